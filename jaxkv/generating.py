"""Text generation on the paged cache: prefill of the prompts, then one compiled decode loop."""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from jaxkv.beginnings import begin_in_pairs, beginnings
from jaxkv.causal_lm import CausalLM
from jaxkv.config import CacheConfig
from jaxkv.decode import Decoding, Finish, decode, end, start
from jaxkv.fitting import check_fit
from jaxkv.generation import Generation as Generation
from jaxkv.generation import generation_of
from jaxkv.initial import init
from jaxkv.packing import common_pages
from jaxkv.policies import Policy
from jaxkv.prefix_sizes import block_tokens
from jaxkv.prompting import Prefilled, Prompts, run_prompts, vocabulary
from jaxkv.queueing import generate_in_turns, must_take_turns
from jaxkv.request import Request, check_key, check_model, check_policy
from jaxkv.sampling import GREEDY, Sampling, SamplingBatch
from jaxkv.sizing import fitting_config
from jaxkv.state import KVCache
from jaxkv.turns import Turn, new_turn, next_turn, with_policy

PREFILL_CHUNK = 256  # tokens per prefill step

_Prompts: TypeAlias = Sequence[Sequence[int]]
_OnTokens: TypeAlias = Callable[[Decoding], Sequence[bool] | np.ndarray | None]

# `generate` made the cache or documents that it consumes it, so these may donate it.
_start = jax.jit(
    start,
    static_argnames=("max_new_tokens", "stop_tokens", "keep_logits", "keep"),
    donate_argnames="cache",
)
_decode = jax.jit(decode, static_argnames="stop_tokens", donate_argnames="state")
_end = jax.jit(end, donate_argnames="state")


def generate(
    model: CausalLM,
    prompts: _Prompts | CacheConfig,
    config: CacheConfig | _Prompts | None = None,
    *,
    cache: KVCache | Generation | None = None,
    seqs: Sequence[int] | None = None,
    keep: bool = False,
    max_new_tokens: int | Sequence[int] = 128,
    num_samples: int = 1,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stop_tokens: Iterable[int] = (),
    key: PRNGKeyArray | None = None,
    share_prefix: bool = True,
    prefill_chunk: int = PREFILL_CHUNK,
    block: int = 16,
    keep_logits: bool = False,
    warm_up: bool = False,
    on_tokens: _OnTokens | None = None,
    policy: Policy | None = None,
) -> Generation:
    """Generates text for a ragged batch of prompts.

    Whole pages that all prompts begin with are prefilled once and shared by `fork`; the samples of a prompt
    share its pages likewise. With `CacheConfig(prefix_cache=True)` so is whatever any two prompts begin with,
    or a prompt and an earlier text of the cache; texts are recorded when their sequences end. Decoding is one
    compiled loop; control returns to the host between blocks.

    More sequences than a new cache has slots or, at their longest, pages for take turns, as requests of a
    server do (`jaxkv.serving`): one that finds too few pages waits and is computed again. Seeds are then
    drawn from `key` for each prompt. With `keep`, `keep_logits` or `on_tokens` none waits: too few slots are
    a `ValueError`, and of sequences that find no page the last ends; with a policy it does so too.

    For several turns, `keep=True` leaves sequences in the cache when they end, and the next call continues:

        first = generate(model, prompts, config, keep=True)
        second = generate(model, replies, cache=first, keep=True)

    Positions are not checked against the context that a model was trained on: bound them by `max_new_tokens`,
    or by a policy with `positions="cache"`.

    The newest token of a sequence is not in the cache yet. A `Generation` given as `cache` holds it, and the
    call puts it before the slot's next prompt. So two turns give the result of one prompt of all their
    tokens, and only new tokens are computed.

    Args:
      model: a pytree with the call signature of `CausalLM`.
      prompts: token ids of each prompt. The order `generate(model, config, prompts)` is accepted too.
      config: sizes of the cache that `generate` makes and returns. Default: from the model's `cache_config`,
        with room for every sequence at its longest, but none for a further turn; with `prefix_cache` if
        some prompts begin alike, but not all.
      cache: instead of a config, a cache to continue with: what an earlier call returned, or a `KVCache`.
        It is consumed, even by a call that fails while it runs: its arrays are donated, and may not be used
        again. `jax.tree.map(jnp.copy, cache)` keeps a copy.
      seqs: with `cache`, the slot that each prompt is appended to, empty or not. Default: 0, 1, 2 ... for a
        `KVCache`, the slots of a `Generation` in its order. Further samples go to empty slots.
      keep: keep sequences and their pages in the cache, including those that end for want of a free page.
      max_new_tokens: limit for every sequence, or one per prompt. A sequence that fills its row of the page
        table ends too. A prompt with a limit of 0 is run only with `keep`.
      num_samples: continuations of each prompt.
      sampling: how tokens are chosen, one for all or one per prompt. Default: greedy. The settings of other
        sequences do not change what a sequence draws.
      stop_tokens: ids that end a sequence.
      key: for sampling; use a different one each turn, or turns draw alike. Default: `jax.random.key(0)`.
      share_prefix: whether to share what prompts begin with; with a policy, only what all begin with.
      prefill_chunk: most tokens per prefill step.
      block: decode steps between two calls of `on_tokens`.
      keep_logits: return the logits of every new token.
      warm_up: compile before timing starts.
      on_tokens: called on the host with the state after each block, for streaming. It may return a boolean
        per sequence, `[prompts * num_samples]`: True ends that sequence at once, with `Finish.STOP`.
      policy: evicts tokens of a sequence that exceeds its budget: after each `prefill_chunk` tokens of its
        prompt, or fewer if its row has no room for more beside the budget, and when it has filled a page.
        Prompts may then be longer than a row of the page table. Other sequences of the batch do not change
        the result, as long as there are free pages. Default with `cache`: the cache's policy.

    Returns:
      A `Generation`.

    Raises:
      ValueError: for empty prompts, token ids beyond the model's vocabulary, too many sequences or bad
        options, with the values; for a model whose logits do not have the shape that `CausalLM` states, or
        that leaves a layer of the cache unwritten.
      SequenceTooLongError, OutOfPagesError: for prompts that do not fit, before anything is computed.
    """
    if isinstance(prompts, CacheConfig):
        prompts, config = config, prompts  # type: ignore[assignment]
    check_policy(policy)
    check_key(key)
    counts = dict(num_samples=num_samples, prefill_chunk=prefill_chunk, block=block)
    request = Request.of(prompts, max_new_tokens, sampling, stop_tokens, **counts)  # type: ignore[arg-type]
    watched = keep or keep_logits or on_tokens is not None
    is_new = cache is None and seqs is None and not watched
    if isinstance(config, CacheConfig) and is_new and must_take_turns(request, config, policy, share_prefix):
        options = dict(policy=policy, key=key, share_prefix=share_prefix, warm_up=warm_up)
        return generate_in_turns(model, request, config, **options)  # type: ignore[arg-type]
    turn = _turn(model, request, config, cache, seqs, policy, share_prefix)
    turn = with_policy(turn, policy)
    request, new = turn.request, partial(init, turn.config, policy)
    fresh = jax.eval_shape(new) if turn.cache is None else turn.cache
    rule = None if fresh.policy is None else fresh.policy.rule
    check_model(model, rule)
    plan = plan_prompts(turn, rule, share_prefix, keep)
    vocab = vocabulary(model, fresh, plan)
    request.check_vocabulary(vocab, model)

    cache = new() if turn.cache is None else turn.cache
    done = Prefilled(cache, jnp.zeros((len(request.prompts), vocab), jnp.float32), 0, 0, 0.0)
    if plan.tokens:
        done = run_prompts(model, cache, plan, warm_up)
    limits = np.repeat(np.array(request.limits, np.int32), request.num_samples)
    samplings = SamplingBatch.of([one for one in request.samplings for _ in range(request.num_samples)])
    records = None
    if plan.before:
        records = tuple(jnp.repeat(jnp.asarray(of), request.num_samples, axis=0) for of in plan.rows())
    decoding = _start(
        done.cache,
        jnp.asarray(plan.slots.reshape(-1)),
        jnp.repeat(done.logits, request.num_samples, axis=0),
        jax.random.key(0) if key is None else key,
        max_new_tokens=max(request.limits),
        limits=jnp.asarray(limits),
        sampling=samplings,
        stop_tokens=request.stop_tokens,
        keep_logits=keep_logits,
        keep=bool(keep),
        prompts=records,
    )
    advance = partial(_decode, model, sampling=samplings, stop_tokens=request.stop_tokens)
    decoding, decode_seconds = _run_decode(advance, decoding, request.block, warm_up, on_tokens)
    return generation_of(
        decoding,
        plan.slots,
        turn.pending,
        prefill_tokens=done.num_computed,
        prefill_seconds=done.seconds,
        decode_seconds=decode_seconds,
        found_tokens=done.num_found,
        held={**turn.held, **_held(plan)},
    )


def _held(plan: Prompts) -> dict[int, list[int]]:
    """The tokens that slots hold once the prompts are run, where they are known."""
    return {
        int(slot): [*before, *plan.tokens[number]]
        for number, before in plan.before.items()
        if before is not None
        for slot in plan.slots[number]
    }


def _turn(
    model: CausalLM, request: Request, config: object, cache: object, seqs, policy, share_prefix: bool
) -> Turn:
    """The turn, on the given cache, a new cache of the config, or a new cache sized for the prompts."""
    if config is not None and not isinstance(config, CacheConfig):
        raise ValueError(f"config={config!r:.200} must be a jaxkv.CacheConfig")
    if isinstance(cache, Generation):
        if seqs is None:
            # Sequences that took turns have no slots; nothing of them is left in the cache.
            seqs = [slot for slots in cache.slots for slot in slots if slot >= 0] or None
        return next_turn(request, cache.cache, config, seqs, cache.pending, cache.held)
    if cache is not None:
        return next_turn(request, cache, config, seqs, {})  # type: ignore[arg-type]
    if seqs is not None:
        raise ValueError(f"seqs={seqs!r:.200} names slots of a given cache; give cache= too")
    if config is None:
        lengths = [len(prompt) for prompt in request.prompts]
        options = request.num_samples, policy, request.prefill_chunk
        pairs = share_prefix and policy is None and begin_in_pairs(request.prompts)
        config = fitting_config(model, lengths, request.limits, *options, prefix_cache=pairs)
    return new_turn(request, config)


def plan_prompts(turn: Turn, policy: Policy | None, share_prefix: bool, keep: bool) -> Prompts:
    """The prompts to run; raises for a prompt that is empty or does not fit."""
    request, config = turn.request, turn.config
    for number, prompt in enumerate(request.prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty")
    wanted = {
        number: prompt for number, prompt in enumerate(request.prompts) if keep or request.limits[number]
    }
    shared, slots, largest = 0, turn.slots[:, 0], request.prefill_chunk
    if config.prefix_cache and policy is None:
        before = {number: turn.before(number) for number in wanted}
        looked_up = {n: prompt for n, prompt in wanted.items() if share_prefix and before[n] == []}
        alike = beginnings(looked_up, block_tokens(config))
        # What the cache holds already may make it fewer pages yet.
        found = {number: one.shared for number, one in alike.items()}
        check_fit(config, turn.cache, slots, wanted, 0, policy, largest, found)
        return Prompts(wanted, turn.slots, 0, largest, turn.is_new, before, alike)
    if share_prefix and len(wanted) > 1 and turn.is_new:
        shared = common_pages(list(wanted.values()), config, policy, largest)
    check_fit(config, turn.cache, slots, wanted, shared, policy, largest)
    return Prompts(wanted, turn.slots, shared * config.page_size, largest, turn.is_new)


def _run_decode(advance, state: Decoding, block: int, warm_up: bool, on_tokens: _OnTokens | None):
    if warm_up:
        state = jax.block_until_ready(advance(state, jnp.asarray(0, jnp.int32)))
    began, until = time.perf_counter(), 0
    while True:
        ends = None if on_tokens is None else on_tokens(state)
        if ends is not None:
            state = _end_some(state, ends)
        if not np.any(np.asarray(state.finish) == Finish.RUNNING):
            return state, time.perf_counter() - began
        until = np.iinfo(np.int32).max if on_tokens is None else until + block
        state = advance(state, jnp.asarray(until, jnp.int32))


def _end_some(state: Decoding, ends: Sequence[bool] | np.ndarray) -> Decoding:
    """Ends the sequences that `on_tokens` returned as True; usually there are none."""
    flags = np.asarray(ends)
    if flags.dtype != bool or flags.shape != state.finish.shape:
        raise ValueError(
            f"on_tokens returned {flags.dtype}{list(flags.shape)}; it must return None or a boolean for each "
            f"of the {state.finish.shape[0]} sequences"
        )
    return _end(state, jnp.asarray(flags)) if flags.any() else state
