"""Finds methods without importing them: files on the shelves, and plug-ins by entry point.

A shelf is a package whose modules without a leading underscore are methods. Reading a method's first docstring line
takes no import; importing its options takes no torch, because heavy libraries are deferred until first use.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from weightworks.errors import UsageError, nearest

SHELVES = {
    "quantize": "compress.quantize",
    "prune": "compress.prune",
    "recover": "compress.recover",
    "score": "weightworks.score",
    "merge": "merge",
}
ENTRY_POINTS = "weightworks.methods"  # a plug-in declares  "quantize.mine" = "package.module"
HEAVY = ("torch", "numpy", "scipy")


@dataclass(frozen=True)
class Entry:
    """A method that exists: ``kind`` and ``name`` (``quantize``, ``gptq``), the module that holds it, its summary."""

    kind: str
    name: str
    module: str
    summary: str

    @property
    def label(self) -> str:
        return f"{self.kind}.{self.name}"

    def load(self) -> Any:
        """The method's module; heavy libraries it imports are loaded on first use."""
        defer(HEAVY)
        return importlib.import_module(self.module)


@cache
def methods() -> dict[str, Entry]:
    """All methods by label, shelf by shelf in name order, then plug-ins."""
    found: dict[str, Entry] = {}
    for kind, package in SHELVES.items():
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(location).glob("[!_]*.py")):
                found[f"{kind}.{path.stem}"] = Entry(kind, path.stem, f"{package}.{path.stem}", _summary(path))
    from importlib.metadata import entry_points

    for point in entry_points(group=ENTRY_POINTS):
        kind, _, name = point.name.partition(".")
        spec = importlib.util.find_spec(point.value)
        summary = _summary(Path(spec.origin)) if spec and spec.origin else ""
        if kind in SHELVES and point.name not in found:
            found[point.name] = Entry(kind, name, point.value, summary)
    return found


def find(kind: str, name: str) -> Entry:
    """The method ``name`` of ``kind``; an unknown one is a usage error that suggests the nearest."""
    names = [entry.name for entry in methods().values() if entry.kind == kind]
    if name not in names:
        raise UsageError(f"unknown method '{name}' for {kind} ({nearest(name, names)})", hint="see: compress methods")
    return methods()[f"{kind}.{name}"]


class _Deferred(ModuleType):
    """Stands for a library until an attribute of it is wanted, then becomes a copy of it.

    ``importlib.util.LazyLoader`` will not do: up to Python 3.12 a second ``import`` statement already loads the library.
    """

    def __getattr__(self, attribute: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        library = importlib.import_module(self.__name__)
        self.__dict__.update(library.__dict__)
        return getattr(library, attribute)


def defer(names: tuple[str, ...]) -> None:
    """Let a later ``import`` of the named libraries return at once, and load each when first used."""
    for name in names:
        if name not in sys.modules and (spec := importlib.util.find_spec(name)) is not None:
            sys.modules[name] = _Deferred(name)
            sys.modules[name].__spec__ = spec


def _summary(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())
