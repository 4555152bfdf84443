"""Whether prompts fit a cache, told before anything is computed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import count

import numpy as np

from jaxkv.config import CacheConfig
from jaxkv.errors import OutOfPagesError, SequenceTooLongError
from jaxkv.groups import Group
from jaxkv.ownership import num_available, num_users
from jaxkv.packing import Stage, chunks, most_at_once, stages
from jaxkv.pages import lengths
from jaxkv.policies import Policy
from jaxkv.state import KVCache


def check_fit(
    config: CacheConfig,
    cache: KVCache | None,
    slots: np.ndarray,
    prompts: Mapping[int, list[int]],
    shared: int,
    policy: Policy | None,
    prefill_chunk: int,
    found: Mapping[int, int] | None = None,
) -> None:
    """Refuses prompts that cannot fit, before anything is computed.

    Args:
      config: of the cache.
      cache: the cache that the prompts are appended to; None for an empty one.
      slots: of all prompts.
      prompts: token ids by index of the prompt; prompts that are not run are left out.
      shared: number of pages that all of them begin with.
      policy: the eviction policy, or None.
      prefill_chunk: most tokens per prefill step.
      found: tokens that each begins with like an earlier prompt, whole pages, which a cache with
        `prefix_cache` finds again. Default: none.

    Raises:
      SequenceTooLongError, OutOfPagesError: naming what is needed and what is available.
    """
    if not prompts:
        return
    most = None
    if policy is not None and not policy.once:
        most = policy.most_kept(config) + most_at_once(policy, config, prefill_chunk)
    held_now = np.zeros(config.max_seqs, np.int32) if cache is None else np.asarray(lengths(cache))
    for number, prompt in prompts.items():
        before = int(held_now[slots[number]])
        if before + len(prompt) > config.max_tokens_per_seq and most is None:
            raise longer_than_a_row(config, number, len(prompt), before)
    saved = shared
    if found is not None:
        prompts = {number: prompt[found.get(number, 0) :] for number, prompt in prompts.items()}
        saved = sum(found.values()) // config.page_size
    parts = stages(list(prompts.values()), shared * config.page_size, prefill_chunk, config, policy)
    own = [int(slots[number]) for number in prompts]
    if policy is None:
        pages = rehearse(config, cache, own, parts, config.groups)
    else:
        windowed = [group for group in config.groups if group.window is not None]
        pages = rehearse(config, cache, own, parts, windowed)
        saved = shared = shared if most is None else min(shared, config.pages_for(most))
        stored = [(int(held_now[slots[number]]), len(prompt)) for number, prompt in prompts.items()]
        pages += _pages_with_policy(config, stored, shared, policy, most) + copied_pages(cache, own)
    free = config.num_pages if cache is None else int(num_available(cache.table))
    if pages > free:
        raise OutOfPagesError(
            f"the prompts need {pages} pages of {config.page_size} tokens ({saved} of them shared); "
            f"{free} of the pool's {config.num_pages} are free"
        )


def longer_than_a_row(config: CacheConfig, number: int, length: int, before: int = 0) -> SequenceTooLongError:
    """The error for a prompt of so many tokens, after those that its slot holds already."""
    after = f" after the {before} in its slot" if before else ""
    return SequenceTooLongError(
        f"prompt {number} has {length} tokens{after}; a sequence holds "
        f"{config.max_tokens_per_seq} ({config.max_pages_per_seq} pages of {config.page_size})"
    )


def rehearse(
    config: CacheConfig,
    cache: KVCache | None,
    slots: Sequence[int],
    parts: Sequence[Stage],
    groups: Sequence[Group],
) -> int:
    """The most pages beside those held now that a prefill takes at any step, in these groups of layers.

    Every step is gone through on the host as `allocate`, `evict` and `fork` go through it: what windows no
    longer show is released, shared pages are copied before they are written to, and then pages are taken.

    Args:
      config: of the cache.
      cache: the cache that the prompts are appended to; None for an empty one.
      slots: of the prompts that are run.
      parts: what is run, in order.
      groups: the groups that count.
    """
    rows = [_Row(group, config, cache, slot) for group in groups for slot in slots]
    owners = Counter() if cache is None else Counter(dict(enumerate(num_users(cache.table).tolist())))
    fresh, held, most = count(config.num_pages), 0, 0

    def disown(pages: list[int]) -> int:
        owners.subtract(pages)
        return sum(owners[page] == 0 for page in set(pages))

    for part in parts:
        for num_tokens, _, _ in chunks(part.prompts, part.size, part.most, part.whole):
            counts = np.tile(num_tokens, len(groups)).tolist()
            grows = [(row, num) for row, num in zip(rows, counts, strict=True) if num]
            held -= sum(disown(row.release()) for row, _ in grows)
            shared = [row for row, _ in grows if row.has_room and owners[row.pages[-1]] > 1]
            copied = [row.pages.pop() for row in shared]
            for row, num in grows:
                new = [next(fresh) for _ in range(row.grow(num))]
                row.pages += new
                owners.update(new)
                held += len(new)
            most = max(most, held)
            held -= disown(copied)
            if part.observed:
                held -= sum(disown(row.release()) for row, _ in grows)
        if part.forked:
            for first in range(0, len(rows), len(slots)):
                for child in rows[first + 1 : first + len(slots)]:
                    child.become(rows[first])
                    owners.update(child.pages)
    return most


class _Row:
    """A row of the page table, on the host."""

    def __init__(self, group: Group, config: CacheConfig, cache: KVCache | None, slot: int):
        self.size = group.page_size
        self.behind = None if group.window is None else group.window - 1 + config.rollback
        self.length, self.pages = 0, []
        if cache is not None:
            row, table = config.groups.index(group) * config.max_seqs + slot, cache.table
            self.length = int(table.lengths[row])
            self.pages = np.asarray(table.pages[row, : -(-self.length // self.size)]).tolist()

    @property
    def has_room(self) -> bool:
        """Whether its last page is part full."""
        return self.length % self.size > 0

    def release(self) -> list[int]:
        """Takes out the pages that no token to come can see."""
        if self.behind is None:
            return []
        dropped = max(self.length - self.behind, 0) // self.size
        released, self.pages = self.pages[:dropped], self.pages[dropped:]
        self.length -= dropped * self.size
        return released

    def grow(self, num_tokens: int) -> int:
        """Counts the tokens in, and says how many pages the row lacks then."""
        self.length += num_tokens
        return -(-self.length // self.size) - len(self.pages)

    def become(self, other: "_Row") -> None:
        """Holds what the other does."""
        self.length, self.pages = other.length, list(other.pages)


def _pages_with_policy(
    config: CacheConfig,
    stored: Sequence[tuple[int, int]],
    shared: int,
    policy: Policy,
    most: int | None,
) -> int:
    """A bound of the pages that prompts need in groups with full attention, where a policy evicts.

    Args:
      config: of the cache.
      stored: token slots in use in the slot of each prompt, and tokens of the prompt.
      shared: number of pages that all of them begin with.
      policy: the eviction policy.
      most: token slots that a sequence takes at most while its prompt is run; None for all its tokens.
    """
    sizes = [group.page_size for group in config.groups if group.window is None]

    def full_pages(num_tokens: int) -> int:
        return sum(-(-num_tokens // size) for size in sizes)

    pages = of_shared = full_pages(shared * config.page_size)
    for before, num_tokens in stored:
        after = before + num_tokens if most is None else min(before + num_tokens, max(most, before))
        pages += full_pages(after) - full_pages(before) - of_shared
    if shared:
        # Tokens kept of shared pages are copied for each sequence before the shared pages are released.
        pages += len(stored) * full_pages(policy.copied_tokens(config.max_tokens_per_seq))
    return pages


def copied_pages(cache: KVCache | None, slots: Sequence[int]) -> int:
    """Number of shared, partly filled last pages of full groups: the first write to each copies it."""
    if cache is None:
        return 0
    table, config = cache.table, cache.config
    stored, pages, users = (np.asarray(x) for x in (table.lengths, table.pages, num_users(table)))
    rows = [
        (number * config.max_seqs + slot, group.page_size)
        for number, group in enumerate(config.groups)
        if group.window is None
        for slot in slots
    ]
    tails = [pages[row, stored[row] // size] for row, size in rows if stored[row] % size]
    return sum(int(users[page] > 1) for page in tails)
