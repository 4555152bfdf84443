"""`generate` for more sequences than a cache has slots: they take turns, as in a server."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from jaxkv import serving
from jaxkv.causal_lm import CausalLM
from jaxkv.config import CacheConfig
from jaxkv.decode import Finish
from jaxkv.generation import Generation
from jaxkv.invariants import status_text
from jaxkv.policies import Policy
from jaxkv.request import Request, check_model
from jaxkv.serving.running import vocabulary
from jaxkv.state import Status

_submit = jax.jit(serving.submit, donate_argnums=0)
_run = jax.jit(serving.run, donate_argnums=1)


def generate_in_turns(
    model: CausalLM, request: Request, config: CacheConfig, policy: Policy | None, key: PRNGKeyArray | None
) -> Generation:
    """Generates for every prompt; those that find no slot or no pages wait until others have ended.

    Args:
      model: the model.
      request: the prompts, and how to continue each.
      config: of the cache.
      policy: of the cache.
      key: the seed of each prompt is drawn from it.

    Raises:
      ValueError: for a prompt that no cache of this config can hold, naming it.
    """
    for number, prompt in enumerate(request.prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty")
    limits = [len(prompt) + limit for prompt, limit in zip(request.prompts, request.limits, strict=True)]
    wanted = [number for number, limit in enumerate(request.limits) if limit]
    samples, stops = request.num_samples, request.stop_tokens
    server = serving.ServingConfig(
        config,
        max_requests=max(1, len(wanted) * samples),
        max_tokens=max(2, *limits),
        token_budget=max(request.prefill_chunk, config.max_seqs),
        max_stop_tokens=max(1, len(stops)),
        policy=policy,
    )
    check_model(model, policy)
    empty = jax.eval_shape(partial(serving.init, server))
    request.check_vocabulary(vocabulary(model, empty), model)
    key = jax.random.key(0) if key is None else key
    seeds = np.asarray(jax.random.bits(key, (len(request.prompts),), "uint32")).tolist()
    asked = [
        serving.Request(
            tokens=request.prompts[number],
            id=number,
            max_new_tokens=request.limits[number],
            sampling=request.samplings[number],
            seed=seeds[number],
            num_samples=samples,
            stop_tokens=stops,
        )
        for number in wanted
    ]
    began = time.perf_counter()
    state = jax.jit(partial(serving.init, server))()
    state, status = _submit(state, serving.Requests.of(asked, server))
    for number, one in zip(wanted, np.asarray(status).tolist(), strict=False):
        if one != Status.OK:
            raise ValueError(f"prompt {number}: {status_text(Status(one))}")
    state = _run(model, state, jnp.asarray(np.iinfo(np.int32).max, jnp.int32))
    table = jax.device_get(state.requests)
    tokens: list[list[list[int]]] = [[[] for _ in range(samples)] for _ in request.prompts]
    finish = [[Finish.LENGTH] * samples for _ in request.prompts]
    for row in range(len(wanted) * samples):
        number, sample = int(table.ids[row]), int(table.samples[row])
        text = table.tokens[row, table.prompt_lengths[row] : table.lengths[row]]
        tokens[number][sample] = text.tolist()
        finish[number][sample] = Finish(int(table.finish[row]))
    stats = state.stats.as_dict()
    peak = int(state.cache.stats.peak_pages)
    return Generation(
        tokens=tokens,
        finish=finish,
        slots=[[-1] * samples for _ in request.prompts],
        cache=state.cache,
        pending={},
        peak_pages=peak,
        peak_pages_unshared=peak,
        prefill_tokens=stats["computed_tokens"] - stats["new_tokens"],
        prefill_seconds=0.0,
        decode_steps=stats["steps"],
        decode_seconds=time.perf_counter() - began,
        logits=None,
        found_tokens=stats["matched_tokens"],
    )
