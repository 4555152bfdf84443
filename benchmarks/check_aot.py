"""Is everything done in place on a GPU? Asked of the compiler, with no GPU at hand.

Each program is compiled for an H100 with its cache donated, at the sizes of an 8-billion-parameter
model and a 4 GiB pool, on the `xla` backend and on the `triton` one. (The model itself has all its 32
layers with floats, and the first four with codes; the pool always has 32.) Three answers are read off what
the compiler returns:

  temporaries   What the program needs beside its arguments and results. The pool can be to blame for
                no more, scaled from all but the smallest pool to the whole one. The bar is 2% of the pool.
  copies        Instructions of the optimized HLO that write a new buffer of at least one layer of K.
                The bar is none. (A layer is 1.6% of the pool: the first bar alone would let one pass.)
  aliased       Bytes of the results that reuse donated arguments. The bar is the whole pool.

Where one of the first two bars is missed, the same program is compiled with a pool as small as the page
table allows, everything else the same. What the pool is to blame for is then the difference of the two,
scaled likewise; and the copies that the smaller has not.

And for the Triton kernels: what a layer of a decode step launches.

Programs that are wrong on purpose run first: if the check passes one of them, it checks nothing.

It needs the CUDA plugin of the same version as JAX (`jax-cuda12-plugin` and `jax-cuda12-pjrt`, or
their successors), and neither a driver nor the CUDA libraries.

    python -m benchmarks.check_aot [--self-test] [--only NAME ...]

Exit status: 0, or 1 where a bar is missed, or 2 where the compiler cannot be reached. The last line
of output is one JSON document.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache as once
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

import jaxkv
from benchmarks.hlo import launches, new_buffers
from jaxkv import policies
from jaxkv.models import ModelConfig, abstract_model
from pallas_kernels import use_backend

LLAMA_8B = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    max_context=131072,
)
POOL_BYTES = 4 * 2**30
MAX_SEQS, ROW_PAGES, CHUNK_TOKENS = 64, 128, 512
BAR = 0.02
MIB = 2**20
KERNELS = ("append_kv", "copy_pages", "move_pages", "paged_attention", "attention_mass")
TARGET = Path(__file__).with_name("h100.textproto")


@dataclass(frozen=True)
class Program:
    """A function of a cache and other arguments, which takes the cache first and returns it first."""

    name: str
    run: Callable
    arguments: Callable[[], tuple]
    donated: bool = True
    backend: str = "xla"
    quantization: str | None = None
    policy: policies.Policy | None = None


@dataclass(frozen=True)
class Verdict:
    """What the compiler says of one program; sizes in bytes. `of_the_pool` may be less."""

    program: str
    compile_seconds: float
    temporary: int
    of_the_pool: int
    aliased: int
    pool: int
    copies: dict[str, int]

    @property
    def ok(self) -> bool:
        """Whether every bar holds."""
        return self.of_the_pool <= BAR * self.pool and self.aliased >= self.pool and not self.copies


def decode(cache, model, seqs, tokens):
    """One token of each sequence: make room, run the model."""
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
    logits, cache = model(tokens, cache, batch)
    return cache, logits, batch.status


def prefill(cache, model, seqs, num_tokens, tokens):
    """A chunk of one prompt; logits of its last token only."""
    cache, batch = jaxkv.allocate(cache, seqs, num_tokens, total_tokens=tokens.shape[0])
    logits, cache = model(tokens, cache, batch, rows=batch.query_starts[1:] - 1)
    return cache, logits, batch.status


def generate_tidily(cache, seqs, k, q):
    """A compiled loop of steps that compact when that is due."""

    def step(_, carry):
        cache, q = carry
        return append_and_attend(jaxkv.maybe_compact(cache), seqs, k, q, layers=2)

    return jax.lax.fori_loop(0, 100, step, (cache, q))


def allocate_evicting(cache, seqs):
    """What a decode loop does before the model runs: a policy evicts, and pages are given out."""
    return jax.lax.fori_loop(
        0, 100, lambda _, cache: jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))[0], cache
    )


def append_and_attend(cache, seqs, k, q, *, layers: int):
    """A decode step with nothing but the cache in it."""
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
    for layer in range(layers):
        cache = jaxkv.append(cache, layer, batch, k, k)
        q = jaxkv.attend(cache, layer, batch, q)
    return cache, q


def attend_with_mass(cache, seqs, k, q):
    """A decode step of two layers that also says what attention each place received."""
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
    masses = []
    for layer in range(2):
        cache = jaxkv.append(cache, layer, batch, k, k)
        out, lse = jaxkv.attend(cache, layer, batch, q, return_lse=True)
        masses.append(jaxkv.attention_mass(cache, layer, batch, q, lse))
        q = jaxkv.after(out, masses[-1])
    return cache, q, jnp.stack(masses)


def compact_by_cond(cache):
    """Wrong on purpose: each branch of a `cond` has a pool of its own."""
    return jax.lax.cond(jaxkv.should_compact(cache), lambda c: jaxkv.compact(c)[0], lambda c: c, cache)


def layer_sliced_out(cache, seqs, k):
    """Wrong on purpose: each layer leaves the pool, is written to, and is put back."""
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
    for layer in range(cache.config.num_layers):
        own = jax.lax.optimization_barrier(cache.pool.k[layer])
        own = own.at[batch.page_ids, :, batch.offsets].set(k.astype(own.dtype), mode="drop")
        cache = replace(cache, pool=replace(cache.pool, k=cache.pool.k.at[layer].set(own)))
    return cache


def pool_through_scan(cache, seqs, k):
    """Wrong on purpose: the pool as inputs and outputs of a scan over layers."""
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))

    def write(_, own):
        new, _ = cache.config.storage.encode(k, keys=True)
        return None, own.at[batch.page_ids, :, batch.offsets].set(new, mode="drop")

    _, pages = jax.lax.scan(write, None, cache.pool.k)
    return replace(cache, pool=replace(cache.pool, k=pages))


def programs() -> list[Program]:
    """What is held to the bars."""
    seqs, one = _int32(MAX_SEQS), _int32(1)
    triton = [
        Program("triton: decode step", decode, lambda: (_model(32), seqs, seqs), backend="triton"),
        Program(
            "triton: prefill chunk",
            prefill,
            lambda: (_model(32), one, one, _int32(CHUNK_TOKENS)),
            backend="triton",
        ),
        Program(
            "triton: append and attend, 1 layer",
            partial(append_and_attend, layers=1),
            lambda: (seqs, *_step()),
            backend="triton",
        ),
        Program("triton: allocate, copy-on-write", jaxkv.allocate, lambda: (seqs, seqs), backend="triton"),
        Program("triton: compact", jaxkv.compact, lambda: (), backend="triton"),
        Program("triton: maybe_compact", jaxkv.maybe_compact, lambda: (), backend="triton"),
        Program(
            "triton: loop with maybe_compact", generate_tidily, lambda: (seqs, *_step()), backend="triton"
        ),
    ]
    codes = [
        Program(
            f"{backend}: append and attend, {quantization}",
            partial(append_and_attend, layers=2),
            lambda: (seqs, *_step()),
            backend=backend,
            quantization=quantization,
        )
        for backend in ("xla", "triton")
        for quantization in ("int8", "fp8", "int4")
    ]
    codes += [
        Program(
            f"{backend}: prefill chunk, {quantization}",
            prefill,
            lambda: (_model(4), one, one, _int32(CHUNK_TOKENS)),
            backend=backend,
            quantization=quantization,
        )
        for backend in ("xla", "triton")
        for quantization in ("int8", "int4")
    ]
    codes += [
        Program(
            f"triton: {name}, {quantization}",
            run,
            lambda a=a: a,
            backend="triton",
            quantization=quantization,
        )
        for quantization in ("int8", "int4")
        for name, run, a in (
            ("allocate", jaxkv.allocate, (seqs, seqs)),
            ("compact", jaxkv.compact, ()),
            ("maybe_compact", jaxkv.maybe_compact, ()),
        )
    ]
    masses = [
        Program(
            f"{backend}: decode step with mass", attend_with_mass, lambda: (seqs, *_step()), backend=backend
        )
        for backend in ("xla", "triton")
    ]
    return [
        Program("decode step, 64 sequences", decode, lambda: (_model(32), seqs, seqs)),
        Program(
            "prefill chunk, 512 tokens",
            prefill,
            lambda: (_model(32), one, one, _int32(CHUNK_TOKENS)),
        ),
        Program("allocate, with copy-on-write", jaxkv.allocate, lambda: (seqs, seqs)),
        Program("fork", jaxkv.fork, lambda: (seqs, seqs)),
        Program("reorder", jaxkv.reorder, lambda: (seqs, seqs)),
        Program("free", jaxkv.free, lambda: (seqs,)),
        Program("truncate", jaxkv.truncate, lambda: (seqs, seqs)),
        Program("compact", jaxkv.compact, lambda: ()),
        Program("maybe_compact", jaxkv.maybe_compact, lambda: ()),
        Program("loop with maybe_compact", generate_tidily, lambda: (seqs, *_step())),
        *triton,
        *codes,
        *masses,
        *evictions(),
    ]


def evictions() -> list[Program]:
    """Each kind of policy, and keys that move to other positions, for floats and for codes."""
    seqs, rope = _int32(MAX_SEQS), jaxkv.Rope.of(LLAMA_8B.head_dim, LLAMA_8B.rope_theta)
    kinds = {
        "sliding window": policies.SlidingWindow(1024, 4, positions="cache", rope=rope),
        "heavy hitter": policies.HeavyHitter(1024, 512),
        "heavy hitter, numbered anew": policies.HeavyHitter(1024, 512, positions="cache", rope=rope),
        "semantic merge": policies.SemanticMerge(1024, 512),
    }
    chosen = [(name, "triton", None) for name in kinds] + [("heavy hitter", "xla", None)]
    chosen += [(name, "triton", "int8") for name in ("sliding window", "heavy hitter")]
    return [
        Program(
            f"{backend}: evict, {name}{', int8' if quantization else ''}",
            allocate_evicting,
            lambda: (seqs,),
            backend=backend,
            quantization=quantization,
            policy=kinds[name],
        )
        for name, backend, quantization in chosen
    ]


def wrong_programs() -> list[Program]:
    """What the check must not pass."""
    seqs = _int32(MAX_SEQS)
    k = jax.ShapeDtypeStruct((MAX_SEQS, LLAMA_8B.num_kv_heads, LLAMA_8B.head_dim), jnp.bfloat16)
    return [
        Program("a layer sliced out and put back", layer_sliced_out, lambda: (seqs, k)),
        Program("a layer of codes sliced out", layer_sliced_out, lambda: (seqs, k), quantization="int8"),
        Program("the pool through a scan", pool_through_scan, lambda: (seqs, k)),
        Program("compact inside a cond", compact_by_cond, lambda: ()),
        Program("nothing donated", jaxkv.allocate, lambda: (seqs, seqs), donated=False),
    ]


def check(program: Program) -> Verdict:
    """Compiles a program with the whole pool and, where that alone does not clear it, with a small one."""
    start = time.perf_counter()
    whole, small = (_cache(size, program.quantization, program.policy) for size in (POOL_BYTES, 0))
    memory, hlo = _compile(program, whole)
    pool, small_pool = _bytes(whole.pool), _bytes(small.pool)
    layer_of_k = _bytes(whole.pool.k) // whole.config.num_layers
    more, copies = memory.temp_size_in_bytes, Counter(new_buffers(hlo, layer_of_k))
    if more * pool > BAR * pool * (pool - small_pool) or copies:
        small_memory, small_hlo = _compile(program, small)
        more = max(0, more - small_memory.temp_size_in_bytes)
        copies -= Counter(new_buffers(small_hlo, layer_of_k))
    return Verdict(
        program=program.name,
        compile_seconds=time.perf_counter() - start,
        temporary=memory.temp_size_in_bytes,
        of_the_pool=more * pool // (pool - small_pool),
        aliased=memory.alias_size_in_bytes,
        pool=pool,
        copies=dict(copies),
    )


def table(verdicts: list[Verdict], *, wanted: bool) -> str:
    """The verdicts, a line each; `wanted` is the outcome that is good."""
    header = f"{'program':34}{'compile s':>10}{'temp MiB':>10}{'of the pool<=':>14}{'bar MiB':>9}"
    lines = [f"{header}{'aliased MiB':>13}{'copies':>8}  verdict"]
    for v in verdicts:
        word = {True: "ok", False: "MISSED"}[v.ok] if wanted else {True: "PASSED", False: "caught"}[v.ok]
        lines.append(
            f"{v.program:34}{v.compile_seconds:10.1f}{v.temporary / MIB:10.2f}{v.of_the_pool / MIB:14.2f}"
            f"{BAR * v.pool / MIB:9.1f}{v.aliased / MIB:13.1f}{sum(v.copies.values()):8d}  {word}"
        )
        lines += [f"    {times} x {copy}" for copy, times in v.copies.items()]
    return "\n".join(lines)


def launches_a_layer() -> Counter[str]:
    """What append and attention of one more layer add to a decode step, on the `triton` backend."""
    counts = []
    for layers in (2, 3):
        run = partial(append_and_attend, layers=layers)
        program = Program("", run, lambda: (_int32(MAX_SEQS), *_step()), backend="triton")
        _, hlo = _compile(program, _cache(0))
        counts.append(Counter(launches(hlo)))
    return counts[1] - counts[0]


def _step() -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """K (or V) and q of one token of each sequence."""
    q_heads, kv_heads, head_dim = LLAMA_8B.num_q_heads, LLAMA_8B.num_kv_heads, LLAMA_8B.head_dim
    return (
        jax.ShapeDtypeStruct((MAX_SEQS, kv_heads, head_dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((MAX_SEQS, q_heads, head_dim), jnp.bfloat16),
    )


def _int32(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), jnp.int32)


@once
def _model(layers: int):
    """All layers, or the first few: the cache has them all, and compiling takes a fraction of the time."""
    return abstract_model(replace(LLAMA_8B, num_layers=layers), jnp.bfloat16)


def _cache(
    pool_bytes: int, quantization: str | None = None, policy: policies.Policy | None = None
) -> jaxkv.KVCache:
    """Shapes of a cache with a pool of about so many bytes, and no smaller than one row."""
    sizes = LLAMA_8B.cache_config(
        num_pages=ROW_PAGES, max_seqs=MAX_SEQS, dtype="bfloat16", quantization=quantization
    )
    pages = max(ROW_PAGES, pool_bytes // sizes.page_bytes)
    return jax.eval_shape(lambda: jaxkv.init(replace(sizes, num_pages=pages), policy))


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@once
def _mesh() -> jax.sharding.Mesh:
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=TARGET.read_text()
    )
    return jax.sharding.Mesh(np.array(topology.devices), ("x",))


def _compile(program: Program, cache) -> tuple[Any, str]:
    """The compiler's account of the program's memory, and its optimized HLO."""
    on_gpu = jax.sharding.NamedSharding(_mesh(), jax.sharding.PartitionSpec())
    donated = 0 if program.donated else ()
    with jax.sharding.use_abstract_mesh(_mesh().abstract_mesh), use_backend(program.backend):
        jitted = jax.jit(program.run, donate_argnums=donated, in_shardings=on_gpu, out_shardings=on_gpu)
        compiled = jitted.lower(cache, *program.arguments()).compile()
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    if memory is None or hlo is None:
        raise RuntimeError(f"the compiler says nothing of {program.name}")
    # Anywhere: a loop's body is a computation of its own.
    if (program.backend == "triton") != any(f'name = "{kernel}"' in hlo for kernel in KERNELS):
        raise RuntimeError(f"{program.name} was not compiled for the {program.backend} backend")
    return memory, hlo


def _check_named(name: str) -> Verdict:
    print(f"compiling: {name}", file=sys.stderr, flush=True)
    (program,) = (program for program in wrong_programs() + programs() if program.name == name)
    try:
        return check(program)
    except Exception as error:
        error.add_note(f"while {name} was compiled")
        raise


def _check_all(chosen: list[Program], compilers: Executor, *, wanted: bool) -> list[Verdict]:
    # By name: what a program is made of does not travel to another process.
    verdicts = list(compilers.map(_check_named, [program.name for program in chosen]))
    print(table(verdicts, wanted=wanted), flush=True)
    return verdicts


def main(arguments: list[str] | None = None) -> int:
    """Runs the check; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compiled for an H100: is everything done in place?")
    parser.add_argument("--self-test", action="store_true", help="only the programs that must be caught")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="some programs")
    options = parser.parse_args(arguments)
    try:
        _mesh()
    except Exception as error:
        print(
            f"check_aot: no CUDA compiler ({error}); install jax-cuda12-plugin and jax-cuda12-pjrt "
            f"{jax.__version__} beside JAX",
            file=sys.stderr,
        )
        return 2
    chosen = [p for p in programs() if not options.only or any(name in p.name for name in options.only)]
    if not chosen:
        parser.error(f"no program is called {options.only}")
    print(f"JAX {jax.__version__}, compiled for {_mesh().devices[0].device_kind}\n\nmust be caught")
    held, launched = [], Counter()
    # A compiler keeps one core busy, and takes 2 GiB.
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), 8), get_context("spawn")) as compilers:
        wrong = _check_all(wrong_programs(), compilers, wanted=False)
        if not options.self_test:
            print(f"\nmust hold: bar {BAR:.0%} of a {POOL_BYTES / 2**30:g} GiB pool")
            held = _check_all(chosen, compilers, wanted=True)
    if held:
        launched = launches_a_layer()
        print("\na layer of a decode step launches, on the triton backend:")
        print("\n".join(f"    {times} x {name}" for name, times in launched.items()))
    passed = all(v.ok for v in held) and not any(v.ok for v in wrong)
    document = {
        "benchmark": "check_aot",
        "jax": jax.__version__,
        "target": _mesh().devices[0].device_kind,
        "bar": BAR,
        "programs": [asdict(v) | {"ok": v.ok} for v in held],
        "launches_a_layer": dict(launched),
        "self_test": [asdict(v) | {"caught": not v.ok} for v in wrong],
        "passed": passed,
    }
    print(json.dumps(document))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
