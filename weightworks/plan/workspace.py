"""Where a recipe's outputs lie: kept by key, linked by name, found again only if complete and intact.

WORKSPACE/cache/KEY/STAGE/       an output folder with its provenance.json
WORKSPACE/cache/KEY/record.json  written last: what it is, what it cost
WORKSPACE/RECIPE/STAGE           a link to the latest output of that stage
WORKSPACE/RECIPE/stages.json     the latest key of each stage, to say what changed
WORKSPACE/RECIPE/.run-*          the keys a run needs, locked as long as it runs
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from weightworks.errors import CheckpointError, OutputError
from weightworks.plan.remote import Remote
from weightworks.store.sources import Digests

PROVENANCE, RECORD, LOCK, LATEST, RUN = "provenance.json", "record.json", "lock", "stages.json", ".run-"
WHOLE = "."  # the last line of what a run says it needs


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
        with self._writing():
            for torn in (self.cache / key).glob(f".{RECORD}.*"):  # of a run that was killed
                torn.unlink()
            write_json(self.cache / key / RECORD, record)
        if self.remote is not None:
            self.remote.send(self.cache, key)
        return Output(folder, record)

    @contextmanager
    def only_one(self, key: str) -> Iterator[None]:
        """Hold the key: another run that wants the same output waits, then finds it."""
        with self._locked(self.cache / key / LOCK):
            yield

    def busy(self, key: str) -> bool:
        """Whether a run is making the output under ``key``."""
        try:
            with (self.cache / key / LOCK).open() as lock:
                return not _free(lock, fcntl.LOCK_SH)
        except OSError:
            return False

    @contextmanager
    def using(self, keys: Iterable[str]) -> Iterator[None]:
        """Say which outputs a run needs: none of them is removed until it ends, however it ends."""
        self.used()  # clears away
        with self._locked(self.view / f"{RUN}{uuid.uuid4().hex}") as file:
            try:
                with self._writing():
                    file.write("\n".join([*keys, WHOLE]))
                    file.flush()
                yield
            finally:
                Path(file.name).unlink(missing_ok=True)

    def used(self) -> set[str]:
        """The keys that runs need now. What killed runs have left of theirs is cleared away."""
        keys: set[str] = set()
        for path in self.root.glob(f"*/{RUN}*"):
            with suppress(OSError), path.open() as file:
                while not _free(file, fcntl.LOCK_EX):
                    file.seek(0)
                    lines = file.read().split()
                    if WHOLE in lines:
                        keys.update(lines)
                        break
                    time.sleep(0.01)  # it is being written
                else:
                    path.unlink()
        return keys

    @contextmanager
    def _locked(self, path: Path) -> Iterator[TextIO]:
        """The file ``path``, made and locked; made again if somebody removed it before the lock was ours."""
        while True:
            self.make(path.parent)
            with ExitStack() as stack:
                with self._writing():
                    file = stack.enter_context(path.open("a"))
                    fcntl.flock(file, fcntl.LOCK_EX)
                status = _status(path)
                if status is not None and os.path.samestat(os.fstat(file.fileno()), status):
                    yield file
                    return

    def make(self, folder: Path) -> None:
        """Make a folder of the workspace; raises :class:`OutputError` where nothing can be written."""
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = error.filename or self.root
            raise OutputError(
                f"{where}: cannot write there ({error.strerror})", hint="choose another place with --workspace"
            ) from None

    def link(self, stage: str, output: Output) -> None:
        """Let the stage's name lead to its output; what is there and no link of ours stays."""
        path = self.view / safe(stage)
        target = os.path.relpath(output.folder, self.view)
        if path.is_symlink() and os.readlink(path) == target:
            return
        if path.exists() and not path.is_symlink():
            return
        self.make(self.view)
        temporary = self.view / f".{safe(stage)}.{os.getpid()}"
        with self._writing():
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target)
            temporary.replace(path)

    def latest(self) -> dict[str, Any]:
        """Key and material of each stage of the recipe as last run or found."""
        return _latest(self.view / LATEST)

    def remember(self, latest: Mapping[str, Any]) -> None:
        """Add to what :meth:`latest` tells."""
        before = self.latest()
        if (after := {**before, **latest}) != before:
            with self._writing():
                write_json(self.view / LATEST, after)

    def entries(self) -> list[dict[str, Any]]:
        """All that is kept, finished or not: key, stage, method, bytes, time of last use, and state: ``in use`` by a run,
        ``current`` (what a recipe's stage last was), ``old``, ``unfinished``."""
        current = {facts.get("key") for path in self.root.glob(f"*/{LATEST}") for facts in _latest(path).values()}
        in_use, found = self.used(), []
        for folder in sorted(self.cache.glob("[!.]*")):
            try:
                record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                record = {}
            state = "unfinished" if not record else "current" if folder.name in current else "old"
            used = [_status(folder / name) for name in (RECORD, LOCK)]
            found.append(
                {
                    "key": folder.name,
                    "stage": record.get("stage", "?"),
                    "method": record.get("method", "?"),
                    "bytes": sum(status.st_size for path in folder.rglob("*") if (status := _status(path))),
                    "used": max((status.st_mtime for status in used if status), default=0.0),
                    "state": "in use" if folder.name in in_use or self.busy(folder.name) else state,
                }
            )
        return found

    def remove(self, key: str) -> None:
        """Remove what is kept under ``key``; refused while a run works on it."""
        folder = self.cache / key
        if not folder.is_dir():
            raise CheckpointError(f"{self.cache}: holds no {key}", hint="see: compress cache ls")
        with self._writing(), (folder / LOCK).open("a") as lock:
            if not _free(lock, fcntl.LOCK_EX) or key in self.used():
                raise OutputError(f"{key[:12]}: a run is working on it", hint="wait for it, or stop it")
            (folder / RECORD).unlink(missing_ok=True)  # from here on it is not found
            shutil.rmtree(folder)
        for link in self.root.glob("*/*"):
            if link.is_symlink() and not link.exists():
                link.unlink()

    def touch(self, key: str) -> None:
        """Mark the output under ``key`` as used now."""
        with suppress(OSError):  # in a workspace that cannot be written nothing is removed either
            os.utime(self.cache / key / LOCK)


def _latest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: facts for name, facts in found.items() if isinstance(facts, dict)} if isinstance(found, dict) else {}


def _free(file: TextIO, kind: int) -> bool:
    """Whether a lock of this kind could be had at once; then it is held until the file is closed."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _status(path: Path) -> os.stat_result | None:
    """A file's status, None for what is gone meanwhile and what is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


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
