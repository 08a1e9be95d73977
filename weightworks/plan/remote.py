"""A workspace's outputs on storage that fsspec knows (s3://, gs://, file://, memory://), mirrored in a local folder.

Files go up before the record that speaks for them, and come down before it, so that an interrupted transfer is never
taken for an output. Two machines that make the same output send the same bytes.
"""

from __future__ import annotations

import hashlib
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from weightworks.errors import OutputError, UsageError
from weightworks.store.sources import cache_folder

RECORD = "record.json"


class Remote:
    """The storage at ``url``."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"--workspace {url}: {error}", hint="install what fsspec needs, such as s3fs or gcsfs"
            ) from None

        self._local = isinstance(self._fs, fsspec.get_filesystem_class("file"))

    @property
    def mirror(self) -> Path:
        """The local folder that stands for this storage."""
        return cache_folder() / "workspaces" / hashlib.sha256(self.url.encode()).hexdigest()[:16]

    def send(self, cache: Path, key: str) -> None:
        """Copy what is kept under ``key`` to the storage."""
        record = cache / key / RECORD
        paths = [path for path in sorted((cache / key).rglob("*")) if path.is_file() and _kept(path, cache / key)]
        for path in [*(path for path in paths if path != record), record]:
            self.publish(path, f"cache/{path.relative_to(cache)}")

    def fetch(self, cache: Path, key: str) -> bool:
        """Copy the output under ``key`` here, if the storage has it."""
        self._fs.invalidate_cache()  # of listings: others write there too
        if not self._call("read", lambda: self._fs.exists(self._at("cache", key, RECORD))):
            return False
        staging = cache / f".{key}.coming"
        shutil.rmtree(staging, ignore_errors=True)
        base = self._at("cache", key)
        names = [str(path).partition(f"/{key}/")[2] for path in self._call("read", lambda: self._fs.find(base))]
        for name in names:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            self._call("read", partial(self._fs.get_file, f"{base}/{name}", str(staging / name)))
        (cache / key).mkdir(parents=True, exist_ok=True)
        for name in sorted(names, key=lambda name: name == RECORD):
            (cache / key / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).replace(cache / key / name)
        shutil.rmtree(staging)
        return True

    def publish(self, path: Path, name: str) -> None:
        """Copy a file to ``name`` under the storage's root."""
        place = self._at(name)
        if self._local:  # others have no folders to make
            self._call("write to", partial(self._fs.makedirs, place.rpartition("/")[0], exist_ok=True))
        self._call("write to", partial(self._fs.put_file, str(path), place))

    def _at(self, *parts: Any) -> str:
        return "/".join([self._root.rstrip("/"), *(str(part) for part in parts)])

    def _call(self, what: str, action: Any) -> Any:
        try:
            return action()
        except Exception as error:  # every storage has errors of its own
            text = str(error) or type(error).__name__
            raise OutputError(f"cannot {what} {self.url}: {text}", hint="check address, rights and network") from error


def _kept(path: Path, root: Path) -> bool:
    """Whether a file belongs to an output: no logs, locks, or unfinished work."""
    parts = path.relative_to(root).parts
    return (
        not any(part.endswith((".partial", ".log")) or part.startswith(".") for part in parts) and path.name != "lock"
    )
