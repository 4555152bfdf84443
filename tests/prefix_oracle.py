"""Prefix caching in plain Python: which beginnings are known, and in which order their pages are taken.

A node is a key: a salt and all tokens so far. It is known while it, or a longer one, has a page.
"""

from math import lcm

from jaxkv import CacheConfig


class PrefixOracle:
    def __init__(self, config: CacheConfig):
        self.config, self.groups = config, config.groups
        self.block = lcm(*(group.page_size for group in self.groups))
        self.each = [self.block // group.page_size for group in self.groups]
        self.pages = {}  # key -> {(group, nth page of the node): label}
        self.holder = {}  # label -> (key, (group, nth))
        self.content = {}  # label -> its tokens
        self.queue = []  # labels that no sequence has, the next to be reclaimed first
        self.num_reclaimed = 0

    def keys(self, tokens, count, salt):
        return [(salt, tuple(tokens[: (i + 1) * self.block])) for i in range(count)]

    def known(self) -> set:
        return {(salt, so_far[:end]) for salt, so_far in self.pages for end in self.ends(so_far)}

    def ends(self, so_far):
        return range(self.block, len(so_far) + 1, self.block)

    def num_known(self, keys) -> int:
        known = self.known()
        return next((i for i, key in enumerate(keys) if key not in known), len(keys))

    def unrecord(self, label):
        key, nth = self.holder.pop(label)
        del self.content[label], self.pages[key][nth]
        if not self.pages[key]:
            del self.pages[key]

    def reclaim(self, count):
        """The first `count` of the queue are recorded no more."""
        for label in self.queue[:count]:
            self.unrecord(label)
        self.num_reclaimed += len(self.queue[:count])
        del self.queue[:count]

    def release(self, removed, owners):
        """`removed`: labels in the order in which rows lost them."""
        for label in reversed(list(dict.fromkeys(reversed(removed)))):
            if label in self.holder and not owners[label]:
                self.queue.append(label)

    def record(self, tokens, count, salt, candidates) -> int:
        """`candidates[i][group, nth]`: (label, content) of the pages that a sequence has of block `i`."""
        keys = self.keys(tokens, count, salt)
        fresh = [
            {nth: page for nth, page in of.items() if page[0] not in self.holder} for of in candidates[:count]
        ]
        last = max((i + 1 for i, of in enumerate(fresh) if of), default=0)
        wanted = last - self.num_known(keys)
        while self.num_free < wanted and self.queue:
            self.reclaim(wanted - self.num_free)
        found = self.num_known(keys)
        end = min(last, found + self.num_free)
        end = max([found, *(i + 1 for i in range(end) if fresh[i])])
        before = len(self.holder)
        for key, of in zip(keys[:end], fresh[:end], strict=True):
            for nth, (label, content) in of.items():
                held = self.pages.setdefault(key, {})
                if nth not in held:
                    held[nth] = label
                    self.holder[label], self.content[label] = (key, nth), content
            if key in self.pages and not self.pages[key]:
                del self.pages[key]
        return len(self.holder) - before

    @property
    def num_free(self) -> int:
        return self.config.num_pages - len(self.known())

    def match(self, tokens, count, salt) -> tuple[int, list[list[int]]]:
        """Blocks found, and labels to install in each group."""
        keys = self.keys(tokens, count, salt)
        for blocks in range(self.num_known(keys), 0, -1):
            installed = [self.installed(keys[:blocks], group) for group in range(len(self.groups))]
            if all(
                len(of) >= min(blocks * each, self.seen(group))
                for group, (of, each) in enumerate(zip(installed, self.each, strict=True))
            ):
                return blocks, installed
        return 0, [[] for _ in self.groups]

    def seen(self, group, more=0):
        """Pages that hold what the next token sees."""
        of = self.groups[group]
        return 2**31 if of.window is None else -(-(of.window - 1 + more) // of.page_size)

    def installed(self, keys, group) -> list[int]:
        """As far back as there are pages, of what the next token sees and `rollback` more."""
        pages = [self.pages.get(key, {}).get((group, nth)) for key in keys for nth in range(self.each[group])]
        found = []
        for label in reversed(pages):
            if label is None or len(found) == self.seen(group, self.config.rollback):
                break
            found.insert(0, label)
        return found

    def clear(self):
        self.pages, self.holder, self.content, self.queue = {}, {}, {}, []
