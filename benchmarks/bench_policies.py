"""What does a bounded memory cost in quality? SmolLM2 on English prose, by policy and budget.

Perplexity: a text of 4,096 tokens goes through the cache a page at a time; a policy evicts whenever a page
is full, as `generate` does, and every token is predicted from what is kept then. The figure is that of the
last 1,024 tokens, which every budget has long bounded. `PromptCompress` cuts once: the first three quarters
are its prompt. The text is the language reference that Python ships for `help()`.

Recall: eight facts stand at the beginning of a text of 1,024 tokens; at its end the cache is forked and each
child is asked for one of them. The figure is the share that the most likely next token gets right.

Targets, at a quarter: a window with four sinks within 15% of the full cache's perplexity, and without sinks
worse than that; HeavyHitter, with 7/8 of the budget for recent tokens, no worse than the window;
SemanticMerge, with as much and with half, no worse than dropping what it merges.

    python -m benchmarks.bench_policies [--quick] [--only NAME ...]

Exit status: 0, or 1 where a target is missed. The last line of output is one JSON document.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks.publishing import publish
from jaxkv.models import LoadedModel, load
from jaxkv.policies import (
    HeavyHitter,
    LeastRecentlyUsed,
    Policy,
    PromptCompress,
    SemanticMerge,
    SlidingWindow,
    TokenPolicy,
)

PAGE_SIZE, TOKENS = 32, 4096
LAST = TOKENS // 4
FACTS = {
    "password for the garden is": "copper",
    "best friend of Anna is": "Oliver",
    "capital of Zubrowka is": "Lutz",
    "name of the captain's ship is": "Falcon",
    "color of the old door is": "purple",
    "favorite fruit of the queen is": "melon",
    "favorite food of the dragon is": "honey",
    "king of the island is": "Arthur",
}
RECALL_TOKENS = 1024
SINKS_TARGET = 1.15


class MergedDropped(SemanticMerge):
    """Drops what `SemanticMerge` would merge into the token before it."""

    gather = TokenPolicy.gather


@dataclass(frozen=True)
class Row:
    """A line of the table; `policy` is made for a number of token places."""

    name: str
    policy: Callable[[int], Policy]


ROWS = [
    Row("SlidingWindow, 4 sinks", lambda budget: SlidingWindow(budget - 4, 4)),
    Row("SlidingWindow, no sinks", lambda budget: SlidingWindow(budget, 0)),
    Row("LeastRecentlyUsed", lambda budget: LeastRecentlyUsed(budget)),
    Row("HeavyHitter, half recent", lambda budget: HeavyHitter(budget, budget // 2)),
    Row("HeavyHitter, 7/8 recent", lambda budget: HeavyHitter(budget, budget * 7 // 8)),
    Row("SemanticMerge, half recent", lambda budget: SemanticMerge(budget, budget // 2)),
    Row("dropped, half recent", lambda budget: MergedDropped(budget, budget // 2)),
    Row("SemanticMerge, 7/8 recent", lambda budget: SemanticMerge(budget, budget * 7 // 8)),
    Row("dropped, 7/8 recent", lambda budget: MergedDropped(budget, budget * 7 // 8)),
    Row("PromptCompress", lambda budget: PromptCompress(budget, 32)),
]


@partial(jax.jit, donate_argnames="cache", static_argnames=("size", "observed"))
def read(model, cache, tokens, targets, *, size: int, observed: bool):
    """A text in chunks of `size`, to slot 0: the cache, each target's negative log-likelihood, statuses."""
    seqs = jnp.zeros(1, jnp.int32)

    def step(cache, chunk):
        tokens, targets = chunk
        cache, batch = jaxkv.allocate(cache, seqs, jnp.full(1, size), total_tokens=size)
        if observed and cache.policy is not None and cache.policy.rule.needs_mass:
            logits, cache, mass = model(tokens, cache, batch, return_mass=True)
            cache = jaxkv.observe(cache, batch, mass)
        else:
            logits, cache = model(tokens, cache, batch)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]
        return cache, (-chosen, batch.status)

    chunks = tokens.reshape(-1, size), targets.reshape(-1, size)
    cache, (nll, status) = jax.lax.scan(step, cache, chunks)
    return cache, nll.reshape(-1), status


class Reader:
    """One sequence in a cache with as many places as a policy needs, and slots for children."""

    def __init__(self, loaded: LoadedModel, policy: Policy | None, num_tokens: int, children: int = 0):
        self.model, self.policy = loaded.model, policy
        sizes = dict(page_size=PAGE_SIZE, max_seqs=1 + children, dtype="float32")
        places = num_tokens + PAGE_SIZE
        if policy is not None and not policy.once:
            places = policy.capacity(loaded.config.cache_config(num_pages=1, **sizes))
        row = places // PAGE_SIZE + (children > 0)
        config = loaded.config.cache_config(num_pages=row + 2 * children, max_pages_per_seq=row, **sizes)
        self.cache = jaxkv.init(config, policy)

    def read(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """A whole text, by the page."""
        return self._read(tokens, targets, PAGE_SIZE)

    def compress(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """A prompt, which the policy cuts at its end."""
        policy = self.policy
        assert isinstance(policy, PromptCompress)
        cut = len(tokens) - policy.observe_last
        body = self._read(tokens[:cut], targets[:cut], PAGE_SIZE, observed=False)
        tail = self._read(tokens[cut:], targets[cut:], len(tokens) - cut)
        evict = jax.jit(jaxkv.evict, donate_argnames="cache")
        self.cache, dropped = evict(self.cache, jnp.zeros(1, jnp.int32))
        assert int(dropped[0]) == len(tokens) - policy.budget
        return np.concatenate([body, tail])

    def go_on(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """More of the text, with all that is kept and nothing dropped."""
        return self._read(tokens, targets, PAGE_SIZE, observed=False)

    def _read(self, tokens, targets, size, *, observed=True) -> np.ndarray:
        self.cache, nll, status = read(self.model, self.cache, tokens, targets, size=size, observed=observed)
        assert not np.any(status), "a chunk was refused"
        return np.asarray(nll)


def perplexity(loaded: LoadedModel, ids: np.ndarray, policy: Policy | None) -> float:
    """Of the last tokens of the text, `ids` and one more."""
    reader, (tokens, targets) = Reader(loaded, policy, TOKENS), (ids[:-1], ids[1:])
    if policy is not None and policy.once:
        prompt = TOKENS - LAST
        reader.compress(tokens[:prompt], targets[:prompt])
        nll = reader.go_on(tokens[prompt:], targets[prompt:])
    else:
        nll = reader.read(tokens, targets)
    return float(np.exp(nll[-LAST:].mean()))


@partial(jax.jit, static_argnames="view")
def ask(model, cache, tokens, num_tokens, *, view):
    """The most likely next token of each child of slot 0, after its question. Nothing more is dropped."""
    cache = replace(cache, policy=None)
    children = jnp.arange(1, num_tokens.shape[0] + 1, dtype=jnp.int32)
    cache, _ = jaxkv.fork(cache, jnp.zeros_like(children), children)
    cache, batch = jaxkv.allocate(cache, children, num_tokens, total_tokens=tokens.shape[0])
    logits, _ = model(tokens, cache, view(batch), rows=batch.query_starts[1:] - 1)
    return jnp.argmax(logits, axis=-1), batch.status


def recall(loaded: LoadedModel, prose: str, policy: Policy | None) -> float:
    """The share of facts that are known at the end."""
    assert loaded.tokenizer is not None
    encode = loaded.tokenizer.encode
    facts = "\n".join(f"The {start} {word}." for start, word in FACTS.items())
    beginning, filler = encode(f"Facts:\n{facts}\n\n"), encode(prose)
    ids = np.asarray([*beginning, *filler[: RECALL_TOKENS - len(beginning)]], np.int32)
    reader = Reader(loaded, policy, RECALL_TOKENS, children=len(FACTS))
    targets = np.roll(ids, -1)
    if policy is not None and policy.once:
        reader.compress(ids, targets)
    else:
        reader.read(ids, targets)
    questions = [encode(f"\n\nFacts:\nThe {start}") for start in FACTS]
    view = policy.view if policy is not None else _everything
    answers, status = ask(
        loaded.model,
        reader.cache,
        jnp.asarray(np.concatenate(questions), jnp.int32),
        jnp.asarray([len(question) for question in questions], jnp.int32),
        view=view,
    )
    assert not np.any(status), "a question was refused"
    wanted = [encode(f" {word}")[0] for word in FACTS.values()]
    return float(np.mean(np.asarray(answers) == wanted))


def _everything(batch):
    return batch


def judge(table: dict[str, dict[str, Any]], full: float) -> dict[str, bool]:
    """The targets, at a quarter."""
    quarter = {name: cells["1/4"]["perplexity"] for name, cells in table.items()}
    window = quarter["SlidingWindow, 4 sinks"]
    return {
        f"a window with sinks within {SINKS_TARGET - 1:.0%} of the full cache": window <= SINKS_TARGET * full,
        "without sinks it breaks": quarter["SlidingWindow, no sinks"] > SINKS_TARGET * full,
        "HeavyHitter no worse than the window": quarter["HeavyHitter, 7/8 recent"] <= window,
        **{
            f"SemanticMerge no worse than dropping, {recent}": quarter[f"SemanticMerge, {recent}"]
            <= quarter[f"dropped, {recent}"]
            for recent in ("half recent", "7/8 recent")
        },
    }


def main() -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="Perplexity and recall by policy and budget.")
    parser.add_argument("--quick", action="store_true", help="budgets of a quarter alone; nothing is kept")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="some rows; nothing is kept")
    options = parser.parse_args()
    rows = [row for row in ROWS if not options.only or any(name in row.name for name in options.only)]
    if not rows:
        parser.error(f"no row is called {options.only}")
    loaded = load("smollm2-135m")
    assert loaded.tokenizer is not None
    prose = "\n\n".join(topics[name] for name in sorted(topics))
    ids = np.asarray(loaded.tokenizer.encode(prose[: 16 * TOKENS])[: TOKENS + 1], np.int32)
    parts = (4,) if options.quick else (2, 4, 8)
    full, known = perplexity(loaded, ids, None), recall(loaded, prose, None)
    print(
        f"{loaded.name}: perplexity of the last {LAST} of {TOKENS} tokens, and recall after {RECALL_TOKENS}\n"
    )
    print(f"{'budget':<26}{'1':>14}" + "".join(f"{f'1/{part}':>20}" for part in parts))
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        cells = {}
        print(f"{row.name:<26}{full:>8.3f}{known:>6.0%}", end="", flush=True)
        for part in parts:
            value = perplexity(loaded, ids, row.policy(TOKENS // part))
            facts = recall(loaded, prose, row.policy(RECALL_TOKENS // part))
            cells[f"1/{part}"] = {"perplexity": value, "change": value / full - 1, "recall": facts}
            print(f"{value:>9.3f}{value / full - 1:>+7.1%}{facts:>4.0%}", end="", flush=True)
            # Every cell has programs of its own: those of all take more memory maps than Linux allows.
            jax.clear_caches()
        table[row.name] = cells
        print()
    targets = judge(table, full) if rows == ROWS else {}
    print("\n" + "\n".join(f"{name}: {'yes' if ok else 'NO'}" for name, ok in targets.items()))
    document = {"full": {"perplexity": full, "recall": known}, "table": table, "targets": targets}
    publish("policies", document, keep=not options.quick and rows == ROWS)
    return 0 if all(targets.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
