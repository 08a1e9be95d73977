"""Small files beside the weights: JSON read within bounds, names that stay in their folder (no torch)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from weightworks.errors import CheckpointError

MOST_BYTES = 100_000_000  # of a JSON file, as of a header of tensors
LONGEST_NAME = 255  # bytes, of file systems


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, which may be as long as a header of tensors."""
    if (size := path.stat().st_size) > MOST_BYTES:
        raise CheckpointError(f"{path}: {size:,} bytes, more than the {MOST_BYTES:,} that a JSON file may have here")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, found {type(value).__name__}")
    return value


def is_plain(name: str) -> bool:
    """Whether ``name`` can only mean a file directly in the folder it is looked for in."""
    return (
        name not in ("", ".", "..")
        and not {"/", "\\", "\0"} & set(name)
        and len(name.encode(errors="surrogatepass")) <= LONGEST_NAME
    )
