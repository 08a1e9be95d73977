"""What a training or a renormalisation came to, in words: for the terminal and for the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def training(facts: Mapping[str, Any]) -> str:
    """How much was trained, for how long, and what the loss on held-out text was before and after."""
    rounds, blocks = len(facts.get("rounds", ())), len(facts.get("blocks", ()))
    how_long = f"{facts['steps']} steps" + (
        f" in {rounds} rounds" if rounds > 1 else f" in {blocks} blocks" if blocks else ""
    )
    if facts["steps"] < facts.get("steps_allowed", 0):
        how_long += f" of {facts['steps_allowed']}, stopped early"
    losses = facts["held_out"]
    if (teacher := losses.get("teacher")) is not None:
        original = f", {teacher:.4f} of the original"
        if losses["before"] > teacher:
            original += f": {(losses['before'] - losses['after']) / (losses['before'] - teacher):.0%} won back"
    else:
        original = ""
    return (
        f"{facts['trained_parameters']:,} parameters ({facts['trained_share']:.2%} of the model), {how_long} on "
        f"{facts['tokens']:,} tokens; held-out loss {losses['before']:.4f} before, {losses['after']:.4f} after{original}"
    )


def renormalised(facts: Mapping[str, Any]) -> str:
    """On what, how far rows were scaled, and what could not be met."""
    rows = facts["factors"].values()
    least, greatest = (
        pick((row[key] for row in rows), default=1.0) for pick, key in ((min, "least"), (max, "greatest"))
    )
    left = facts.get("means_left", {})
    means = f"; deviations alone in {len(left)} layers, which have no bias for the means" if left else ""
    return f"on {facts['text']['source']}, by {least:.3f} to {greatest:.3f}{means}"
