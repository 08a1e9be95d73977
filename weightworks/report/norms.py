"""What came of tuning the norms of a model's blocks, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def norms(blocks: Sequence[dict[str, Any]]) -> str:
    """In how many blocks tuned norms were kept, how far they moved, and what the error of those blocks' outputs came to."""
    kept = [block for block in blocks if block["kept"]]
    text = f"kept in {len(kept)} of {len(blocks)} blocks"
    if not kept:
        return f"{text}: it did not help on windows held out"
    ratio = sum(block["after"]["error"] / block["before"]["error"] for block in kept) / len(kept)
    change = max(block["largest_change"] for block in kept)
    return f"{text} (there error of outputs {ratio - 1:+.1%} on windows held out, gains moved by {change:.1%} at most)"
