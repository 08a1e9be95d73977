"""``provenance.json``: what made a checkpoint, out of what, and the digests that prove it. No clock is in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weightworks.errors import CheckpointError
from weightworks.store.documents import is_plain, read_json
from weightworks.store.sources import file_digest

PROVENANCE = "provenance.json"


def read_provenance(root: Path) -> dict[str, Any] | None:
    """The provenance of a folder; None if it has none."""
    path = root / PROVENANCE
    if not path.is_file():
        return None
    value = read_json(path)
    if not isinstance(value.get("files"), dict):
        raise CheckpointError(f"{path}: not a provenance of weightworks", hint="remove it if another tool wrote it")
    return value


@contextmanager
def understood(root: Path) -> Iterator[None]:
    """An entry of the provenance of ``root`` that is missing or of another kind is told as what it is."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{root / PROVENANCE}: not as weightworks writes it ({type(error).__name__}: {error})",
            hint="it was changed, or written by another version; remove it to go on without it",
        ) from error


def made_by(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What of a provenance goes into that of whatever is made from its folder."""
    return {key: provenance.get(key) for key in ("stage", "identity", "source", "calibration")}


def changed_files(root: Path, provenance: dict[str, Any]) -> list[str]:
    """Files that are missing or differ from what the provenance says, each with the reason."""
    problems = []
    for name, digest in provenance["files"].items():
        if Path(name).is_absolute() or not all(is_plain(part) for part in name.split("/")):
            problems.append(f"{name[:80]!r}: is not the name of a file in this folder")
        elif not (root / name).is_file():
            problems.append(f"{name}: missing")
        elif file_digest(root / name) != digest:
            problems.append(f"{name}: content differs from the provenance")
    return problems
