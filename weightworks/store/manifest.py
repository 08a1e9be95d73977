"""``provenance.json``: what made a checkpoint, out of what, and the digests that prove it. No clock is in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightworks.errors import CheckpointError
from weightworks.store.sources import file_digest

PROVENANCE = "provenance.json"


def read_provenance(root: Path) -> dict[str, Any] | None:
    """The provenance of a folder; None if it has none."""
    path = root / PROVENANCE
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict) or not isinstance(value.get("files"), dict):
        raise CheckpointError(f"{path}: not a provenance of weightworks", hint="remove it if another tool wrote it")
    return value


def made_by(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What of a provenance goes into that of whatever is made from its folder."""
    return {key: provenance.get(key) for key in ("stage", "identity", "source", "calibration")}


def changed_files(root: Path, provenance: dict[str, Any]) -> list[str]:
    """Files that are missing or differ from what the provenance says, each with the reason."""
    problems = []
    for name, digest in provenance["files"].items():
        if not (root / name).is_file():
            problems.append(f"{name}: missing")
        elif file_digest(root / name) != digest:
            problems.append(f"{name}: content differs from the provenance")
    return problems
