"""Tables of tunings: what they change, and what is said of one that is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import formats, paged_attention
from pallas_kernels.device import Device
from pallas_kernels.paged_attention.triton import tables, tuning
from pallas_kernels.paged_attention.triton.tables import Shape, Values
from pallas_kernels.reference.cases import PAGED_ATTENTION, TOLERANCE, make

H100 = Device("sm_90", 132, "NVIDIA H100 80GB HBM3")
BFLOAT16 = formats.named("bfloat16")
DECODE = dict(tokens=64, seqs=64, group=4, head_dim=128, storage=BFLOAT16, q_dtype=jnp.bfloat16)
ROW = dict(queries="one", head_dim=128, group=4, pool="bfloat16", dtype="bfloat16")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes the user's table."""

    def write(device, rows):
        path = tmp_path / "tuning.toml"
        tables.write(path, device, rows, "of a test")
        tables.read.cache_clear()
        monkeypatch.setenv(tables.VARIABLE, str(path))
        return path

    return write


def test_a_table_goes_before_the_rule_where_it_says_something(table):
    before = tuning.rule(H100, **DECODE)
    path = table(H100.kind, {Shape(**ROW): Values(key_tile=32, num_stages=3, programs=2)})
    chosen = tuning.choose(H100, **DECODE)
    assert (chosen.key_tile, chosen.num_stages, chosen.programs) == (32, 3, 264)
    assert chosen.num_warps == before.num_warps
    assert tables.read(path) == (H100.kind, {Shape(**ROW): Values(key_tile=32, num_stages=3, programs=2)})
    # Another shape, another GPU, and the kernel that no search has been for.
    for device, shape in ((H100, DECODE | {"tokens": 128}), (Device("sm_90", 132, "NVIDIA H200"), DECODE)):
        assert tuning.choose(device, **shape) == tuning.rule(device, **shape)
    assert tuning.choose_mass(H100, **DECODE).key_tile == before.key_tile


def test_no_query_tile_is_longer_than_the_sequences(table):
    table(H100.kind, {Shape(**ROW | {"queries": "many"}): Values(query_tile=32)})
    assert tuning.choose(H100, **DECODE | {"seqs": 16}).query_tile == 4
    assert tuning.choose(H100, **DECODE | {"seqs": 1}).query_tile == 32


def test_a_kernel_is_cut_up_as_the_table_says_and_right(table):
    case = PAGED_ATTENTION[0]
    arguments = make(case)
    q, k_pages = arguments.arrays[:2]
    group = q.shape[1] // k_pages.shape[2]
    shape = Shape.of(
        tokens=q.shape[0],
        seqs=arguments.kv_lengths.shape[0],
        group=group,
        head_dim=q.shape[2],
        storage=formats.of(k_pages.dtype),
        q_dtype=q.dtype,
    )
    table("", {shape: Values(key_tile=16, num_warps=1, num_stages=7)})

    def run(*arrays, backend):
        options = {"layer": case.layer, **arguments.options}
        return paged_attention(*arrays, **options, backend=backend, interpret=backend == "triton")

    got, want = (run(*arguments.arrays, backend=backend) for backend in ("triton", "xla"))
    tolerance = TOLERANCE[case.dtype]
    np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=tolerance, atol=tolerance)
    traced = str(jax.make_jaxpr(lambda *arrays: run(*arrays, backend="triton"))(*arguments.arrays))
    assert "num_warps=1" in traced and "num_stages=7" in traced


@pytest.mark.parametrize(
    "text, says",
    [
        ("device = ", "is not TOML"),
        ("[[shape]]", "needs device"),
        ('device = "a"\ntile = 4', "'tile' is not one of device, shape"),
        ('device = "a"\nshape = [1]', "shape 1 is not a table"),
        ("num_warps = 4", None),
        ("key_tile = 48", "key_tile=48 must be a power of two"),
        ("key_tile = 8", "key_tile=8 must be 16 or more"),
        ("num_warps = 3", "num_warps=3 must be a power of two"),
        ("num_stages = 0", "num_stages=0 must be a positive integer"),
        ('programs = "many"', "programs='many' must be a positive integer"),
        ("warps = 4", "'warps' is not one of queries,"),
        ("queries = 'two'", "queries='two' must be 'one' or 'many'"),
        ("group = 3", "group=3 must be a power of two"),
        ("pool = 'float99'", "pool='float99' is not a dtype"),
        ("dtype = 1", "dtype=1 is not a dtype"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_errors_name_the_file_and_the_key(tmp_path, text, says):
    path = tmp_path / "mine.toml"
    if "device" not in text and "[[" not in text:
        changed = text.partition(" =")[0]
        row = [f"{name} = {value!r}" for name, value in ROW.items() if name != changed]
        text = "\n".join(['device = "a"', "[[shape]]", *row, text])
    path.write_text(text)
    if says is None:
        assert tables.read(path)[1][Shape(**ROW)] == Values(num_warps=4)
        return
    with pytest.raises(ValueError, match=r"mine\.toml") as error:
        tables.read(path)
    assert says in str(error.value)


def test_a_table_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv(tables.VARIABLE, str(tmp_path / "none.toml"))
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        tuning.choose(H100, **DECODE)


def test_a_row_that_lacks_a_key(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('device = "a"\n[[shape]]\nqueries = "one"')
    with pytest.raises(ValueError, match=r"mine\.toml: shape 1 lacks head_dim"):
        tables.read(path)
