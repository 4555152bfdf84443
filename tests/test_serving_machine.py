"""A server beside the one in plain Python: the same decisions step by step, the same tokens, no leak."""

import os
from dataclasses import replace

import jax
import numpy as np
import pytest

import jaxkv
from jaxkv import CacheConfig, Finish, Sampling, Status, serving
from jaxkv.serving import Phase, PromptLookup, Request, Requests, ServingConfig, programs
from tests.caches import ints, poisoned_init
from tests.history_model import VOCAB, HistoryModel
from tests.serving_oracle import ServingOracle

BASE = CacheConfig(
    num_layers=1,
    num_kv_heads=1,
    head_dim=2,
    num_pages=12,
    page_size=4,
    max_seqs=4,
    max_pages_per_seq=8,
    dtype="float32",
)
WINDOWS = replace(
    BASE,
    num_layers=3,
    page_size=2,
    num_pages=26,
    max_pages_per_seq=14,
    layer_windows=(5, None, 3),
    max_chunk=6,
)
SERVERS = {
    "prefixes": ServingConfig(
        replace(BASE, prefix_cache=True), max_requests=8, max_tokens=30, token_budget=12, widths=(4, 8, 12)
    ),
    "windows": ServingConfig(WINDOWS, max_requests=7, max_tokens=26, token_budget=9),
    "speculation": ServingConfig(
        replace(BASE, prefix_cache=True),
        max_requests=8,
        max_tokens=30,
        token_budget=14,
        speculate=PromptLookup(ngram=1, num_tokens=2),
    ),
    "pages of one": ServingConfig(
        replace(BASE, page_size=1, num_pages=25, max_seqs=3, max_pages_per_seq=17),
        max_requests=5,
        max_tokens=22,
        token_budget=3,
    ),
    "one sequence": ServingConfig(
        replace(BASE, max_seqs=1, num_pages=3, max_pages_per_seq=3),
        max_requests=3,
        max_tokens=14,
        token_budget=5,
    ),
    "windows, prefixes, speculation": ServingConfig(
        replace(WINDOWS, prefix_cache=True, rollback=1),
        max_requests=8,
        max_tokens=26,
        token_budget=16,
        speculate=PromptLookup(ngram=1, num_tokens=3),
    ),
}
ENTRIES = 4  # of a call of `submit`


class Twin:
    """A server and its oracle, driven together."""

    def __init__(self, config):
        self.config, self.oracle = config, ServingOracle(config)
        state = serving.init(config)
        self.state = replace(state, cache=poisoned_init(config.cache, config.policy))
        self.model = HistoryModel(config.cache)
        self.events = {}

    def submit(self, requests):
        arrays = Requests.of(requests, self.config, entries=ENTRIES)
        self.state, status = programs.submit(self.state, arrays)
        expected = self.oracle.submit(requests)
        assert [Status(int(one)) for one in status[: len(requests)]] == expected
        self.check()
        return expected

    def cancel(self, *ids):
        self.state = programs.cancel(self.state, ints(*(list(ids) + [-1] * 2)[:2]))
        self.oracle.cancel(ids)
        self.check()

    def cancel_samples(self, *named):
        """Each a request's id and the number of a sample."""
        ids, samples = zip(*(list(named) + [(-1, 0)] * 2)[:2], strict=True)
        self.state = programs.cancel(self.state, ints(*ids), samples=ints(*samples))
        self.oracle.cancel_samples(named)
        self.check()

    def step(self):
        until = ints(self.oracle.steps + 1)[0]
        self.state = programs.run(self.model, self.state, until, logits_fn=None)
        if self.oracle.live(Phase.WAITING, Phase.RUNNING):
            self.oracle.step()
        self.check()

    def take(self):
        self.state, events = programs.take(self.state)
        of = [
            np.asarray(x) for x in (events.ids, events.samples, events.tokens, events.counts, events.finish)
        ]
        new = [
            (int(i), int(sample), tokens[:count].tolist(), Finish(int(finish)))
            for i, sample, tokens, count, finish in zip(*of, strict=True)
            if count or finish
        ]
        assert new == self.oracle.take()
        return new

    def check(self):
        """Every row of the request table, every slot, and how many pages are left."""
        table, oracle = jax.device_get(self.state.requests), self.oracle
        slots = self.config.cache.max_seqs
        for number, row in enumerate(oracle.rows):
            assert table.phase[number] == (Phase.EMPTY if row is None else row.phase), number
            if row is None:
                continue
            assert table.slots[number] == (slots if row.slot is None else row.slot)
            assert table.tokens[number, : table.lengths[number]].tolist() == row.text
            assert table.finish[number] == row.finish
        cache = self.state.cache.table
        assert np.asarray(cache.positions).tolist() == [one.position for one in oracle.cache.sequences]
        assert int(cache.num_free) + int(cache.num_reclaimable) == oracle.cache.num_free
        assert int(cache.num_reclaimable) == oracle.cache.num_reclaimable
        stats = self.state.stats.as_dict()
        assert (stats["steps"], stats["preemptions"]) == (oracle.steps, oracle.preemptions)

    def finish(self, most=2000):
        """Until nothing is left; then every page is free or reclaimable."""
        for _ in range(most):
            if not self.oracle.live(Phase.WAITING, Phase.RUNNING):
                break
            self.step()
        assert not self.oracle.live(Phase.WAITING, Phase.RUNNING)
        self.take()
        assert self.oracle.cache.num_used == 0
        jaxkv.check_invariants(self.state.cache)


def random_request(rng, config, number):
    """Often like an earlier one in its beginning, of few different tokens, and sometimes too long."""
    most = min(config.max_tokens, config.cache.max_tokens_per_seq)
    length = int(rng.integers(1, most + 2 if rng.random() < 0.1 else most - 1))
    base = np.random.default_rng(rng.integers(3)).integers(0, 4, config.max_tokens + 2)
    tokens = [*base[: min(length, int(rng.integers(most)))]]
    tokens += [*rng.integers(0, 4, length - len(tokens))]
    sampling = [
        Sampling(),
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=3),
        Sampling(temperature=2.0, top_p=0.6, min_p=0.1),
    ]
    return Request(
        tokens=tokens,
        id=number,
        priority=int(rng.choice([0, 0, 0, 1, -1])),
        max_new_tokens=int(rng.integers(1, 18)),
        sampling=sampling[int(rng.integers(4))],
        seed=int(rng.integers(2**32)),
        num_samples=int(rng.choice([1, 1, 1, 2, 3])),
        stop_tokens=tuple(rng.choice(VOCAB, int(rng.integers(3)), replace=False).tolist()),
        salt=int(rng.choice([0, 0, 0, 5])),
    )


def stream(config, seed):
    """A random stream of requests, arrivals, cancellations and moments of `take`."""
    rng, twin, number = np.random.default_rng(seed), Twin(config), 0
    for _ in range(int(rng.integers(1, 6))):
        for _ in range(int(rng.integers(1, 3))):
            requests = [random_request(rng, config, number + i) for i in range(int(rng.integers(1, ENTRIES)))]
            number += len(requests)
            twin.submit(requests)
        if rng.random() < 0.3:
            twin.cancel(*rng.integers(0, number, 2).tolist())
        if rng.random() < 0.3:
            twin.cancel_samples(*((int(rng.integers(number)), sample) for sample in (0, 1)))
        for _ in range(int(rng.integers(0, 12))):
            twin.step()
        if rng.random() < 0.7:
            twin.take()
    twin.finish()
    return twin


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVERS)
def test_many_random_streams_of_requests(name):
    for seed in range(100, 100 + int(os.environ.get("JAXKV_STREAMS", 12))):
        stream(SERVERS[name], seed)
