"""Each operation within `shard_map` with its default checks, and over explicit and automatic mesh axes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.four_devices import OPERATIONS, POLICIES, WAYS

# Of the policies one runs in `make test`, and of codes a decode step; the others and prefixes in `test-slow`.
# Codes make no difference to policies, nor to `sampled`, which neither reads nor writes the pool.
OFTEN = [*(name for name in OPERATIONS if name != "prefixes"), "HeavyHitter"]
SELDOM = [*(name for name in POLICIES if name not in OFTEN), "prefixes"]


@pytest.mark.parametrize(
    ("quantization", "names"),
    [
        ("none", OFTEN),
        ("int8", ["decode"]),
        pytest.param("int8", ["options", "table_operations"], marks=pytest.mark.slow),
        pytest.param("none", SELDOM, marks=pytest.mark.slow),
    ],
    ids=["float", "int8", "other options, int8", "other policies, prefixes"],
)
def test_every_operation_does_on_four_devices_what_it_does_on_one(quantization, names):
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-m", "tests.four_devices", quantization, *names],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as on one device") == len(WAYS) * len(names)
    assert done.stdout.count("as without a mesh") == 2
