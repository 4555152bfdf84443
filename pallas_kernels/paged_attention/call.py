"""What a backend of `paged_attention` is asked for."""

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
    """Where ragged sequences lie; int32, as `api.paged_attention` takes them."""

    page_table: Int[Array, "rows pages_per_seq"]
    table_rows: Int[Array, " seqs"]
    kv_lengths: Int[Array, " seqs"]
    query_starts: Int[Array, " seqs+1"]

    @property
    def count(self) -> int:
        """Sequences."""
        return self.kv_lengths.shape[0]

    @property
    def lengths(self) -> tuple[Array, Array, Array]:
        """What `schedule.query_tiles` takes."""
        return self.kv_lengths, self.query_starts, self.table_rows


class Scoring(NamedTuple):
    """What scores are, and which of them a token sees: static."""

    scale: float
    window: int | None
    sink_tokens: int
    softcap: float | None

    @classmethod
    def of(cls, options: Options, head_dim: int, max_keys: int) -> "Scoring":
        """With the default scale, and no number larger than an array could tell apart."""
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
      queries: the same, as the pool's format has them meet its keys.
      pool: K and V.
      sequences: the queries' own.
      layer: a number that may be no layer's.
      scoring: the static options.
      sinks: as there.
      prefixes: finds what neighbouring sequences share, in whole units of tokens; None not to look.
      tuning, shared_tuning: of a GPU's kernel, where the caller chose them.
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
        """Places of a row of the page table."""
        return self.sequences.page_table.shape[1] * self.pool.shape[3]

    @property
    def shape(self) -> dict[str, Any]:
        """What tunings are chosen by: see `tuning.rule`."""
        tokens, q_heads, head_dim = self.q.shape
        return dict(
            tokens=tokens,
            seqs=self.sequences.count,
            group=q_heads // self.pool.shape[2],
            head_dim=head_dim,
            storage=self.pool.storage,
            q_dtype=self.q.dtype,
        )
