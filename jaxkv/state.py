"""Every pytree of the cache, and `Status`.

All are frozen. None checks its fields, since a transformation may unflatten it from leaves of any kind;
the functions check their arguments instead.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, Shaped, UInt32

from jaxkv.config import CacheConfig


class Status(IntEnum):
    """The result of one entry of a call. Failure is a value; `raise_for_status` raises it as an error.

    Attributes:
      OK: done; also for an entry of no tokens.
      OUT_OF_PAGES: refused by `allocate`: the pool has too few free pages for it, or for an entry before it.
      SEQUENCE_TOO_LONG: refused by `allocate`: the sequence would outgrow its row of the page table.
      INVALID_SEQ: refused: a slot beyond `max_seqs`, one that an earlier entry names, or an empty parent.
      OCCUPIED: refused by `fork`: the child is in use, taken by an earlier entry, or its own parent.
      PADDING: a negative slot: nothing was asked.
      INVALID_LENGTH: refused by `allocate`: `num_tokens` is negative, reaches past `total_tokens`, or is more
        than `max_chunk` where a layer has a window; refused by `truncate`: the length is negative.
      ROLLBACK_TOO_LONG: refused by `truncate`: it would need tokens that were released or rewritten.
      TABLE_FULL: refused by `serving.submit`: too few rows of the request table are empty.
    """

    OK = 0
    OUT_OF_PAGES = 1
    SEQUENCE_TOO_LONG = 2
    INVALID_SEQ = 3
    OCCUPIED = 4
    PADDING = 5
    INVALID_LENGTH = 6
    ROLLBACK_TOO_LONG = 7
    TABLE_FULL = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class KVPool:
    """All pages, of `config.storage_dtype`; `gather` gives their values. `layers` are those of one group.

    Of a quantized pool K and V are codes; else there are no scales.

    A row is `head_dim` elements, or words of eight codes, and then its scales are words too. Where layers
    differ in shape, this is the shape of the first kind, and the scales of a page have one axis.
    """

    k: Shaped[Array, "layers pages kv_heads page_size row"]
    v: Shaped[Array, "layers pages kv_heads page_size row"]
    k_scale: Shaped[Array, "layers pages *words"] | None = None
    v_scale: Shaped[Array, "layers pages *v_words"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class PrefixIndex:
    """Which pages hold which tokens, so that prompts that begin alike can share them.

    A node stands for a page of tokens and all that precedes them: it names its parent. Where groups differ in
    page size it stands for as many tokens as are whole pages in each. A node stays while it has a page or a
    child, so that a node found below its parent is right without a look at what precedes. A page is
    reclaimable while the index alone holds it.

    Attributes:
      tokens, salts: of each node; the salt is that of its chain.
      tags: hash of each node's chain, to pick one in a bucket.
      parents: node above each, `nodes` for the first of a chain.
      children: nodes below each.
      places: where in `buckets` each node stands.
      pages: page ids of each node, one group after the other; `num_pages` where it has none.
      buckets: node ids by hash, eight a bucket; `nodes` where there is none.
      free_nodes: a stack of node ids, `free_nodes[:num_free_nodes]`.
      num_free_nodes: nodes on it.
      holders: where in `pages` each page stands, counted through; past the end for a page not recorded.
      queue: reclaimable pages, from `queue_ends[0]` to `queue_ends[1]`, the next to be reclaimed first. An
        entry counts only where `queued_at` says that its page stands there.
      queue_ends: see `queue`.
      queued_at: where in the queue each page stands; negative for a page that is not reclaimable.
      num_reclaimable: pages that the index alone holds.
      num_reclaimed: pages reclaimed so far; it wraps around.
      intact: leading token slots of each sequence that were never dropped, rewritten or shifted.
    """

    tokens: Int[Array, "nodes block"]
    salts: Int[Array, " nodes"]
    tags: UInt32[Array, " nodes"]
    parents: Int[Array, " nodes"]
    children: Int[Array, " nodes"]
    places: Int[Array, " nodes"]
    pages: Int[Array, "nodes held"]
    buckets: Int[Array, " places"]
    free_nodes: Int[Array, " nodes"]
    num_free_nodes: Int[Array, ""]
    holders: Int[Array, " pages"]
    queue: Int[Array, " queue"]
    queue_ends: Int[Array, "2"]
    queued_at: Int[Array, " pages"]
    num_reclaimable: Int[Array, ""]
    num_reclaimed: Int[Array, ""]
    intact: Int[Array, " seqs"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class PageTable:
    """Who owns which page. A row is that of one group of layers and one sequence: `group * max_seqs + slot`.

    Attributes:
      pages: page ids of each row in token order, `num_pages` past its last page.
      lengths: token slots in use of each row.
      positions: position of each sequence's next token, 0 for an empty slot; more than `lengths` once a
        policy dropped tokens or a window released some.
      refcounts: table entries that name each page, and the index of prefixes as one more owner of those
        that it holds.
      free_pages: a stack of page ids, `free_pages[:num_free]`; `allocate` takes from its top.
      num_free: pages on the stack.
      fingerprint: a hash of the table's history, changed by every operation that changes the table. Equal
        histories have equal fingerprints.
      prefixes: the index of recorded prefixes; None without `prefix_cache`.
    """

    pages: Int[Array, "rows pages_per_seq"]
    lengths: Int[Array, " rows"]
    positions: Int[Array, " seqs"]
    refcounts: Int[Array, " pages"]
    free_pages: Int[Array, " pages"]
    num_free: Int[Array, ""]
    fingerprint: UInt32[Array, "2"]
    prefixes: PrefixIndex | None = None

    @property
    def num_reclaimable(self) -> Int[Array, ""]:
        """Pages that the index of prefixes alone holds: taken where the free stack does not suffice."""
        if self.prefixes is None:
            return jnp.zeros_like(self.num_free)
        return self.prefixes.num_reclaimable


def counter(index: int, doc: str) -> Any:
    """A property of `Counters`: the element of the vector at this index."""
    return property(lambda stats: stats.counters[..., index], doc=doc)


class Counters:
    """What dataclasses have in common whose only field, `counters`, is a vector with a property for each."""

    __slots__ = ()
    counters: Array

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the counters, in order."""
        return tuple(name for name, value in vars(cls).items() if isinstance(value, property))

    def as_dict(self) -> dict[str, Any]:
        """Every counter by its name.

        Returns:
          Python integers, after waiting for the device. For stacked statistics, such as from a scan, NumPy
          arrays; inside `jit`, traced int32.

        Example:
          >>> import jaxkv
          >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=4)
          >>> jaxkv.init(config).stats.as_dict()["peak_pages"]
          0
        """
        return {name: on_host(getattr(self, name)) for name in self.names()}

    def __repr__(self) -> str:
        # A transformation may have replaced the vector by any object, and a donated vector is deleted.
        counters = self.counters
        if isinstance(counters, Tracer) or not isinstance(counters, (jax.Array, np.ndarray)):
            return f"{type(self).__name__}(counters={counters!r})"
        if isinstance(counters, jax.Array) and counters.is_deleted():
            return f"{type(self).__name__}(counters=<deleted>)"
        fields = ", ".join(f"{name}={np.asarray(x).tolist()}" for name, x in self.as_dict().items())
        return f"{type(self).__name__}({fields})"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, repr=False)
class AllocationStats(Counters):
    """Counters since `init`, in pages unless stated; they saturate at the largest int32.

    `counters` holds them in the order of `names()`, so that a step updates one vector.
    """

    counters: Int[Array, " 15"]

    total_allocations = counter(0, "Taken into use, copies included.")
    total_deallocations = counter(1, "Given back, by their last sequence.")
    current_pages = counter(2, "In use now, by sequences.")
    peak_pages = counter(3, "Most in use at any moment.")
    copy_on_write_copies = counter(4, "Copied because a shared tail page was written to.")
    refused_allocations = counter(5, "Entries of `allocate` that were refused, whatever the reason.")
    compactions = counter(6, "Calls of `compact`.")
    pages_moved = counter(7, "Moved by `compact`.")
    evictions = counter(8, "Times that a policy dropped tokens of a sequence.")
    evicted_tokens = counter(9, "Tokens that policies dropped.")
    prefix_queries = counter(10, "Prompts that `match_prefix` looked up.")
    prefix_tokens_asked = counter(11, "Tokens of those prompts.")
    prefix_tokens_matched = counter(12, "Tokens of them that were found.")
    prefix_pages_recorded = counter(13, "Made findable by `record_prefix`.")
    prefix_pages_reclaimed = counter(14, "Recorded pages that were taken for other tokens.")


def on_host(value: Any) -> Any:
    """A traced array unchanged; a Python number for another scalar, a NumPy array for other arrays."""
    if isinstance(value, Tracer):
        return value
    array = np.asarray(value)
    return array if array.ndim else array.item()


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class PolicyState:
    """An eviction policy in a cache, and its state for each sequence.

    Attributes:
      values: arrays whose first axis is `seqs`; those with four axes are
        `[seqs, layers, kv_heads, max_tokens]`, a value for each token slot; the layers are those with full
        attention.
      least: token slots that `truncate` must leave of each sequence, unless it empties it: those before were
        rewritten, or dropped tokens stood between them.
      rule: the `jaxkv.Policy` whose state it is.
    """

    values: dict[str, Shaped[Array, "seqs ..."]]
    least: Int[Array, " seqs"]
    rule: Any = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class KVCache:
    """A paged KV cache: one immutable pytree. Without an eviction policy, `policy` is None."""

    pool: KVPool
    table: PageTable
    stats: AllocationStats
    config: CacheConfig = field(metadata={"static": True})
    policy: PolicyState | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Batch:
    """Where this step's tokens are stored and which tokens they attend to.

    The tokens of `seqs[i]` are the rows `query_starts[i]:query_starts[i+1]` of the token axis.
    A batch is valid for the cache that `allocate` returned with it, until the page table changes again.
    With a stale batch `append` writes nothing and `attend` returns NaN.

    Attributes:
      seqs, num_tokens: as given to `allocate`.
      status: a `Status` for each entry.
      query_starts: first row of each entry, and the end of the last.
      kv_lengths: token slots of each sequence in groups with full attention, this step's among them; where
        there are none, its tokens so far. 0 for a refused entry.
      positions: of each token, for RoPE; 0 for padding.
      row_lengths: token slots of each sequence in each group; 0 for a refused entry.
      page_ids, offsets: where each token is written in each group; page id `num_pages` for padding.
      num_free: pages that can be taken after the call, reclaimable ones included.
      fingerprint: of the page table after the call.
      config: the cache's.
      window, sink_tokens: the limits that the cache's policy sets on what each token attends to; see
        `attend`.
    """

    seqs: Int[Array, " seqs"]
    num_tokens: Int[Array, " seqs"]
    status: Int[Array, " seqs"]
    query_starts: Int[Array, " seqs+1"]
    kv_lengths: Int[Array, " seqs"]
    positions: Int[Array, " tokens"]
    row_lengths: Int[Array, "groups seqs"]
    page_ids: Int[Array, "groups tokens"]
    offsets: Int[Array, "groups tokens"]
    num_free: Int[Array, ""]
    fingerprint: UInt32[Array, "2"]
    config: CacheConfig = field(metadata={"static": True})
    window: int | None = field(default=None, metadata={"static": True})
    sink_tokens: int = field(default=0, metadata={"static": True})

    @property
    def ok(self) -> Bool[Array, " seqs"]:
        """Which entries were granted: False for refused entries and for padding."""
        return self.status == Status.OK

    @property
    def last_rows(self) -> Int[Array, " seqs"]:
        """Row of each entry's last token, whose logits choose the next token: `logits[batch.last_rows]`.

        Always a valid row, but meaningful only where `ok & (num_tokens > 0)`: `attend` returns zeros in the
        rows of a refused entry, and an entry without tokens gets another entry's row, or 0.
        """
        return jnp.clip(self.query_starts[..., 1:] - 1, 0, self.positions.shape[-1] - 1)

    @property
    def entries(self) -> Int[Array, " tokens"]:
        """The entry that each token is of; the number of entries for padding.

        With tokens `prompts [entries, width]`, of which a prefix cache already has some, those to compute are
        `prompts.at[batch.entries, batch.positions].get(mode="fill", fill_value=0)`.
        """
        row = jnp.arange(self.positions.shape[-1], dtype=jnp.int32)
        ended = self.query_starts[..., 1:, None] <= row.reshape(*(1,) * self.query_starts.ndim, -1)
        return jnp.sum(ended, axis=-2, dtype=jnp.int32)
