"""What `generate` returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from jaxtyping import Array

from jaxkv.decode import Decoding, Finish
from jaxkv.state import KVCache


@dataclass(frozen=True, slots=True)
class Generation:
    """What `generate` returns, on the host.

    Where more sequences than slots took turns, steps hold prompts and new tokens together: all time is in
    `decode_seconds`, tokens computed again count in `prefill_tokens`, and `peak_pages_unshared` is
    `peak_pages`.

    Attributes:
      tokens: `tokens[prompt][sample]` is the list of new token ids, a stop token included.
      finish: `finish[prompt][sample]` is why it ended, a `Finish`.
      slots: `slots[prompt][sample]` is its slot of the cache; -1 where sequences took turns.
      cache: the cache at the end. Without `keep` finished sequences are freed. With it, the cache holds each
        prompt and all its new tokens except the newest.
      pending: that newest token of each slot, which the model has not run on. `generate(...,
        cache=generation)` puts it before the slot's next prompt; with `cache=generation.cache` the caller
        must do so.
      held: of a cache with `prefix_cache`, the token ids that each slot holds after `keep`.
      peak_pages: most pages in use at once since the cache was made.
      peak_pages_unshared: most pages the same sequences would have used at once without sharing.
      prefill_tokens, prefill_seconds: tokens computed before the first new one, and the time.
      found_tokens: tokens of the prompts that the cache held already (`match_prefix`), and were not computed.
      decode_steps, decode_seconds: of the decode loop. With `warm_up` no time includes compilation.
      logits: float32 `[prompts * num_samples, max_new_tokens, vocab]` with `keep_logits`.
    """

    tokens: list[list[list[int]]]
    finish: list[list[Finish]]
    slots: list[list[int]]
    cache: KVCache
    pending: Mapping[int, int]
    peak_pages: int
    peak_pages_unshared: int
    prefill_tokens: int
    prefill_seconds: float
    decode_steps: int
    decode_seconds: float
    logits: Array | None
    found_tokens: int = 0
    held: Mapping[int, list[int]] = field(default_factory=dict)

    @property
    def num_new_tokens(self) -> int:
        """New tokens, all prompts and samples together."""
        return sum(len(sample) for samples in self.tokens for sample in samples)


def generation_of(
    state: Decoding,
    slots: np.ndarray,
    pending: Mapping[int, int],
    *,
    prefill_tokens: int,
    prefill_seconds: float,
    decode_seconds: float,
    found_tokens: int = 0,
    held: Mapping[int, list[int]] = MappingProxyType({}),
) -> Generation:
    """The result of a decode loop that has ended.

    Args:
      state: of the loop.
      slots: int32 `[prompts, num_samples]`.
      pending: newest tokens of other slots.
      prefill_tokens, prefill_seconds, decode_seconds, found_tokens: as in `Generation`.
      held: tokens that slots held when the loop began, where they are known.
    """
    output, counts, finish = (np.asarray(x) for x in (state.output, state.num_generated, state.finish))
    tokens = [row[:count].tolist() for row, count in zip(output, counts, strict=True)]
    newest = {int(slot): row[-1] for slot, row in zip(slots.flat, tokens, strict=True) if row and state.keep}
    held = dict(held)
    for slot, row in zip(slots.flat, tokens, strict=True):
        if slot in held:
            held[int(slot)] = [*held[slot], *row[:-1]]
    reasons = [Finish(int(reason)) for reason in finish]
    samples = slots.shape[1]
    by_prompt = range(0, len(tokens), samples)
    return Generation(
        tokens=[tokens[i : i + samples] for i in by_prompt],
        finish=[reasons[i : i + samples] for i in by_prompt],
        slots=slots.tolist(),
        cache=state.cache,
        pending={**pending, **newest},
        peak_pages=int(state.cache.stats.peak_pages),
        peak_pages_unshared=int(state.peak_unshared),
        prefill_tokens=prefill_tokens,
        prefill_seconds=prefill_seconds,
        decode_steps=int(state.step),
        decode_seconds=decode_seconds,
        logits=state.logits,
        found_tokens=found_tokens,
        held=held if state.keep else {},
    )
