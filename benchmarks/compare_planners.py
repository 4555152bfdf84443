"""Bytes of K and V by four planners: ours, and `vllm-wizard`, `hf-mem` and `kvfit` from PyPI.

    python -m benchmarks.compare_planners

Each model of `configs/models` with 8,192 tokens of one sequence in bfloat16, exact. The truth is written down
here, apart from our own code. The peers fetch their configs from a hub; their own functions are given ours. A
row is missed where a planner is off by more than 1%, or fails. `hf-mem` means to count what engines reserve,
so it may say the figure without windows too; `vllm-wizard` adds 15% to everything, and is told not to.

Exit status: 1 where we miss a row. The last line of output is one JSON document.
"""

import importlib.metadata
import json
from collections.abc import Callable

from benchmarks.publishing import publish
from jaxkv import catalog
from jaxkv.planner import ModelShape, kv_cache_bytes

CONTEXT, MIB = 8192, 2**20

# MiB, exact and without windows: layers x tokens kept x numbers a token x 2 bytes.
TRUTH = {
    "deepseek-v2-lite": (243, 243),
    "deepseek-v3": (549, 549),
    "gemma-2-9b": (2016, 2688),
    "gemma-3-1b": (43, 208),
    "gpt-oss-20b": (195, 384),
    "llama-2-13b": (6400, 6400),
    "llama-2-70b": (2560, 2560),
    "llama-2-7b": (4096, 4096),
    "llama-3.1-70b": (2560, 2560),
    "llama-3.1-8b": (1024, 1024),
    "mistral-7b-v0.1": (512, 1024),
    "mistral-7b-v0.3": (1024, 1024),
    "qwen2-0.5b": (96, 96),
    "qwen2.5-14b": (1536, 1536),
    "smollm2-135m": (180, 180),
    "tinyllama-1.1b": (176, 176),
}


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
    """`kvfit`."""
    from kvfit.architectures import estimate_cache  # pyright: ignore[reportMissingImports]

    return estimate_cache(config, context_tokens=CONTEXT, kv_bytes=2.0).total_bytes


PLANNERS: dict[str, Callable[[dict], float]] = {
    "jaxkv": ours,
    "vllm-wizard": vllm_wizard,
    "hf-mem": hf_mem,
    "kvfit": kvfit,
}


def row(name: str) -> dict[str, tuple[str, bool]]:
    """What each planner says of a model, and whether that is right."""
    config = json.loads(catalog.find("models", name).read_text())
    exact, reserved = TRUTH[name]
    said = {}
    for planner, count in PLANNERS.items():
        allowed = (exact, reserved) if planner == "hf-mem" else (exact,)
        try:
            found = count(config) / MIB
        except Exception as error:  # Whatever a peer trips over, it has no answer.
            if planner == "jaxkv":
                raise
            said[planner] = f"{type(error).__name__}", False
        else:
            said[planner] = f"{found:,.0f}", any(abs(found - right) <= 0.01 * right for right in allowed)
    return said


def main() -> int:
    """Prints the table; returns the exit status."""
    versions = {name: importlib.metadata.version(name) for name in PLANNERS}
    print(f"K and V of {CONTEXT:,} tokens in bfloat16, MiB; * is a miss")
    print(f"{'model':<18}{'exact':>8}{'no cap':>8}" + "".join(f"{name:>14}" for name in PLANNERS))
    rows = {name: row(name) for name in catalog.names("models")}
    for name, said in rows.items():
        exact, reserved = TRUTH[name]
        cells = "".join(f"{text + ('' if right else ' *'):>14}" for text, right in said.values())
        print(f"{name:<18}{exact:>8,}{reserved:>8,}{cells}")
    misses = {planner: [name for name, said in rows.items() if not said[planner][1]] for planner in PLANNERS}
    for planner, missed in misses.items():
        listed = ", ".join(missed) or "none"
        print(f"{planner} {versions[planner]} misses {len(missed)} of {len(rows)}: {listed}")
    publish("planners", {"context": CONTEXT, "versions": versions, "misses": misses}, keep=False)
    return 1 if misses["jaxkv"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
