"""`generate` for more sequences than a cache has slots or pages for: they take turns, as in a server."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from jaxkv import serving
from jaxkv.beginnings import beginnings
from jaxkv.causal_lm import CausalLM
from jaxkv.config import CacheConfig
from jaxkv.decode import Finish
from jaxkv.fitting import longer_than_a_row
from jaxkv.generation import Generation
from jaxkv.invariants import refusal
from jaxkv.packing import common_pages
from jaxkv.policies import Policy
from jaxkv.prefix_sizes import block_tokens
from jaxkv.request import Request, check_model
from jaxkv.serving import programs
from jaxkv.serving.running import vocabulary
from jaxkv.state import Status


def must_take_turns(request: Request, config: CacheConfig, policy: Policy | None, share_prefix: bool) -> bool:
    """Whether a new cache may lack slots or pages for all sequences at once, each at its longest.

    With a policy only slots count: it bounds the pages.
    """
    if len(request.prompts) * request.num_samples > config.max_seqs:
        return True
    if policy is not None:
        return False
    wanted = {number: request.prompts[number] for number, limit in enumerate(request.limits) if limit}
    pages = max((config.pages_for_chunk(len(prompt)) for prompt in wanted.values()), default=0)
    for number, prompt in wanted.items():
        shared = (request.num_samples - 1) * _shared_pages(len(prompt), config)
        pages += request.num_samples * config.pages_for_seq(_longest(request, number, config)) - shared
    if share_prefix and config.prefix_cache:
        alike = beginnings(wanted, block_tokens(config))
        pages -= sum(_shared_pages(one.shared, config) for one in alike.values())
    elif share_prefix and wanted:
        common = common_pages(list(wanted.values()), config, None, request.prefill_chunk)
        pages -= (len(wanted) - 1) * _shared_pages(common * config.page_size, config)
    return pages > config.num_pages


def _longest(request: Request, number: int, config: CacheConfig) -> int:
    """Tokens of a prompt with all that may follow it."""
    return min(len(request.prompts[number]) + request.limits[number], config.max_tokens_per_seq)


def _shared_pages(num_tokens: int, config: CacheConfig) -> int:
    """Pages that sequences share which begin with so many equal tokens; windows release theirs."""
    return sum(num_tokens // group.page_size for group in config.groups if group.window is None)


def _fits_together(request: Request, number: int, config: CacheConfig) -> bool:
    """Whether an empty cache surely holds all samples of a prompt at their longest."""
    longest, shared = _longest(request, number, config), _shared_pages(len(request.prompts[number]), config)
    own = config.pages_for_seq(longest) + config.pages_for_chunk(longest) - shared
    return request.num_samples <= config.max_seqs and shared + request.num_samples * own <= config.num_pages


def generate_in_turns(
    model: CausalLM,
    request: Request,
    config: CacheConfig,
    *,
    policy: Policy | None,
    key: PRNGKeyArray | None,
    share_prefix: bool,
    warm_up: bool,
) -> Generation:
    """Generates for every prompt; those that find no slot or no pages wait until others have ended.

    Args:
      model: the model.
      request: the prompts, and how to continue each.
      config: of the cache.
      policy, share_prefix, warm_up: as in `generate`.
      key: the seed of each prompt is drawn from it.

    Raises:
      ValueError: for an empty prompt or a token beyond the vocabulary.
      SequenceTooLongError, OutOfPagesError, InvalidLengthError: for a prompt that even an empty cache does
        not hold; nothing is computed then.
    """
    for number, prompt in enumerate(request.prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty")
        if len(prompt) > config.max_tokens_per_seq and (policy is None or policy.once):
            raise longer_than_a_row(config, number, len(prompt))
    server = _server(request, config, policy)
    check_model(model, policy)
    new = partial(serving.init, server)
    request.check_vocabulary(vocabulary(model, jax.eval_shape(new)), model)
    asked = _asked(request, config, key, share_prefix)
    state, status = programs.submit(jax.jit(new)(), serving.Requests.of(asked, server))
    for one, refused in zip(asked, np.asarray(status).tolist(), strict=False):
        if refused != Status.OK:
            error = refusal(Status(refused))
            raise type(error)(f"prompt {(one.id or 0) // request.num_samples}: {error}")
    if warm_up:
        state = jax.block_until_ready(programs.run(model, state, _steps(0)))
    began = time.perf_counter()
    state = jax.block_until_ready(programs.run(model, state, _steps(np.iinfo(np.int32).max)))
    return _generation(state, request, time.perf_counter() - began)


def _server(request: Request, config: CacheConfig, policy: Policy | None) -> serving.ServingConfig:
    """A server whose request table holds all of them."""
    lengths = [len(prompt) + limit for prompt, limit in zip(request.prompts, request.limits, strict=True)]
    return serving.ServingConfig(
        config,
        max_requests=len(request.prompts) * request.num_samples,
        max_tokens=max(2, *lengths),
        token_budget=max(request.prefill_chunk, config.max_seqs),
        max_stop_tokens=max(1, len(request.stop_tokens)),
        policy=policy,
    )


def _asked(
    request: Request, config: CacheConfig, key: PRNGKeyArray | None, share_prefix: bool
) -> list[serving.Request]:
    """The prompts of which anything is wanted; the id of a sample is its number among all samples.

    Samples of one request run together. Where the pool may not hold them so, each is a request of its own.
    """
    key, samples = jax.random.key(0) if key is None else key, request.num_samples
    seeds = np.asarray(jax.random.bits(key, (len(request.prompts), samples), "uint32")).tolist()
    asked = []
    for number in (number for number, limit in enumerate(request.limits) if limit):
        together = _fits_together(request, number, config)
        for sample in range(1 if together else samples):
            one = serving.Request(
                tokens=request.prompts[number],
                id=number * samples + sample,
                max_new_tokens=request.limits[number],
                sampling=request.samplings[number],
                seed=seeds[number][sample],
                num_samples=samples if together else 1,
                stop_tokens=request.stop_tokens,
                # Prompts of different salts share nothing.
                salt=0 if share_prefix else number,
            )
            asked.append(one)
    return asked


def _steps(until: int) -> Array:
    return jnp.asarray(until, jnp.int32)


def _generation(state: serving.ServingState, request: Request, seconds: float) -> Generation:
    """What the request table holds at the end."""
    prompts, samples = len(request.prompts), request.num_samples
    tokens: list[list[list[int]]] = [[[] for _ in range(samples)] for _ in range(prompts)]
    finish = [[Finish.LENGTH] * samples for _ in range(prompts)]
    table = jax.device_get(state.requests)
    for row in np.flatnonzero(table.phase == serving.Phase.FINISHED):
        number, sample = divmod(int(table.ids[row]) + int(table.samples[row]), samples)
        tokens[number][sample] = table.tokens[row, table.prompt_lengths[row] : table.lengths[row]].tolist()
        finish[number][sample] = Finish(int(table.finish[row]))
    stats, peak_pages = state.stats.as_dict(), int(state.cache.stats.peak_pages)
    return Generation(
        tokens=tokens,
        finish=finish,
        slots=[[-1] * samples for _ in range(prompts)],
        cache=state.cache,
        pending={},
        peak_pages=peak_pages,
        peak_pages_unshared=peak_pages,
        prefill_tokens=stats["computed_tokens"] - stats["new_tokens"],
        prefill_seconds=0.0,
        decode_steps=stats["steps"],
        decode_seconds=seconds,
        logits=None,
        found_tokens=stats["matched_tokens"],
    )
