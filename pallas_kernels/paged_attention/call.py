"""The record of arguments of `paged_attention`."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int

from pallas_kernels.checks import Options, Pool
from pallas_kernels.paged_attention.prefixes import Prefixes
from pallas_kernels.paged_attention.triton.tuning import Tuning


@dataclass(frozen=True, eq=False, slots=True)
class Sequences:
    """The tables of ragged sequences; int32, as for `api.paged_attention`."""

    page_table: Int[Array, "rows pages_per_seq"]
    table_rows: Int[Array, " seqs"]
    kv_lengths: Int[Array, " seqs"]
    query_starts: Int[Array, " seqs+1"]

    @property
    def count(self) -> int:
        """Number of sequences."""
        return self.kv_lengths.shape[0]

    @property
    def lengths(self) -> tuple[Array, Array, Array]:
        """Arguments of `schedule.query_tiles`."""
        return self.kv_lengths, self.query_starts, self.table_rows


class Scoring(NamedTuple):
    """How scores are computed, and which of them a token attends to; static."""

    scale: float
    window: int | None
    sink_tokens: int
    softcap: float | None

    @classmethod
    def of(cls, options: Options, head_dim: int, max_keys: int) -> "Scoring":
        """Fills in the default scale, and clips values that exceed any array."""
        scale, window, sink_tokens, softcap = options
        return cls(
            scale=1 / sqrt(head_dim) if scale is None else scale,
            window=None if window is None else min(window, 2**30),
            sink_tokens=min(sink_tokens, max_keys),
            softcap=softcap,
        )


@dataclass(frozen=True, eq=False, slots=True)
class Call:
    """The arguments of `api.paged_attention`, checked.

    Attributes:
      q: the queries.
      queries: the queries for each part of a tile, from `Format.queries`.
      pool: K and V.
      sequences: of the queries.
      layer: index that may be out of range.
      scoring: the static options.
      sinks: `sink_logits`.
      prefixes: finds the prefixes that adjacent sequences share; None to skip that.
      tuning, shared_tuning: of a GPU's kernel, if the caller chose them.
    """

    q: Float[Array, "tokens q_heads head_dim"]
    queries: tuple[Array, ...]
    pool: Pool
    sequences: Sequences
    layer: int | Int[Array, ""]
    scoring: Scoring
    sinks: Float[Array, " q_heads"] | None
    prefixes: Callable[..., Prefixes] | None
    tuning: Tuning | None
    shared_tuning: Tuning | None

    @property
    def max_keys(self) -> int:
        """Token slots of a row of the page table."""
        return self.sequences.page_table.shape[1] * self.pool.shape[3]

    @property
    def shape(self) -> dict[str, Any]:
        """Arguments of `tuning.rule`, for choosing tunings."""
        tokens, q_heads, head_dim = self.q.shape
        return dict(
            tokens=tokens,
            seqs=self.sequences.count,
            group=q_heads // self.pool.shape[2],
            head_dim=head_dim,
            storage=self.pool.storage,
            q_dtype=self.q.dtype,
        )
