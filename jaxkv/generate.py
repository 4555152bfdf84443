"""Text generation on the paged cache: it drives the parts of `decode.py` for a batch of prompts."""

import inspect
import math
import operator
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from jaxkv.config import CacheConfig
from jaxkv.decode import CausalLM, Decoding, Finish, decode, end, prefill, start
from jaxkv.fork import fork
from jaxkv.invariants import OutOfPagesError, SequenceTooLongError, raise_for_status
from jaxkv.policies import Policy, SlidingWindow, TokenPolicy
from jaxkv.sampling import GREEDY, Sampling
from jaxkv.state import KVCache, PolicyState, Status, init


@dataclass(frozen=True, slots=True)
class Generation:
    """What `generate` returns, on the host.

    Attributes:
      tokens: `tokens[prompt][sample]` is the list of new token ids, a stop token included.
      finish: a `Finish` for each, likewise.
      cache: the cache at the end; sequences that finished have left it.
      peak_pages: most pages in use at once.
      peak_pages_unshared: most pages the same sequences would have held at once without sharing.
      prefill_tokens, prefill_seconds: tokens computed before the first new one, and the time.
      decode_steps, decode_seconds: of the decode loop. Compilation is in neither with `warm_up`.
      logits: float32 `[prompts * num_samples, max_new_tokens, vocab]` if asked for.
    """

    tokens: list[list[list[int]]]
    finish: list[list[Finish]]
    cache: KVCache
    peak_pages: int
    peak_pages_unshared: int
    prefill_tokens: int
    prefill_seconds: float
    decode_steps: int
    decode_seconds: float
    logits: Array | None

    @property
    def num_new_tokens(self) -> int:
        """New tokens, all prompts and samples together."""
        return sum(len(sample) for samples in self.tokens for sample in samples)


def _fork_both(cache: KVCache, policy: PolicyState | None, parents: Array, children: Array):
    cache, status = fork(cache, parents, children)
    if policy is not None:
        policy = policy.policy.fork(policy, parents, jnp.where(status == Status.OK, children, -1))
    return cache, policy, status


# Tokens a prefill step.
PREFILL_CHUNK = 256


# `generate` owns the cache it makes, so these may donate it.
_prefill = jax.jit(prefill, donate_argnames=("cache", "policy"))
_fork = jax.jit(_fork_both, donate_argnames=("cache", "policy"))
_start = jax.jit(
    start,
    static_argnames=("max_new_tokens", "sampling", "stop_tokens", "keep_logits"),
    donate_argnames=("cache", "policy"),
)
_decode = jax.jit(decode, static_argnames=("sampling", "stop_tokens"), donate_argnames="state")
_end = jax.jit(end, donate_argnames="state")


def generate(
    model: CausalLM,
    config: CacheConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    num_samples: int = 1,
    sampling: Sampling = GREEDY,
    stop_tokens: Iterable[int] = (),
    key: PRNGKeyArray | None = None,
    share_prefix: bool = True,
    prefill_chunk: int = PREFILL_CHUNK,
    block: int = 16,
    keep_logits: bool = False,
    warm_up: bool = False,
    on_tokens: Callable[[Decoding], Sequence[bool] | np.ndarray | None] | None = None,
    policy: Policy | None = None,
) -> Generation:
    """Generates text for a ragged batch of prompts.

    Whole pages of what all prompts begin with are prefilled once and shared by `fork`, and so is each
    prompt among its samples. Decoding is one compiled loop, left only between blocks of tokens.

    Args:
      model: a pytree that is called as `CausalLM`.
      config: sizes of the cache; `generate` makes one and returns it at the end.
      prompts: token ids of each prompt.
      max_new_tokens: hard cap for every sequence. One that fills its row of the page table ends too.
      num_samples: continuations of each prompt.
      sampling: how tokens are chosen. Default: greedy.
      stop_tokens: ids that end a sequence.
      key: for sampling. Default: `jax.random.key(0)`.
      share_prefix: whether to look for a common beginning.
      prefill_chunk: most tokens a prefill step.
      block: decode steps between two calls of `on_tokens`.
      keep_logits: return the logits of every new token.
      warm_up: compile before the clock starts.
      on_tokens: called on the host with the state after each block, for streaming. It may return a boolean
        for each sequence, `[prompts * num_samples]`: True ends that sequence at once, with `Finish.STOP`.
      policy: what to forget where a sequence outgrows its budget: after each `prefill_chunk` tokens of its
        prompt, or fewer if its row holds no more beside the budget, and whenever it has filled a page.
        Prompts may then be longer than a row of the page table. What else is in the batch changes nothing, as
        long as there are free pages.

    Returns:
      A `Generation`.

    Raises:
      ValueError: for empty prompts, too many sequences or bad options, with the numbers.
      SequenceTooLongError, OutOfPagesError: for prompts that do not fit, before anything is computed.
    """
    if not isinstance(config, CacheConfig) or not isinstance(sampling, Sampling):
        raise ValueError(f"config={config!r} must be a CacheConfig, sampling={sampling!r} a Sampling")
    try:
        prompts = [_token_ids(prompt, f"prompt {number}") for number, prompt in enumerate(prompts)]
    except TypeError:
        raise ValueError("prompts must be a sequence of sequences of token ids") from None
    if policy is not None:
        check_policy(policy, config, model)
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("prefill_chunk", prefill_chunk),
        ("block", block),
    ):
        if type(value) is not int or not 1 <= value < 2**30:
            raise ValueError(f"{name}={value!r} must be a positive integer below {2**30}")
    last = (policy.observe_last if policy else None) or 1
    shared = 0
    if share_prefix and len(prompts) > 1:
        shared = _common_pages(prompts, last, config, policy, prefill_chunk)
    _check_fit(config, prompts, num_samples, shared, policy, prefill_chunk)
    stop = tuple(sorted(set(_token_ids(stop_tokens, "stop_tokens"))))

    cache, state = init(config), policy.init(config) if policy else None
    first_slots = np.arange(len(prompts), dtype=np.int32) * num_samples
    cache, state, logits, prefill_tokens, prefill_seconds = _run_prompts(
        model, cache, state, prompts, first_slots, shared * config.page_size, prefill_chunk, warm_up
    )
    slots = jnp.arange(len(prompts) * num_samples, dtype=jnp.int32)
    if num_samples > 1:
        parents = jnp.repeat(jnp.asarray(first_slots), num_samples)
        # Each prompt's own slot is among its children; as padding it stays what it is.
        cache, state, status = _fork(cache, state, parents, jnp.where(slots == parents, -1, slots))
        raise_for_status(status)
    decoding = _start(
        cache,
        slots,
        jnp.repeat(logits, num_samples, axis=0),
        jax.random.key(0) if key is None else key,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=stop,
        keep_logits=keep_logits,
        policy=state,
    )
    decoding, decode_seconds = _run_decode(
        partial(_decode, model, sampling=sampling, stop_tokens=stop), decoding, block, warm_up, on_tokens
    )
    return _result(decoding, num_samples, prefill_tokens, prefill_seconds, decode_seconds)


def check_policy(policy: object, config: CacheConfig, model: CausalLM) -> None:
    """Raises `ValueError` for a policy that the cache or the model cannot serve, naming both sides."""
    if not isinstance(policy, Policy):
        raise ValueError(f"policy={policy!r} must be a jaxkv.policies.Policy")
    policy.check(config)
    if policy.needs_mass:
        parameters = inspect.signature(model).parameters.values()
        if not any(p.name == "return_mass" or p.kind is p.VAR_KEYWORD for p in parameters):
            raise ValueError(
                f"{type(policy).__name__} goes by the attention that tokens received, and calling a "
                f"{type(model).__name__} takes no return_mass"
            )


def _token_ids(tokens: Iterable[int], name: str) -> list[int]:
    ids = []
    for token in tokens:
        try:
            ids.append(operator.index(token))
        except TypeError:
            raise ValueError(f"{name}: {token!r} is not a token id") from None
        if not 0 <= ids[-1] < 2**31:
            raise ValueError(f"{name}: token id {token} is out of range")
    return ids


def _run_prompts(model, cache, policy, prompts, slots, shared: int, largest: int, warm_up: bool):
    """Prefills all prompts; the first `shared` tokens once, in the first slot, and forked from there."""
    num_prompts, seconds = len(prompts), 0.0
    last_logits: list = [None] * num_prompts
    for stage in _stages(prompts, shared, largest, policy):
        observer = policy if stage.observed else None
        if warm_up:
            none, padding = jnp.full(num_prompts, -1, jnp.int32), jnp.zeros(stage.size, jnp.int32)
            logits, cache, observer, _ = _prefill(model, cache, none, jnp.zeros_like(none), padding, observer)
            jax.block_until_ready(logits)
        for num_tokens, tokens, ends in _chunks(stage.prompts, stage.size, stage.most, stage.whole):
            began = time.perf_counter()
            seqs = jnp.where(num_tokens > 0, jnp.asarray(slots), -1)
            logits, cache, observer, status = _prefill(model, cache, seqs, num_tokens, tokens, observer)
            raise_for_status(status)
            seconds += time.perf_counter() - began
            for entry in np.flatnonzero(ends):
                last_logits[entry] = logits[entry]
        policy = observer if stage.observed else policy
        if stage.forked and num_prompts > 1:
            parents = jnp.full(num_prompts - 1, slots[0], jnp.int32)
            cache, policy, status = _fork(cache, policy, parents, jnp.asarray(slots[1:]))
            raise_for_status(status)
    num_tokens = shared + sum(len(prompt) - shared for prompt in prompts)
    return cache, policy, jnp.stack(last_logits), num_tokens, seconds


class _Stage(NamedTuple):
    """A part of each prompt, prefilled in chunks of `size` tokens.

    Attributes:
      prompts: the parts.
      size: tokens a chunk.
      most: tokens of one prompt in a chunk: where it keeps as much as it may, they must fit its row.
      observed: whether the policy takes note and evicts.
      whole: whether every `most` tokens of a part stay together, wherever the chunk before them ended.
      forked: whether it is the first prompt's alone, and the others take it from there.
    """

    prompts: list[list[int]]
    size: int
    most: int
    observed: bool = True
    whole: bool = False
    forked: bool = False


def _stages(prompts: list[list[int]], shared: int, largest: int, policy: PolicyState | None) -> list[_Stage]:
    """What all prompts share, then the rest; last, on its own, the end that a policy asks for."""
    last = policy.policy.observe_last if policy is not None else None
    most = largest if policy is None else _most_at_once(policy.policy, policy.config, largest)
    rest = [prompt[shared:] for prompt in prompts]
    longest = max(shared, sum(len(prompt) for prompt in rest))
    size = min(largest, 1 << (longest - 1).bit_length())
    stages = []
    if shared:
        first = [prompts[0][:shared]] + [[]] * (len(prompts) - 1)
        stages.append(_Stage(first, size, most, observed=last is None, forked=True))
    if last is None:
        return [*stages, _Stage(rest, size, most, whole=policy is not None)]
    if any(len(prompt) > last for prompt in rest):
        stages.append(_Stage([prompt[:-last] for prompt in rest], size, most, observed=False))
    size = max(size, last)
    return [*stages, _Stage([prompt[-last:] for prompt in rest], size, size, whole=True)]


def _chunks(prompts: list[list[int]], size: int, most: int, whole: bool):
    """Packs prompts into chunks of `size` tokens: `(num_tokens, tokens, which prompts end here)`."""
    done = [0] * len(prompts)
    while any(at < len(prompt) for at, prompt in zip(done, prompts, strict=True)):
        num_tokens, tokens = np.zeros(len(prompts), np.int32), []
        for entry, prompt in enumerate(prompts):
            room = size - len(tokens)
            part = prompt[done[entry] : done[entry] + (most if whole else min(most, room))]
            if len(part) > room:
                continue
            num_tokens[entry] = len(part)
            done[entry] += len(part)
            tokens += part
        lengths = np.array([len(prompt) for prompt in prompts])
        ends = (num_tokens > 0) & (np.array(done) == lengths)
        padded = np.zeros(size, np.int32)
        padded[: len(tokens)] = tokens
        yield jnp.asarray(num_tokens), jnp.asarray(padded), ends


def _run_decode(advance, state: Decoding, block: int, warm_up: bool, on_tokens):
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
    """Ends what `on_tokens` says; most blocks end nothing."""
    flags = np.asarray(ends)
    if flags.dtype != bool or flags.shape != state.finish.shape:
        raise ValueError(
            f"on_tokens returned {flags.dtype}{list(flags.shape)}; it must return None or a boolean for each "
            f"of the {state.finish.shape[0]} sequences"
        )
    return _end(state, jnp.asarray(flags)) if flags.any() else state


def _result(state: Decoding, num_samples: int, prefill_tokens, prefill_seconds, decode_seconds) -> Generation:
    output, counts, finish = (np.asarray(x) for x in (state.output, state.num_generated, state.finish))
    tokens = [row[:count].tolist() for row, count in zip(output, counts, strict=True)]
    reasons = [Finish(int(reason)) for reason in finish]
    by_prompt = range(0, len(tokens), num_samples)
    return Generation(
        tokens=[tokens[i : i + num_samples] for i in by_prompt],
        finish=[reasons[i : i + num_samples] for i in by_prompt],
        cache=state.cache,
        peak_pages=int(state.cache.stats.peak_pages),
        peak_pages_unshared=int(state.peak_unshared),
        prefill_tokens=prefill_tokens,
        prefill_seconds=prefill_seconds,
        decode_steps=int(state.step),
        decode_seconds=decode_seconds,
        logits=state.logits,
    )


def _most_at_once(policy: Policy, config: CacheConfig, largest: int) -> int:
    """Tokens of a prompt after which a policy evicts, if it is one that does."""
    if policy.observe_last is not None:
        return largest
    return min(largest, config.max_tokens_per_seq - policy.most_kept(config))


def _common_pages(
    prompts: list[list[int]], own: int, config: CacheConfig, policy: Policy | None, largest: int
) -> int:
    """Whole pages that all prompts begin with; each keeps `own` tokens or more to itself.

    Where it matters when a policy evicts, only as far as each of them alone would be evicted from too.
    """
    common = max(min((len(prompt) for prompt in prompts), default=own) - own, 0)
    for prompt in prompts[1:]:
        pairs = zip(prompt[:common], prompts[0], strict=False)
        common = next((i for i, (mine, first) in enumerate(pairs) if mine != first), min(common, len(prompt)))
    unit = config.page_size
    # A window hides the same tokens whenever it gives back their pages.
    exact = isinstance(policy, SlidingWindow) and policy.positions == "original"
    if policy is not None and policy.observe_last is None and not exact:
        unit = math.lcm(unit, _most_at_once(policy, config, largest))
    return max(common, 0) // unit * unit // config.page_size


def _check_fit(
    config: CacheConfig,
    prompts: list[list[int]],
    num_samples: int,
    shared: int,
    policy: Policy | None,
    prefill_chunk: int,
) -> None:
    """Refuses what cannot fit, with the numbers, before anything is computed."""
    most = None
    if policy is not None and policy.observe_last is None:
        most = policy.most_kept(config) + _most_at_once(policy, config, prefill_chunk)
    if not prompts:
        raise ValueError("there are no prompts")
    if type(num_samples) is not int or num_samples < 1:
        raise ValueError(f"num_samples={num_samples!r} must be positive")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty")
        if len(prompt) > config.max_tokens_per_seq and most is None:
            raise SequenceTooLongError(
                f"prompt {number} has {len(prompt)} tokens; a sequence holds {config.max_tokens_per_seq} "
                f"({config.max_pages_per_seq} pages of {config.page_size})"
            )
    if len(prompts) * num_samples > config.max_seqs:
        raise ValueError(
            f"{len(prompts)} prompts x {num_samples} samples need {len(prompts) * num_samples} slots; "
            f"the cache has max_seqs={config.max_seqs}"
        )
    if most is not None:
        prompts, shared = [prompt[:most] for prompt in prompts], min(shared, config.pages_for(most))
    pages = shared + sum(config.pages_for(len(prompt)) - shared for prompt in prompts)
    if isinstance(policy, TokenPolicy) and shared:
        # What is kept of shared pages goes to pages of each sequence's own, before the others let go.
        pages += len(prompts) * config.pages_for(policy.budget)
    if pages > config.num_pages:
        raise OutOfPagesError(
            f"the prompts need {pages} pages of {config.page_size} tokens ({shared} of them shared); "
            f"the pool has {config.num_pages}"
        )
