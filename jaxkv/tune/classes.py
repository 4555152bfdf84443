"""The classes of shapes that are searched, each with the problems that stand for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax.numpy as jnp

from jaxkv.tune.implementation import HAS_GPU
from jaxkv.tune.problems import Problem, decode, ragged, uniform
from pallas_kernels import formats
from pallas_kernels.paged_attention.triton.tables import Shape


@dataclass(frozen=True)
class Class:
    """Problems of one `Shape`, which share a row of the table."""

    problems: tuple[Problem, ...]

    @property
    def arguments(self) -> dict:
        """Of `tuning.choose`, for the first of them."""
        problem = self.problems[0]
        q_heads, kv_heads, head_dim = problem.heads
        return dict(
            tokens=sum(problem.queries),
            seqs=len(problem.queries),
            group=q_heads // kv_heads,
            head_dim=head_dim,
            storage=formats.of(problem.stored),
            q_dtype=jnp.dtype(problem.dtype),
        )

    @property
    def shape(self) -> Shape:
        """What the table calls it."""
        return Shape.of(**self.arguments)

    @property
    def name(self) -> str:
        """For people: `decode 128x4, bfloat16, q bfloat16`."""
        shape = self.shape
        return f"{self.problems[0].kind} {shape.head_dim}x{shape.group}, {shape.pool}, q {shape.dtype}"


def classes() -> list[Class]:
    """Those that matter most come first."""
    if not HAS_GPU:
        return [Class((decode(ragged(2, 20, 40), heads=(4, 2, 16)),))]
    floats = partial(decode, stored="bfloat16", dtype="bfloat16")
    heads = (32, 8, 128), (64, 8, 128), (32, 32, 128), (9, 3, 64), (16, 8, 256)
    found = [_decode(partial(floats, heads=heads[0]))]
    found += [_decode(partial(floats, heads=heads[0], stored=stored)) for stored in ("int8", "uint8")]
    found += [_prefill(heads[0])]
    found += [_decode(partial(floats, heads=one)) for one in heads[1:]]
    found += [_prefill(one) for one in heads[1:]]
    return found


def _decode(problem: Callable[[Sequence[int]], Problem]) -> Class:
    lengths = uniform(64, 8192), uniform(8, 32768), ragged(64, 512, 8192), uniform(1, 32768)
    return Class(tuple(_spread(problem(some)) for some in lengths))


def _prefill(heads: tuple[int, int, int]) -> Class:
    sized = partial(Problem, "prefill", heads=heads, stored="bfloat16", dtype="bfloat16")
    lengths = (2048, 2048), (10240, 2048)
    return Class(tuple(_spread(sized(uniform(1, end), uniform(1, new))) for end, new in lengths))


def _spread(problem: Problem) -> Problem:
    """Over layers that together do not fit an L2 cache."""
    return replace(problem, layers=max(1, min(8, int(2e8 / problem.cost.bytes_accessed))))
