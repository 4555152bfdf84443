"""Bytes of K and V by four planners: ours, and `vllm-wizard`, `hf-mem` and `kvfit` from PyPI.

    python -m benchmarks.compare_planners

Each of 53 published configs with 8,192 tokens of one sequence in 16 bits, exact: windows applied, states of
fixed size not counted. The truth is `tests/fixtures/planner/cases.json`, apart from our own code. The peers
fetch their configs from a hub; their own functions are given ours. A planner is right within 1%, wrong beyond
it, and has refused where it raised an error. `hf-mem` means to count what engines reserve, so it may say the
figure without windows too, by our planner; `vllm-wizard` adds 15% to everything, and is told not to.

Exit status: 1 where we are wrong or refuse. The last line of output is one JSON document.
"""

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.publishing import publish
from jaxkv.planner import ModelShape, kv_cache_bytes

CONTEXT, MIB = 8192, 2**20
CASES = Path(__file__).parents[1] / "tests/fixtures/planner/cases.json"
VERDICTS = ("right", "wrong", "refused")


def ours(config: dict) -> float:
    """`jaxkv.planner`."""
    return kv_cache_bytes(ModelShape.from_config(config), CONTEXT, kv_dtype="bf16").exact


def vllm_wizard(config: dict) -> float:
    """`vllm-wizard`, without its factor of 1.15."""
    from vllm_wizard.models.metadata import _parse_config  # pyright: ignore[reportMissingImports]
    from vllm_wizard.planning.memory import compute_kv_cache_memory  # pyright: ignore[reportMissingImports]
    from vllm_wizard.schemas.inputs import DType  # pyright: ignore[reportMissingImports]

    metadata = _parse_config(config, "a model")
    return compute_kv_cache_memory(metadata, CONTEXT, 1, dtype=DType.BF16, fragmentation_factor=1.0)


def hf_mem(config: dict) -> float:
    """`hf-mem`."""
    from hf_mem.safetensors.kv_cache import (  # pyright: ignore[reportMissingImports]
        compute_safetensors_kv_cache_size,
    )

    return compute_safetensors_kv_cache_size(config, "BF16", CONTEXT)


def kvfit(config: dict) -> float:
    """`kvfit`, without states of fixed size."""
    from kvfit.architectures import estimate_cache  # pyright: ignore[reportMissingImports]

    parts = estimate_cache(config, context_tokens=CONTEXT, kv_bytes=2.0).components
    # States of fixed size are parts of their own.
    return sum(part.bytes for part in parts if not part.name.endswith(("state", "history")))


PLANNERS: dict[str, Callable[[dict], float]] = {
    "jaxkv": ours,
    "vllm-wizard": vllm_wizard,
    "hf-mem": hf_mem,
    "kvfit": kvfit,
}


def row(case: dict) -> dict[str, tuple[str, str]]:
    """What each planner says of a model, and whether that is right, wrong or refused."""
    config, exact = case["config"], case["kv_bytes_8192"]
    shape = ModelShape.from_config(config)
    whole = shape.elements_per_token * CONTEXT * len(shape.windows) * 2
    said = {}
    for planner, count in PLANNERS.items():
        allowed = (exact, whole) if planner == "hf-mem" else (exact,)
        try:
            found = count(config)
        except Exception as error:  # Whatever a peer trips over, it has no answer.
            said[planner] = f"{type(error).__name__}"[:13], "refused"
        else:
            right = any(abs(found - answer) <= 0.01 * answer for answer in allowed)
            said[planner] = f"{found / MIB:,.0f}", "right" if right else "wrong"
    return said


def largest_error(cases: dict[str, dict]) -> tuple[float, str]:
    """Our largest relative error of parameters where they are published, and of which model."""
    counted = ((ModelShape.from_config(case["config"]), case.get("params"), n) for n, case in cases.items())
    return max((abs(shape.num_parameters / params - 1), name) for shape, params, name in counted if params)


def main() -> int:
    """Prints the table; returns the exit status."""
    versions = {name: importlib.metadata.version(name) for name in PLANNERS}
    cases = json.loads(CASES.read_text())
    print(f"K and V of {CONTEXT:,} tokens in 16 bits, MiB; * is wrong")
    print(f"{'model':<42}{'exact':>8}" + "".join(f"{name:>14}" for name in PLANNERS))
    rows = {name: row(case) for name, case in cases.items()}
    for name, said in rows.items():
        cells = "".join(
            f"{text + (' *' if verdict == 'wrong' else ''):>14}" for text, verdict in said.values()
        )
        print(f"{name[:41]:<42}{cases[name]['kv_bytes_8192'] / MIB:>8,.0f}{cells}")
    counts = {
        planner: {verdict: sum(said[planner][1] == verdict for said in rows.values()) for verdict in VERDICTS}
        for planner in PLANNERS
    }
    for planner, of in counts.items():
        print(
            f"{planner} {versions[planner]}: " + ", ".join(f"{of[verdict]} {verdict}" for verdict in VERDICTS)
        )
    error, worst = largest_error(cases)
    print(f"parameters: largest error {error:.2%} ({worst})")
    result = {"context": CONTEXT, "versions": versions, "counts": counts, "largest_parameter_error": error}
    publish("planners", result, keep=False)
    return 0 if counts["jaxkv"]["right"] == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
