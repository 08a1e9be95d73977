"""Bits chosen layer by layer: in words, as a table, and as a chart of what bytes are expected to buy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from weightworks.report.charts import ACCENT, INK, MUTED, PANEL, drawing, inlined
from weightworks.report.figures import entries, figure, listed, number, words
from weightworks.report.tables import Cell, Table, table


def allocation(facts: Mapping[str, Any]) -> str:
    """What was chosen how often, and what it is expected to cost; what was measured, where the loss was bounded."""
    counts = Counter(unit["choice"] for unit in facts["units"])
    parts = ", ".join(f"{choice} in {counts[choice]}" for choice in facts["choices"] if choice in counts)
    text = f"{parts} of {len(facts['units'])} parts of blocks; perplexity expected {facts['expected_increase']:+.2%}"
    if trials := facts.get("trials"):
        text += f", measured {trials[-1]['increase']:+.2%} on windows held out"
        text += f" (try {len(trials)})" if len(trials) > 1 else ""
    return text


def allocation_table(facts: Mapping[str, Any]) -> Table | None:
    """A row a unit: its layers, what was chosen, its error and what that is expected to cost."""
    rows = []
    for unit in map(entries, listed(facts.get("units"))):
        alpha, error, cost = (number(unit.get(key)) for key in ("alpha", "error", "expected"))
        names = ", ".join(words(name).removesuffix(".weight") for name in listed(unit.get("tensors")))
        rows.append(
            [Cell(names), Cell(words(unit.get("choice"))), *(Cell(figure(one), one) for one in (alpha, error, cost))]
        )
    return table(["layers", "choice", "sensitivity", "output error", "expected loss, nats"], rows) if rows else None


def allocation_chart(facts: Mapping[str, Any], ident: str) -> str | None:
    """Expected increase of perplexity against bits a weight: all allocations that no other beats, and the uniform ones."""
    curve = [pair for pair in map(listed, listed(facts.get("curve"))) if len(pair) == 2]
    points = [(number(bits), number(loss)) for bits, loss in curve]
    line = [(bits, 100 * loss) for bits, loss in points if bits is not None and loss is not None and loss > 0]
    if len(line) < 2:
        return None
    uniform = [
        (words(one.get("choice")), bits, 100 * loss)
        for one in map(entries, listed(facts.get("uniform")))
        if (bits := number(one.get("bits_a_weight"))) is not None
        and (loss := number(one.get("expected_increase")))
        and loss > 0
    ]
    chosen = number(facts.get("bits_a_weight")), number(facts.get("expected_increase"))
    label = f"Expected increase of perplexity against bits a weight of {len(line)} allocations"
    with drawing(690, 340) as (drawn, axes):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
        axes.set_xlabel("bits a weight, scales included")
        axes.set_ylabel("expected increase of perplexity (log)")
        axes.plot(*zip(*line, strict=True), color=ACCENT, linewidth=1.5)
        for name, bits, loss in uniform:
            axes.plot([bits], [loss], marker="o", markersize=8, markerfacecolor=PANEL, markeredgecolor=MUTED)
            axes.annotate(name, (bits, loss), xytext=(8, 6), textcoords="offset points", color=INK, fontsize=11.5)
        if chosen[0] is not None and chosen[1] is not None and chosen[1] > 0:
            axes.plot(
                [chosen[0]], [100 * chosen[1]], marker="D", markersize=9, markerfacecolor=ACCENT, markeredgecolor=ACCENT
            )
        return inlined(drawn, ident, label)
