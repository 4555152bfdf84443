"""Each operation within `shard_map` with its default checks, and over explicit and automatic mesh axes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.four_devices import OPERATIONS, POLICIES, WAYS


@pytest.mark.parametrize(
    ("quantization", "operations"),
    [("none", len(OPERATIONS) + len(POLICIES)), ("int8", len(OPERATIONS))],
)
def test_every_operation_does_on_four_devices_what_it_does_on_one(quantization, operations):
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-m", "tests.four_devices", quantization],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as on one device") == len(WAYS) * operations
