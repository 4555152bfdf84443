"""What `bench_attention` must reach, by problem and baseline."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from jaxkv.tune.implementation import HAS_GPU
from jaxkv.tune.problems import Problem

OURS, PLAIN = "jaxkv", "jaxkv, sharing nothing"
FASTEST = "FlashAttention-3", "FlashInfer"
VLLM = "vLLM's Triton kernel"
EINSUMS = "dense einsum", "dense einsum, K transposed"
MEGABYTE = 1e6
# Times the tokens of bfloat16 that codes of one byte must serve.
CODED_TARGET = 1.7
# Targets against these are not missed where they are not installed or not made for a GPU or a shape; but see
# `lacks_judgement`.
MAY_BE_ABSENT = *FASTEST, VLLM


def targets_of(problem: Problem) -> dict[str, float]:
    """How many times as fast as each baseline we must be."""
    even = len(set(problem.lengths)) == 1
    if not HAS_GPU:
        if problem.heads != (32, 8, 128) or problem.kind != "decode" or problem.stored != "float32":
            return {PLAIN: 1.0} if problem.kind == "shared prefix" else {}
        if max(problem.lengths) * len(problem.lengths) < 8 * 4096:
            return {}
        einsum = 0.6 if even else 1.2
        return {"jax.nn.dot_product_attention": 3.0 if even else 6.0, **dict.fromkeys(EINSUMS, einsum)}
    if problem.cost.bytes_accessed < 256 * MEGABYTE and problem.kind == "decode":
        return {}
    if problem.kind == "prefill":
        return {"cuDNN, contiguous": 0.6}
    if problem.kind == "shared prefix":
        return {PLAIN: 5.0} if (len(problem.lengths), problem.shared) == (32, 8192) else {}
    targets = {"copy bandwidth": 0.85, VLLM: 1.0}
    if problem.stored != problem.dtype:  # the others take no codes
        return targets
    return {**targets, "JAX's paged attention": 1.0, **dict.fromkeys(FASTEST, 0.95)}


def lacks_judgement(targets: Collection[str], timed: Collection[str], excused: Collection[str]) -> bool:
    """Whether a target was not judged that had to be. Baselines in `excused` may be absent, but one of the
    fastest must have run."""
    unjudged = set(targets) - set(timed)
    return bool(unjudged - set(excused)) or unjudged >= set(FASTEST)


def coded_targets(timed: Iterable[Problem], results: Iterable[Mapping]) -> list[dict]:
    """How many times the tokens of bfloat16 we serve from codes: each decode of codes beside its twin."""
    seconds = {
        result["problem"]: row["seconds"]["median"]
        for result in results
        for row in result.get("rows", ())
        if row["name"] == OURS
    }
    rows = []
    for problem in timed:
        twin = replace(problem, stored=problem.dtype)
        judged = HAS_GPU and problem.kind == "decode" and twin.cost.bytes_accessed >= 256 * MEGABYTE
        # What gave a wrong result is missed already.
        if judged and twin != problem and {problem.name, twin.name} <= set(seconds):
            rows.append(_coded_target(problem.name, seconds[twin.name] / seconds[problem.name]))
    return rows


def _coded_target(name: str, ratio: float) -> dict:
    name, met = f"{name}, beside bfloat16", ratio >= CODED_TARGET
    print(f"\n{name}: {ratio:.3g}x the tokens, target {CODED_TARGET} {'met' if met else 'MISSED'}")
    return {"problem": name, "ratio": float(f"{ratio:.4g}"), "target": CODED_TARGET, "met": met}
