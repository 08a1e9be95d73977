"""Finds methods: files on the shelves, and plug-ins by entry point. Nothing is imported before it is wanted.

A shelf is a package whose modules without a leading underscore are methods. Reading a method's first docstring line
takes no import; importing its options takes no torch, because heavy libraries are deferred until first use.

A plug-in is code of others, so it is imported to see whether it can be used before it is offered; one that cannot is
named with its cause when methods are listed or when it is asked for, and stops nothing else.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
import textwrap
import threading
import traceback
import types
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Union, get_args, get_origin

from weightworks.errors import UsageError, WeightworksError, nearest

SHELVES = {
    "quantize": "compress.quantize",
    "prune": "compress.prune",
    "recover": "compress.recover",
    "select": "compress.select",
    "score": "weightworks.score",
    "merge": "merge",
    "adapter": "merge.adapters",
}
ENTRY_POINTS = "weightworks.methods"  # a plug-in declares  "quantize.mine" = "package.module"
HEAVY = ("torch", "numpy", "scipy")
ESSENTIALS = ("Options", "Method", "VERSION", "PAPER")
SCALARS = (bool, int, float, str)
# What the commands and every run already call their own: an option of such a name could not be told from it. A test
# holds this against the commands and the settings of a run.
RESERVED = """
model models method output_dir dry_run json quiet verbose help version dataset num_samples seq_len seed device dtype
max_memory max_shard_size overwrite resume strict trust_remote_code allow_pickle base continue_from teacher
""".split()  # noqa: SIM905 (a list of twenty strings is harder to read)
_importing = threading.RLock()  # stdout, which is turned away meanwhile, is the whole process's


@dataclass(frozen=True)
class Entry:
    """A method that exists: ``kind`` and ``name`` (``quantize``, ``gptq``), the module that holds it, its summary.

    ``distribution`` is name and version of the package a plug-in came with, None for our own; ``broken`` is why a
    plug-in cannot be used, None as long as nothing is known against it.
    """

    kind: str
    name: str
    module: str
    summary: str
    distribution: str | None = None
    broken: str | None = None

    @property
    def label(self) -> str:
        return f"{self.kind}.{self.name}" if self.kind else self.name

    def load(self) -> Any:
        """The method's module; heavy libraries it imports are loaded on first use.

        Raises :class:`WeightworksError` with the cause for a plug-in that cannot be used.
        """
        if self.distribution is None:
            defer(HEAVY)
            return importlib.import_module(self.module)
        module, reason = _examined(self)
        if reason is not None:
            raise WeightworksError(
                f"{self.label} of {self.distribution} cannot be used: {reason}",
                hint=f"other methods can; to be rid of it: pip uninstall {self.distribution.rpartition(' ')[0]}",
            )
        return module

    def version_facts(self) -> dict[str, Any]:
        """What tells this method's code from other code of the same name: part of the identity of all it makes."""
        facts: dict[str, Any] = {"method_version": self.load().VERSION}
        return facts if self.distribution is None else {**facts, "distribution": self.distribution}


@cache
def declared() -> tuple[Entry, ...]:
    """Every method by its file or entry point alone: ours shelf by shelf in name order, then plug-ins by label."""
    ours: dict[str, Entry] = {}
    for kind, package in SHELVES.items():
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(location).glob("[!_]*.py")):
                ours[f"{kind}.{path.stem}"] = Entry(kind, path.stem, f"{package}.{path.stem}", _summary(path))
    plugins = sorted(_plugins(), key=lambda entry: (entry.label, entry.distribution or ""))
    return *ours.values(), *(_unique(entry, plugins, set(ours)) for entry in plugins)


@cache
def methods(kind: str | None = None) -> dict[str, Entry]:
    """All methods that can be used, or those of one kind, by label; plug-ins are imported to find out."""
    return {entry.label: entry for entry in declared() if kind in (None, entry.kind) and _examined(entry)[1] is None}


@cache
def broken() -> tuple[Entry, ...]:
    """Plug-ins that cannot be used, each with the reason."""
    return tuple(replace(entry, broken=reason) for entry in declared() if (reason := _examined(entry)[1]) is not None)


def find(kind: str, name: str) -> Entry:
    """The method ``name`` of ``kind``, dashes or underscores; an unknown one is a usage error that suggests the nearest.

    No other plug-in is imported. One that is broken is an error with the cause, here or when it is loaded.
    """
    known = [entry for entry in declared() if entry.kind == kind]
    meant = sorted(
        (entry for entry in known if entry.name in (name, name.replace("-", "_"))),
        key=lambda entry: entry.broken is not None,
    )
    if not meant:
        names = {entry.name for entry in known if entry.broken is None}
        raise UsageError(f"unknown method '{name}' for {kind} ({nearest(name, names)})", hint="see: compress methods")
    if meant[0].broken is not None:
        meant[0].load()  # raises, naming the cause
    return meant[0]


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


# Plug-ins.


def _plugins() -> Iterator[Entry]:
    """What installed distributions declare, each distribution once; the first on the path is the one that imports find."""
    from importlib.metadata import distributions

    seen: set[str] = set()
    for distribution in distributions():
        who = str(getattr(distribution, "_path", distribution))
        try:
            if ENTRY_POINTS not in (distribution.read_text("entry_points.txt") or ""):
                continue
            who = f"{distribution.name} {distribution.version}"
            points = [(point.name, point.value) for point in distribution.entry_points.select(group=ENTRY_POINTS)]
        except Exception as error:  # damaged metadata raises many kinds; the other distributions are sound
            yield Entry("", who, "", "", who, f"its metadata cannot be read: {_said(error)}")
            continue
        if (name := re.sub(r"[-_.]+", "-", distribution.name).lower()) not in seen:
            seen.add(name)
            yield from (_declared_by(who, *point) for point in sorted(set(points)))


def _declared_by(distribution: str, label: str, value: str) -> Entry:
    """The entry of an entry point ``label = value``, as far as its text and the file it points to can tell."""
    kind, _, name = label.partition(".")
    reason = None
    if kind not in SHELVES:
        kind, name, reason = "", label, f"'{label}' is not KIND.NAME with a kind of {', '.join(SHELVES)}"
    elif not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        reason = f"the name '{name}' is not made of lower-case letters, digits and underscores"
    elif not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", value):
        reason = f"'{value}' is not the name of a module"
    return Entry(kind, name, value, "" if reason else _plugin_summary(value), distribution, reason)


def _plugin_summary(module: str) -> str:
    """The first sentence of a module's docstring, without importing the packages it is in; "" if it cannot be had."""
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
        folders = [Path(folder, *inner) for folder in (spec.submodule_search_locations or ())] if spec else []
        files = [file for folder in folders for file in (folder.with_suffix(".py"), folder / "__init__.py")]
        files += [Path(spec.origin)] if spec and spec.origin and not inner else []
        return next((_summary(file) for file in files if file.is_file()), "")
    except Exception:  # importing it will tell why
        return ""


def _unique(entry: Entry, plugins: list[Entry], ours: set[str]) -> Entry:
    """``entry``, broken if its label is ours or that of another plug-in: which one was meant cannot be known."""
    others = [other.distribution for other in plugins if other.label == entry.label and other is not entry]
    if entry.broken is not None or not (entry.label in ours or others):
        return entry
    if entry.label in ours:
        return replace(entry, broken=f"weightworks itself has a method {entry.label}")
    return replace(entry, broken=f"{entry.label} is also declared by {', '.join(map(str, others))}; uninstall one")


@cache
def _examined(entry: Entry) -> tuple[ModuleType | None, str | None]:
    """The module of a plug-in, or why it cannot be used. Our own methods are not imported for this."""
    if entry.distribution is None or entry.broken is not None:
        return None, entry.broken
    defer(HEAVY)
    try:
        with _importing, redirect_stdout(sys.stderr):  # what it prints must not get into the output of --json
            module = importlib.import_module(entry.module)
            return module, fault(module, entry.kind)
    except (Exception, SystemExit) as error:  # whatever the code of others raises, everything else goes on
        return None, _said(error, entry.module)


def fault(module: Any, kind: str) -> str | None:
    """What keeps the module of a method of ``kind`` from being used, or None: what is missing, or an option that no
    command can offer.
    """
    if missing := [name for name in ESSENTIALS if not hasattr(module, name)]:
        return f"{module.__name__} has no {', '.join(missing)}"
    options, version = module.Options, module.VERSION
    bases = options.__mro__ if isinstance(options, type) else ()
    if not any((base.__module__, base.__name__) == ("weightworks.options", "Options") for base in bases):
        return "Options is not a subclass of weightworks.options.Options"
    if not callable(module.Method):
        return "Method is not a class"
    if type(version) is not int or version < 1:
        return f"VERSION is {version!r}, not a whole number from 1 on"
    if not isinstance(module.PAPER, str) or not module.PAPER.strip():
        return "PAPER is not a text"
    for name, field in options.model_fields.items():
        if name in RESERVED and kind != "score":  # scores have no command whose options theirs would meet
            return f"option '{name}' has a name that commands already use"
        if not _typed(field.annotation):
            plain = isinstance(field.annotation, type) and not get_args(field.annotation)
            shown = field.annotation.__name__ if plain else str(field.annotation)
            allowed = "bool, int, float, str, a Literal of them, list[str], list[float], or one of these | None"
            return f"option '{name}' has type {shown}; allowed: {allowed}"
    options.model_json_schema()  # its page, and its defaults: an error here is the reason
    if not any(field.is_required() for field in options.model_fields.values()):
        options().resolved()
    return None


def _typed(annotation: Any) -> bool:
    """Whether a value of this type can be typed on a command line."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _typed(next(arg for arg in args if arg is not type(None)))
    if origin is Literal:
        return type(args[0]) in SCALARS
    return annotation in SCALARS or (origin is list and args in ((str,), (float,)))


def _said(error: BaseException, module: str = "") -> str:
    """An exception in one line: its kind, its text, and the last line of the package of ``module`` on the way to it."""
    text = f"{type(error).__name__}: {textwrap.shorten(str(error), 200)}".removesuffix(": ")
    top = module.partition(".")[0]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if top in path.parts or path.name == f"{top}.py":
            return f"{text} ({path.name}, line {frame.lineno})"
    return text
