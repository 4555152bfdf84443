"""The programs that must run in place: every operation, with floats and codes, on both backends."""

from functools import partial

import jax
import jax.numpy as jnp

import jaxkv
from jaxkv import policies
from tests.compiled.in_place.program import LLAMA_8B, MAX_SEQS, Program, int32, model, one_token

CHUNK_TOKENS = 512
SEQS, ONE = int32(MAX_SEQS), int32(1)


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


def append_and_attend(cache, seqs, k, q, *, layers: int):
    """A decode step with nothing but the cache in it."""
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
    for layer in range(layers):
        cache = jaxkv.append(cache, layer, batch, k, k)
        q = jaxkv.attend(cache, layer, batch, q)
    return cache, q


def attend_with_mass(cache, seqs, k, q):
    """A decode step of two layers that also returns the attention that each token slot received."""
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
    masses = []
    for layer in range(2):
        cache = jaxkv.append(cache, layer, batch, k, k)
        out, lse = jaxkv.attend(cache, layer, batch, q, return_lse=True)
        masses.append(jaxkv.attention_mass(cache, layer, batch, q, lse))
        q = jaxkv.after(out, masses[-1])
    return cache, q, jnp.stack(masses)


def generate_and_compact(cache, seqs, k, q):
    """A compiled loop of steps that compact when that is due."""

    def step(_, carry):
        cache, q = carry
        return append_and_attend(jaxkv.maybe_compact(cache), seqs, k, q, layers=2)

    return jax.lax.fori_loop(0, 100, step, (cache, q))


def allocate_and_evict(cache, seqs):
    """What a decode loop does before the model runs: a policy evicts, and pages are given out."""
    return jax.lax.fori_loop(
        0, 100, lambda _, cache: jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))[0], cache
    )


def programs() -> list[Program]:
    """All of them."""
    return [*_floats(), *_codes(), *_masses(), *_evictions()]


def _floats() -> list[Program]:
    xla = [
        Program("decode step, 64 sequences", decode, lambda: (model(32), SEQS, SEQS)),
        Program("prefill chunk, 512 tokens", prefill, lambda: (model(32), ONE, ONE, int32(CHUNK_TOKENS))),
        Program("allocate, with copy-on-write", jaxkv.allocate, lambda: (SEQS, SEQS)),
        Program("fork", jaxkv.fork, lambda: (SEQS, SEQS)),
        Program("reorder", jaxkv.reorder, lambda: (SEQS, SEQS)),
        Program("free", jaxkv.free, lambda: (SEQS,)),
        Program("truncate", jaxkv.truncate, lambda: (SEQS, SEQS)),
        Program("compact", jaxkv.compact, lambda: ()),
        Program("maybe_compact", jaxkv.maybe_compact, lambda: ()),
        Program("loop with maybe_compact", generate_and_compact, lambda: (SEQS, *one_token())),
    ]
    one_layer = partial(append_and_attend, layers=1)
    triton = [
        ("decode step", decode, lambda: (model(32), SEQS, SEQS)),
        ("prefill chunk", prefill, lambda: (model(32), ONE, ONE, int32(CHUNK_TOKENS))),
        ("append and attend, 1 layer", one_layer, lambda: (SEQS, *one_token())),
        ("allocate, copy-on-write", jaxkv.allocate, lambda: (SEQS, SEQS)),
        ("compact", jaxkv.compact, lambda: ()),
        ("maybe_compact", jaxkv.maybe_compact, lambda: ()),
        ("loop with maybe_compact", generate_and_compact, lambda: (SEQS, *one_token())),
    ]
    return xla + [
        Program(f"triton: {name}", run, arguments, backend="triton") for name, run, arguments in triton
    ]


def _codes() -> list[Program]:
    step = partial(append_and_attend, layers=2), lambda: (SEQS, *one_token())
    chunk = prefill, lambda: (model(4), ONE, ONE, int32(CHUNK_TOKENS))
    rows = [
        (backend, "append and attend", *step, quantization)
        for backend in ("xla", "triton")
        for quantization in ("int8", "fp8", "int4")
    ]
    rows += [
        (backend, "prefill chunk", *chunk, quantization)
        for backend in ("xla", "triton")
        for quantization in ("int8", "int4")
    ]
    for quantization in ("int8", "int4"):
        rows += [
            ("triton", "allocate", jaxkv.allocate, lambda: (SEQS, SEQS), quantization),
            ("triton", "compact", jaxkv.compact, lambda: (), quantization),
            ("triton", "maybe_compact", jaxkv.maybe_compact, lambda: (), quantization),
        ]
    return [
        Program(
            f"{backend}: {name}, {quantization}", run, arguments, backend=backend, quantization=quantization
        )
        for backend, name, run, arguments, quantization in rows
    ]


def _masses() -> list[Program]:
    return [
        Program(
            f"{backend}: decode step with mass",
            attend_with_mass,
            lambda: (SEQS, *one_token()),
            backend=backend,
        )
        for backend in ("xla", "triton")
    ]


def _evictions() -> list[Program]:
    """Each kind of policy, and keys that move to other positions, for floats and for codes."""
    rope = jaxkv.Rope.of(LLAMA_8B.head_dim, LLAMA_8B.rope_theta)
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
            allocate_and_evict,
            lambda: (SEQS,),
            backend=backend,
            quantization=quantization,
            policy=kinds[name],
        )
        for name, backend, quantization in chosen
    ]
