"""A cache under a policy and its oracle, side by side; see `tests.twin`."""

import functools
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from jaxkv import Status
from jaxkv.policies import HeavyHitter, LeastRecentlyUsed, PromptCompress, SemanticMerge, SlidingWindow
from tests import jitted, policy_rules
from tests.twin import TOLERANCE, Twin, poisoning

# How many roundings of float32, in float64's place, the attention a token received may be off by.
MASS = 1e-4


class Programs(NamedTuple):
    extend: ...
    evict: ...
    shift: ...


@functools.cache
def programs(policy) -> Programs:
    def extend(cache, seqs, num_tokens, k, v, q):
        cache, batch = jaxkv.allocate(cache, seqs, num_tokens, total_tokens=q[0].shape[0])

        def one_layer(cache, layer):
            layer, k, v, q = layer
            cache = jaxkv.append(cache, layer, batch, k, v)
            out, lse = jaxkv.attend(cache, layer, batch, q, return_lse=True)
            return cache, (out, lse, jaxkv.attention_mass(cache, layer, batch, q, lse))

        if len(cache.config.groups) > 1:
            results = []
            for layer in range(len(q)):
                cache = jaxkv.append(cache, layer, batch, k[layer], v[layer])
                out, lse = jaxkv.attend(cache, layer, batch, q[layer], return_lse=True)
                mass = None
                if layer in cache.config.full_layers:
                    mass = jaxkv.attention_mass(cache, layer, batch, q[layer], lse)
                results.append((out, lse, mass))
            out, lse, mass = zip(*results, strict=True)
            mass = jnp.stack([of for of in mass if of is not None])
            return jaxkv.observe(cache, batch, mass), batch, out, lse, mass

        layers = jnp.arange(len(q), dtype=jnp.int32)
        cache, (out, lse, mass) = jax.lax.scan(one_layer, cache, (layers, *map(jnp.stack, (k, v, q))))
        return jaxkv.observe(cache, batch, mass), batch, out, lse, mass

    def shift(cache, seqs, by):
        return jaxkv.shift_positions(cache, seqs, by, rope=policy.rope, first=FIRST)

    def donated(operation):
        return jax.jit(poisoning(operation), donate_argnums=0)

    return Programs(extend=donated(extend), evict=donated(jaxkv.evict), shift=donated(shift))


FIRST = 3  # places that `shift` leaves where they are


class PolicyTwin(Twin):
    """Each sequence of the oracle has `memory`: what the policy remembers, `[length, layers, kv_heads]`."""

    def __init__(self, policy, **shape):
        super().__init__(policy=policy, **shape)
        self.policy = policy
        self.seen = [0] * self.config.max_seqs  # PromptCompress: places when the prompt was observed
        self.memory = [self._nothing() for _ in range(self.config.max_seqs)]
        self.clock = [0] * self.config.max_seqs
        if isinstance(policy, SlidingWindow):
            self.options = {"window": policy.window, "sink_tokens": policy.sinks}

    def _nothing(self):
        return np.zeros((0, len(self.config.full_layers), self.config.num_kv_heads))

    def extend(self, seqs, num_tokens, ids=None):
        count = len(seqs)
        seqs, num_tokens = self._padded(seqs), self._padded(num_tokens, fill=0)
        k, v = (self._of_layers(self.total_tokens) for _ in "kv")
        q = self._of_layers(self.total_tokens, self.q_heads)
        growing = [] if self.policy.once else self.oracle.growing(seqs, num_tokens, self.total_tokens)
        stack = self._stack_after_evicting(growing)
        self.cache, *rest = programs(self.policy).extend(self.cache, seqs, num_tokens, k, v, q)
        due = [slot for slot in growing if self._is_over_budget(slot)]
        evicted = self._evict(growing)
        waiting = [slot for slot in due if slot not in evicted]
        reclaimed = self.oracle.num_reclaimed
        want = self.oracle.allocate(seqs, num_tokens, self.total_tokens, waiting)
        self.oracle.note_ids(want, self.random.integers(0, 2, self.total_tokens) if ids is None else ids)
        for layer, pair in enumerate(zip(k, v, strict=True)):
            self.oracle.append(want, layer, *(np.asarray(x, np.float64) for x in pair))
        batch, out, lse, mass = jax.device_get(rest)
        assert batch.fingerprint.tolist() == np.asarray(self.cache.table.fingerprint).tolist()
        self.check()
        self._check_batch(batch, want)
        if self.oracle.num_reclaimed == reclaimed:
            self._check_order(want, stack)
        self._check_attention(out, lse, want, q)
        self._observe(want, mass, seqs, num_tokens, q)
        return want.status[:count]

    def _stack_after_evicting(self, slots):
        """What `allocate` hands out first, once it has evicted."""
        if not slots:
            return self._stack()
        kept, copy = self.cache, jax.tree.map(jnp.copy, self.cache)
        self.cache, _ = programs(self.policy).evict(copy, self._padded(slots))
        stack, self.cache = self._stack(), kept
        return stack

    def _is_over_budget(self, slot):
        return not isinstance(self.policy, SlidingWindow) and (
            self.oracle.sequences[slot].length > self.policy.budget
        )

    def _observe(self, want, mass, seqs, num_tokens, q):
        """The mass is what the oracle's attention gives; the policy's state follows from it."""
        config, group = self.config, self.q_heads // self.config.num_kv_heads
        for entry, slot in enumerate(seqs.tolist()):
            sequence = self.oracle.sequences[slot] if 0 <= slot < config.max_seqs else None
            ran = sequence is not None and want.status[entry] == Status.OK and num_tokens[entry] > 0
            if not ran:
                assert not mass[:, entry].any()
                continue
            rows = slice(want.query_starts[entry], want.query_starts[entry + 1])
            expected = np.zeros(mass[:, entry].shape)
            for nth, layer in enumerate(config.full_layers):
                weights = self._weights(layer, slot, np.asarray(q[layer][rows], np.float64))
                by_head = weights.reshape(weights.shape[0], config.num_kv_heads, group, -1).sum((0, 2))
                expected[nth, :, : sequence.length] = by_head
            np.testing.assert_allclose(mass[:, entry], expected, rtol=MASS, atol=MASS)
            self._remember(slot, entry, int(num_tokens[entry]), mass[:, entry])

    def _weights(self, layer, slot, q):
        """Softmax weights `[tokens, q_heads, length]`: attention to values that are a place's number."""
        length = self.oracle.sequences[slot].length
        k, _ = self.oracle.gather(layer, slot)
        v = np.broadcast_to(np.eye(length)[:, None], (length, k.shape[1], length))
        from pallas_kernels import reference

        return reference.attention(q, k, v, scale=k.shape[-1] ** -0.5, **self.options)[0]

    def _remember(self, slot, entry, num_tokens, mass):
        """What the policy's state must be; from here on the oracle goes by the library's own float32."""
        length = self.oracle.sequences[slot].length
        mass = np.moveaxis(mass[..., :length], -1, 0)
        before = self.memory[slot][: length - num_tokens]
        if len(before) == 0:
            self.clock[slot] = 0
        match self.policy:
            case HeavyHitter() | SemanticMerge():
                self.memory[slot] = mass.copy()
                self.memory[slot][: len(before)] += before
                self._same_state("mass", slot)
            case PromptCompress():
                self.memory[slot], self.seen[slot] = mass, length
                self._same_state("mass", slot)
            case LeastRecentlyUsed(threshold=threshold):
                came_in = self.clock[slot] + 1 + np.arange(num_tokens)
                came_in = np.broadcast_to(came_in[:, None, None], (num_tokens, *mass.shape[1:]))
                self.clock[slot] += num_tokens
                used = np.concatenate([before, came_in])
                self.memory[slot] = np.where(mass > threshold, self.clock[slot], used)
                self._same_state("used", slot)

    def _same_state(self, name, slot):
        memory = self.memory[slot]
        held = np.moveaxis(np.asarray(self.cache.policy.values[name])[slot], -1, 0)[: len(memory)]
        np.testing.assert_allclose(held, memory, rtol=1e-6, atol=1e-7)
        self.memory[slot] = held.astype(np.float64)

    def fork(self, parents, children):
        status = super().fork(parents, children)
        self._follow(zip(parents, children, status, strict=True))
        return status

    def reorder(self, seqs, parents):
        status = super().reorder(seqs, parents)
        self._follow(zip(parents, seqs, status, strict=True))
        return status

    def _follow(self, moves):
        memory, seen, clock = list(self.memory), list(self.seen), list(self.clock)
        for parent, child, status in moves:
            if status == Status.OK:
                self.memory[child] = memory[parent].copy()
                self.seen[child], self.clock[child] = seen[parent], clock[parent]

    def truncate(self, seqs, lengths):
        before = [sequence.length for sequence in self.oracle.sequences]
        status = super().truncate(seqs, lengths)
        self._forget(before)
        return status

    def free(self, seqs):
        before = [sequence.length for sequence in self.oracle.sequences]
        super().free(seqs)
        self._forget(before)

    def _forget(self, before):
        for slot, sequence in enumerate(self.oracle.sequences):
            self.memory[slot] = self.memory[slot][: sequence.length]
            if sequence.length < before[slot]:
                self.seen[slot] = 0

    # evict ---------------------------------------------------------------------------------

    def evict(self, seqs) -> list[int]:
        count = len(seqs)
        seqs = self._padded(seqs)
        self.cache, dropped = programs(self.policy).evict(self.cache, seqs)
        valid = list(dict.fromkeys(s for s in seqs.tolist() if 0 <= s < self.config.max_seqs))
        self.oracle.release([(slot, 1) for slot in valid])
        want = self._evict(valid)
        got, named = [], set()
        for slot in seqs.tolist():
            got.append(want.get(slot, 0) if slot not in named else 0)
            named.add(slot)
        assert dropped.tolist() == got
        self.check()
        return got[:count]

    def _evict(self, slots) -> dict[int, int]:
        if isinstance(self.policy, SlidingWindow):
            return self._slide(slots)
        budget, sequences = self.policy.budget, self.oracle.sequences
        due = [slot for slot in slots if sequences[slot].length > budget]
        if isinstance(self.policy, PromptCompress):
            due = [slot for slot in due if self.seen[slot] == sequences[slot].length]
        dropped = {slot: sequences[slot].length - budget for slot in due}
        granted = self.oracle.own_pages(dict.fromkeys(due, (0, budget)))
        for slot in granted:
            self._keep(slot)
            self.oracle.count_eviction(dropped[slot])
        return {slot: dropped[slot] for slot in granted}

    def _keep(self, slot):
        """Gathers the survivors of every layer and head; a group of places becomes one."""
        sequence, policy, memory = self.oracle.sequences[slot], self.policy, self.memory[slot]
        budget, length, old = policy.budget, sequence.length, [row.tokens for row in sequence.rows]
        self.memory[slot] = memory[:budget].copy()
        for row in sequence.rows[: self.oracle.num_full]:
            row.tokens = row.tokens[:budget].copy()
        self.seen[slot], sequence.least = 0, budget
        for nth, layer in enumerate(self.config.full_layers):
            row, index = self.oracle.home[layer]
            tokens = sequence.rows[row].tokens[:, :, index]
            for head in range(self.config.num_kv_heads):
                own, remembered = old[row][:, :, index, head], memory[:, nth, head]
                groups = self._groups(own[:, 0], remembered)
                assert len(groups) == budget
                for place, group in enumerate(groups):
                    first = group[0]
                    tokens[place, :, head] = own[first]
                    if len(group) > 1:
                        value = policy_rules.merged(own[:, 0], own[:, 1], remembered, group)
                        tokens[place, 1, head] = value
                    self.memory[slot][place, nth, head] = remembered[first]
                    if policy.positions == "cache":
                        key = tokens[place, 0, head]
                        key[...] = turned(key, place - first, policy.rope)
        if policy.positions == "cache":
            sequence.position -= length - budget
        if policy.positions == "cache" or isinstance(policy, SemanticMerge):
            self._take_over(slot)

    def _groups(self, keys, remembered) -> list[list[int]]:
        match self.policy:
            case HeavyHitter(budget=budget, recent=recent):
                kept = policy_rules.heavy_hitter(remembered, budget, recent)
            case LeastRecentlyUsed(budget=budget):
                kept = policy_rules.least_recently_used(remembered, budget)
            case PromptCompress(budget=budget, observe_last=observed, kernel=kernel):
                kept = policy_rules.prompt_compress(remembered, budget, observed, kernel)
            case SemanticMerge(budget=budget, recent=recent):
                return policy_rules.semantic_merge(keys, remembered, budget, recent)
        return [[place] for place in kept]

    def _slide(self, slots) -> dict[int, int]:
        policy, page_size, sequences = self.policy, self.config.page_size, self.oracle.sequences
        first, pages, far = -(-policy.sinks // page_size), {}, {}
        for slot in slots:
            length = sequences[slot].length
            pages[slot] = policy_rules.sliding_window(length, policy.window, policy.sinks, page_size)
        self.oracle.drop_pages(first, pages)
        for slot in slots:
            sequence = sequences[slot]
            if pages[slot]:
                sequence.least = first * page_size + policy.window - 1
            gap = sequence.position - sequence.length
            if policy.positions == "cache" and gap >= policy.window:
                far[slot] = gap
        if any(pages.values()):
            self._shift({slot: -gap for slot, gap in far.items()}, first * page_size)
        return {slot: count * page_size for slot, count in pages.items()}

    # shift_positions -----------------------------------------------------------------------

    def shift(self, seqs, by):
        seqs, by = self._padded(seqs), self._padded(by, fill=0)
        self.cache, status = programs(self.policy).shift(self.cache, seqs, by)
        moves, want, named = {}, [], set()
        for slot, amount in zip(seqs.tolist(), by.tolist(), strict=True):
            known = 0 <= slot < self.config.max_seqs and slot not in named
            sequence = self.oracle.sequences[slot] if known else None
            named.add(slot)
            if slot < 0:
                want.append(Status.PADDING)
            elif sequence is None or sequence.length == 0:
                want.append(Status.INVALID_SEQ)
            elif not sequence.length <= sequence.position + amount < 2**31:
                want.append(Status.INVALID_LENGTH)
            else:
                want.append(Status.OK)
                if amount:
                    moves[slot] = amount
        granted = self._shift(moves, FIRST)
        for entry, slot in enumerate(seqs.tolist()):
            if want[entry] == Status.OK and slot in moves and slot not in granted:
                want[entry] = Status.OUT_OF_PAGES
        assert [Status(s) for s in status.tolist()] == want
        self.check()

    def _shift(self, moves: dict[int, int], first: int) -> list[int]:
        sequences, column = self.oracle.sequences, first // self.config.page_size
        granted = self.oracle.own_pages({slot: (column, sequences[slot].length) for slot in moves})
        for slot in granted:
            for row in sequences[slot].rows:
                keys = row.tokens[first:, 0]
                keys[...] = turned(keys, moves[slot], self.policy.rope)
            sequences[slot].position += moves[slot]
            self._take_over(slot)
        return granted

    def _take_over(self, slot):
        """What was computed anew is as near as its dtype allows; the oracle goes on from the library's."""
        cache = replace(self.cache, policy=None)
        for layer in self.config.full_layers:
            row, index = self.oracle.home[layer]
            tokens = self.oracle.sequences[slot].rows[row].tokens[:, :, index]
            read = jitted.gather(cache, np.int32(layer), np.array([slot], np.int32))
            k, v, lengths = jax.device_get(read)
            assert lengths[0] >= len(tokens), "tokens may have come in behind"
            for nth, got in enumerate((k, v)):
                got = got[0, : len(tokens)].astype(np.float64)
                tolerance = self._step(tokens[:, nth])
                assert np.all(np.abs(got - tokens[:, nth]) <= tolerance)
                tokens[:, nth] = got

    def _step(self, values):
        if self.config.quantization == "int8":
            return np.abs(values).max(axis=-1, keepdims=True) * (1 / 127) + 1e-6
        if self.config.quantization == "int4":
            return 0.15 * np.linalg.norm(values, axis=-1, keepdims=True) + 1e-6
        return TOLERANCE[self.config.dtype] * np.maximum(np.abs(values), 1.0)


def turned(keys, by, rope):
    """RoPE by definition, in float64: pairs of features as complex numbers."""
    frequencies = np.asarray(rope.frequencies)
    count, out = len(frequencies), keys.copy()
    first = slice(0, count) if rope.pairing == "half" else slice(0, 2 * count, 2)
    second = slice(count, 2 * count) if rope.pairing == "half" else slice(1, 2 * count, 2)
    pairs = (keys[..., first] + 1j * keys[..., second]) * np.exp(1j * by * frequencies)
    out[..., first], out[..., second] = pairs.real, pairs.imag
    return out
