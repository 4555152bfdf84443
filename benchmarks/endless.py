"""Text without end at constant memory: SmolLM2 writes 20,000 tokens through a window of 16 pages.

The model knows positions up to 8,192. The kept keys move up as the window slides, so its positions stay
within some hundreds. Checked after every block: pages in use, positions, and that nothing was compiled again.

    python -m benchmarks.endless [--tokens N] [--pages N]

Exit status: 0, or 1 where a check fails. The last line of output is one JSON document.
"""

import argparse
import sys

import jax
import numpy as np

import jaxkv
from benchmarks.publishing import publish
from jaxkv.models import load
from jaxkv.policies import SlidingWindow

PAGE_SIZE, SINKS, BLOCK = 16, 4, 200
PROMPT = "Tell me a very long story about a lighthouse keeper and the sea."


def main() -> int:
    """Generates, prints what it saw, and returns the exit status."""
    parser = argparse.ArgumentParser(description="Text without end at constant memory.")
    parser.add_argument("--tokens", type=int, default=20_000, help="to write (default: 20,000)")
    parser.add_argument("--pages", type=int, default=16, help="of the window (default: 16)")
    options = parser.parse_args()
    loaded = load("smollm2-135m", dtype="float32")
    assert loaded.tokenizer is not None
    policy = SlidingWindow(options.pages * PAGE_SIZE, SINKS, positions="cache", rope=loaded.config.rope)
    sizes = loaded.config.cache_config(num_pages=1, page_size=PAGE_SIZE, dtype="float32")
    pages = policy.capacity(sizes) // PAGE_SIZE
    config = loaded.config.cache_config(num_pages=pages + 4, page_size=PAGE_SIZE, max_seqs=1, dtype="float32")
    used, positions, compiled, compilations = [], [], [], [0]

    def count(event: str, duration_secs: float, **_) -> None:
        compilations[0] += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(count)

    def see(state):
        used.append(int(state.cache.stats.current_pages))
        positions.append(int(state.cache.table.positions[0]))
        compiled.append(compilations[0])
        print(
            f"\r{int(state.num_generated[0]):,} tokens, {used[-1]} pages", end="", file=sys.stderr, flush=True
        )

    result = jaxkv.generate(
        loaded.model,
        config,
        [loaded.tokenizer.encode_chat([{"role": "user", "content": PROMPT}])],
        max_new_tokens=options.tokens,
        sampling=jaxkv.Sampling(temperature=0.8, top_p=0.95),
        key=jax.random.key(0),
        block=BLOCK,
        on_tokens=see,
        policy=policy,
        warm_up=True,
    )
    # From when its window is full; the last look is after the sequence has left.
    settled = used[used.index(max(used)) : -1]
    tokens = np.asarray(result.tokens[0][0])
    checks = {
        f"{options.tokens:,} tokens": len(tokens) == options.tokens,
        f"pages constant at {pages}": set(settled) == {pages},
        "nothing compiled on the way": compiled[-1] == compiled[1] > 0,
        f"positions within {policy.most_positions(config)}": max(positions) <= policy.most_positions(config),
    }
    stats = result.cache.stats
    for share in (0, 1, 2, 3):
        begin = share * (len(tokens) - 60) // 3
        text = loaded.tokenizer.decode(tokens[begin : begin + 60].tolist())
        print(f"\n... from token {begin:,}: {' '.join(text.split())}")
    print(f"\n{int(stats.evicted_tokens):,} tokens given up in {int(stats.evictions):,} evictions")
    speed = (len(tokens) - 1) / result.decode_seconds
    print(
        "\n".join(f"{name}: {'yes' if ok else 'NO'}" for name, ok in checks.items()),
        f"\n{speed:.1f} tokens/s",
    )
    publish("endless", {"tokens": len(tokens), "pages": pages, "checks": checks, "tokens_per_second": speed})
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
