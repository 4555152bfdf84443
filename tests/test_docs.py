"""The documentation names every public name, shows every example, and repeats nothing by hand."""

import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import jaxkv

ROOT = Path(__file__).parent.parent
DOCS, EXAMPLES = ROOT / "docs", ROOT / "docs" / "examples"
PAGES = {path: path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
PUBLIC = (
    "jaxkv",
    "jaxkv.memory",
    "jaxkv.models",
    "jaxkv.planner",
    "jaxkv.policies",
    "jaxkv.serving",
    "jaxkv.telemetry",
    "pallas_kernels",
)
# Modules without an `__init__.py` of exports: their functions and classes.
MODULES = ("jaxkv.errors", "jaxkv.sizing", "jaxkv.testing", "pallas_kernels.formats")
# Those of the README are run by its own tests.
SCRIPTS = [
    path
    for path in sorted(EXAMPLES.rglob("*.py"))
    if (path.parent == EXAMPLES or path.name == "check.py") and not path.name.startswith("readme_")
]
README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def exported(module: str) -> dict[str, object]:
    """The names that a module's `__init__.py` exports, as `from x import y as y`."""
    source = Path(import_module(module).__file__).read_text(encoding="utf-8")
    names = re.findall(r"^ *(?:from \S+ )?import (\w+) as \1$", source, re.MULTILINE)
    return {name: getattr(import_module(module), name) for name in names}


def defined(module: str) -> dict[str, object]:
    """The public functions and classes that a module defines."""
    of = import_module(module)
    return {
        name: value
        for name, value in vars(of).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module
    }


def documented() -> dict[int, str]:
    """What the API pages have an entry for, by identity: one entry serves all names of an object."""
    entries = [name for text in PAGES.values() for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]
    assert len(entries) == len(set(entries)), "an entry stands twice"
    found = {}
    for entry in entries:
        module, _, name = entry.rpartition(".")
        found[id(getattr(import_module(module), name))] = entry
    return found


def test_every_public_name_has_an_entry():
    entries = documented()
    names = {f"{module}.{name}": value for module in PUBLIC for name, value in exported(module).items()}
    names |= {f"{module}.{name}": value for module in MODULES for name, value in defined(module).items()}
    missing = [name for name, value in names.items() if id(value) not in entries and not is_module(value)]
    assert not missing


def is_module(value: object) -> bool:
    return type(value).__name__ == "module"


def test_every_entry_has_a_docstring():
    for entry in documented().values():
        module, _, name = entry.rpartition(".")
        value = getattr(import_module(module), name)
        assert callable(value) is False or (value.__doc__ or "").strip(), entry


def test_every_example_is_shown_and_every_shown_part_exists():
    shown = [
        part
        for text in PAGES.values()
        for part in re.findall(r'--8<-- "examples/([\w/]+\.py)(?::(\w+))?"', text)
    ]
    assert {name for name, _ in shown} >= {
        str(path.relative_to(EXAMPLES))
        for path in EXAMPLES.rglob("*.py")
        if path.name not in ("check.py", "readme_text.py", "readme_server.py")
    }
    for name, section in shown:
        text = (EXAMPLES / name).read_text(encoding="utf-8")
        assert not section or f"[start:{section}]" in text, (name, section)


def test_the_examples_of_the_readme_are_those_of_the_documentation():
    for name, example in zip(("readme_text", "readme_loop", "readme_server"), README, strict=True):
        assert (EXAMPLES / f"{name}.py").read_text(encoding="utf-8") == example


def test_every_page_is_in_the_navigation():
    # What the hook generates is in it too.
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r"([\w/-]+\.(?:md|ipynb))", nav))
    files = {str(path.relative_to(DOCS)) for end in ("md", "ipynb") for path in DOCS.rglob(f"*.{end}")}
    generated = runpy.run_path(str(DOCS / "pages.py"))["PAGES"]
    assert listed == files | set(generated) | {"api/commands.md"}


def test_the_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    number, day = re.search(r"^## \[(\d.*)\] - (\S+)$", changes, re.MULTILINE).groups()
    assert number == jaxkv.__version__
    assert f"version: {number}\ndate-released: {day}\n" in citation


def test_pictures_are_as_their_script_draws_them(tmp_path):
    script = (DOCS / "pictures" / "draw.py").read_text(encoding="utf-8")
    (tmp_path / "draw.py").write_text(script, encoding="utf-8")
    subprocess.run([sys.executable, tmp_path / "draw.py"], check=True)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert drawn and {path.name for path in drawn} == {
        path.name for path in (DOCS / "pictures").glob("*.svg")
    }
    for path in drawn:
        assert path.read_text(encoding="utf-8") == (DOCS / "pictures" / path.name).read_text(encoding="utf-8")


def test_notebooks_are_kept_without_outputs():
    for path in DOCS.rglob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        assert '"outputs": []' in text and '"output_type"' not in text, path


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_examples_run(script, tmp_path):
    """Each in a process of its own, with no settings of the tests."""
    command = [sys.executable, script]
    if script.name.startswith("test_"):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-c",
            tmp_path / "none.ini",
            "-p",
            "no:cacheprovider",
            script,
        ]
        (tmp_path / "none.ini").write_text("[pytest]\n", encoding="utf-8")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
