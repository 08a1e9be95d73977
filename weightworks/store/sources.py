"""Where a checkpoint lies and what it holds, without opening it: folder or hub id, digests of files. No torch here."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from weightworks.errors import CheckpointError

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?")  # "./x" and "../x" are folders
HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "README.md"]
ADAPTER = "adapter_config.json"  # the file that makes a folder an adapter of PEFT
TEXT_FILES = (".txt", ".md", ".jsonl", ".json", ".parquet")
SETTLED = 2.0  # seconds a file must have been left alone before its digest is remembered: clocks of files are coarse


def cache_folder() -> Path:
    """Where small facts are remembered between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weightworks"


def is_text_file(name: str) -> bool:
    """Whether ``name`` means a file of texts, rather than a data set of the hub."""
    return name.lower().endswith(TEXT_FILES)


def resolve(source: str, *, allow_pickle: bool = False) -> Path:
    """The local folder of ``source``: a folder as it is, a hub id from the hub's cache or the hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not any(path.iterdir()):
            raise CheckpointError(f"{path}: the folder is empty; a checkpoint holds config.json and *.safetensors")
        return path
    if path.is_file():
        raise CheckpointError(f"{path}: is a file; give the checkpoint folder that holds it")
    if not HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"{source}: no such folder", hint="give a local folder, or org/name[@revision] on the hub"
        )
    return _download(source, allow_pickle)


def parts(source: str) -> list[str]:
    """``MODEL+ADAPTER+ADAPTER`` taken apart: the model, then the adapters that are to be added to it.

    What is a folder is taken as it is, so a ``+`` in the name of one that exists does no harm.
    """
    words, found = source.split("+"), []
    while words:
        length = next((n for n in range(len(words), 1, -1) if is_folder("+".join(words[:n]))), 1)
        found.append("+".join(words[:length]))
        words = words[length:]
    if len(found) > 1 and not all(part.strip() for part in found):
        raise CheckpointError(f"{source}: nothing stands on one side of a '+'", hint="give MODEL+ADAPTER")
    return found


def folders(source: str, *, allow_pickle: bool = False) -> list[Path]:
    """The local folders of ``MODEL+ADAPTER``: the model's, then those of its adapters."""
    return [resolve(part, allow_pickle=allow_pickle) for part in parts(source)]


def is_folder(path: str) -> bool:
    """Whether ``path`` is a folder; no name is too odd to be asked for."""
    try:
        return Path(path).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # too long for a file, a home that nobody has, a zero byte
        return False


def _download(source: str, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    name, _, revision = source.partition("@")
    patterns = [*HUB_PATTERNS, "*.bin"] if allow_pickle else HUB_PATTERNS
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{source}: no such folder, and the hub did not give it ({type(error).__name__}: {reason})",
            hint="check the path or id; offline, download the model into the hub's cache first",
        ) from None


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Size, time of change and inode of a file, which a change of content changes; None if it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_mark(mark: Any) -> bool:
    return isinstance(mark, list) and len(mark) == 4 and isinstance(mark[3], str)


class Digests:
    """sha256 of files, remembered between runs in the file ``memo`` by path, size, time of change and inode."""

    def __init__(self, memo: Path) -> None:
        self.memo = memo
        self.fresh: dict[str, list[Any]] = {}
        try:
            known = json.loads(memo.read_text())
        except (OSError, ValueError, RecursionError):
            known = {}
        known = known.items() if isinstance(known, dict) else ()
        self.known: dict[str, list[Any]] = {name: mark for name, mark in known if _is_mark(mark)}

    def file(self, path: Path) -> str:
        """The digest of one file."""
        status = path.stat()
        name, mark = str(path.resolve()), [status.st_size, status.st_mtime_ns, status.st_ino]
        found = self.fresh.get(name) or self.known.get(name)
        if found and found[:3] == mark:
            return str(found[3])
        digest = file_digest(path)
        if time.time() - status.st_mtime > SETTLED:
            self.fresh[name] = [*mark, digest]
        return digest

    def folder(self, root: Path) -> dict[str, str]:
        """Digests by name of a folder's files, and of those one level down; hidden ones and unfinished work left out."""
        paths = [path for path in root.iterdir() if path.is_file()]
        for inner in root.iterdir():
            if inner.is_dir() and not inner.name.startswith(".") and inner.suffix != ".partial":
                paths += [path for path in inner.iterdir() if path.is_file()]
        kept = [path for path in paths if not path.name.startswith(".") and path.suffix not in (".log", ".lock")]
        return {str(path.relative_to(root)): self.file(path) for path in sorted(kept)}

    def save(self) -> None:
        """Remember what was computed; another run's additions in the meantime are kept. Files that are gone are forgotten."""
        if not self.fresh:
            return
        known = {**Digests(self.memo).known, **self.fresh}
        try:
            self.memo.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.memo.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps({name: mark for name, mark in known.items() if os.path.exists(name)}))
            temporary.replace(self.memo)
        except OSError:
            pass  # a read-only home costs hashing again, nothing else
