"""The cases of attention over pages that every backend is tested with, and their arguments."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.reference import operations as reference


@dataclass(frozen=True)
class Case:
    """Attention over pages: sequence i has `lengths[i]` tokens; the last `queries[i]` are queries."""

    name: str
    lengths: Sequence[int]
    queries: Sequence[int] | None = None  # default: decode, one for each sequence with any token
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    num_layers: int = 2
    layer: int = 1
    dtype: str = "float32"
    stored: str | None = None  # as codes of this dtype
    padding_rows: int = 0  # rows of q that belong to no sequence
    spare_pages: int = 3  # pages of the pool that belong to no sequence, filled with NaN
    spare_columns: int = 1  # columns of the page table beyond the longest sequence's
    magnitude: float = 1.0  # of q
    sinks: bool = False
    begins_like: dict[int, tuple[int, int]] = field(default_factory=dict)  # one before it, in so many pages
    more_slots: int = 0  # a page of scales has so many more than `page_size`
    options: dict = field(default_factory=dict)

    def __str__(self):
        return self.name

    @property
    def num_queries(self) -> Sequence[int]:
        if self.queries is not None:
            return self.queries
        return [min(length, 1) for length in self.lengths]


@dataclass(frozen=True)
class Arguments:
    q: np.ndarray
    k_pages: np.ndarray
    v_pages: np.ndarray
    page_table: np.ndarray
    kv_lengths: np.ndarray
    query_starts: np.ndarray
    options: dict

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """The positional arguments of `paged_attention`."""
        names = ("q", "k_pages", "v_pages", "page_table", "kv_lengths", "query_starts")
        return tuple(jnp.asarray(getattr(self, name)) for name in names)


# Of codes and scales: words of ones stand for steps and spikes that are infinite.
WORST = {"int8": (-128, np.nan), "uint8": (0x7F, np.nan), "int32": (-1, -1)}


def make(case: Case, seed: int = 0) -> Arguments:
    """Random arguments. Pages lie in random order, and every token slot of the pool and row of q that
    belongs to no sequence holds NaN: past a length, in a spare page, in another layer."""
    random = np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)
    needed = [-(-length // case.page_size) for length in case.lengths]
    num_pages = sum(needed) - sum(pages for _, pages in case.begins_like.values()) + case.spare_pages
    width = max(1, *needed) + case.spare_columns
    order = random.permutation(num_pages).tolist()
    page_table = np.full((len(needed), width), num_pages, np.int32)
    pool = (case.num_layers, num_pages, case.kv_heads, case.page_size, case.head_dim)
    pools = [np.full(pool, np.nan, np.float32) for _ in "kv"]
    for row, (length, pages) in enumerate(zip(case.lengths, needed, strict=True)):
        like, shared = case.begins_like.get(row, (0, 0))
        page_table[row, :shared] = page_table[like, :shared]
        page_table[row, shared:pages] = [order.pop() for _ in range(pages - shared)]
        for index in range(length):
            at = case.layer, page_table[row, index // case.page_size], slice(None), index % case.page_size
            for pages in pools:
                pages[at] = random.normal(size=(case.kv_heads, case.head_dim))
    query_starts = np.cumsum([0, *case.num_queries], dtype=np.int32)
    q = case.magnitude * random.normal(
        size=(query_starts[-1] + case.padding_rows, case.q_heads, case.head_dim)
    )
    q[query_starts[-1] :] = np.nan
    options = dict(case.options)
    if case.stored is None:
        k_pages, v_pages = (pages.astype(dtype) for pages in pools)
    else:
        k_pages, v_pages, k_scales, v_scales = reference.encode(pools[0], pools[1], np.dtype(case.stored))
        # Token slots that belong to no sequence hold the worst codes there are, and scales of NaN.
        unowned = np.isnan(pools[0][..., 0])
        worst, worst_scale = WORST[case.stored]
        for codes, scales in ((k_pages, k_scales), (v_pages, v_scales)):
            codes[unowned], scales[unowned] = worst, worst_scale
        k_scales, v_scales = (
            with_slots(scales, case.more_slots, WORST[case.stored][1]) for scales in (k_scales, v_scales)
        )
        options |= {"k_scales": k_scales, "v_scales": v_scales}
    if case.sinks:
        options["sink_logits"] = random.normal(size=case.q_heads).astype(np.float32)
    lengths = np.array(case.lengths, np.int32)
    return Arguments(q.astype(dtype), k_pages, v_pages, page_table, lengths, query_starts, options)


def padded(case: Case, seqs: int = 6, rows: int = 80, num_pages: int = 20, columns: int = 14) -> Case:
    """The same case in arrays of a given size: one program serves all that differ in lengths alone."""
    empty = [0] * (seqs - len(case.lengths))
    pages = [-(-length // case.page_size) for length in case.lengths]
    return replace(
        case,
        lengths=(*case.lengths, *empty),
        queries=(*case.num_queries, *empty),
        padding_rows=rows - sum(case.num_queries),
        spare_pages=num_pages - sum(pages),
        spare_columns=columns - max(1, *pages),
    )


def with_slots(scales: np.ndarray, more: int, value: float | int) -> np.ndarray:
    """Scales `[layers, pages, kv_heads, slots, ...]` with more slots a page, which hold this value."""
    after = [(0, more if axis == 3 else 0) for axis in range(scales.ndim)]
    return np.pad(scales, after, constant_values=value)


DTYPES = ("float32", "bfloat16", "float16")

# How far a result computed in float32 and rounded to the dtype may lie from float64, values of
# order one.
TOLERANCE = {"float32": 1e-5, "float16": 2.0**-9, "bfloat16": 2.0**-6}

RAGGED = (1, 37, 16, 0, 100, 17)

# Rows of a window that began in mid-text: their lengths are the tokens stored. Some queries are a chunk that
# is longer than the window.
WINDOWED_ROWS = [
    Case(
        f"a chunk past its window, {stored or dtype}, {kv_heads} KV heads",
        (67, 27, 0, 20, 40),
        (45, 1, 0, 1, 40),
        kv_heads=kv_heads,
        page_size=8,
        dtype=dtype,
        stored=stored,
        more_slots=more_slots,
        options={"window": 20},
    )
    for kv_heads, dtype, stored, more_slots in (
        (2, "float32", None, 0),
        (2, "float32", "int8", 4),
        (1, "float32", "int8", 8),
        (2, "bfloat16", "uint8", 4),
        (2, "bfloat16", "int32", 4),
    )
]
WINDOWED_ROWS.append(
    Case(
        "decode in windows' rows, int8, 1 KV heads",
        (20, 27, 0, 5, 24),
        kv_heads=1,
        page_size=8,
        stored="int8",
        more_slots=8,
        options={"window": 20},
    )
)

SHARED_PREFIX = [
    Case("two share all but a tail", (140, 131), begins_like={1: (0, 8)}),
    Case(
        "a system prompt, and samples of each prompt",
        (300, 320, 290, 0, 200, 210, 5, 190),
        (1, 1, 1, 0, 1, 1, 1, 1),
        begins_like={1: (0, 17), 2: (1, 17), 4: (0, 9), 5: (4, 12), 7: (0, 8)},
    ),
    Case(
        "rows of no sequence within a run, and options",
        (150, 0, 170, 200),
        (3, 2, 1, 2),
        begins_like={2: (0, 9), 3: (2, 9)},
        sinks=True,
        padding_rows=2,
        options={"softcap": 4.0, "scale": 0.3},
    ),
    Case("a prefix and nothing else", (129, 129), page_size=128, begins_like={1: (0, 1)}),
    Case("shared pages larger than a tile", (500, 450), page_size=200, begins_like={1: (0, 2)}),
    Case("pages of 1", (140, 150, 160), page_size=1, begins_like={1: (0, 139), 2: (1, 139)}),
    Case("forks that continue with prompts", (200, 230), (60, 90), begins_like={1: (0, 8)}, q_heads=2),
    *[
        Case(
            f"a shared prefix of {stored}",
            (140, 150, 3),
            dtype="bfloat16",
            stored=stored,
            begins_like={1: (0, 8)},
        )
        for stored in ("int8", "uint8", "int32")
    ],
]
SHARED_PREFIX = [replace(case, options=case.options | {"shared_prefix": True}) for case in SHARED_PREFIX]

SINK_TOKENS = [
    Case("sink tokens over tiles", (700, 300, 0, 5), page_size=8, options={"window": 50, "sink_tokens": 150}),
    Case(
        "sink tokens up to the window, pages of 3",
        (300, 170, 40),
        (130, 1, 3),
        page_size=3,
        options={"window": 100, "sink_tokens": 90},
    ),
    Case(
        "sink tokens at boundaries, pages of 1",
        (385, 9),
        page_size=1,
        options={"window": 64, "sink_tokens": 128},
    ),
    Case(
        "sink tokens in a large page of int8",
        (500, 390, 5),
        (1, 3, 1),
        page_size=200,
        stored="int8",
        options={"window": 70, "sink_tokens": 130},
    ),
    Case(
        "sink tokens of fp8, and all options",
        (400, 33),
        (130, 1),
        page_size=7,
        dtype="bfloat16",
        stored="uint8",
        padding_rows=2,
        sinks=True,
        options={"window": 33, "sink_tokens": 3, "softcap": 5.0, "scale": 0.2},
    ),
]

PAGED_ATTENTION = (
    [
        Case(f"decode with {heads}, {dtype}", RAGGED, q_heads=q_heads, kv_heads=kv_heads, dtype=dtype)
        for heads, q_heads, kv_heads in [("MHA", 4, 4), ("GQA", 6, 2), ("MQA", 5, 1)]
        for dtype in DTYPES
    ]
    + [
        Case(f"{kind} with head_dim {head_dim}", (5, 40), queries, head_dim=head_dim, dtype=dtype)
        for kind, queries, dtype in [("decode", (1, 1), "bfloat16"), ("prefill", (5, 33), "float32")]
        for head_dim in (64, 80, 96, 128, 256)
    ]
    + [
        Case(f"pages of {page_size}", (1, 64, 35, 63), (1, 2, 35, 1), page_size=page_size)
        for page_size in (1, 2, 3, 8, 64, 128)
    ]
    + [
        Case("one token of one sequence", (1,)),
        Case("one layer", (9,), num_layers=1, layer=0),
        Case("every length at a page boundary", (16, 32, 48), (1, 16, 32)),
        Case("whole prompts", (33, 7, 16), (33, 7, 16)),
        Case("a chunk after a prefix", (200, 48), (64, 16)),
        Case("prefill and decode in one call", (30, 90, 0, 1, 64), (30, 1, 0, 1, 1)),
        Case("a chunk among single tokens", (250, 30, 0, 90, 17, 64), (90, 1, 0, 1, 5, 0), padding_rows=5),
        Case("live sequences without queries", (30, 20, 10), (0, 2, 0)),
        Case("nothing to see at all", (0, 0), padding_rows=3),
        Case("rows of no sequence", RAGGED, padding_rows=5),
        Case("long against short", (1500, 3, 1), page_size=8),
        Case("a long prompt", (300,), (300,), page_size=8, q_heads=2, head_dim=16),
        Case("large scores", (70, 40), (70, 1), magnitude=60.0),
        Case("scale", (40, 20), (3, 1), options={"scale": 0.3}),
        Case("a window of one", (40, 20), (3, 1), options={"window": 1}),
        Case("a window inside a page", (40, 20), (3, 1), options={"window": 5}),
        Case("a window over pages", (150, 33, 1), (20, 33, 1), options={"window": 40}),
        Case("a window, a chunk and single tokens", (150, 70, 9), (80, 1, 9), options={"window": 40}),
        Case("a window at page boundaries", (64, 48), (17, 1), options={"window": 16}),
        Case("a window longer than the sequence", (40, 20), (3, 1), options={"window": 1000}),
        Case("softcap", (40, 20), (3, 1), magnitude=8.0, options={"softcap": 2.0}),
        Case("a softcap of 50", (40, 20), (3, 1), magnitude=8.0, options={"softcap": 50.0}),
        Case("sinks", (40, 1), (3, 1), sinks=True),
        *[
            Case(f"{kind} of {stored}, {dtype}", RAGGED, queries, dtype=dtype, stored=stored)
            for kind, queries in (("decode", None), ("prefill", (1, 5, 16, 0, 40, 2)))
            for stored, dtype in (("int8", "float32"), ("int8", "float16"), ("uint8", "bfloat16"))
        ],
        Case("pages of 3, of int8, head_dim 80", (35, 64), (3, 1), page_size=3, head_dim=80, stored="int8"),
        Case("pages of 1, of fp8", (35, 64), (3, 1), page_size=1, stored="uint8"),
        Case("decode of int4, float16", RAGGED, head_dim=128, dtype="float16", stored="int32"),
        Case("prefill of int4, bfloat16", RAGGED, (1, 5, 16, 0, 40, 2), dtype="bfloat16", stored="int32"),
        Case(
            "pages of 3, of int4, head_dim 80",
            (35, 64),
            (3, 1),
            page_size=3,
            head_dim=80,
            dtype="bfloat16",
            stored="int32",
        ),
        Case(
            "a large page of int4, head_dim 96",
            (300, 5),
            page_size=200,
            head_dim=96,
            dtype="float16",
            stored="int32",
            options={"window": 70, "softcap": 4.0},
        ),
        Case("a large page of int8", (300, 5), page_size=200, stored="int8", options={"window": 70}),
        Case(
            "all options, bfloat16",
            (90, 33, 0, 5),
            (40, 1, 0, 5),
            dtype="bfloat16",
            padding_rows=2,
            sinks=True,
            options={"window": 20, "softcap": 5.0, "scale": 0.2},
        ),
    ]
    + SINK_TOKENS
    + SHARED_PREFIX
    + WINDOWED_ROWS
)
