"""Data sets that an earlier stage chose: where their rows lie, and what is told of that stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightworks.store.manifest import made_by, read_provenance

SELECTED = "selected.jsonl"  # the file of the rows chosen, in the folder of a choice


def chosen_by(dataset: str, called: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """What made the ``dataset``, if a choice of rows did: its ``name`` and ``made_by`` as for other inputs; else None.

    ``called`` is what folders are called in place of their paths.
    """
    path = Path(dataset).expanduser()
    provenance = read_provenance(path.parent) if path.name == SELECTED and path.is_file() else None
    if provenance is None or "selection" not in provenance:
        return None
    folder = (called or {}).get(str(path.parent), str(path.parent))
    return {"name": f"{folder}/{SELECTED}", "made_by": made_by(provenance)}
