"""Compiles a launch for a GPU and reads the machine code."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.compiled.machine_code.launches import Launch
from tests.compiled.machine_code.targets import KIB, Target

BYTES_IN_FLIGHT = 40 * KIB


@dataclass(frozen=True)
class Report:
    """What came out for one kernel and one target."""

    kernel: str
    launch: str
    target: str
    registers: int
    spills: int
    shared: int
    matrix: int
    wide_loads: int
    in_flight: int | None
    missed: tuple[str, ...]


def build(launch: Launch, target: Target) -> Report:
    """Compiles one launch for one target and reads what came out."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{launch.name}.ttir")
        path.write_text(launch.ir)
        compiled = triton.compile(
            str(path),
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options=dict(num_warps=launch.warps, num_stages=launch.stages),
        )
        shared = compiled.metadata.shared
        if target.backend == "cuda":
            # Scales of a tile of codes are few, and copied by fours.
            sizes = "8" if launch.quantized else "48"
            narrow = rf"cp\.async\.c[ag]\.shared\.global[^;]*, 0x[{sizes}]\b"
            narrow = len(re.findall(narrow, compiled.asm["ptx"]))
            found = _read_ptx(compiled.asm["ptx"], target, launch, shared, Path(folder))
        else:
            narrow = 0
            found = _read_amdgcn(compiled.asm["amdgcn"])
    met = {
        "spills": found["spills"] == 0,
        "matrix": found["matrix"] > 0 or not _has_matrix_units(target, launch.kernel),
        "wide loads": found["wide_loads"] >= launch.least_wide_loads and not narrow,
        "shared memory": shared <= target.shared_of_a_program,
        "in flight": found["in_flight"] is None or found["in_flight"] >= BYTES_IN_FLIGHT,
    }
    missed = tuple(name for name in sorted(launch.requirements | {"shared memory"}) if not met[name])
    return Report(launch.kernel, launch.name, target.name, shared=shared, missed=missed, **found)


def _has_matrix_units(target: Target, kernel: str) -> bool:
    # RDNA 3 multiplies 16-bit matrices only.
    return not (target.name == "gfx1100" and "f32" in kernel)


def _read_ptx(ptx: str, target: Target, launch: Launch, shared: int, folder: Path) -> dict:
    import triton  # pyright: ignore[reportMissingImports]

    path = folder / "kernel.ptx"
    path.write_text(ptx)
    tools = Path(str(triton.__file__)).parent / "backends/nvidia/bin"
    arch = _find(r"\.target (sm_\w+)", ptx)
    ptxas = tools / ("ptxas-blackwell" if target.name == "sm_100" else "ptxas")
    run = subprocess.run(
        [ptxas, "-v", f"--gpu-name={arch}", path, "-o", folder / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=True,
    )
    registers = int(_find(r"Used (\d+) registers", run.stderr))
    resident = min(
        target.registers // (launch.warps * 32 * -(-registers // 8) * 8),
        target.shared // (shared + KIB),
        target.warps // launch.warps,
    )
    return dict(
        registers=registers,
        spills=sum(map(int, re.findall(r"(\d+) bytes spill", run.stderr))),
        matrix=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx)),
        wide_loads=len(
            re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x10|ld\.global\S*\.v4\.b32", ptx)
        ),
        in_flight=int(resident * _copies_not_waited_for(ptx, launch.warps) * launch.unpadded),
    )


def _copies_not_waited_for(ptx: str, warps: int) -> int:
    """Bytes of 16-byte copies that a program leaves under way where it waits for the ones it needs."""
    most, group, sizes = 0, [], []
    for line in ptx.splitlines():
        if "cp.async.c" in line and "0x10" in line:
            group.append(16 * 32 * warps)
        elif "cp.async.commit_group" in line:
            sizes.append(sum(group))
            group = []
        elif wait := re.search(r"cp\.async\.wait_group\s+(\d+)", line):
            under_way = int(wait[1])
            most = max(most, sum(sizes[-under_way:]) if under_way else 0)
    return most


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output holds no {pattern}")
    return found[1]


def _read_amdgcn(code: str) -> dict:
    def number(pattern: str) -> int:
        return int(_find(pattern, code))

    return dict(
        registers=number(r"\.vgpr_count:\s+(\d+)"),
        # Scalar registers spill to vector ones, which costs no memory.
        spills=number(r"\.vgpr_spill_count:\s+(\d+)") + number(r"ScratchSize:\s+(\d+)"),
        matrix=len(re.findall(r"\bv_(?:mfma|wmma|smfmac)", code)),
        wide_loads=len(re.findall(r"\b(?:global|buffer)_load_(?:dwordx4|b128|lds_dwordx4)", code)),
        in_flight=None,
    )
