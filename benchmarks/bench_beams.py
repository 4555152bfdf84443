"""What does beam search on shared pages save, and does it find the same texts? SmolLM2-135M, float32.

Three prompts, four beams each, 64 new tokens. The baseline is what a JAX user writes by hand: a dense cache
whose rows are gathered by parent in each step, and the choice of beams in NumPy on the host.

  text   sequences and scores of both. Target: equal sequences, scores within 1e-4.
  pages  the most in use at once, copies in progress included; beside it what the same beams take unshared,
         each `ceil(tokens / page size)`. Target: at most 0.6 of it, for page sizes 4 and 16.
  time   of a step, choice of beams included, in turns. Target: none; a dense step copies all K and V.

    python -m benchmarks.bench_beams [--quick]

The last line of output is one JSON document; unless `--quick`, it is also written under `results/`. Exit
status: 1 where the texts differ or a target is missed.
"""

import argparse
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks.publishing import publish
from jaxkv.models import LoadedModel, dense_cache, load
from jaxkv.tune.timing import Sample, microseconds, times

WIDTH, NEW_TOKENS, MAX_TOKENS, PAGE_SIZES, ROUNDS = 4, 64, 128, (4, 16), 5
TEXTS = (
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is",
    "Once upon a time, there was a small village at the edge of a forest. In this village there lived an old "
    "woman who knew the name of every bird and every tree, and children came to her to listen. One day",
    "Water boils at 100 degrees Celsius, and it freezes at",
)
SCORES_TARGET, PAGES_TARGET = 1e-4, 0.6


class DenseSearch:
    """Beam search on a dense cache, for all prompts together; sequences that end are kept apart."""

    def __init__(self, loaded: LoadedModel, prompts: list[list[int]], stops: set[int]):
        self.loaded, self.prompts, self.stops = loaded, prompts, stops

        @jax.jit
        def step(model, cache, parents, tokens):
            cache = jax.tree.map(lambda rows: rows[parents], cache)
            logits, cache = dense_cache.decode_step(model, cache, tokens)
            return jax.nn.log_softmax(logits, axis=-1), cache

        self.step = step
        self.ready, self.first = self._prefilled()

    def _prefilled(self) -> tuple[dense_cache.DenseCache, np.ndarray]:
        """The cache with each prompt in `WIDTH` rows, and log-probabilities after it."""
        rows, longest = len(self.prompts) * WIDTH, max(map(len, self.prompts))
        cache = dense_cache.init(self.loaded.config, rows, longest + NEW_TOKENS)
        every, ends = jnp.arange(rows, dtype=jnp.int32), np.array([len(prompt) for prompt in self.prompts])
        first = np.zeros((len(self.prompts), self.loaded.config.vocab_size), np.float32)
        for place in range(longest):
            tokens = [prompt[min(place, len(prompt) - 1)] for prompt in self.prompts for _ in range(WIDTH)]
            log_probs, cache = self.step(self.loaded.model, cache, every, jnp.asarray(tokens, jnp.int32))
            done = ends == place + 1
            first[done] = np.asarray(log_probs)[::WIDTH][done]
        lengths = jnp.asarray(np.repeat(ends, WIDTH), jnp.int32)
        return dense_cache.DenseCache(cache.k, cache.v, lengths), first

    def run(self) -> tuple[list[list[tuple[float, list[int]]]], float, int]:
        """Each prompt's sequences with their scores, best first; seconds and steps of the search."""
        began, cache, count = time.perf_counter(), self.ready, len(self.prompts)
        beams: list[list[tuple[np.float32, list[int]]]] = [[(np.float32(0), [])] for _ in range(count)]
        pools: list[list[tuple[float, list[int]]]] = [[] for _ in range(count)]
        log_probs = self.first[:, None]
        running, parents, length = set(range(count)), np.arange(count * WIDTH, dtype=np.int32), 0
        while True:
            length += 1
            for prompt in sorted(running):
                chosen = self._choose(beams[prompt], log_probs[prompt], pools[prompt], length)
                if chosen is None:
                    running.remove(prompt)
                    continue
                beams[prompt] = [(total, text) for total, text, _ in chosen]
                parents[prompt * WIDTH :][:WIDTH] = [prompt * WIDTH + parent for _, _, parent in chosen]
            if not running:
                return pools, time.perf_counter() - began, length - 1
            newest = jnp.asarray([text[-1] if text else 0 for rows in beams for _, text in rows], jnp.int32)
            out, cache = self.step(self.loaded.model, cache, jnp.asarray(parents), newest)
            log_probs = np.asarray(out).reshape(count, WIDTH, -1)

    def _choose(self, beams, log_probs: np.ndarray, pool: list, length: int):
        """The next beams of a prompt, `(sum, tokens, parent)`; None where its search ends. Fills the pool."""
        sums = np.array([total for total, _ in beams], np.float32)[:, None] + log_probs[: len(beams)]
        flat, kept = sums.reshape(-1), []
        most = WIDTH * max(2, 1 + len(self.stops))
        best = np.argpartition(-flat, most)[:most]
        for rank, index in enumerate(best[np.lexsort((best, -flat[best]))]):
            parent, token = divmod(int(index), sums.shape[1])
            text = [*beams[parent][1], token]
            if token not in self.stops and length < NEW_TOKENS:
                kept.append((flat[index], text, parent))
            elif rank < WIDTH:
                pool.append((float(flat[index]) / length, text))
        pool.sort(key=lambda one: -one[0])
        del pool[WIDTH:]
        if not kept or (len(pool) == WIDTH and kept[0][0] / length <= pool[-1][0]):
            return None
        return kept[:WIDTH]


class PagedSearch:
    """`jaxkv.beam_search` with pages of one size."""

    def __init__(self, loaded: LoadedModel, prompts: list[list[int]], stops: set[int], page_size: int):
        self.config = loaded.config.cache_config(
            num_pages=len(prompts) * WIDTH * MAX_TOKENS // page_size,
            page_size=page_size,
            max_seqs=len(prompts) * WIDTH,
            max_pages_per_seq=MAX_TOKENS // page_size,
            dtype="float32",
        )
        self.loaded, self.prompts, self.stops = loaded, prompts, stops

    def run(self) -> jaxkv.BeamSearch:
        """The result; nothing is compiled while its time is taken."""
        return jaxkv.beam_search(
            self.loaded.model,
            self.prompts,
            self.config,
            width=WIDTH,
            max_new_tokens=NEW_TOKENS,
            stop_tokens=self.stops,
            warm_up=True,
        )


def compare(rounds: int) -> dict[str, Any]:
    """Runs both; prints the table."""
    loaded = load("smollm2-135m", dtype="float32")
    assert loaded.tokenizer is not None
    prompts, stops = [loaded.tokenizer.encode(text) for text in TEXTS], set(loaded.tokenizer.stop_tokens)
    dense = DenseSearch(loaded, prompts, stops)
    expected, _, _ = dense.run()
    texts = [[text for _, text in pool] for pool in expected]
    scores = [score for pool in expected for score, _ in pool]
    print(f"{len(prompts)} prompts of {', '.join(str(len(one)) for one in prompts)} tokens, {WIDTH} beams")
    print(f"{'page size':>10}{'pages':>8}{'unshared':>10}{'ratio':>8}  target     of a step, us")
    rows = []
    for size in PAGE_SIZES:
        search = PagedSearch(loaded, prompts, stops, size)
        result, rounds_of = search.run(), ([], [])
        for _ in range(rounds):
            result = search.run()
            _, seconds, steps = dense.run()
            rounds_of[0].append(result.search_seconds / result.search_steps)
            rounds_of[1].append(seconds / steps)
        rows.append(_row(size, result, *(Sample(tuple(of)) for of in rounds_of)))
        found = [score for pool in result.scores for score in pool]
        equal = result.tokens == texts
        furthest = float(np.max(np.abs(np.subtract(scores, found)))) if equal else float("inf")
        rows[-1] |= {"sequences_equal": equal, "scores_within": furthest}
        print(f"{'':10}sequences {'equal' if equal else 'DIFFER'}, scores within {furthest:.1e}", flush=True)
    return {"prompts": [len(one) for one in prompts], "width": WIDTH, "new_tokens": NEW_TOKENS, "rows": rows}


def _row(size: int, result: jaxkv.BeamSearch, ours: Sample, theirs: Sample) -> dict[str, Any]:
    """Pages and times with one page size; prints its line."""
    ratio = result.peak_pages / result.peak_pages_unshared
    met = ratio <= PAGES_TARGET
    print(
        f"{size:>10}{result.peak_pages:>8}{result.peak_pages_unshared:>10}{ratio:>8.2f}  {PAGES_TARGET} "
        f"{'ok' if met else 'MISSED':<7}{microseconds(ours)}, dense {microseconds(theirs)}: "
        f"{times(theirs.over(ours))}"
    )
    return {
        "page_size": size,
        "peak_pages": result.peak_pages,
        "peak_pages_unshared": result.peak_pages_unshared,
        "ratio": round(ratio, 4),
        "met": met,
        "step_seconds": ours.as_json(),
        "dense_step_seconds": theirs.as_json(),
        "dense_over_jaxkv": theirs.over(ours).as_json(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description="What does beam search on shared pages save?")
    parser.add_argument("--quick", action="store_true", help="one round, nothing kept")
    options = parser.parse_args(arguments)
    document = compare(1 if options.quick else ROUNDS)
    publish("beams", document, keep=not options.quick)
    return 0 if all(row["met"] and row["scores_within"] <= SCORES_TARGET for row in document["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
