"""A user's own lm-eval tasks: what the YAML files of a folder define, and the local files each of them reads.

Read without lm-eval, whose import and index take seconds: cache keys need these files before anything runs.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightworks.errors import CalibrationError

BUILDERS = (
    "arrow",
    "csv",
    "json",
    "pandas",
    "parquet",
    "text",
    "xml",
    "webdataset",
)  # data sets of `datasets` from files
IGNORED = ("__pycache__", ".ipynb_checkpoints")  # folders lm-eval does not look into
REMOTE = re.compile(r"\w+://")


@dataclass(frozen=True)
class TaskFile:
    """A task or group by its YAML file: ``config`` with what it includes, ``sources`` it and the included files."""

    name: str
    config: dict[str, Any] = field(repr=False)
    sources: tuple[Path, ...]

    @property
    def members(self) -> list[str]:
        """Tasks and groups of a group, by name."""
        listed = self.config.get("task")
        items = listed if isinstance(listed, list) else []
        return [item if isinstance(item, str) else str(item.get("group") or item.get("task")) for item in items]

    def absolute(self, values: Any) -> Any:
        """``data_files`` (a path, a list, or either by split) with relative paths put below the task's folder.

        Raises :class:`CalibrationError` for a path that leads to no file.
        """
        if isinstance(values, dict):
            return {key: self.absolute(value) for key, value in values.items()}
        if isinstance(values, list | tuple):
            return [self.absolute(value) for value in values]
        path = str(values)
        if REMOTE.match(path) or Path(path).is_absolute():
            return path
        for source in self.sources:  # an included file may lie elsewhere, with its data beside it
            if glob.glob(str(source.parent / path), recursive=True):
                return str(source.parent / path)
        raise CalibrationError(
            f"task '{self.name}' ({self.sources[0]}): its data file '{path}' is not in {self.sources[0].parent}",
            hint="paths in a task's YAML are relative to the folder of that YAML",
        )

    def located(self, dataset: str | None, arguments: dict[str, Any] | None) -> tuple[str | None, dict[str, Any]]:
        """``dataset_path`` and ``dataset_kwargs`` with the local paths among them absolute; hub data sets stay as they are."""
        arguments = dict(arguments or {})
        if dataset in BUILDERS:
            for key in ("data_files", "data_dir"):
                if arguments.get(key):
                    arguments[key] = self.absolute(arguments[key])
        elif dataset and any((source.parent / dataset).exists() for source in self.sources):
            dataset = self.absolute(dataset)
        return dataset, arguments

    def files(self) -> Iterator[Path]:
        """The YAML files, the Python files their functions are in, and the data."""
        for source in self.sources:
            yield source
            if "!function" in source.read_text(encoding="utf-8"):
                yield from sorted(source.parent.glob("*.py"))  # those that the named ones import too
        configs = [self.config, *(part for part in _listed(self.config) if "dataset_path" in part)]
        for config in configs:
            dataset, arguments = self.located(config.get("dataset_path"), config.get("dataset_kwargs"))
            places = [place for key in ("data_files", "data_dir") for place in _flat(arguments.get(key))]
            for place in [*places, *_flat(dataset)]:
                if Path(place).is_absolute():
                    for path in sorted(glob.glob(place, recursive=True)):
                        yield from [Path(path)] if Path(path).is_file() else _below(Path(path))


def scan(folder: str | Path) -> tuple[dict[str, TaskFile], dict[str, list[str]], list[str]]:
    """Tasks and groups in the YAML files below ``folder`` by name, members by tag, and a sentence for each unreadable file.

    Raises :class:`CalibrationError` when there is no such folder.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise CalibrationError(
            f"{folder}: no such folder", hint="--include-path takes the folder of your tasks' YAML files"
        )
    tasks: dict[str, TaskFile] = {}
    tags: dict[str, list[str]] = {}
    problems = []
    for path in sorted(root.glob("**/*.yaml"), key=lambda path: path.as_posix()):
        if any(part in IGNORED for part in path.parts):
            continue
        try:
            config, sources = read_yaml(path)
        except (OSError, ValueError) as error:
            problems.append(f"{path} cannot be read ({str(error).splitlines()[0]})")
            continue
        named = config.get("group") or config.get("task")
        if not isinstance(named, str):
            continue
        found = TaskFile(named, config, tuple(sources))
        tasks.setdefault(named, found)  # as lm-eval does: the first of a name in one folder
        for tag in _flat(config.get("tag")):
            tags.setdefault(tag, []).append(named)
        for part in _listed(config):
            if "dataset_path" in part and "task" in part:  # a task defined inside a group
                tasks.setdefault(f"{named}::{part['task']}", TaskFile(f"{named}::{part['task']}", part, tuple(sources)))
    return tasks, tags, problems


def files_of(names: Sequence[str], tasks: dict[str, TaskFile], tags: dict[str, list[str]]) -> list[Path]:
    """Local files that the named tasks, groups and tags read, members included; names found elsewhere give none."""
    found: dict[Path, None] = {}
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop(0)
        if name in seen:
            continue
        seen.add(name)
        waiting += tags.get(name, [])
        if name in tasks:
            waiting += tasks[name].members
            found |= dict.fromkeys(tasks[name].files())
    return list(found)


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[Path]]:
    """A task file with what it includes merged below it, and the files read, itself first. Functions stay names.

    Raises ValueError for what is not such a file, OSError for an included file that is not there.
    """
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    if path in seen:
        raise ValueError(f"includes itself by way of {seen[-1]}")
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)  # a SafeLoader: it makes no objects
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(config, dict):
        raise ValueError(f"a mapping is expected, found {type(config).__name__}")  # noqa: TRY004 (a file is wrong)
    merged: dict[str, Any] = {}
    sources = [path]
    for name in _flat(config.pop("include", None)):
        inner, files = read_yaml((path.parent / name).resolve(), (*seen, path))
        merged |= inner
        sources += files
    return merged | config, sources


def _listed(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries of a group that define or change a task on the spot."""
    listed = config.get("task")
    return [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []


def _flat(value: Any) -> list[str]:
    """The paths or names in a string, a list, or lists by key."""
    if value is None:
        return []
    if isinstance(value, dict):
        return [inner for part in value.values() for inner in _flat(part)]
    if isinstance(value, list | tuple):
        return [inner for part in value for inner in _flat(part)]
    return [str(value)]


def _below(folder: Path) -> list[Path]:
    """All files in a folder of data."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
