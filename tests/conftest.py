"""Settings for every test: CPU by default, strict promotion of dtypes and ranks, shapes as annotated."""

import gc
import os
import pkgutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they run: LLVM's optimizations would take a third of their time, and the newer
# emitters, which there is no way around since jaxlib 0.11, a third of the rest. Those emitters are tested on
# Python 3.12; and `tests/compiled/check_aot.py` judges the compiled program as users get it.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)

# Function modules only: JAX unflattens the pytrees of jaxkv.state with things that are not arrays.
CHECKED = (
    "allocation",
    "pages",
    "releasing",
    "granting",
    "forking",
    "reordering",
    "merge",
    "pool",
    "attention",
    "eviction",
    "compaction",
    "invariants",
    "testing",
)
# All modules but the one that turns numbers into Python's, which a plan asks for a million times.
KERNELS = [
    module.name for module in pkgutil.iter_modules(find_spec("pallas_kernels").submodule_search_locations)
]
jaxtyping.install_import_hook(
    [f"jaxkv.{module}" for module in CHECKED]
    + [f"pallas_kernels.{module}" for module in KERNELS if module != "arguments"],
    "beartype.beartype",
)

pytest.register_assert_rewrite("tests.twin", "tests.edges")

# Tracing makes objects by the million and hardly any cycles: collecting often takes a twentieth of the time.
gc.set_threshold(50_000, 20, 50)

collect_ignore = ["fixtures"]  # data, and the scripts that wrote it

# Begun first: with one of these left to the end, one core would wait for the other.
LONGEST = (
    "test_cli.py",
    "test_paged_attention.py",
    "test_policies.py",
    "test_policy_machine.py",
    "test_x64.py",
    "test_state_machine.py",
    "test_attention.py",
)


def pytest_collection_modifyitems(items):
    """The longest modules first, and last in each the tests after which programs are compiled anew."""
    modules = list(dict.fromkeys(item.path for item in items))
    modules.sort(key=lambda path: LONGEST.index(path.name) if path.name in LONGEST else len(LONGEST))
    items.sort(key=lambda item: (modules.index(item.path), "traced_anew" in item.fixturenames))


# Of 65,530 memory mappings, after which a process is killed. Every compiled program takes some.
MOST_MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def programs_of_several_modules():
    """Compiled programs are kept for the modules that follow, until they take too many memory mappings."""
    yield
    mappings = Path("/proc/self/maps")
    if not mappings.exists() or mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture
def traced_anew():
    """For a test that patches what is traced: it takes no program of another test, and leaves none."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def no_shape_checks():
    """As a user runs: without the type checker, which would speak before the library does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
