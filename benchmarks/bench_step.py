"""The decode step as a whole: time a token, where it goes, and whether memory is what was planned.

A model of Llama 3.1 8B's shape with random weights in bfloat16 decodes greedily, one token a sequence, from
pages in random order that are there already. The step is one compiled program: allocate; of 32 layers each
with append and attend; the next token.

  time        Of a token, and of a step; beside it the least time that reading the weights and the context
              once takes at the copy bandwidth of the same run.
  division    Of the device's time into allocate, append, attend and the rest, from a profiler's trace.
              Targets at batch 64: allocate at most 2%, append at most 3%. What the GPU launches as one
              graph may be traced without names: then the step is compiled again without graphs, for the
              trace alone.
  memory      The allocator's peak beside two accounts: the planner's and `memory_profile`'s, each with what
              the compiler says that the step needs besides. Target: within 2%.

Without a GPU it rehearses with a tiny model, and judges nothing. What does not fit the device is named.

    python -m benchmarks.bench_step [--only PART ...]

Exit status: 0, or 1 where a target is missed or could not be judged. The last line of output is one JSON
document, which a GPU's run also leaves under `benchmarks/results/`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

# Before JAX takes its share of the memory: the largest problems need more than its three quarters.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp

import jaxkv
from benchmarks.publishing import publish
from benchmarks.traces import Division, divide, read_trace
from jaxkv import catalog
from jaxkv.memory.device import PeakMemory
from jaxkv.models import Llama, ModelConfig, abstract_model
from jaxkv.planner import Device, ModelShape, Plan, plan
from jaxkv.tune.timing import Sample, conditions, microseconds, of_one_more, stopwatch
from jaxkv.units import format_bytes

HAS_GPU = jax.default_backend() == "gpu"
PAGE_SIZE = 16
# A sequence opens a page every 16 steps: whole rounds of them.
STEPS, TRACED_STEPS, ROUNDS = (32, 16, 7) if HAS_GPU else (16, 16, 2)
JUDGED_BATCH = 64
TARGETS = {"allocate": 0.02, "append": 0.03}
MEMORY_TARGET = 0.02
# More of the device's time without a name than this, and the shares are not worth judging.
MOST_UNNAMED = 0.02
TINY = dict(hidden_size=128, num_hidden_layers=2, intermediate_size=256, vocab_size=512, head_dim=32)
TINY |= dict(num_attention_heads=4, num_key_value_heads=2)
NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}


@dataclass(frozen=True, slots=True)
class Problem:
    """So many sequences that have so many tokens each."""

    batch: int
    context: int

    @property
    def name(self) -> str:
        """`batch 64, context 2048`."""
        return f"batch {self.batch}, context {self.context}"

    @property
    def max_tokens(self) -> int:
        """A sequence's, at the end of a round."""
        return self.context + max(STEPS, TRACED_STEPS)


def problems() -> list[Problem]:
    """Those that need little memory first: an allocator's peak only rises."""
    contexts, batches = ((2048, 16384), (1, 8, 64)) if HAS_GPU else ((64, 128), (1, 4))
    grid = [Problem(batch, context) for batch in batches for context in contexts]
    return sorted(grid, key=lambda problem: problem.batch * problem.max_tokens)


def model_json() -> dict[str, Any]:
    """As Hugging Face would describe the model."""
    raw = json.loads(catalog.find("models", "llama-3.1-8b").read_text())
    return raw if HAS_GPU else raw | TINY


def planned(problem: Problem) -> Plan:
    """What the planner says of it."""
    device = Device("here", _limit() or 2**40)
    return plan(
        ModelShape.from_config(model_json(), name="Llama 3.1 8B's shape"),
        device,
        context=problem.max_tokens,
        concurrency=problem.batch,
        kv_dtype="bfloat16",
        weights_dtype="bfloat16",
        page_size=PAGE_SIZE,
        memory_fraction=1.0,
    )


def _limit() -> int | None:
    """Bytes that may be taken of the device, where it says so."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def step(cache: jaxkv.KVCache, model: Llama, seqs, tokens):
    """One token of each sequence: room for it, the model, the next."""
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
    logits, cache = model(tokens, cache, batch)
    return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), batch.status


def compile_step(problem: Problem, options: Mapping[str, str] | None = None):
    """The step for shapes alone, so that what the compiler tries out takes no memory beside the weights."""
    model = abstract_model(ModelConfig.from_hf(model_json()), jnp.bfloat16)
    cache = jax.eval_shape(partial(jaxkv.init, cache_config(problem)))
    ids = jax.ShapeDtypeStruct((problem.batch,), jnp.int32)
    lowered = jax.jit(step, donate_argnums=0).lower(cache, model, ids, ids)
    return lowered.compile(compiler_options=dict(options) if options else None)


def cache_config(problem: Problem) -> jaxkv.CacheConfig:
    """As the planner would have it made."""
    config = planned(problem).cache_config
    if config is None:
        raise RuntimeError("the planner knows no cache for this model")
    return config


def random_weights(config: ModelConfig) -> Llama:
    """Drawn in bfloat16 at once: in float32 the largest would set the allocator's peak."""

    @partial(jax.jit, static_argnums=1)
    def draw(key, shape):
        return (jax.random.normal(key, shape) * shape[-1] ** -0.5).astype(jnp.bfloat16)

    keys = iter(jax.random.split(jax.random.key(0), 16 * config.num_layers + 16))

    def parameter(name: str, shape: tuple[int, ...]) -> jax.Array:
        return jnp.ones(shape, jnp.float32) if len(shape) == 1 else draw(next(keys), shape)

    return jax.block_until_ready(Llama(config, parameter))


def full_cache(problem: Problem) -> jaxkv.KVCache:
    """Every sequence with its context. Pages are in random order, and hold the same random values."""
    config = cache_config(problem)

    @jax.jit
    def make(key):
        cache = jax.eval_shape(partial(jaxkv.init, config))
        # Made where it is to lie: to fill one that is there would take a second for a moment.
        tile = jax.random.normal(key, (2, *cache.pool.k.shape[2:])).astype(cache.pool.k.dtype)
        k, v = (jnp.broadcast_to(one, cache.pool.k.shape) for one in tile)
        empty = jaxkv.init(config)
        order = jax.random.permutation(key, config.num_pages).astype(jnp.int32)
        table = replace(empty.table, free_pages=order)
        return replace(empty, table=table, pool=replace(empty.pool, k=k, v=v))

    seqs = jnp.arange(problem.batch, dtype=jnp.int32)
    lengths = jnp.full_like(seqs, problem.context)
    grow = jax.jit(jaxkv.allocate, donate_argnums=0, static_argnames="total_tokens")
    cache, batch = grow(make(jax.random.key(1)), seqs, lengths, total_tokens=problem.batch * problem.context)
    jaxkv.raise_for_status(batch)
    return jax.block_until_ready(cache)


class Runner:
    """Decodes so many steps from the same context again and again."""

    def __init__(self, problem: Problem, model: Llama):
        self.problem, self.model = problem, model
        self.seqs = jnp.arange(problem.batch, dtype=jnp.int32)
        self.lengths = jnp.full_like(self.seqs, problem.context)
        self.tokens = self.seqs
        self.cache = full_cache(problem)
        self.rewind = jax.jit(jaxkv.truncate, donate_argnums=0)

    def run(self, compiled: Callable, steps: int) -> float:
        """Seconds of one step, of as many."""
        self.cache, _ = jax.block_until_ready(self.rewind(self.cache, self.seqs, self.lengths))

        def decode():
            cache, tokens, status = self.cache, self.tokens, None
            for _ in range(steps):
                cache, tokens, status = compiled(cache, self.model, self.seqs, tokens)
            return cache, tokens, status

        seconds, (self.cache, self.tokens, status) = stopwatch(decode)
        if status is not None and status.any():
            raise RuntimeError(f"{self.problem.name}: a sequence was refused: {status.tolist()}")
        return seconds / steps

    def trace(self, compiled: Any) -> Division:
        """Where a step's device time goes."""
        self.run(compiled, 2)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                self.run(compiled, TRACED_STEPS)
            return divide(read_trace(folder), compiled.as_text())


def measure(problem: Problem, model: Llama, compiled: Any, bandwidth: float) -> dict[str, Any]:
    """Times, traces and weighs one problem; prints it."""
    with PeakMemory() as memory:
        runner = Runner(problem, model)
        runner.run(compiled, STEPS)
        memory.sample()
    accounts = account(problem, runner, compiled)
    sample = Sample(tuple(runner.run(compiled, STEPS) for _ in range(ROUNDS)))
    division, graphs = runner.trace(compiled), True
    if HAS_GPU and division.unnamed_share > MOST_UNNAMED:
        division, graphs = runner.trace(compile_step(problem, NO_GRAPHS)), False
    lengths = jax.device_get(runner.cache.table.lengths)
    if set(lengths.tolist()) != {problem.context + TRACED_STEPS}:
        raise RuntimeError(f"{problem.name}: sequences have {lengths.tolist()} tokens after {TRACED_STEPS}")
    seen = (problem.context + STEPS / 2) / problem.max_tokens
    per_step = round(planned(problem).kv.exact * seen) + _bytes(model) - _bytes(model.embedding)
    result = {
        "problem": problem.name,
        "step_seconds": sample.as_json(),
        "tokens_per_second": float(f"{problem.batch / sample.median:.4g}"),
        "bytes_read": per_step,
        "seconds_at_copy_bandwidth": float(f"{per_step / bandwidth:.4g}"),
        **judge_division(problem, division, graphs, sample.median),
        **judge_memory(memory, accounts),
    }
    result["met"] = result["division_met"] and result["memory_met"]
    print(_lines(result, sample), flush=True)
    return result


def judge_division(problem: Problem, division: Division, graphs: bool, step_seconds: float) -> dict[str, Any]:
    """Shares of the device's time, and whether the targets are met; they are for the largest batch."""
    shares = {part: division.share(part) for part in ("attend", "append", "allocate", "compiler", "rest")}
    total = division.total
    judged = HAS_GPU and problem.batch == JUDGED_BATCH
    named = division.unnamed_share <= MOST_UNNAMED
    # Copies that the compiler put in have no scope; those of tables go with allocate, so all count there.
    weighed = {**shares, "allocate": shares["allocate"] + shares["compiler"]}
    held = named and all(weighed[part] <= target for part, target in TARGETS.items())
    return {
        "shares": {part: float(f"{share:.3g}") for part, share in shares.items()},
        "unnamed_share": float(f"{division.unnamed_share:.3g}"),
        "mixed_share": float(f"{division.mixed / total if total else 0:.3g}"),
        "device_seconds": float(f"{total / TRACED_STEPS:.4g}"),
        "idle_share": float(f"{max(0.0, 1 - total / TRACED_STEPS / step_seconds):.3g}"),
        "traced_with_graphs": graphs,
        "targets": TARGETS if judged else {},
        "division_met": held or not judged,
    }


def account(problem: Problem, runner: Runner, compiled: Any) -> dict[str, int]:
    """What should have been taken at most, by the planner and by `memory_profile`.

    Both with what the compiler says that the step needs besides its arguments.
    """
    needs = compiled.memory_analysis()
    besides = needs.temp_size_in_bytes + needs.output_size_in_bytes - needs.alias_size_in_bytes
    asked, profile = planned(problem), jax.jit(jaxkv.memory_profile)(runner.cache)
    return {
        "planner": asked.weights + asked.kv.reserved + asked.tables + besides,
        "memory_profile": _bytes(runner.model) + profile.total_bytes + besides,
    }


def judge_memory(memory: PeakMemory, accounts: Mapping[str, int]) -> dict[str, Any]:
    """The peak over each account. A peak that did not rise is an earlier one's, and judges nothing."""
    ratios = {name: memory.peak / expected for name, expected in accounts.items()}
    held = memory.is_exact and all(abs(memory.peak - n) <= MEMORY_TARGET * n for n in accounts.values())
    return {
        "peak_bytes": memory.peak,
        "peak_is_exact": memory.is_exact,
        "expected_bytes": dict(accounts),
        "peak_to_expected": {name: float(f"{ratio:.4f}") for name, ratio in ratios.items()},
        "memory_met": held or not HAS_GPU,
    }


def _lines(result: Mapping[str, Any], sample: Sample) -> str:
    ratio = sample.median / result["seconds_at_copy_bandwidth"]
    shares = ", ".join(f"{part} {share:.1%}" for part, share in result["shares"].items())
    targets = ", ".join(f"{part} {target:.0%}" for part, target in result["targets"].items())
    verdict = f"; targets {targets}: {'met' if result['division_met'] else 'MISSED'}" if targets else ""
    besides = ", ".join(f"{ratio:.3f} of the {name}'s" for name, ratio in result["peak_to_expected"].items())
    exact = "" if result["peak_is_exact"] else " at least"
    memory = "" if not HAS_GPU else f": {'met' if result['memory_met'] else 'MISSED'}"
    return (
        f"\n{result['problem']}\n"
        f"  a step    {microseconds(sample)} us, {result['tokens_per_second']:,.0f} tokens/s, "
        f"{ratio:.2f} times the reading of {format_bytes(result['bytes_read'])}\n"
        f"  division  {shares}, unnamed {result['unnamed_share']:.1%}, mixed {result['mixed_share']:.1%}; "
        f"idle {result['idle_share']:.1%} of the step{verdict}\n"
        f"  memory   {exact} {format_bytes(result['peak_bytes'])}, {besides}, "
        f"target {MEMORY_TARGET:.0%}{memory}"
    )


def copy_bandwidth() -> float:
    """Bytes a second that a device copy reads and writes together."""
    source = jnp.ones(2**28 if HAS_GPU else 2**22, jnp.bfloat16)

    @partial(jax.jit, static_argnums=0)
    def copy(calls, x):
        for _ in range(calls):
            x = jax.lax.optimization_barrier(x + jnp.bfloat16(1))
        return x

    def seconds(calls: int) -> float:
        copy(calls, source)
        return min(stopwatch(copy, calls, source)[0] for _ in range(10))

    return 2 * source.nbytes / of_one_more(seconds, few=1, many=5)


def too_large(problem: Problem) -> str | None:
    """Why it is not run, if it cannot be."""
    asked, limit = planned(problem), _limit()
    needed = asked.weights + asked.kv.reserved + asked.tables
    # A prefill's activations are not wanted here; half a GiB for the step's.
    if limit is None or needed + 2**29 <= limit:
        return None
    return f"it needs {format_bytes(needed)} of the {format_bytes(limit)} that may be taken"


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main() -> int:
    """Runs all of it; returns the exit status."""
    parser = argparse.ArgumentParser(description="The decode step as a whole: time, division, memory.")
    parser.add_argument("--only", nargs="+", metavar="PART", help="of the problems' names")
    options = parser.parse_args()
    start, now = time.perf_counter(), conditions()
    print(f"on {jax.devices()[0].device_kind}, JAX {now['jax']}")
    if not HAS_GPU:
        print("There is no GPU here: a rehearsal with a tiny model, which says nothing of one.")
    chosen = [p for p in problems() if not options.only or any(part in p.name for part in options.only)]
    absent = {problem.name: reason for problem in chosen if (reason := too_large(problem))}
    for name, reason in absent.items():
        print(f"{name}: not run: {reason}")
    compiled = {}
    for problem in chosen:
        if problem.name not in absent:
            compiled[problem] = compile_step(problem)
            print(f"{time.perf_counter() - start:6.0f} s  compiled: {problem.name}", flush=True)
    bandwidth = copy_bandwidth()
    model = random_weights(ModelConfig.from_hf(model_json()))
    results = []
    for problem, program in compiled.items():
        results.append(measure(problem, model, program, bandwidth))
        print(f"{time.perf_counter() - start:6.0f} s  done", flush=True)
    publish(
        "step",
        {"on_gpu": HAS_GPU, "copy_bandwidth": bandwidth, "results": results, "not_run": absent},
        keep=HAS_GPU and options.only is None,
    )
    missed = [result["problem"] for result in results if not result["met"]]
    for name in missed:
        print(f"missed: {name}", file=sys.stderr)
    return 1 if missed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
