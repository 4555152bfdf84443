"""The programs that must run in place: every operation, with floats and codes, on both backends."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

import jaxkv
from jaxkv import policies, serving
from tests.compiled.in_place.program import (
    GEMMA_3_27B,
    GEMMA_4_26B,
    LLAMA,
    LLAMA_8B,
    MAX_SEQS,
    Program,
    hidden,
    int32,
    model,
    one_token,
)

CHUNK_TOKENS = 512
BLOCK = 6  # layers from one with full attention to the next
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


def serve(cache, seqs, tokens, num_tokens):
    """What a server does around the model, for requests that come and go."""
    cache, num_matched = jaxkv.match_prefix(cache, seqs, tokens, num_tokens)
    cache, batch = jaxkv.allocate(cache, seqs, jnp.minimum(num_tokens - num_matched, 1))
    cache = jaxkv.record_prefix(cache, seqs, tokens, num_tokens)
    return jaxkv.free(cache, seqs), batch.status


def serving_loop(cache, model, server, until):
    """The whole loop of a server: schedule, model, sampling."""
    config = replace(server.config, cache=cache.config)
    state = serving.run(model, replace(server, cache=cache, config=config), until)
    return state.cache, replace(state, cache=None)


def one_layer(cache, batch, x, layer, like: int):
    """Append and attend in a layer, which may be traced, of the same kind as layer `like`."""
    kind = cache.config.groups[cache.config.homes[like].group]
    q = x.reshape(x.shape[0], -1, kind.head_dim)
    k = q[:, : kind.num_kv_heads]
    cache = jaxkv.append(cache, layer, batch, k, k)
    return cache, jaxkv.attend(cache, layer, batch, q, window=kind.window).reshape(x.shape)


def unrolled(cache, seqs, num_tokens, x):
    """A step of layers of several kinds with nothing but the cache in it: a program for each layer."""
    cache, batch = jaxkv.allocate(cache, seqs, num_tokens, total_tokens=x.shape[0])
    for layer in range(cache.config.num_layers):
        cache, x = one_layer(cache, batch, x, layer, layer)
    return cache, x


def by_blocks(cache, seqs, num_tokens, x):
    """The same as a loop over blocks of layers, and what is left over."""
    cache, batch = jaxkv.allocate(cache, seqs, num_tokens, total_tokens=x.shape[0])
    blocks = cache.config.num_layers // BLOCK

    def block(nth, carry):
        cache, x = carry
        for layer in range(BLOCK):
            cache, x = one_layer(cache, batch, x, BLOCK * nth + layer, layer)
        return cache, x

    cache, x = jax.lax.fori_loop(0, blocks, block, (cache, x))
    for layer in range(BLOCK * blocks, cache.config.num_layers):
        cache, x = one_layer(cache, batch, x, layer, layer)
    return cache, x


def programs() -> list[Program]:
    """All of them."""
    return [*_floats(), *_codes(), *_masses(), *_evictions(), *_kinds(), *_prefixes(), *_serving()]


def _floats() -> list[Program]:
    # XLA takes minutes for all layers of its attention; the kernels' programs have them all.
    xla = [
        Program("decode step, 64 sequences", decode, lambda: (model(8), SEQS, SEQS)),
        Program("prefill chunk, 512 tokens", prefill, lambda: (model(8), ONE, ONE, int32(CHUNK_TOKENS))),
        Program("allocate, with copy-on-write", jaxkv.allocate, lambda: (SEQS, SEQS)),
        Program("fork", jaxkv.fork, lambda: (SEQS, SEQS)),
        Program("reorder", jaxkv.reorder, lambda: (SEQS, SEQS)),
        Program("free", jaxkv.free, lambda: (SEQS,)),
        Program("truncate", jaxkv.truncate, lambda: (SEQS, SEQS)),
        Program("compact", jaxkv.compact, lambda: ()),
        Program("maybe_compact", jaxkv.maybe_compact, lambda: ()),
        Program("loop with maybe_compact", generate_and_compact, lambda: (SEQS, *one_token())),
    ]
    step_of_one = partial(append_and_attend, layers=1)
    triton = [
        ("decode step", decode, lambda: (model(32), SEQS, SEQS)),
        ("prefill chunk", prefill, lambda: (model(32), ONE, ONE, int32(CHUNK_TOKENS))),
        ("append and attend, 1 layer", step_of_one, lambda: (SEQS, *one_token())),
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
    chunk = prefill, lambda: (model(2), ONE, ONE, int32(CHUNK_TOKENS))
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


def _kinds() -> list[Program]:
    """Layers with and without a window, of one shape and of two, for floats and for codes."""
    rows = []
    for name, sizes in (("Gemma 3", GEMMA_3_27B), ("Gemma 4", GEMMA_4_26B)):
        step, chunk = partial(_tokens, SEQS, sizes, MAX_SEQS), partial(_tokens, ONE, sizes, CHUNK_TOKENS)
        rows += [
            ("xla", f"{name}, decode step", by_blocks, step, sizes, None),
            ("xla", f"{name}, prefill chunk", by_blocks, chunk, sizes, None),
            ("xla", f"{name}, allocate", jaxkv.allocate, lambda: (SEQS, SEQS), sizes, None),
            ("xla", f"{name}, fork", jaxkv.fork, lambda: (SEQS, SEQS), sizes, None),
            ("xla", f"{name}, free", jaxkv.free, lambda: (SEQS,), sizes, None),
            ("xla", f"{name}, truncate", jaxkv.truncate, lambda: (SEQS, SEQS), sizes, None),
            ("xla", f"{name}, compact", jaxkv.compact, lambda: (), sizes, None),
            ("triton", f"{name}, decode step", by_blocks, step, sizes, None),
            ("triton", f"{name}, prefill chunk", by_blocks, chunk, sizes, None),
            ("triton", f"{name}, allocate", jaxkv.allocate, lambda: (SEQS, SEQS), sizes, None),
            ("triton", f"{name}, compact", jaxkv.compact, lambda: (), sizes, None),
        ]
    step = partial(_tokens, SEQS, GEMMA_4_26B, MAX_SEQS)
    rows += [
        ("triton", "Gemma 4, unrolled", unrolled, step, GEMMA_4_26B, None),
        ("triton", "Gemma 4, decode, int8", by_blocks, step, GEMMA_4_26B, "int8"),
        ("triton", "Gemma 4, compact, int8", jaxkv.compact, lambda: (), GEMMA_4_26B, "int8"),
    ]
    return [
        Program(f"{backend}: {name}", run, arguments, backend=backend, quantization=quantization, sizes=sizes)
        for backend, name, run, arguments, sizes, quantization in rows
    ]


def _prefixes() -> list[Program]:
    """Prompts that are looked up and recorded, pages that are reclaimed: of one kind of layers and of two."""
    one, two = (replace(sizes, prefix_cache=True) for sizes in (LLAMA, GEMMA_4_26B))
    rows = [
        ("xla", "match_prefix", jaxkv.match_prefix, _prompts, one),
        ("xla", "record_prefix", jaxkv.record_prefix, _prompts, one),
        ("xla", "allocate, with prefixes", jaxkv.allocate, lambda: (SEQS, SEQS), one),
        ("xla", "free, with prefixes", jaxkv.free, lambda: (SEQS,), one),
        ("xla", "compact, with prefixes", jaxkv.compact, lambda: (), one),
        ("triton", "serve a step, with prefixes", serve, _prompts, one),
        ("xla", "Gemma 4, match_prefix", jaxkv.match_prefix, _prompts, two),
        ("xla", "Gemma 4, record_prefix", jaxkv.record_prefix, _prompts, two),
        ("triton", "Gemma 4, serve a step, with prefixes", serve, _prompts, two),
    ]
    return [
        Program(f"{backend}: {name}", run, arguments, backend=backend, sizes=sizes)
        for backend, name, run, arguments, sizes in rows
    ]


def _serving() -> list[Program]:
    """The compiled loop of a server, at two widths, with all that it can have."""
    sizes = replace(LLAMA, prefix_cache=True)
    arguments = partial(_server, sizes, serving.PromptLookup())
    name = "triton: serving loop, with prefixes and proposals"
    return [Program(name, serving_loop, arguments, backend="triton", sizes=sizes)]


def _server(sizes, speculate) -> tuple:
    config = serving.ServingConfig(
        sizes, max_requests=256, max_tokens=2048, token_budget=CHUNK_TOKENS, speculate=speculate
    )
    state = jax.eval_shape(partial(serving.init, config))
    return model(2), replace(state, cache=None), jax.ShapeDtypeStruct((), jnp.int32)


def _prompts() -> tuple:
    return SEQS, jax.ShapeDtypeStruct((MAX_SEQS, 2048), jnp.int32), SEQS


def _tokens(seqs, sizes, tokens: int) -> tuple:
    return seqs, seqs, hidden(sizes, tokens)
