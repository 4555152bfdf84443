"""A server in plain Python: the same rules, one request at a time. Read this before `jaxkv.serving`.

What a sample's text is depends on the request alone (`tests.history_model.alone`); what this decides is when.
"""

from dataclasses import dataclass

import numpy as np

from jaxkv import Finish, Status
from jaxkv.serving import Phase, PromptLookup, Request, ServingConfig
from tests.history_model import alone
from tests.oracle import Oracle


@dataclass(eq=False)
class Row:
    """A sample. `text` is what it has so far, `whole` what it will have; `slot` is None unless it runs."""

    request: Request
    sample: int
    arrival: int
    text: list[int]
    whole: list[int]
    stops: bool
    phase: Phase = Phase.WAITING
    finish: Finish = Finish.RUNNING
    slot: int | None = None
    leader: int | None = None  # slot that it is to be forked from
    taken: int = 0

    @property
    def rank(self):
        return -self.request.priority, self.arrival, self.sample


class ServingOracle:
    def __init__(self, config: ServingConfig):
        self.config, self.sizes = config, config.cache
        self.cache = Oracle(config.cache)
        self.rows: list[Row | None] = [None] * config.max_requests
        self.steps = self.preemptions = 0

    # requests ------------------------------------------------------------------------------

    def live(self, *phases):
        return [row for row in self.rows if row is not None and row.phase in phases]

    def submit(self, requests: list[Request]) -> list[Status]:
        statuses, full = [], False
        last = max((row.arrival for row in self.live(Phase.WAITING, Phase.RUNNING)), default=-1)
        for entry, request in enumerate(requests):
            status = self.fault(request)
            empty = [number for number, row in enumerate(self.rows) if row is None]
            if status == Status.OK and (full or request.num_samples > len(empty)):
                status, full = Status.TABLE_FULL, True
            if status == Status.OK:
                for sample, number in zip(range(request.num_samples), empty, strict=False):
                    whole, stops = alone(request, sample, self.sizes, self.config.max_tokens)
                    text = list(request.tokens)
                    self.rows[number] = Row(
                        request, sample, last + 1 + entry, text, whole, stops, taken=len(text)
                    )
            statuses.append(status)
        return statuses

    def fault(self, request: Request) -> Status:
        length = len(request.tokens)
        if request.num_samples > min(self.sizes.max_seqs, self.config.max_requests):
            return Status.INVALID_LENGTH
        if length > min(self.config.max_tokens - 1, self.sizes.max_tokens_per_seq):
            return Status.SEQUENCE_TOO_LONG
        shared = self.shared_pages(length)
        most = shared + request.num_samples * (self.pages_of(length + 1) - shared)
        return Status.OUT_OF_PAGES if most > self.sizes.num_pages else Status.OK

    def cancel(self, ids):
        ended = [row for row in self.live(Phase.WAITING, Phase.RUNNING) if row.request.id in ids]
        self.end(dict.fromkeys(ended, Finish.CANCELLED))

    def cancel_samples(self, named):
        live = self.live(Phase.WAITING, Phase.RUNNING)
        ended = [row for row in live if (row.request.id, row.sample) in named]
        for row in ended:
            # The first that waits for its prompt goes on where it was.
            left = [one for one in live if one not in ended]
            heirs = [one for one in left if row.slot is not None and one.leader == row.slot]
            if heirs:
                heirs[0].slot, heirs[0].leader, row.slot = row.slot, None, None
        self.end(dict.fromkeys(ended, Finish.CANCELLED))

    def take(self):
        """(id, sample, new tokens, finish) of each row that has something new."""
        events = []
        for number, row in enumerate(self.rows):
            if row is None:
                continue
            new, row.taken = row.text[row.taken :], len(row.text)
            if new or row.phase == Phase.FINISHED:
                events.append((row.request.id or 0, row.sample, new, row.finish))
            if row.phase == Phase.FINISHED:
                self.rows[number] = None
        return events

    # pages ---------------------------------------------------------------------------------

    def pages_of(self, length):
        return sum(min(-(-length // group.page_size), group.columns) for group in self.sizes.groups)

    def shared_pages(self, prompt):
        return sum(prompt // group.page_size for group in self.sizes.groups if group.window is None)

    def computed(self, slot):
        return self.cache.sequences[slot].position

    def needs(self, slot, count):
        if self.cache.stored(slot) + count > self.sizes.max_tokens_per_seq:
            return 0
        return sum(map(sum, self.cache.need(slot, count, self.cache.owners())))

    # a step --------------------------------------------------------------------------------

    def slots(self) -> dict[int, Row]:
        return {row.slot: row for row in self.live(Phase.RUNNING)}

    def step(self):
        self.steps += 1
        proposed = self.propose()
        counts = self.allot(proposed)
        self.cache.release([(slot, count) for slot, count in counts.items() if count])
        while sum(self.needs(slot, count) for slot, count in counts.items() if count) > self.cache.num_free:
            if any(proposed.values()):
                proposed = {}
            else:
                self.yield_pages()
            counts = self.allot(proposed)
        if self.live(Phase.WAITING):
            self.admit(self.config.token_budget - sum(counts.values()), proposed)
        self.advance(self.allot(proposed), proposed)

    def decodes(self, row):
        return (
            row.leader is None and len(row.text) == self.computed(row.slot) + 1 and self.remaining(row) == 1
        )

    def leads(self, row):
        return any(other.leader == row.slot for other in self.slots().values())

    def remaining(self, row):
        if row.leader is not None:
            return 0
        end = min(len(row.text), len(row.request.tokens)) if self.leads(row) else len(row.text)
        return end - self.computed(row.slot)

    def propose(self) -> dict[int, list[int]]:
        if self.config.speculate is None:
            return {}
        proposed = {}
        for slot, row in self.slots().items():
            if self.decodes(row) and not self.leads(row):
                limit = min(len(row.request.tokens) + row.request.max_new_tokens, self.config.max_tokens)
                most = min(limit - len(row.text) - 1, self.sizes.max_tokens_per_seq - len(row.text))
                if self.sizes.layer_windows is not None:
                    most = min(most, self.sizes.max_chunk - 1)
                proposed[slot] = look_up(self.config.speculate, row.text)[: max(most, 0)]
        return proposed

    def allot(self, proposed) -> dict[int, int]:
        slots = self.slots()
        counts = {s: 1 + len(proposed.get(s, [])) for s, row in slots.items() if self.decodes(row)}
        left = self.config.token_budget - sum(counts.values())
        for slot, row in sorted(slots.items(), key=lambda item: item[1].rank):
            if slot not in counts:
                want = min(self.remaining(row), self.config.most_at_once)
                counts[slot] = max(0, min(want, left))
                left -= want
        return counts

    def yield_pages(self):
        """The last-ranked running request waits; alone, it ends."""
        running = self.live(Phase.RUNNING)
        last = max(running, key=lambda row: row.rank[:2])
        samples = [row for row in running if row.arrival == last.arrival]
        if len(samples) == len(running):
            self.record(samples)
            self.end(dict.fromkeys(samples, Finish.OUT_OF_PAGES))
            return
        self.record(samples)
        self.cache.free([row.slot for row in samples])
        self.preemptions += len(samples)
        for row in samples:
            row.phase, row.slot, row.leader = Phase.WAITING, None, None

    def admit(self, left, proposed):
        running = self.slots()
        free = [slot for slot in range(self.sizes.max_seqs) if slot not in running]
        reserved = (self.reserved(row, len(proposed.get(slot, []))) for slot, row in running.items())
        room = self.cache.num_free - sum(reserved)
        admitted: list[list[Row]] = []
        requests: dict[tuple, list[Row]] = {}
        for row in sorted(self.live(Phase.WAITING), key=lambda row: row.rank):
            requests.setdefault(row.rank[:2], []).append(row)
        for samples in requests.values():
            prompt = len(samples[0].request.tokens)
            room -= sum(self.pages_of(len(row.text)) + 1 for row in samples)
            room += (len(samples) - 1) * self.shared_pages(prompt)
            alone = not running and not admitted
            if (room < 0 and not alone) or len(samples) > len(free) or left <= 0 or not free:
                break
            left -= len(samples[0].text) + sum(len(row.text) - prompt for row in samples[1:])
            slots, free = free[: len(samples)], free[len(samples) :]
            for row, slot in zip(samples, slots, strict=True):
                row.phase, row.slot = Phase.RUNNING, slot
                row.leader = None if slot == slots[0] else slots[0]
            admitted.append(samples)
        if self.sizes.prefix_cache and admitted:
            first = [samples[0] for samples in admitted]
            width = self.config.max_tokens
            tokens = np.array([row.text + [0] * (width - len(row.text)) for row in first])
            ends = [len(one[0].request.tokens) if len(one) > 1 else len(one[0].text) for one in admitted]
            salts = [row.request.salt for row in first]
            self.cache.match_prefix([row.slot for row in first], tokens, ends, salts)

    def reserved(self, row, proposed):
        """Pages that a running sample will take for the tokens it has and those proposed."""
        end = len(row.text) + proposed
        whole = self.pages_of(end)
        if row.leader is not None:
            return whole - self.shared_pages(len(row.request.tokens))
        return min(self.needs(row.slot, end - self.computed(row.slot)), whole)

    def advance(self, counts, proposed):
        slots, total = self.slots(), sum(counts.values())
        width = next((width for width in self.config.widths if width >= total), None)
        finish: dict[Row, Finish] = {}
        prompts = []
        if total:
            seqs = [slot if counts.get(slot) else -1 for slot in range(self.sizes.max_seqs)]
            tokens = [counts.get(slot, 0) for slot in range(self.sizes.max_seqs)]
            statuses = self.cache.allocate(seqs, tokens, width).status
            assert all(status in (Status.OK, Status.PADDING, Status.SEQUENCE_TOO_LONG) for status in statuses)
        forks = [
            row
            for row in slots.values()
            if row.leader is not None and self.computed(row.leader) == len(row.request.tokens)
        ]
        self.cache.fork([row.leader for row in forks], [row.slot for row in forks])
        for row in forks:
            row.leader = None
        for slot, row in slots.items():
            count = counts.get(slot, 0) - len(proposed.get(slot, []))
            prompts += [row] if count > 1 else []
            ran = row in forks or count > 0
            if ran and row.leader is None and self.computed(slot) >= len(row.text):
                self.draw(row, proposed.get(slot, []), finish)
        self.record([row for row in slots.values() if row in finish or row in prompts])
        self.end(finish)

    def draw(self, row, proposed, finish):
        new = row.whole[len(row.text) : len(row.text) + 1]
        for token in proposed:
            if new[-1] != token or len(row.text) + len(new) >= len(row.whole):
                break
            new.append(row.whole[len(row.text) + len(new)])
        row.text = row.text + new
        if len(row.text) == len(row.whole):
            finish[row] = Finish.STOP if row.stops else Finish.LENGTH
        if len(new) <= len(proposed):
            assert self.cache.truncate([row.slot], [len(row.text) - 1]) == [Status.OK]

    def record(self, rows):
        if not self.sizes.prefix_cache:
            return
        width = self.config.max_tokens
        for row in sorted(rows, key=lambda row: row.slot):
            if row.leader is None:
                tokens = np.array([row.text + [0] * (width - len(row.text))])
                self.cache.record_prefix([row.slot], tokens, [self.computed(row.slot)], [row.request.salt])

    def end(self, finish: dict):
        rows = [row for row in self.rows if row is not None and any(row is one for one in finish)]
        self.cache.free([row.slot for row in rows if row.slot is not None])
        for row in rows:
            row.phase, row.finish, row.slot, row.leader = Phase.FINISHED, finish[row], None, None


def look_up(speculate: PromptLookup, text) -> list[int]:
    """What followed the last occurrence of the text's last tokens."""
    ngram, most = speculate.ngram, speculate.num_tokens
    for begin in range(len(text) - 1, ngram - 1, -1):
        if text[begin - ngram : begin] == text[-ngram:]:
            return text[begin : begin + most]
    return []
