"""What came of tuning the norms of a model's blocks, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def norms(blocks: Sequence[dict[str, Any]]) -> str:
    """In how many blocks tuned norms were kept, how far they moved, and what the held-out loss came to there."""
    kept = [block for block in blocks if block["kept"]]
    text = f"kept in {len(kept)} of {len(blocks)} blocks, where the held-out loss fell"
    if not kept:
        return text
    ratio = sum(block["loss_after"] / block["loss_before"] for block in kept) / len(kept)
    change = max(block["largest_change"] for block in kept)
    return f"{text} (by {1 - ratio:.1%} on average, gains moved by {change:.1%} at most)"
