"""The journal of a staging folder: what is being made there, and every step that is complete, a line of JSON each."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightworks.errors import OutputError

JOURNAL = "journal.jsonl"


def read_journal(staging: Path) -> list[dict[str, Any]]:
    """The complete records of a staging folder's journal; a line torn by a crash, and what follows it, is dropped."""
    path, good = staging / JOURNAL, 0
    records: list[dict[str, Any]] = []
    if not path.is_file():
        return records
    data = path.read_bytes()
    for line in data.splitlines(keepends=True):
        try:
            if not line.endswith(b"\n"):
                break
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not _is_record(record, first=not records):
            raise OutputError(
                f"{path}: line {len(records) + 1} is no record of weightworks",
                hint="--no-resume discards what lies there",
            )
        records.append(record)
        good += len(line)
    if good < len(data):
        os.truncate(path, good)
    return records


def _is_record(record: Any, *, first: bool) -> bool:
    """Whether a line has what a reader of journals relies on."""
    kinds = {"identity": dict, "layout": str} if first else {"step": str, "tensors": dict, "facts": dict}
    return isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in kinds.items())


def difference(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> str:
    """What two identities differ in, in words."""
    changes = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changes += [difference(a, b, f"{path}{key}.")] if a != b else []
        elif a != b:
            changes.append(f"{path}{key} ({str(a)[:16]} then, {str(b)[:16]} now)")
    return ", ".join(changes)
