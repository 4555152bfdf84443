"""The problems of `bench_attention`, the most informative first."""

from dataclasses import replace
from functools import partial

from benchmarks.attention_targets import MEGABYTE
from jaxkv.tune.implementation import HAS_GPU
from jaxkv.tune.problems import Problem, decode, ragged, uniform


def problems() -> list[Problem]:
    """All problems that fit the memory."""
    return _for_gpu() if HAS_GPU else _for_cpu()


def _for_cpu() -> list[Problem]:
    prefill = partial(Problem, "prefill", page_size=16)
    shared = partial(Problem, "shared prefix", page_size=16)
    even, uneven = uniform(8, 4096), ragged(8, 128, 4096)
    return [
        decode(even),
        decode(uneven),
        decode(even, page_size=64),
        decode(uneven, page_size=128),
        *(decode(uniform(8, length)) for length in (256, 512, 1024, 2048)),
        decode(uniform(1, 4096)),
        decode(even, heads=(9, 3, 64)),
        decode(uneven, heads=(9, 3, 64)),
        decode(uneven, heads=(8, 1, 128)),
        decode(uneven, stored="int8"),
        decode(uneven, stored="uint8"),
        prefill(uniform(1, 512), uniform(1, 512)),
        prefill(uniform(1, 2560), uniform(1, 512)),
        shared(uniform(8, 2176), uniform(8, 1), shared=2048),
        shared(uniform(32, 2176), uniform(32, 1), shared=2048),
    ]


def _for_gpu() -> list[Problem]:
    """One for each target, then 32/8/128 over every batch and context, the other heads at one of each, and
    what else the kernels do."""
    floats = partial(decode, stored="bfloat16", dtype="bfloat16")
    sized = partial(Problem, stored="bfloat16", dtype="bfloat16")
    even, uneven = uniform(64, 8192), ragged(64, 512, 8192)
    first = [
        floats(even),
        floats(even, stored="int8"),
        floats(uneven),
        sized("prefill", uniform(1, 8192), uniform(1, 8192)),
        floats(even, heads=(64, 8, 128)),
        floats(uniform(8, 32768)),
        floats(even, page_size=64),
        floats(even, stored="uint8"),
        sized("shared prefix", uniform(32, 8320), uniform(32, 1), shared=8192),
        sized("prefill", uniform(1, 10240), uniform(1, 2048)),
        floats(even, heads=(9, 3, 64)),
        floats(even, heads=(32, 32, 128)),
        floats(uniform(1, 32768)),
        floats(uniform(256, 1024)),
    ]
    grid = [
        floats(lengths, page_size=page_size)
        for page_size in (16, 64)
        for seqs in (1, 8, 64, 256)
        for length in (1024, 8192, 32768, 131072)
        for lengths in (uniform(seqs, length), ragged(seqs, length // 16, length))
        if seqs > 1 or lengths == uniform(1, length)
    ]
    grid += [floats(uniform(64, 8192), page_size=page_size) for page_size in (32, 128)]
    grid += [
        floats(uniform(seqs, length), heads=heads)
        for heads in ((8, 1, 128), (32, 32, 128), (64, 8, 128), (9, 3, 64))
        for seqs, length in ((8, 8192), (64, 8192))
    ]
    coded = even, uniform(8, 32768), uneven
    twins = [
        problem
        for problem in grid
        if problem.lengths in coded and (problem.heads, problem.page_size) == ((32, 8, 128), 16)
    ]
    grid += [replace(problem, stored=stored) for stored in ("int8", "uint8") for problem in twins]
    grid += [
        sized("prefill", uniform(1, cached + chunk), uniform(1, chunk))
        for chunk in (512, 2048, 8192)
        for cached in (0, 8192, 32768)
    ]
    grid += [
        sized("shared prefix", uniform(seqs, prefix + 128), uniform(seqs, 1), shared=prefix)
        for seqs in (8, 32, 128)
        for prefix in (2048, 8192, 32768)
    ]
    memory = 9 * 2**30
    return [
        # A layer of a few megabytes is read from the L2 cache unless others come between.
        replace(problem, layers=max(1, min(8, int(200 * MEGABYTE / problem.cost.bytes_accessed))))
        for problem in dict.fromkeys([*first, *grid])
        if problem.cost.bytes_accessed < memory
    ]
