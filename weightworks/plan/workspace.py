"""Where a recipe's outputs lie: kept by key, linked by name, found again only if complete and intact.

WORKSPACE/cache/KEY/STAGE/       an output folder with its provenance.json
WORKSPACE/cache/KEY/record.json  written last: what it is, what it cost
WORKSPACE/STAGE                  a link to the latest output of that stage
WORKSPACE/stages.json            the latest key of each stage, to say what changed
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightworks.errors import CheckpointError, OutputError
from weightworks.plan.remote import Remote
from weightworks.store.sources import Digests

PROVENANCE, RECORD, LOCK, LATEST = "provenance.json", "record.json", "lock", "stages.json"


@dataclass(frozen=True)
class Output:
    """A finished output: its folder, and the record of how it came about (clocks live there)."""

    folder: Path
    record: Mapping[str, Any]

    def provenance(self) -> dict[str, Any]:
        """What the output says of itself."""
        found: dict[str, Any] = json.loads((self.folder / PROVENANCE).read_text(encoding="utf-8"))
        return found


class Workspace:
    """The folder of several recipes' runs, seen by one of them. Several runs may use it at once."""

    def __init__(self, root: Path, digests: Digests, recipe: str = "recipe", remote: Remote | None = None) -> None:
        self.root = root.absolute()
        self.cache = self.root / "cache"
        self.view = self.root / (safe(recipe) if safe(recipe) != "cache" else "cache-recipe")
        self.digests = digests
        self.remote = remote

    def place(self, key: str, stage: str) -> Path:
        """Where the output of ``stage`` under ``key`` goes."""
        return self.cache / key / safe(stage)

    def find(self, key: str) -> Output | None:
        """The output under ``key`` if it is complete and every file is as its provenance says; fetched if need be."""
        found = self._find(key)
        if found is None and self.remote is not None and self.remote.fetch(self.cache, key):
            return self._find(key)
        return found

    def _find(self, key: str) -> Output | None:
        try:
            record = json.loads((self.cache / key / RECORD).read_text(encoding="utf-8"))
            folder = self.cache / key / record["folder"]
            if self.digests.file(folder / PROVENANCE) != record["provenance"]:
                return None
            files = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["files"]
            intact = all(self.digests.file(folder / name) == digest for name, digest in files.items())
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Output(folder, record) if intact else None

    def keep(self, key: str, folder: Path, facts: Mapping[str, Any]) -> Output:
        """Enter the finished ``folder`` under ``key``: from now on it is found."""
        record = {**facts, "folder": folder.name, "provenance": self.digests.file(folder / PROVENANCE)}
        write_json(self.cache / key / RECORD, record)
        if self.remote is not None:
            self.remote.send(self.cache, key)
        return Output(folder, record)

    @contextmanager
    def only_one(self, key: str, wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the key: another run that wants the same output waits, then finds it. ``wait`` is told of a wait."""
        self.make(self.cache / key)
        with (self.cache / key / LOCK).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wait()
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def make(self, folder: Path) -> None:
        """Make a folder of the workspace; raises :class:`OutputError` where nothing can be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be made ({error.strerror})", hint="choose another place with --workspace"
            ) from None

    def link(self, stage: str, output: Output) -> None:
        """Let the stage's name lead to its output; what is there and no link of ours stays."""
        path = self.view / safe(stage)
        if path.exists() and not path.is_symlink():
            return
        self.make(self.view)
        temporary = self.view / f".{safe(stage)}.{os.getpid()}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(output.folder, self.view))
        temporary.replace(path)

    def latest(self) -> dict[str, Any]:
        """Key and material of each stage of the recipe as last run or found."""
        return _latest(self.view / LATEST)

    def remember(self, latest: Mapping[str, Any]) -> None:
        """Add to what :meth:`latest` tells."""
        write_json(self.view / LATEST, {**self.latest(), **latest})

    def entries(self) -> list[dict[str, Any]]:
        """All that is kept, finished or not: key, stage, bytes, seconds since last use, state."""
        current = {facts["key"] for path in self.root.glob(f"*/{LATEST}") for facts in _latest(path).values()}
        found = []
        for folder in sorted(self.cache.iterdir()) if self.cache.is_dir() else []:
            try:
                record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                record = {}
            files = [path for path in folder.rglob("*") if path.is_file()]
            used = max(
                (path.stat().st_mtime for path in (folder / RECORD, folder / LOCK) if path.exists()), default=0.0
            )
            found.append(
                {
                    "key": folder.name,
                    "stage": record.get("stage", "?"),
                    "method": record.get("method", "?"),
                    "bytes": sum(path.stat().st_size for path in files),
                    "used": used,
                    "state": "unfinished" if not record else "current" if folder.name in current else "old",
                }
            )
        return found

    def remove(self, key: str) -> None:
        """Remove what is kept under ``key``; refused while a run works on it."""
        folder = self.cache / key
        if not folder.is_dir():
            raise CheckpointError(f"{self.cache}: holds no {key}", hint="see: compress cache ls")
        with (folder / LOCK).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"{key[:12]}: a run is working on it", hint="wait for it, or stop it") from None
            (folder / RECORD).unlink(missing_ok=True)  # from here on it is not found
            shutil.rmtree(folder)
        for link in self.root.glob("*/*"):
            if link.is_symlink() and not link.exists():
                link.unlink()

    def touch(self, key: str) -> None:
        """Mark the output under ``key`` as used now."""
        os.utime(self.cache / key / LOCK, (time.time(), time.time())) if (self.cache / key / LOCK).exists() else None


def _latest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def safe(stage: str) -> str:
    """A stage's name as a folder's: ``small[bits=3,seed=0]`` is ``small-bits-3-seed-0``."""
    return re.sub(r"[^\w.]+", "-", stage).strip("-")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
