"""Imports: what packages may, tests and benchmarks apart, no circle, and no module hidden by a function."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOPS = ("jaxkv", "pallas_kernels")

# The packages that each package imports from, within functions and for annotations too. A package is the
# modules of its folder, and of folders in it that are not listed. Modules that only export are "exports".
EXPORTS = ("jaxkv", "jaxkv.telemetry", "pallas_kernels")
ALLOWED = {
    "exports": {
        "jaxkv",
        "jaxkv.memory",
        "jaxkv.policies",
        "jaxkv.serving",
        "pallas_kernels",
        "pallas_kernels.append_kv",
        "pallas_kernels.attention_mass",
        "pallas_kernels.copy_pages",
        "pallas_kernels.move_pages",
        "pallas_kernels.paged_attention",
    },
    "jaxkv": {"jaxkv.policies", "jaxkv.serving", "pallas_kernels"},
    "jaxkv.checkpoints": {"jaxkv"},
    "jaxkv.cli": {
        "jaxkv",
        "jaxkv.memory",
        "jaxkv.models",
        "jaxkv.planner",
        "jaxkv.policies",
        "jaxkv.serving",
        "pallas_kernels",
    },
    "jaxkv.memory": {"jaxkv"},
    "jaxkv.models": {"jaxkv", "jaxkv.checkpoints", "pallas_kernels"},
    "jaxkv.planner": {"jaxkv", "jaxkv.checkpoints", "pallas_kernels"},
    "jaxkv.policies": {"jaxkv", "pallas_kernels"},
    "jaxkv.serving": {"jaxkv", "jaxkv.memory", "jaxkv.models", "jaxkv.policies", "pallas_kernels"},
    "jaxkv.tune": {"jaxkv.cli", "pallas_kernels"},
    "pallas_kernels": {"pallas_kernels.formats"},
    "pallas_kernels.formats": {"pallas_kernels", "pallas_kernels.paged_attention"},
    "pallas_kernels.append_kv": {"pallas_kernels", "pallas_kernels.formats"},
    "pallas_kernels.attention_mass": {
        "pallas_kernels",
        "pallas_kernels.paged_attention",
        "pallas_kernels.formats",
    },
    "pallas_kernels.copy_pages": {"pallas_kernels"},
    "pallas_kernels.move_pages": {"pallas_kernels"},
    "pallas_kernels.paged_attention": {"pallas_kernels", "pallas_kernels.formats"},
    "pallas_kernels.reference": set(),
}


@cache
def modules() -> dict[str, Path]:
    """Every module by its name, packages among them."""
    files = [path.relative_to(ROOT) for top in TOPS for path in sorted((ROOT / top).rglob("*.py"))]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): ROOT / path for path in files}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def statements(node: ast.AST, *, at_load: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements; with `at_load` only those that run when the module is loaded."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not (at_load and runs_later(child)):
            yield from statements(child, at_load=at_load)


def runs_later(node: ast.AST) -> bool:
    """Whether what stands in it runs when a function is called, or never."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def mentioned(statement: ast.Import | ast.ImportFrom) -> list[str]:
    """What a statement imports, each by its whole name: `a.b` of `from a import b`."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    assert statement.level == 0, f"a relative import in line {statement.lineno}"
    return [f"{statement.module}.{alias.name}" for alias in statement.names]


def named(statement: ast.Import | ast.ImportFrom) -> list[str]:
    """Modules of `TOPS` that a statement names."""
    names = mentioned(statement)
    if isinstance(statement, ast.ImportFrom):
        names = [name if name in modules() else str(statement.module) for name in names]
    return [name for name in names if name.partition(".")[0] in TOPS]


def imports(module: str, *, at_load: bool) -> set[str]:
    """Modules that a module imports."""
    return {name for found in statements(tree(module), at_load=at_load) for name in named(found)}


def ancestors(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def package(module: str) -> str:
    """The package of `ALLOWED` that a module belongs to."""
    if module in EXPORTS:
        return "exports"
    inner = ".".join(module.split(".")[:2])
    return inner if modules()[inner].name == "__init__.py" else module.partition(".")[0]


def edges() -> dict[str, set[str]]:
    """Which packages import which. To `jaxkv` all of `pallas_kernels` is one."""
    found: dict[str, set[str]] = {}
    for module in modules():
        sources = imports(module, at_load=False)
        if module.startswith("jaxkv"):
            sources = {"pallas_kernels.*" if name.startswith("pallas_kernels") else name for name in sources}
        packages = {"pallas_kernels" if name == "pallas_kernels.*" else package(name) for name in sources}
        found.setdefault(package(module), set()).update(packages - {package(module)})
    return found


def test_packages_import_those_that_the_list_allows():
    found = edges()
    assert set(found) == set(ALLOWED)
    more = {name: found[name] - ALLOWED[name] for name in found if found[name] - ALLOWED[name]}
    fewer = {name: ALLOWED[name] - found[name] for name in found if ALLOWED[name] - found[name]}
    assert not more, f"not allowed: {more}"
    assert not fewer, f"allowed, and no longer needed: {fewer}"


@pytest.mark.parametrize(
    ("folder", "others"),
    [("tests", {"benchmarks"}), ("benchmarks", {"tests"}), *((top, {"tests", "benchmarks"}) for top in TOPS)],
)
def test_tests_and_benchmarks_import_the_library_and_not_each_other(folder, others):
    found = {
        f"{path.relative_to(ROOT)}:{statement.lineno}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for statement in statements(ast.parse(path.read_text(encoding="utf-8")), at_load=False)
        if others & {name.partition(".")[0] for name in mentioned(statement)}
    }
    assert not found


def loading() -> dict[str, set[str]]:
    """What is loaded for each module: what it imports, and the packages that this lies in."""
    graph = {}
    for module in modules():
        found = imports(module, at_load=True)
        inside = {*ancestors(module), module}
        graph[module] = found | {outer for name in found for outer in ancestors(name)} - inside
    return graph


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_no_module_imports_itself_through_others():
    assert circle(loading()) is None


def test_a_circle_would_be_found():
    graph = loading()
    assert circle(graph | {"jaxkv.config": graph["jaxkv.config"] | {"jaxkv.sizing"}})
    assert circle(graph | {"jaxkv.state": graph["jaxkv.state"] | {"jaxkv"}})


def test_no_command_imports_another():
    commands = {f"jaxkv.cli.{name}" for name in ("generate", "serve", "profile", "demo", "plan")}
    assert not {name: found for name in commands if (found := imports(name, at_load=False) & commands)}


def exported(package: str) -> Iterator[tuple[str, str]]:
    """Names that a package's `__init__` gives, and the module that each comes from."""
    for found in statements(tree(package), at_load=True):
        if isinstance(found, ast.ImportFrom):
            yield from ((alias.asname or alias.name, str(found.module)) for alias in found.names)


@pytest.mark.parametrize(
    "package", [name for name, path in modules().items() if path.name == "__init__.py" and "jaxkv" in name]
)
def test_no_export_hides_a_module_of_its_name(package):
    """`import jaxkv.name as module` gives what the package calls `name`."""
    hidden = [
        name for name, source in exported(package) if f"{package}.{name}" in modules() and source != package
    ]
    assert not hidden
