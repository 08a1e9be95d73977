"""The journal of a staging folder: what is being made there, and every step that is complete, a line of JSON each."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
            records.append(json.loads(line))
            good += len(line)
        except ValueError:
            break
    if good < len(data):
        os.truncate(path, good)
    return records


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
