"""Compiles a program for an H100 and judges what the compiler says of it."""

import time
from collections import Counter
from dataclasses import dataclass
from functools import cache as once
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from jaxkv.hlo import launches, new_buffers
from pallas_kernels import use_backend
from tests.compiled.in_place.program import MAX_SEQS, POOL_BYTES, Program, int32, one_token
from tests.compiled.in_place.programs import append_and_attend

# Of the pool's bytes, what may be temporary memory for the pool's sake.
LIMIT = 0.02
KERNELS = ("append_kv", "copy_pages", "move_pages", "paged_attention", "attention_mass")
H100 = Path(__file__).with_name("h100.textproto")


@dataclass(frozen=True)
class Verdict:
    """What the compiler says of one program; sizes in bytes. `of_the_pool` is an upper bound."""

    program: str
    compile_seconds: float
    temporary: int
    of_the_pool: int
    aliased: int
    pool: int
    copies: dict[str, int]

    @property
    def ok(self) -> bool:
        """Whether it runs in place."""
        return self.of_the_pool <= LIMIT * self.pool and self.aliased >= self.pool and not self.copies


def check(program: Program) -> Verdict:
    """Compiles a program with the whole pool and, where that alone does not clear it, with a small one."""
    start = time.perf_counter()
    whole, small = program.cache(POOL_BYTES), program.cache(0)
    memory, hlo = compiled(program, whole)
    pool, small_pool = _bytes(whole.pool), _bytes(small.pool)
    layer_of_k = _bytes(whole.pool.k) // whole.pool.k.shape[0]
    more, copies = memory.temp_size_in_bytes, Counter(new_buffers(hlo, layer_of_k))
    if more * pool > LIMIT * pool * (pool - small_pool) or copies:
        small_memory, small_hlo = compiled(program, small)
        more = max(0, more - small_memory.temp_size_in_bytes)
        copies -= Counter(new_buffers(small_hlo, layer_of_k))
    return Verdict(
        program=program.name,
        compile_seconds=time.perf_counter() - start,
        temporary=memory.temp_size_in_bytes,
        of_the_pool=more * pool // (pool - small_pool),
        aliased=memory.alias_size_in_bytes,
        pool=pool,
        copies=dict(copies),
    )


def launches_a_layer() -> Counter[str]:
    """What append and attention of one more layer add to a decode step, on the `triton` backend."""
    counts = []
    for layers in (2, 3):
        run = partial(append_and_attend, layers=layers)
        program = Program("", run, lambda: (int32(MAX_SEQS), *one_token()), backend="triton")
        _, hlo = compiled(program, program.cache(0))
        counts.append(Counter(launches(hlo)))
    return counts[1] - counts[0]


def compiled(program: Program, cache) -> tuple[Any, str]:
    """The compiler's account of the program's memory, and its optimized HLO."""
    on_gpu = jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec())
    donated = 0 if program.donated else ()
    with jax.sharding.use_abstract_mesh(mesh().abstract_mesh), use_backend(program.backend):
        jitted = jax.jit(program.run, donate_argnums=donated, in_shardings=on_gpu, out_shardings=on_gpu)
        executable = jitted.lower(cache, *program.arguments()).compile()
    memory, hlo = executable.memory_analysis(), executable.as_text()
    if memory is None or hlo is None:
        raise RuntimeError(f"the compiler says nothing of {program.name}")
    # Anywhere: a loop's body is a computation of its own.
    if (program.backend == "triton") != any(f'name = "{kernel}"' in hlo for kernel in KERNELS):
        raise RuntimeError(f"{program.name} was not compiled for the {program.backend} backend")
    return memory, hlo


@once
def mesh() -> jax.sharding.Mesh:
    """One H100, which need not be there."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100.read_text()
    )
    return jax.sharding.Mesh(np.array(topology.devices), ("x",))


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
