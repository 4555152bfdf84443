"""Everything of a server's step that is not the model: scheduling, pages, sampling, records.

`serving.run` with a model that returns zeros, every slot decoding: 256 slots, 65,536 pages of 16 tokens, with
the prefix cache and without. A round is one call of `run`, so that what surrounds it on the host is spread
over the round's steps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxkv
from jaxkv import serving
from jaxkv.tune.timing import Sample, interleave, stopwatch

SLOTS, PAGES, PAGE_SIZE, VOCAB = 256, 2**16, 16, 64
STEPS, ROUNDS = 200, 9
_MAX_TOKENS, _ENTRIES = 4096, 64


@jax.tree_util.register_static
class Zeros:
    """A model of no layers to speak of, whose logits are zeros. One instance, for it is static."""

    def __call__(self, tokens, cache, batch, *, rows=None):
        """See `CausalLM`."""
        count = tokens.shape[0] if rows is None else rows.shape[0]
        # Of the tokens, lest the draw be computed when compiling.
        return jnp.zeros((count, VOCAB)) + 0.0 * tokens[0].astype(jnp.float32), cache


def server(*, prefix_cache: bool, slots: int, rounds: int) -> Callable[[], float]:
    """A function that takes `STEPS` steps and returns their seconds."""
    columns = PAGES // SLOTS
    cache = jaxkv.CacheConfig(
        num_layers=1,
        num_kv_heads=1,
        head_dim=8,
        num_pages=PAGES,
        page_size=PAGE_SIZE,
        max_seqs=SLOTS,
        max_pages_per_seq=columns,
        dtype="float32",
        prefix_cache=prefix_cache,
    )
    config = serving.ServingConfig(cache, max_requests=2 * SLOTS, max_tokens=_MAX_TOKENS, token_budget=512)
    submit = jax.jit(serving.submit, donate_argnums=0)
    run = jax.jit(serving.run, donate_argnums=1)
    state = jax.jit(serving.init, static_argnums=0)(config)
    new_tokens = STEPS * (rounds + 2)
    requests = [serving.Request(tokens=[number] * 5, max_new_tokens=new_tokens) for number in range(slots)]
    for start in range(0, slots, _ENTRIES):
        arrays = serving.Requests.of(requests[start : start + _ENTRIES], config, entries=_ENTRIES)
        state, status = submit(state, arrays)
        if (status[: len(requests[start : start + _ENTRIES])] != jaxkv.Status.OK).any():
            raise RuntimeError(f"requests were refused: {status}")
    model = Zeros()
    # Prompts are computed, and everything compiled.
    states = [run(model, state, jnp.asarray(8, jnp.int32))]
    before = int(states[0].stats.new_tokens)

    def steps() -> float:
        until = states[0].stats.steps + STEPS
        seconds, states[0] = stopwatch(run, model, states[0], until)
        nonlocal before
        made, before = int(states[0].stats.new_tokens) - before, int(states[0].stats.new_tokens)
        if made != slots * STEPS:
            raise RuntimeError(f"{made} new tokens in {STEPS} steps of {slots} requests")
        return seconds

    return steps


def measure(requests: int | None, target: float) -> dict[str, Any]:
    """Prints the table; `target` is the most milliseconds of a step.

    Args:
      requests: so many decode. Default: one in every slot.
      target: for either kind of cache.
    """
    slots = SLOTS if requests is None else min(requests, SLOTS)
    functions = {on: server(prefix_cache=on, slots=slots, rounds=ROUNDS) for on in (False, True)}
    samples = interleave(functions, rounds=ROUNDS, warm_up=1)
    print(f"\na step without the model: {slots} of {SLOTS} slots decode, {PAGES:,} pages, ms")
    rows = []
    for on, sample in samples.items():
        step = Sample(tuple(1e3 * seconds / STEPS for seconds in sample.rounds))
        held = step.median <= target
        low, high = step.quartiles
        print(
            f"{'with' if on else 'without':>8} a prefix cache: {step.median:.2f} ({low:.2f}-{high:.2f}), "
            f"target {target:g}: {'held' if held else 'missed'}",
            flush=True,
        )
        rows.append({"prefix_cache": on, "milliseconds": step.as_json(), "target": target, "held": held})
    return {"slots": slots, "pages": PAGES, "steps": STEPS, "rows": rows}
