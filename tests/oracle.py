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
from tests.prefix_oracle import PrefixOracle


@dataclass
class Row:
    """One group's part of a sequence.

    `tokens` [count, 2, layers, kv_heads, head_dim]: k and v of every token slot. Where the group has a
    window, of every token there ever was: those before `start` were released, and that must show nowhere.
    """

    tokens: np.ndarray
    pages: list[int] = field(default_factory=list)
    start: int = 0

    @property
    def length(self) -> int:
        return len(self.tokens) - self.start

    def copy(self) -> "Row":
        return Row(self.tokens.copy(), list(self.pages), self.start)


@dataclass
class Sequence:
    """`tokens`, `pages` and `length` are those of the first group, with full attention if any group has it.

    `least`: token slots that a cut must leave there, unless it empties the sequence: a policy rewrote them.
    `ids`: token ids, but for those that a policy dropped. `intact`: how many of the first token slots were
    never dropped, rewritten or shifted; None for all.
    """

    rows: list[Row]
    position: int = 0
    least: int = 0
    ids: list[int] = field(default_factory=list)
    intact: int | None = None

    def limit_intact(self, length):
        """No more of the first token slots are as they were."""
        self.intact = length if self.intact is None else min(self.intact, length)

    @property
    def length(self) -> int:
        return self.rows[0].length

    @property
    def tokens(self) -> np.ndarray:
        return self.rows[0].tokens

    @tokens.setter
    def tokens(self, tokens):
        self.rows[0].tokens = tokens

    @property
    def pages(self) -> list[int]:
        return self.rows[0].pages

    @pages.setter
    def pages(self, pages):
        self.rows[0].pages = pages

    def copy(self) -> "Sequence":
        rows = [row.copy() for row in self.rows]
        return Sequence(rows, self.position, self.least, list(self.ids), self.intact)


@dataclass
class Batch:
    status: list[Status]
    query_starts: list[int]
    kv_lengths: list[int]
    rows: dict[int, tuple[int, int, int]]  # row of the token axis -> slot, token slot, position
    indices: dict[int, list[int]]  # row of the token axis -> token slot in the row of each group
    handed_out: list[int]  # labels, in the order their pages leave the stack
    written: list[int] = field(default_factory=list)  # part-full tail pages that are written in place


class Oracle:
    def __init__(self, config: CacheConfig):
        self.config, self.groups = config, config.groups
        self.windowed = [group for group, of in enumerate(self.groups) if of.window is not None]
        self.home = {
            layer: (group, index)
            for group, of in enumerate(self.groups)
            for index, layer in enumerate(of.layers)
        }
        self.sequences = [self.empty() for _ in range(config.max_seqs)]
        self.labels = 0
        self.stats = Counter()
        self.prefixes = PrefixOracle(config) if config.prefix_cache else None

    def empty(self) -> Sequence:
        shapes = [(0, 2, len(of.layers), of.num_kv_heads, of.head_dim) for of in self.groups]
        return Sequence([Row(np.zeros(shape)) for shape in shapes])

    def owners(self) -> Counter:
        return Counter(page for sequence in self.sequences for row in sequence.rows for page in row.pages)

    @property
    def num_used(self) -> int:
        return len(self.owners())

    @property
    def num_free(self) -> int:
        """Pages that can be taken: those that no sequence has."""
        return self.config.num_pages - self.num_used

    @property
    def num_reclaimable(self) -> int:
        return 0 if self.prefixes is None else len(self.prefixes.queue)

    @property
    def num_reclaimed(self) -> int:
        return 0 if self.prefixes is None else self.prefixes.num_reclaimed

    def rows_before(self):
        return [[list(row.pages) for row in sequence.rows] for sequence in self.sequences]

    def settle(self, before, slots):
        """Recorded pages without a row are reclaimable now, the end of a chain before its beginning."""
        if self.prefixes is None:
            return
        slots = [slot for slot in dict.fromkeys(slots) if 0 <= slot < self.config.max_seqs]
        removed = [
            label
            for group in range(len(self.groups))
            for slot in slots
            for label in reversed(before[slot][group])
            if label not in self.sequences[slot].rows[group].pages
        ]
        self.prefixes.release(removed, self.owners())

    def take(self, num_pages, used):
        """Off the stack, then off the queue. `used`: pages that sequences had before."""
        if self.prefixes is not None:
            free = self.config.num_pages - used - self.num_reclaimable
            self.prefixes.reclaim(max(num_pages - free, 0))

    def new_page(self) -> int:
        self.labels += 1
        return self.labels

    # allocate and append -------------------------------------------------------------------

    def allocate(self, seqs, num_tokens, total_tokens, waiting=()) -> Batch:
        """`waiting`: slots that a policy found no pages for, and refuses until there are some."""
        self.release(self.valid(seqs, num_tokens, total_tokens))
        owners, used, free, before = self.owners(), self.num_used, self.num_free, self.rows_before()
        batch = Batch([], [0], [], {}, {}, [])
        named, starved, row = set(), False, 0
        for slot, count in zip(map(int, seqs), map(int, num_tokens), strict=True):
            first, row = row, row + max(count, 0)
            batch.query_starts.append(min(row, total_tokens))
            need = self.need(slot, count, owners)
            pages = sum(copies + fresh for copies, fresh in need)
            if slot < 0:
                status = Status.PADDING
            elif slot >= self.config.max_seqs or slot in named:
                status = Status.INVALID_SEQ
            elif count < 0 or (count > 0 and row > total_tokens) or self.too_many_at_once(count):
                status = Status.INVALID_LENGTH
            elif count == 0:
                status = Status.OK
            elif slot in waiting:
                status = Status.OUT_OF_PAGES
            elif self.stored(slot) + count > self.config.max_tokens_per_seq:
                status = Status.SEQUENCE_TOO_LONG
            elif pages and (starved or pages > free):
                status, starved = Status.OUT_OF_PAGES, True
            else:
                status, free = Status.OK, free - pages
                self.extend(slot, count, need, first, batch)
            named.add(slot)
            batch.status.append(status)
            batch.kv_lengths.append(self.stored(slot) if status == Status.OK else 0)
        handed_out = len(batch.handed_out)
        self.take(handed_out, used)
        self.settle(before, map(int, seqs))
        for label in batch.written:
            if self.prefixes is not None and label in self.prefixes.holder:
                self.prefixes.unrecord(label)
        self.stats["total_allocations"] += handed_out
        self.stats["total_deallocations"] += used + handed_out - self.num_used
        self.stats["peak_pages"] = max(self.stats["peak_pages"], used + handed_out)
        self.stats["refused_allocations"] += sum(
            status not in (Status.OK, Status.PADDING) for status in batch.status
        )
        return batch

    def stored(self, slot) -> int:
        """Token slots that count against the longest a sequence may be: with windows only, every token."""
        sequence = self.sequences[slot]
        return sequence.length if self.groups[0].window is None else sequence.position

    def too_many_at_once(self, count) -> bool:
        return bool(self.windowed) and count > self.config.max_chunk

    def valid(self, seqs, num_tokens, total_tokens) -> list[tuple[int, int]]:
        """Entries that ask for tokens and are refused at most for want of room."""
        valid, named, row = [], set(), 0
        for slot, count in zip(map(int, seqs), map(int, num_tokens), strict=True):
            row += max(count, 0)
            known = 0 <= slot < self.config.max_seqs and slot not in named
            named.add(slot)
            if known and count > 0 and row <= total_tokens and not self.too_many_at_once(count):
                valid.append((slot, count))
        return valid

    def growing(self, seqs, num_tokens, total_tokens) -> list[int]:
        """The slots whose new tokens do not fit their tail page: a policy evicts from them first."""
        valid = self.valid(seqs, num_tokens, total_tokens)
        return [s for s, count in valid if count > -self.sequences[s].length % self.config.page_size]

    def release(self, entries):
        """Whole pages of tokens that no token to come can see, even once `rollback` tokens are taken back."""
        used, before = self.num_used, self.rows_before()
        for slot, _ in entries:
            sequence = self.sequences[slot]
            for group in self.windowed:
                of, row = self.groups[group], sequence.rows[group]
                first_kept = max(0, sequence.position - (of.window - 1) - self.config.rollback)
                pages = max(0, first_kept - row.start) // of.page_size
                row.start += pages * of.page_size
                del row.pages[:pages]
        self.settle(before, [slot for slot, _ in entries])
        self.stats["total_deallocations"] += used - self.num_used

    def need(self, slot, count, owners) -> list[tuple[int, int]]:
        """For each group the pages for the copy of a shared part-full tail, and fresh pages."""
        if not (0 <= slot < self.config.max_seqs and count > 0):
            return [(0, 0) for _ in self.groups]
        need = []
        for of, row in zip(self.groups, self.sequences[slot].rows, strict=True):
            part_full = row.length % of.page_size > 0
            copies = int(part_full and owners[row.pages[-1]] > 1)
            need.append((copies, -(-(row.length + count) // of.page_size) - len(row.pages)))
        return need

    def extend(self, slot, count, need, first_row, batch):
        sequence = self.sequences[slot]
        for i in range(count):
            batch.rows[first_row + i] = (slot, sequence.length + i, sequence.position + i)
            batch.indices[first_row + i] = [row.length + i for row in sequence.rows]
        for of, row, (copies, fresh) in zip(self.groups, sequence.rows, need, strict=True):
            if row.length % of.page_size and not copies:
                batch.written.append(row.pages[-1])
            new = [self.new_page() for _ in range(copies + fresh)]
            row.pages = row.pages[: len(row.pages) - copies] + new
            row.tokens = np.concatenate([row.tokens, np.full((count, *row.tokens.shape[1:]), np.nan)])
            batch.handed_out += new
            self.stats["copy_on_write_copies"] += copies
        sequence.position += count

    def append(self, batch: Batch, layer, k, v):
        """k and v [tokens, kv_heads, head_dim]."""
        if self.config.quantization:
            dtype, storage = self.config.dtype, self.config.storage_dtype
            k, v, *scales = reference.encode(k, v, np.dtype(storage))
            pairs = zip((k, v), scales, strict=True)
            k, v = (reference.dequantize(*pair).astype(np.float32).astype(dtype) for pair in pairs)
        group, index = self.home[layer]
        for number, (slot, _, _) in batch.rows.items():
            row = self.sequences[slot].rows[group]
            row.tokens[row.start + batch.indices[number][group], :, index] = k[number], v[number]

    # reading -------------------------------------------------------------------------------

    def gather(self, layer, slot) -> tuple[np.ndarray, np.ndarray]:
        """What is stored. Where the layer has a window, by position, and zeros for what was released."""
        group, index = self.home[layer]
        row = self.sequences[slot].rows[group]
        tokens = row.tokens[:, :, index].copy()
        tokens[: row.start] = 0
        return tokens[:, 0], tokens[:, 1]

    def attend(self, layer, slot, q, last, window=None, **options) -> tuple[np.ndarray, np.ndarray]:
        """(out, lse) of q [tokens, q_heads, head_dim], whose last row is token `last` of the first group.

        Over every token there ever was, in a layer with a window: what is released must make no difference.
        """
        group, index = self.home[layer]
        of, sequence = self.groups[group], self.sequences[slot]
        row = sequence.rows[group]
        if of.window is not None:
            window = of.window if window is None else min(window, of.window)
        end = len(row.tokens) - (sequence.length - 1 - last)
        k, v = row.tokens[:end, 0, index], row.tokens[:end, 1, index]
        return reference.attention(q, k, v, window=window, **options)

    # sharing and giving back ---------------------------------------------------------------

    def fork(self, parents, children) -> list[Status]:
        before, taken, status = [s.position for s in self.sequences], set(), []
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
                self.sequences[child] = self.sequences[parent].copy()
        return status

    def reorder(self, seqs, parents) -> list[Status]:
        used, before, named, status = self.num_used, list(self.sequences), set(), []
        rows = self.rows_before()
        for slot, parent in zip(map(int, seqs), map(int, parents), strict=True):
            if slot < 0 or parent < 0:
                status.append(Status.PADDING)
                continue
            beyond = max(slot, parent) >= self.config.max_seqs
            if beyond or slot in named or (slot != parent and before[parent].position == 0):
                status.append(Status.INVALID_SEQ)
            else:
                status.append(Status.OK)
                named.add(slot)
                self.sequences[slot] = before[parent].copy()
        self.settle(rows, map(int, seqs))
        self.stats["total_deallocations"] += used - self.num_used
        return status

    def truncate(self, seqs, lengths) -> list[Status]:
        """`lengths`: tokens that each sequence has afterwards, those that were dropped included."""
        used, pairs = self.num_used, list(zip(map(int, seqs), map(int, lengths), strict=True))
        before = self.rows_before()
        shortest = {}
        for slot, length in pairs:
            if 0 <= slot < self.config.max_seqs and length >= 0:
                shortest[slot] = min(length, shortest.get(slot, length))
        refused = {slot for slot, length in shortest.items() if not self.cut(slot, length)}
        self.settle(before, shortest)
        self.stats["total_deallocations"] += used - self.num_used
        return [
            Status.PADDING
            if slot < 0
            else Status.INVALID_SEQ
            if slot >= self.config.max_seqs
            else Status.INVALID_LENGTH
            if length < 0
            else Status.ROLLBACK_TOO_LONG
            if slot in refused
            else Status.OK
            for slot, length in pairs
        ]

    def cut(self, slot, length) -> bool:
        """False where it would need tokens that are gone."""
        sequence = self.sequences[slot]
        by = sequence.position - length
        if by <= 0:
            return True
        if length == 0:
            self.sequences[slot] = self.empty()
            return True
        for of, row in zip(self.groups, sequence.rows, strict=True):
            seen_from = 0 if of.window is None else max(0, length - of.window + 1)
            least = 0 if of.window is not None else max(1, sequence.least)
            if row.start > seen_from or row.length - by < least:
                return False
        for of, row in zip(self.groups, sequence.rows, strict=True):
            row.tokens = row.tokens[: len(row.tokens) - by]
            row.pages = row.pages[: -(-row.length // of.page_size)]
        sequence.ids = sequence.ids[: len(sequence.ids) - by]
        if sequence.intact is not None and length == sequence.length <= sequence.intact:
            sequence.intact = None
        sequence.position = length
        return True

    def free(self, seqs):
        self.truncate(seqs, [0] * len(seqs))

    # prefixes ------------------------------------------------------------------------------

    def note_ids(self, batch: Batch, ids):
        """Which tokens an `allocate` was for."""
        for number, (slot, _, _) in sorted(batch.rows.items()):
            self.sequences[slot].ids.append(int(ids[number]))

    def match_prefix(self, seqs, tokens, num_tokens, salts) -> list[int]:
        prefixes, owners, named = self.prefixes, self.owners(), Counter(map(int, seqs))
        found = []
        most = min(tokens.shape[1], self.config.max_tokens_per_seq) // prefixes.block
        for slot, row, count, salt in zip(map(int, seqs), tokens, map(int, num_tokens), salts, strict=True):
            valid = 0 <= slot < self.config.max_seqs and named[slot] == 1
            if not valid or self.sequences[slot].position:
                found.append(None)
                continue
            self.stats["prefix_queries"] += 1
            self.stats["prefix_tokens_asked"] += min(max(count, 0), tokens.shape[1])
            count = min(max((count - 1) // prefixes.block, 0), most)
            found.append(prefixes.match(row.tolist(), count, int(salt)))
        for slot, row, match in zip(map(int, seqs), tokens, found, strict=True):
            if match is not None and match[0]:
                self.install(self.sequences[slot], row.tolist(), *match)
        labels = {label for match in found if match is not None for of in match[1] for label in of}
        taken = [label for label in labels if not owners[label]]
        prefixes.queue = [label for label in prefixes.queue if label not in labels]
        self.stats["total_allocations"] += len(taken)
        self.stats["peak_pages"] = max(self.stats["peak_pages"], self.num_used)
        matched = [0 if match is None else match[0] * prefixes.block for match in found]
        self.stats["prefix_tokens_matched"] += sum(matched)
        return matched

    def install(self, sequence: Sequence, tokens, blocks, labels):
        length = blocks * self.prefixes.block
        for of, row, some in zip(self.groups, sequence.rows, labels, strict=True):
            row.pages, row.start = list(some), length - len(some) * of.page_size
            gone = np.zeros((row.start, *row.tokens.shape[1:]))
            row.tokens = np.concatenate([gone, *(self.prefixes.content[label] for label in some)])
        sequence.position, sequence.ids, sequence.intact = length, tokens[:length], None

    def record_prefix(self, seqs, tokens, num_tokens, salts):
        most = min(tokens.shape[1], self.config.max_tokens_per_seq) // self.prefixes.block
        for slot, row, count, salt in zip(map(int, seqs), tokens, map(int, num_tokens), salts, strict=True):
            if not 0 <= slot < self.config.max_seqs:
                continue
            sequence = self.sequences[slot]
            count = min(count, sequence.position)
            count = count if sequence.intact is None else min(count, sequence.intact)
            count = min(max(count // self.prefixes.block, 0), most)
            pages = [self.pages_of_block(sequence, block) for block in range(count)]
            self.stats["prefix_pages_recorded"] += self.prefixes.record(row.tolist(), count, int(salt), pages)

    def pages_of_block(self, sequence: Sequence, block):
        found = {}
        for group, (of, row, each) in enumerate(
            zip(self.groups, sequence.rows, self.prefixes.each, strict=True)
        ):
            for nth in range(each):
                first = (block * each + nth) * of.page_size
                if row.start <= first and first + of.page_size <= len(row.tokens):
                    label = row.pages[(first - row.start) // of.page_size]
                    found[group, nth] = label, row.tokens[first : first + of.page_size].copy()
        return found

    def clear_prefixes(self):
        self.prefixes.clear()

    # bounded memory ------------------------------------------------------------------------

    @property
    def num_full(self) -> int:
        """Groups with full attention, which come first."""
        return len(self.groups) - len(self.windowed)

    def drop_pages(self, first, dropped: dict[int, int]):
        """Whole pages of each slot, from a column on, in groups with full attention."""
        used, page_size, before = self.num_used, self.config.page_size, self.rows_before()
        for slot, pages in dropped.items():
            sequence, gone = self.sequences[slot], slice(first * page_size, (first + pages) * page_size)
            for row in sequence.rows[: self.num_full]:
                row.tokens = np.delete(row.tokens, gone, axis=0)
                del row.pages[first : first + pages]
            if pages:
                del sequence.ids[gone]
                sequence.limit_intact(first * page_size)
            self.count_eviction(pages * page_size)
        self.settle(before, dropped)
        self.stats["total_deallocations"] += used - self.num_used

    def count_eviction(self, tokens):
        self.stats["evictions"] += tokens > 0
        self.stats["evicted_tokens"] += tokens

    def own_pages(self, wanted: dict[int, tuple[int, int]]) -> list[int]:
        """Pages of its own for each slot, from a column to a length; returns the slots that got them.

        Its own pages stay where they are, those beyond the length fill holes, then come fresh ones. In every
        group with full attention or in none."""
        owners, used, free, granted, handed_out = self.owners(), self.num_used, self.num_free, [], 0
        starved, before, written = False, self.rows_before(), []
        for slot, (first, length) in wanted.items():
            full, end = self.sequences[slot].rows[: self.num_full], -(-length // self.config.page_size)
            spares = [[p for p in row.pages[max(first, end) :] if owners[p] == 1] for row in full]
            holes = [sum(owners[page] > 1 for page in row.pages[first:end]) for row in full]
            needs = [max(count - len(own), 0) for count, own in zip(holes, spares, strict=True)]
            need = sum(needs)
            if need and (starved or need > free):
                starved = True
                continue
            free, handed_out = free - need, handed_out + need
            for row, own, fresh in zip(full, spares, needs, strict=True):
                spare = iter([*own, *(self.new_page() for _ in range(fresh))])
                kept = [page if owners[page] == 1 else next(spare) for page in row.pages[first:end]]
                row.pages = row.pages[:first] + kept
                written += kept
            self.sequences[slot].limit_intact(min(first * self.config.page_size, length))
            granted.append(slot)
        self.take(handed_out, used)
        self.settle(before, granted)
        for label in written:
            if self.prefixes is not None and label in self.prefixes.holder:
                self.prefixes.unrecord(label)
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
        owners = self.owners()
        sizes, fullest = {}, dict.fromkeys(owners, 0)
        for sequence in self.sequences:
            for of, row in zip(self.groups, sequence.rows, strict=True):
                for number, page in enumerate(row.pages):
                    held = min(of.page_size, row.length - number * of.page_size)
                    fullest[page], sizes[page] = max(fullest[page], held), of.page_size
        readable = sum(row.length for sequence in self.sequences for row in sequence.rows)
        stored, places = sum(fullest.values()), sum(sizes.values())
        return dict(
            active_seqs=sum(s.position > 0 for s in self.sequences),
            tokens=sum(self.stored(slot) for slot in range(self.config.max_seqs)),
            stored_tokens=stored,
            physical_pages=len(owners),
            logical_pages=sum(owners.values()),
            shared_pages=sum(count > 1 for count in owners.values()),
            saved_pages=sum(owners.values()) - len(owners),
            free_pages=self.num_free - self.num_reclaimable,
            reclaimable_pages=self.num_reclaimable,
            unused_token_slots=places - stored,
            fragmentation=(places - stored) / places if places else 0.0,
            efficiency=readable / places if places else 1.0,
        )
