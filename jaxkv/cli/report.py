"""Summaries of a finished generation."""

from jaxkv.config import CacheConfig
from jaxkv.decode import Finish
from jaxkv.generation import Generation


def speed(result: Generation) -> str:
    """Tokens per second of the prefill and of the decode loop."""
    prefill = result.prefill_tokens / max(result.prefill_seconds, 1e-9)
    # The first token of each sequence comes from its prefill.
    decoded = result.num_new_tokens - sum(bool(tokens) for samples in result.tokens for tokens in samples)
    decode = decoded / max(result.decode_seconds, 1e-9)
    return (
        f"prefill {result.prefill_tokens} tokens at {prefill:.0f} tokens/s, "
        f"decode {decoded} tokens at {decode:.1f} tokens/s"
    )


def found(result: Generation) -> str:
    """Tokens of the prompts that were found in the cache, and need not be computed."""
    whole = result.prefill_tokens + result.found_tokens
    return f"{result.found_tokens} of {whole} tokens were in the cache already, and not computed"


def cut(result: Generation, most: int) -> str:
    """How many texts ended because a row of the page table was full; nothing if none did.

    Args:
      result: of `generate`.
      most: new tokens asked for.
    """
    ends = [
        (reason, len(tokens))
        for reasons, samples in zip(result.finish, result.tokens, strict=True)
        for reason, tokens in zip(reasons, samples, strict=True)
    ]
    count = sum(reason is Finish.LENGTH and length < most for reason, length in ends)
    if not count:
        return ""
    room = result.cache.config.max_tokens_per_seq
    return f"{count} of {len(ends)} texts ended early: a sequence holds {room} tokens (see --num-pages)"


def pages(config: CacheConfig, result: Generation) -> str:
    """Pages at the peak, and the pages that sharing saved."""
    used, alone = result.peak_pages, result.peak_pages_unshared
    text = f"{used} pages of {config.page_size} tokens at the peak"
    if used < alone:
        text += f", {alone} without sharing ({100 * (1 - used / alone):.0f}% saved)"
    cut = sum(reason is Finish.OUT_OF_PAGES for samples in result.finish for reason in samples)
    return text + (f"; {cut} sequences ended early, out of pages" if cut else "")
