"""`transformers` on PyTorch, decoding SmolLM2's architecture on the CPU. Absent where it is not installed."""

import importlib.util
import time
from collections.abc import Callable


def present() -> bool:
    """Whether the peer can be run here."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def decode(context: int, steps: int) -> Callable[[], float] | None:
    """Decodes `steps` tokens after `context`, float32, one sequence, greedy; None where absent.

    The weights are random (speed does not depend on them), the sizes SmolLM2-135M's; the cache is the
    library's own default, cut back to `context` between runs, outside the clock.
    """
    if not present():
        return None
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import (  # pyright: ignore[reportMissingImports]
        DynamicCache,
        LlamaConfig,
        LlamaForCausalLM,
    )

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    cache = DynamicCache(config=config)
    with torch.inference_mode():
        model(torch.randint(0, 49152, (1, context)), past_key_values=cache, use_cache=True)

    @torch.inference_mode()
    def run() -> float:
        token = torch.zeros((1, 1), dtype=torch.long)
        start = time.perf_counter()
        for _ in range(steps):
            logits = model(token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
        seconds = time.perf_counter() - start
        cache.crop(-steps)
        return seconds

    return run
