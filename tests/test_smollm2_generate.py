"""SmolLM2's own text: the paged cache writes, token for token, what a dense cache writes.

`make test` has the demo instead (`test_cli.py`), which holds SmolLM2's logits to dense attention.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.decode import decode, prefill, start
from jaxkv.models import dense_cache, load
from jaxkv.sampling import GREEDY
from pallas_kernels import use_backend

pytestmark = pytest.mark.slow

NEW_TOKENS = 64
SYSTEM = "You are a friendly assistant. Answer in plain English, in one or two short sentences, please."
QUESTIONS = (
    "Hi!",
    "What is the capital of France?",
    "Name the planets of our solar system in order.",
    "Why do leaves change their colour in autumn, and why do some trees keep theirs all winter long?",
    "Count from one to five.",
    "Write a line about the sea.",
    "What is two plus two?",
    "Explain to a child of six how a letter gets from one town to another.",
)
CONFIG = dict(num_pages=160, page_size=16, max_seqs=9, max_pages_per_seq=16, dtype="float32")


@pytest.fixture(scope="module")
def smollm2():
    return load("smollm2-135m")


@pytest.fixture(scope="module")
def prompts(smollm2):
    messages = [[dict(role="system", content=SYSTEM), dict(role="user", content=text)] for text in QUESTIONS]
    prompts = [smollm2.tokenizer.encode_chat(message) for message in messages]
    assert len({len(prompt) for prompt in prompts}) > 4
    return prompts


@pytest.fixture(scope="module")
def expected(smollm2, prompts):
    """Greedy continuations by the dense cache: prompts fed token by token, then its own choices."""
    lengths = jnp.array([len(prompt) for prompt in prompts])
    steps = int(lengths.max()) + NEW_TOKENS
    given = np.zeros((len(prompts), steps + 1), np.int32)
    for row, prompt in zip(given, prompts, strict=True):
        row[: len(prompt)] = prompt

    @jax.jit
    def run(model, tokens):
        def step(i, carry):
            cache, tokens = carry
            logits, cache = dense_cache.decode_step(model, cache, tokens[:, i])
            chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            keep = i + 1 < lengths
            return cache, tokens.at[:, i + 1].set(jnp.where(keep, tokens[:, i + 1], chosen))

        cache = dense_cache.init(smollm2.config, len(prompts), steps)
        return jax.lax.fori_loop(0, steps, step, (cache, tokens))[1]

    tokens = np.asarray(run(smollm2.model, jnp.asarray(given)))
    return [row[n : n + NEW_TOKENS].tolist() for row, n in zip(tokens, lengths.tolist(), strict=True)]


def texts(result: jaxkv.Generation) -> list[list[int]]:
    return [samples[0] for samples in result.tokens]


@pytest.mark.parametrize("share_prefix", [False, True])
def test_greedy_text_is_that_of_a_dense_cache_forked_and_unforked(smollm2, prompts, expected, share_prefix):
    result = jaxkv.generate(
        smollm2.model,
        smollm2.config.cache_config(**CONFIG),
        prompts,
        max_new_tokens=NEW_TOKENS,
        prefill_chunk=128,
        share_prefix=share_prefix,
    )
    assert texts(result) == expected
    assert (result.peak_pages < result.peak_pages_unshared) == share_prefix


def test_greedy_text_is_that_of_a_dense_cache_before_and_after_compact(smollm2, prompts, expected):
    model = smollm2.model
    cache = jaxkv.init(smollm2.config.cache_config(**CONFIG))
    # Another sequence takes the lowest pages, and leaves them when the others are half way.
    cache, batch = jaxkv.allocate(cache, jnp.array([8]), jnp.array([200]), total_tokens=200)
    jaxkv.raise_for_status(batch)
    chunk = jax.jit(prefill, donate_argnames="cache")
    last = [None] * len(prompts)
    for slot, prompt in enumerate(prompts):
        seqs = jnp.where(jnp.arange(8) == slot, jnp.arange(8), -1)
        tokens = jnp.zeros(128, jnp.int32).at[: len(prompt)].set(jnp.array(prompt))
        logits, cache, status = chunk(model, cache, seqs, jnp.where(seqs >= 0, len(prompt), 0), tokens)
        jaxkv.raise_for_status(status)
        last[slot] = logits[slot]
    begin = jax.jit(partial(start, max_new_tokens=NEW_TOKENS, sampling=GREEDY), donate_argnums=0)
    state = begin(cache, jnp.arange(8), jnp.stack(last), jax.random.key(0))
    run = jax.jit(partial(decode, sampling=GREEDY), donate_argnums=1)
    state = run(model, state, NEW_TOKENS // 2)
    cache, num_moved = jax.jit(jaxkv.compact, donate_argnums=0)(jaxkv.free(state.cache, jnp.array([8])))
    jaxkv.check_invariants(cache)
    assert int(num_moved) > 20
    state = run(model, replace(state, cache=cache), NEW_TOKENS)
    assert state.output.tolist() == expected


def test_greedy_text_by_the_interpreted_gpu_kernels_is_that_of_a_dense_cache(smollm2):
    prompt, length = smollm2.tokenizer.encode("The capital of France is"), 10
    seqs = jnp.zeros(1, jnp.int32)

    def paged_step(model, cache, token):
        cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
        logits, cache = model(token, cache, batch)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    def dense_step(model, cache, token):
        logits, cache = dense_cache.decode_step(model, cache, token)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    def greedy(step, cache):
        step = jax.jit(step, donate_argnums=1)
        tokens = list(prompt)
        for place in range(length):
            chosen, cache = step(smollm2.model, cache, jnp.array(tokens[place : place + 1]))
            if place + 1 >= len(prompt):
                tokens.append(int(chosen[0]))
        return smollm2.tokenizer.decode(tokens)

    config = smollm2.config.cache_config(num_pages=3, page_size=8, max_seqs=1, dtype="float32")
    with use_backend("triton", interpret=True):
        written = greedy(paged_step, jaxkv.init(config))
    assert written == greedy(dense_step, dense_cache.init(smollm2.config, 1, length))
    assert "Paris" in written
