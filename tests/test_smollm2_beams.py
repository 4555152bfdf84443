"""SmolLM2's likeliest texts: beam search on the paged cache finds what one on a dense cache finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.models import dense_cache, load
from tests.plain_beams import Text, by_hand

pytestmark = pytest.mark.slow

WIDTH, NEW_TOKENS = 4, 32
TEXTS = (
    "The capital of France is",
    "Once upon a time, there was a small",
)


class DenseLogProbs:
    """Of the token after each of `WIDTH` texts or of one; each text is one of the last call and a token."""

    def __init__(self, loaded, prompt: list[int]):
        self.cache = dense_cache.init(loaded.config, WIDTH, len(prompt) + NEW_TOKENS)
        self.texts: list[Text] = [()] * WIDTH

        @jax.jit
        def step(cache, parents, tokens):
            logits, cache = dense_cache.decode_step(
                loaded.model, jax.tree.map(lambda x: x[parents], cache), tokens
            )
            return jax.nn.log_softmax(logits), cache

        self.step = step
        for length in range(1, len(prompt)):
            self([tuple(prompt[:length])])

    def __call__(self, texts: list[Text]) -> np.ndarray:
        whole = [*texts, *texts[:1] * (WIDTH - len(texts))]
        parents = jnp.array([self.texts.index(text[:-1]) for text in whole])
        tokens = jnp.array([text[-1] for text in whole])
        log_probs, self.cache = self.step(self.cache, parents, tokens)
        self.texts = whole
        return np.asarray(log_probs)[: len(texts)]


def test_sequences_and_scores_are_those_of_a_dense_cache():
    loaded = load("smollm2-135m", dtype="float32")
    assert loaded.tokenizer is not None
    prompts = [loaded.tokenizer.encode(text) for text in TEXTS]
    stops = tuple(loaded.tokenizer.stop_tokens)
    result = jaxkv.beam_search(
        loaded.model, prompts, width=WIDTH, max_new_tokens=NEW_TOKENS, stop_tokens=stops
    )
    for number, prompt in enumerate(prompts):
        log_probs = DenseLogProbs(loaded, prompt)
        expected = by_hand(log_probs, prompt, WIDTH, limit=NEW_TOKENS, stops=sorted(stops))
        assert result.tokens[number] == expected.tokens
        np.testing.assert_allclose(result.scores[number], expected.scores, atol=1e-4, rtol=0)
    assert result.search_steps == NEW_TOKENS - 1
    assert result.peak_pages < result.peak_pages_unshared
    jaxkv.check_invariants(result.cache)
    assert not jaxkv.lengths(result.cache).any()
