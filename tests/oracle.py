"""The cache in plain Python: what every operation means. Read this before the library.

A sequence is the array of its tokens. Pages appear only as labels, a new one whenever a page is
handed out, so that forks share a page by holding the same label; how many pages are free, and
who shares what, follows from which labels are held. Which id a page has is not the oracle's
business: `tests.twin` checks that labels and ids correspond one to one.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from jaxkv import CacheConfig, Status
from pallas_kernels import reference


@dataclass
class Sequence:
    tokens: np.ndarray  # [length, 2, layers, kv_heads, head_dim]: k and v of every token
    pages: list[int] = field(default_factory=list)
    position: int = 0

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass
class Batch:
    status: list[Status]
    query_starts: list[int]
    kv_lengths: list[int]
    rows: dict[int, tuple[int, int, int]]  # row of the token axis -> slot, place, position
    handed_out: list[int]  # labels, in the order their pages leave the stack


class Oracle:
    def __init__(self, config: CacheConfig):
        self.config = config
        self.sequences = [self.empty() for _ in range(config.max_seqs)]
        self.labels = 0
        self.stats = Counter()

    def empty(self) -> Sequence:
        config = self.config
        return Sequence(np.zeros((0, 2, config.num_layers, config.num_kv_heads, config.head_dim)))

    def owners(self) -> Counter:
        return Counter(page for sequence in self.sequences for page in sequence.pages)

    @property
    def num_used(self) -> int:
        return len(self.owners())

    @property
    def num_free(self) -> int:
        return self.config.num_pages - self.num_used

    def new_page(self) -> int:
        self.labels += 1
        return self.labels

    # allocate and append -------------------------------------------------------------------

    def allocate(self, seqs, num_tokens, total_tokens, waiting=()) -> Batch:
        """`waiting`: slots that a policy found no pages for, and refuses until there are some."""
        owners, used, free = self.owners(), self.num_used, self.num_free
        batch = Batch([], [0], [], {}, [])
        named, starved, row = set(), False, 0
        for slot, count in zip(map(int, seqs), map(int, num_tokens), strict=True):
            first, row = row, row + max(count, 0)
            batch.query_starts.append(min(row, total_tokens))
            copies, fresh = self.need(slot, count, owners)
            if slot < 0:
                status = Status.PADDING
            elif slot >= self.config.max_seqs or slot in named:
                status = Status.INVALID_SEQ
            elif count < 0 or (count > 0 and row > total_tokens):
                status = Status.INVALID_LENGTH
            elif count == 0:
                status = Status.OK
            elif slot in waiting:
                status = Status.OUT_OF_PAGES
            elif self.sequences[slot].length + count > self.config.max_tokens_per_seq:
                status = Status.SEQUENCE_TOO_LONG
            elif copies + fresh and (starved or copies + fresh > free):
                status, starved = Status.OUT_OF_PAGES, True
            else:
                status, free = Status.OK, free - copies - fresh
                self.extend(slot, count, copies, fresh, first, batch)
            named.add(slot)
            batch.status.append(status)
            batch.kv_lengths.append(self.sequences[slot].length if status == Status.OK else 0)
        handed_out = len(batch.handed_out)
        self.stats["total_allocations"] += handed_out
        self.stats["total_deallocations"] += used + handed_out - self.num_used
        self.stats["peak_pages"] = max(self.stats["peak_pages"], used + handed_out)
        self.stats["refused_allocations"] += sum(
            status not in (Status.OK, Status.PADDING) for status in batch.status
        )
        return batch

    def growing(self, seqs, num_tokens, total_tokens) -> list[int]:
        """The slots whose new tokens do not fit their tail page: a policy evicts from them first."""
        growing, named, row = [], set(), 0
        for slot, count in zip(map(int, seqs), map(int, num_tokens), strict=True):
            row += max(count, 0)
            valid = 0 <= slot < self.config.max_seqs and slot not in named and row <= total_tokens
            named.add(slot)
            if valid and count > -self.sequences[slot].length % self.config.page_size:
                growing.append(slot)
        return growing

    def need(self, slot, count, owners) -> tuple[int, int]:
        """Pages for the copy of a shared part-full tail, and fresh pages."""
        if not (0 <= slot < self.config.max_seqs and count > 0):
            return 0, 0
        sequence, page_size = self.sequences[slot], self.config.page_size
        part_full = sequence.length % page_size > 0
        copies = int(part_full and owners[sequence.pages[-1]] > 1)
        return copies, -(-(sequence.length + count) // page_size) - len(sequence.pages)

    def extend(self, slot, count, copies, fresh, first_row, batch):
        sequence = self.sequences[slot]
        for i in range(count):
            place, position = sequence.length + i, sequence.position + i
            batch.rows[first_row + i] = (slot, place, position)
        new = [self.new_page() for _ in range(copies + fresh)]
        sequence.pages = sequence.pages[: len(sequence.pages) - copies] + new
        unwritten = np.full((count, *sequence.tokens.shape[1:]), np.nan)
        sequence.tokens = np.concatenate([sequence.tokens, unwritten])
        sequence.position += count
        batch.handed_out += new
        self.stats["copy_on_write_copies"] += copies

    def append(self, batch: Batch, k, v):
        """k and v [layers, tokens, kv_heads, head_dim]."""
        if self.config.quantization:
            dtype, storage = self.config.dtype, self.config.storage_dtype
            k, v, *scales = reference.encode(k, v, np.dtype(storage))
            pairs = zip((k, v), scales, strict=True)
            k, v = (reference.dequantize(*pair).astype(np.float32).astype(dtype) for pair in pairs)
        for row, (slot, place, _) in batch.rows.items():
            self.sequences[slot].tokens[place] = k[:, row], v[:, row]

    # reading -------------------------------------------------------------------------------

    def gather(self, layer, slot) -> tuple[np.ndarray, np.ndarray]:
        tokens = self.sequences[slot].tokens
        return tokens[:, 0, layer], tokens[:, 1, layer]

    def attend(self, layer, slot, q, last, **options) -> tuple[np.ndarray, np.ndarray]:
        """(out, lse) of q [tokens, q_heads, head_dim], whose last row sits at place `last`."""
        k, v = self.gather(layer, slot)
        return reference.attention(q, k[: last + 1], v[: last + 1], **options)

    # sharing and giving back ---------------------------------------------------------------

    def fork(self, parents, children) -> list[Status]:
        before, taken, status = [s.length for s in self.sequences], set(), []
        for parent, child in zip(map(int, parents), map(int, children), strict=True):
            if parent < 0 or child < 0:
                status.append(Status.PADDING)
            elif max(parent, child) >= self.config.max_seqs:
                status.append(Status.INVALID_SEQ)
            elif child == parent:
                status.append(Status.OCCUPIED)
            elif before[parent] == 0:
                status.append(Status.INVALID_SEQ)
            elif before[child] > 0 or child in taken:
                status.append(Status.OCCUPIED)
            else:
                status.append(Status.OK)
                taken.add(child)
                source = self.sequences[parent]
                self.sequences[child] = Sequence(source.tokens.copy(), list(source.pages), source.position)
        return status

    def reorder(self, seqs, parents) -> list[Status]:
        used, before, named, status = self.num_used, list(self.sequences), set(), []
        for slot, parent in zip(map(int, seqs), map(int, parents), strict=True):
            if slot < 0 or parent < 0:
                status.append(Status.PADDING)
                continue
            beyond = max(slot, parent) >= self.config.max_seqs
            if beyond or slot in named or (slot != parent and before[parent].length == 0):
                status.append(Status.INVALID_SEQ)
            else:
                status.append(Status.OK)
                named.add(slot)
                source = before[parent]
                self.sequences[slot] = Sequence(source.tokens.copy(), list(source.pages), source.position)
        self.stats["total_deallocations"] += used - self.num_used
        return status

    def truncate(self, seqs, lengths):
        used = self.num_used
        for slot, length in zip(map(int, seqs), map(int, lengths), strict=True):
            if not 0 <= slot < self.config.max_seqs:
                continue
            sequence = self.sequences[slot]
            if length == 0:
                self.sequences[slot] = self.empty()
            elif 0 < length < sequence.length:
                sequence.position -= sequence.length - length
                sequence.tokens = sequence.tokens[:length]
                sequence.pages = sequence.pages[: -(-length // self.config.page_size)]
        self.stats["total_deallocations"] += used - self.num_used

    def free(self, seqs):
        self.truncate(seqs, [0] * len(seqs))

    # bounded memory ------------------------------------------------------------------------

    def drop_pages(self, slot, first, dropped):
        """Whole pages, from a column on."""
        used, sequence, page_size = self.num_used, self.sequences[slot], self.config.page_size
        gone = slice(first * page_size, (first + dropped) * page_size)
        sequence.tokens = np.delete(sequence.tokens, gone, axis=0)
        del sequence.pages[first : first + dropped]
        self.stats["total_deallocations"] += used - self.num_used
        self.count_eviction(dropped * page_size)

    def count_eviction(self, tokens):
        self.stats["evictions"] += tokens > 0
        self.stats["evicted_tokens"] += tokens

    def own_pages(self, wanted: dict[int, tuple[int, int]]) -> list[int]:
        """Pages of its own for each slot, from a column to a length; returns the slots that got them.

        Its own pages stay where they are, those beyond the length fill holes, then come fresh ones."""
        owners, used, free, granted, handed_out = self.owners(), self.num_used, self.num_free, [], 0
        starved = False
        for slot, (first, length) in wanted.items():
            pages, end = self.sequences[slot].pages, -(-length // self.config.page_size)
            spares = [page for page in pages[max(first, end) :] if owners[page] == 1]
            holes = sum(owners[page] > 1 for page in pages[first:end])
            need = max(holes - len(spares), 0)
            if need and (starved or need > free):
                starved = True
                continue
            free, handed_out = free - need, handed_out + need
            spares = iter([*spares, *(self.new_page() for _ in range(need))])
            kept = [page if owners[page] == 1 else next(spares) for page in pages[first:end]]
            self.sequences[slot].pages = pages[:first] + kept
            granted.append(slot)
        self.stats["total_allocations"] += handed_out
        self.stats["total_deallocations"] += used + handed_out - self.num_used
        self.stats["peak_pages"] = max(self.stats["peak_pages"], used + handed_out)
        return granted

    def compact(self, num_moved):
        self.stats["compactions"] += 1
        self.stats["pages_moved"] += int(num_moved)

    # memory --------------------------------------------------------------------------------

    def profile(self) -> dict[str, int | float]:
        """What `memory_profile` must count, but for where pages lie."""
        owners, page_size = self.owners(), self.config.page_size
        fullest = dict.fromkeys(owners, 0)
        for sequence in self.sequences:
            for number, page in enumerate(sequence.pages):
                held = min(page_size, sequence.length - number * page_size)
                fullest[page] = max(fullest[page], held)
        tokens, stored = sum(s.length for s in self.sequences), sum(fullest.values())
        places = len(owners) * page_size
        return dict(
            active_seqs=sum(s.length > 0 for s in self.sequences),
            tokens=tokens,
            stored_tokens=stored,
            physical_pages=len(owners),
            logical_pages=sum(owners.values()),
            shared_pages=sum(count > 1 for count in owners.values()),
            saved_pages=sum(owners.values()) - len(owners),
            free_pages=self.num_free,
            unused_places=places - stored,
            fragmentation=(places - stored) / places if places else 0.0,
            efficiency=tokens / places if places else 1.0,
        )
