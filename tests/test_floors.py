"""The house stands: imports only go down, help needs no heavy library, the wheel holds four names.

Every import is read with ``ast``, those inside functions too. Floors are those of docs/architecture.md.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY
from setuptools import find_namespace_packages, find_packages

from weightworks.stage import catalog

TOP = {"weightworks", "compress", "merge", "cli"}
FLOORS = {
    "weightworks": 1,  # the package itself: a version
    "weightworks.errors": 1,
    "weightworks.options": 2,
    "weightworks.store": 2,
    "weightworks.report": 2,
    "weightworks.stream": 3,
    "weightworks.stage": 4,
    "weightworks.engine": 5,
    "weightworks.score": 5,
    "compress": 5,
    "merge": 5,
    "weightworks.plan": 6,
    "weightworks.testing": 7,
    "cli": 7,
}
GROUND = {"weightworks.errors", "weightworks"}  # all that the catalog may import, so that help stays quick
FROM = {
    "torch": 2,
    "numpy": 2,
    "safetensors": 2,
    "transformers": 3,
    "accelerate": 3,
    "tokenizers": 3,
    "gguf": 2,
}  # lowest floor
# Methods of one shelf share modules beside the shelves (compress/grids.py); a method never imports a method.
SHELVES = {package for package in catalog.SHELVES.values() if (REPOSITORY / package.replace(".", "/")).is_dir()}


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in sorted(TOP) for path in sorted((REPOSITORY / package).rglob("*.py"))}


def room(module: str) -> str:
    """The entry of FLOORS that ``module`` is in: the longest that fits."""
    return max((name for name in FLOORS if module == name or module.startswith(name + ".")), key=len)


def floor(module: str) -> int:
    if MODULES[module].name == "__init__.py" and (module == "compress" or module in SHELVES - {"weightworks.score"}):
        return 7  # a front door: what users import
    return FLOORS[room(module)]


def imports(module: str, *, at_start_only: bool = False) -> Iterator[str]:
    """Modules that ``module`` imports, ``from package import submodule`` as the submodule."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in start(tree) if at_start_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide where an arrow points"
            assert node.module is not None
            for alias in node.names:
                assert alias.name != "*", f"{module}: star import"
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def start(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that run when a module is imported: not what is inside functions, nor what only a type checker reads."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for child in ast.iter_child_nodes(node):
            checked = isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
            if not checked and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                waiting.append(child)


def ours(module: str) -> list[str]:
    return [name for name in imports(module) if name.partition(".")[0] in TOP]


def is_method(module: str) -> bool:
    package, _, name = module.rpartition(".")
    return package in SHELVES and not name.startswith("_") and MODULES[module].name != "__init__.py"


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module: str) -> None:
    up = [name for name in ours(module) if floor(name) > floor(module)]
    assert up == []


@pytest.mark.parametrize("module", MODULES)
def test_rooms_of_one_floor_keep_to_themselves(module: str) -> None:
    """engine, score, compress and merge do not know each other; a method does not know another."""
    if floor(module) == 5:
        assert [name for name in ours(module) if floor(name) == 5 and room(name) != room(module)] == []
    if is_method(module):
        assert [name for name in ours(module) if is_method(name) and name != module] == []


def test_ground_never_names_a_method() -> None:
    for module in MODULES:
        if room(module).startswith("weightworks"):
            assert [name for name in ours(module) if name.startswith(("compress", "merge"))] == []


def test_catalog_stands_on_the_ground_floor() -> None:
    assert set(ours("weightworks.stage.catalog")) <= GROUND


@pytest.mark.parametrize("module", MODULES)
def test_libraries_belong_to_floors(module: str) -> None:
    heavy = [name for name in imports(module) if FROM.get(name.partition(".")[0], 0) > floor(module)]
    assert heavy == []
    if floor(module) < 7:
        assert [name for name in imports(module) if name.partition(".")[0] in ("typer", "click")] == []


def reached(module: str) -> set[str]:
    """Everything that importing ``module`` imports at once, ours followed on."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES:
            waiting += imports(name, at_start_only=True)
            waiting += [parent for parent in [name.rpartition(".")[0]] if parent]  # packages come first
    return seen


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) == "cli"])
def test_the_command_line_starts_without_torch(module: str) -> None:
    assert {name for name in reached(module) if name.partition(".")[0] in (*FROM, "scipy")} == set()


@pytest.mark.parametrize("module", ["compress", "compress.quantize", "weightworks", "weightworks.errors"])
def test_front_doors_are_light(module: str) -> None:
    assert {
        name for name in reached(module) if name.partition(".")[0] in (*FROM, "scipy", "pydantic", "typer")
    } == set()


def test_reading_imports_finds_what_it_should() -> None:
    assert "weightworks.plan.api" in set(imports("compress.quantize"))  # inside a function
    assert "weightworks.plan.api" not in set(imports("compress.quantize", at_start_only=True))
    assert "torch" in reached("weightworks.plan.api")
    assert floor("compress.quantize") == 7
    assert floor("compress.quantize.gptq") == 5
    assert is_method("compress.quantize.gptq")
    assert not is_method("compress.grids")


def test_no_circle_of_imports() -> None:
    """Following imports at start from a module never leads back to it."""
    for module in MODULES:
        direct = {name for name in imports(module, at_start_only=True) if name in MODULES and name != module}
        for name in direct:
            assert module not in reached_without_parents(name), f"{module} imports {name}, which leads back"


def reached_without_parents(module: str) -> set[str]:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [inner for inner in imports(name, at_start_only=True) if inner in MODULES]
    return seen


def test_wheel_holds_four_names() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    include = settings["tool"]["setuptools"]["packages"]["find"]["include"]
    found = find_namespace_packages(str(REPOSITORY), include=include)  # what setuptools' automatic finder takes
    packages = {name for name in found if any((REPOSITORY / name.replace(".", "/")).glob("*.py"))}
    assert {name.partition(".")[0] for name in packages} == TOP
    assert set(find_packages(str(REPOSITORY), include=include)) == packages  # none without its __init__.py
    scripts = settings["project"]["scripts"].values()
    assert all(target.partition(":")[0] in MODULES for target in scripts)


def test_every_module_is_in_the_wheel() -> None:
    assert [module for module, path in MODULES.items() if not (path.parent / "__init__.py").is_file()] == []


@pytest.mark.parametrize("entry", catalog.methods().values(), ids=lambda entry: entry.label)
def test_every_method_has_a_test_that_names_it(entry: catalog.Entry) -> None:
    tests = REPOSITORY / "tests"
    package, _, module = entry.module.rpartition(".")
    imported = re.compile(rf"{re.escape(entry.module)}\b|from {re.escape(package)} import [^\n]*\b{module}\b")
    naming = [
        path.name for path in tests.glob("test_*.py") if entry.name in path.stem or imported.search(path.read_text())
    ]
    assert naming
