"""Beam search on the paged cache: prefill of the prompts, then one compiled loop."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.arguments import integer, real
from jaxkv.beam_loop import Beams, EarlyStopping, search, start
from jaxkv.beginnings import begin_in_pairs
from jaxkv.causal_lm import CausalLM
from jaxkv.config import CacheConfig
from jaxkv.decode import Finish
from jaxkv.generating import PREFILL_CHUNK, plan_prompts
from jaxkv.initial import init
from jaxkv.prompting import run_prompts, vocabulary
from jaxkv.request import Request, check_model
from jaxkv.sampling import GREEDY
from jaxkv.sizing import fitting_config
from jaxkv.state import KVCache
from jaxkv.turns import Turn, check_cache

_Prompts: TypeAlias = Sequence[Sequence[int]]
_Cache: TypeAlias = CacheConfig | KVCache

# `beam_search` made the cache or documents that it consumes it, so these may donate it.
_start = jax.jit(start, static_argnames="max_new_tokens", donate_argnames="cache")
_search = jax.jit(search, donate_argnames="state")


@dataclass(frozen=True, slots=True)
class BeamSearch:
    """What `beam_search` returns, on the host.

    Attributes:
      tokens: `tokens[prompt]` are its sequences, at most `width`, best first: lists of new token ids, a stop
        token included. One without a stop token at its end was cut short by what `finish` says.
      scores: `scores[prompt][rank]` is the sum of the sequence's log-probabilities, in nats, divided by
        `length ** length_penalty`.
      finish: why the search of each prompt ended. STOP: no beam could still be among the best. LENGTH: the
        sequences reached `max_new_tokens` or filled their rows. OUT_OF_PAGES: no page was free for the next
        token.
      cache: the cache at the end; the slots of all beams are empty.
      peak_pages: most pages in use at once since the cache was made.
      peak_pages_unshared: most pages the same sequences would have used at once without sharing.
      prefill_tokens, prefill_seconds: tokens computed before the first new one, and the time.
      found_tokens: tokens of the prompts that the cache held already (`match_prefix`), and were not computed.
      search_steps, search_seconds: of the loop. With `warm_up` no time includes compilation.
    """

    tokens: list[list[list[int]]]
    scores: list[list[float]]
    finish: list[Finish]
    cache: KVCache
    peak_pages: int
    peak_pages_unshared: int
    prefill_tokens: int
    prefill_seconds: float
    found_tokens: int
    search_steps: int
    search_seconds: float


def beam_search(
    model: CausalLM,
    prompts: _Prompts | _Cache,
    config: CacheConfig | KVCache | _Prompts | None = None,
    *,
    cache: KVCache | None = None,
    width: int = 4,
    max_new_tokens: int | Sequence[int] = 128,
    stop_tokens: Iterable[int] = (),
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    prefill_chunk: int = PREFILL_CHUNK,
    warm_up: bool = False,
) -> BeamSearch:
    """Finds likely continuations of a ragged batch of prompts by beam search.

    The beams of a prompt share its pages, and what they have in common after it; each step lets every beam
    continue the one that it was chosen from (`reorder`). Beams are chosen on the device, in one compiled
    loop, and all pages are released at the end.

    The method is that of `generate(num_beams=width)` in Hugging Face's transformers. A step considers the
    continuations of all beams with the largest sums of log-probabilities: `2 * width`, or with n > 1 stop
    tokens `(1 + n) * width`. Those among the first `width` that end with a stop token join the pool, which
    keeps the `width` sequences with the best scores; the first `width` others are the next beams. At
    `max_new_tokens` the first `width` all join the pool. A continuation that ends holds no pages.

    Log-probabilities and sums are float32. Ties go to the better beam, then to the lower token id; in the
    pool to the older sequence. A token whose log-probability is -inf or NaN is never chosen; so a prompt may
    have fewer sequences than `width`. With a `width` of 1 the result is that of greedy `generate`, unless
    `early_stopping` is "never".

    A prompt that lacks free pages waits for other prompts to end. If all wait, the last of them ends with
    `Finish.OUT_OF_PAGES`: its beams, complete up to there, join the pool.

    Args:
      model: a pytree with the call signature of `CausalLM`.
      prompts: token ids of each prompt. The order `beam_search(model, cache, prompts)` is accepted too, and
        `beam_search(model, config, prompts)`.
      config: sizes of the cache that is made and returned, with `width` slots for each prompt. Default: from
        the model's `cache_config`, with room for every beam at its longest.
      cache: instead of a config, a cache whose empty slots are used; other sequences stay as they are. It is
        consumed, even by a call that fails while it runs: its arrays are donated, and may not be used again.
        `jax.tree.map(jnp.copy, cache)` keeps a copy.
      width: beams of each prompt, and sequences that are returned.
      max_new_tokens: most new tokens, for all prompts or for each, at least 1.
      stop_tokens: ids that end a sequence.
      length_penalty: exponent of the length in scores. 0 compares sums; larger values favour long sequences.
        It may change without compiling again.
      early_stopping: when the search of a prompt ends, once its pool is full. False, the default here and in
        transformers: when the best beam, scored at its present length, does not exceed the worst of the
        pool. "never": when it could not at any length either, so exact for this pool. True: at once.
      prefill_chunk: most tokens per prefill step.
      warm_up: compile before timing starts.

    Returns:
      A `BeamSearch`.

    Raises:
      ValueError: for bad arguments, with the values; for too few empty slots, a cache with an eviction
        policy, or a model whose results do not match `CausalLM`.
      SequenceTooLongError, OutOfPagesError: for prompts that do not fit, before anything is computed.

    Example:
      >>> import jax, jax.numpy as jnp, jaxkv
      >>> @jax.tree_util.register_static
      ... class Table:
      ...     "One layer, without attention: probabilities of the next token by the newest one."
      ...     def __call__(self, tokens, cache, batch, *, rows=None):
      ...         zeros = jnp.zeros((tokens.shape[0], 1, 8))
      ...         cache = jaxkv.append(cache, 0, batch, zeros, zeros)
      ...         last = tokens if rows is None else tokens[rows]
      ...         return jnp.log(jnp.array([[0, 0.6, 0.4], [0.3, 0.4, 0.3], [0, 0.1, 0.9]]))[last], cache
      ...     def cache_config(self, **sizes):
      ...         return jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, **sizes)
      >>> result = jaxkv.beam_search(Table(), [[0]], width=2, max_new_tokens=2, length_penalty=0)
      >>> result.tokens[0], [round(score, 2) for score in result.scores[0]]
      ([[2, 2], [1, 1]], [-1.02, -1.43])
      >>> bool(result.cache.table.num_free == result.cache.config.num_pages)
      True
    """
    if isinstance(prompts, (CacheConfig, KVCache)):
        prompts, config = config, prompts  # type: ignore[assignment]
    if isinstance(config, KVCache):
        config, cache = None, config
    penalty, ending = _checked(length_penalty, early_stopping)
    counts = dict(num_samples=integer("width", width), prefill_chunk=prefill_chunk, block=1)
    request = Request.of(prompts, max_new_tokens, GREEDY, stop_tokens, **counts)  # type: ignore[arg-type]
    if min(request.limits) < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r:.200} must be at least 1 for each prompt")
    check_model(model, None)
    turn, slots = _turn(model, request, config, cache)
    plan = plan_prompts(turn, None, True, False)
    new = partial(init, turn.config)
    vocab = vocabulary(model, jax.eval_shape(new) if turn.cache is None else turn.cache, plan)
    request.check_vocabulary(vocab, model)
    done = run_prompts(model, new() if turn.cache is None else turn.cache, plan, warm_up)
    state = _start(
        done.cache,
        jnp.asarray(slots),
        done.logits,
        jnp.asarray(request.limits, jnp.int32),
        max_new_tokens=max(request.limits),
        stop_tokens=jnp.asarray(request.stop_tokens, jnp.int32),
        length_penalty=jnp.asarray(penalty, jnp.float32),
        early_stopping=jnp.asarray(ending, jnp.int32),
    )
    if warm_up:
        state = jax.block_until_ready(_search(model, state, jnp.asarray(0, jnp.int32)))
    began = time.perf_counter()
    state = jax.block_until_ready(_search(model, state, jnp.asarray(np.iinfo(np.int32).max, jnp.int32)))
    return BeamSearch(
        *_sequences(state),
        finish=[Finish(int(reason)) for reason in np.asarray(state.finish)],
        cache=state.cache,
        peak_pages=int(state.cache.stats.peak_pages),
        peak_pages_unshared=int(state.peak_unshared),
        prefill_tokens=done.num_computed,
        prefill_seconds=done.seconds,
        found_tokens=done.num_found,
        search_steps=int(state.step),
        search_seconds=time.perf_counter() - began,
    )


def _checked(length_penalty: object, early_stopping: object) -> tuple[float, EarlyStopping]:
    number = real(length_penalty)
    if number is None or not abs(number) < float("inf"):
        raise ValueError(f"length_penalty={length_penalty!r} must be a finite number")
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise ValueError(f'early_stopping={early_stopping!r} must be False, True or "never"')
    return number, EarlyStopping.NEVER if early_stopping == "never" else EarlyStopping(early_stopping)


def _turn(
    model: CausalLM, request: Request, config: object, cache: KVCache | None
) -> tuple[Turn, np.ndarray]:
    """The prompts in the first slot of each, and the slots of all beams, `[prompts, width]`."""
    if config is not None and not isinstance(config, CacheConfig):
        raise ValueError(f"config={config!r:.200} must be a jaxkv.CacheConfig")
    prompts, width = len(request.prompts), request.num_samples
    if cache is not None:
        check_cache(cache, config)
        if cache.policy is not None:
            raise ValueError(
                f"the cache has the policy {cache.policy.rule}; beam_search compares beams by all their "
                "tokens, so it needs a cache without one"
            )
        config, empty = cache.config, np.flatnonzero(np.asarray(cache.table.positions) == 0)
    else:
        if config is None:
            lengths = [len(prompt) for prompt in request.prompts]
            options = width, None, request.prefill_chunk
            pairs = begin_in_pairs(request.prompts)
            config = fitting_config(model, lengths, request.limits, *options, prefix_cache=pairs)
        empty = np.arange(config.max_seqs)
    if prompts * width > len(empty):
        raise ValueError(
            f"{prompts} prompts x {width} beams need {prompts * width} slots; {len(empty)} of the cache's "
            f"max_seqs={config.max_seqs} are empty"
        )
    slots = empty[: prompts * width].astype(np.int32).reshape(prompts, width)
    return Turn(request, config, cache, slots[:, :1], {}), slots


def _sequences(state: Beams) -> tuple[list[list[list[int]]], list[list[float]]]:
    """Tokens and scores of each prompt's pool."""
    scores = [[score for score in row if score > -np.inf] for row in np.asarray(state.pool_scores).tolist()]
    tokens = [
        [[token for token in text if token >= 0] for text, _ in zip(texts, row, strict=False)]
        for texts, row in zip(np.asarray(state.pool_tokens).tolist(), scores, strict=True)
    ]
    return tokens, scores
