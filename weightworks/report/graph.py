"""The graph of stages laid out: columns by the longest way to a stage, few crossings, straight lines where possible."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

GAP = 40  # pixels between columns; up to three times as many where lines are steep


@dataclass
class Box:
    """A stage in the graph, or (``stage`` None) the place where lines to ``target`` pass through a column."""

    stage: int | None
    target: int
    column: int
    height: float
    before: list[Box] = field(default_factory=list)
    after: list[Box] = field(default_factory=list)
    x: float = 0.0
    y: float = 0.0  # of the centre
    width: float = 0.0


@dataclass(frozen=True)
class Drawing:
    """The graph laid out: boxes of the stages, and the lines between as SVG paths with whether they end in a box."""

    boxes: list[Box]
    lines: list[tuple[str, bool]]
    width: float
    height: float


def graph(parents: Sequence[Sequence[int]], widths: Sequence[float], height: float) -> Drawing:
    """A drawing of stages in run order: ``parents`` are earlier stages; a column holds what has equally long ways to it.

    Lines to one stage that pass columns share their way, so many models going into one score are one line.
    """
    depth: list[int] = []
    for above in parents:
        depth.append(1 + max((depth[p] for p in above), default=-1))
    columns = _columns(parents, depth, height)
    _order(columns)
    _settle(columns)
    x, gap = 1.0, 0.0
    for column in columns:
        width = max(widths[box.stage] for box in column if box.stage is not None)
        for box in column:
            box.x, box.width = x, width
        steepest = max((abs(box.y - after.y) for box in column for after in box.after), default=0.0)
        gap = min(GAP + steepest / 16, 3 * GAP)
        x += width + gap
    boxes = [box for column in columns for box in column]
    top = min((box.y - box.height / 2 for box in boxes), default=0.0) - 1
    for box in boxes:
        box.y -= top
    lines = []
    for box in boxes:
        if box.stage is None:
            lines.append((f"M{box.x:.1f} {box.y:.1f}H{box.x + box.width:.1f}", False))
        for after in box.after:
            x0, middle = box.x + box.width, (box.x + box.width + after.x) / 2
            path = (
                f"M{x0:.1f} {box.y:.1f}C{middle:.1f} {box.y:.1f} {middle:.1f} {after.y:.1f} {after.x:.1f} {after.y:.1f}"
            )
            lines.append((path, after.stage is not None))
    lowest = max((box.y + box.height / 2 for box in boxes), default=0.0)
    return Drawing([box for box in boxes if box.stage is not None], lines, x - gap + 1, lowest + 1)


def _columns(parents: Sequence[Sequence[int]], depth: Sequence[int], height: float) -> list[list[Box]]:
    """Boxes by column, joined; a line that is longer than one column has a box in each it passes."""
    columns: list[list[Box]] = [[] for _ in range(max(depth, default=-1) + 1)]
    stages = [Box(k, k, depth[k], height) for k in range(len(parents))]
    for box in stages:
        columns[box.column].append(box)
    for target, above in enumerate(parents):
        passing: dict[int, Box] = {depth[target]: stages[target]}
        for column in range(depth[target] - 1, min((depth[p] for p in above), default=depth[target]), -1):
            passing[column] = Box(None, target, column, 6)
            columns[column].append(passing[column])
            _join(passing[column], passing[column + 1])
        for p in above:
            _join(stages[p], passing[depth[p] + 1])
    return columns


def _join(before: Box, after: Box) -> None:
    before.after.append(after)
    after.before.append(before)


def _order(columns: list[list[Box]]) -> None:
    """Boxes of every column in an order with few crossings: each goes to the middle of those it is joined to."""
    best = ([list(column) for column in columns], _crossings(columns))
    for sweep in range(12):
        forth = sweep % 2 == 0
        for column in columns[1:] if forth else columns[-2::-1]:
            rank = {id(box): k for other in columns for k, box in enumerate(other)}
            means = {
                id(box): sum(rank[id(b)] for b in near) / len(near) if near else rank[id(box)]
                for box in column
                for near in [box.before if forth else box.after]
            }
            column.sort(key=lambda box, means=means: means[id(box)])  # type: ignore[misc]
        count = _crossings(columns)
        if count < best[1]:
            best = ([list(column) for column in columns], count)
    columns[:] = best[0]


def _crossings(columns: list[list[Box]]) -> int:
    total = 0
    for left, right in pairwise(columns):
        rank = {id(box): k for k, box in enumerate(right)}
        ends = [sorted(rank[id(after)] for after in box.after) for box in left]
        total += sum(b < a for k, upper in enumerate(ends) for lower in ends[k + 1 :] for a in upper for b in lower)
    return total


def _settle(columns: list[list[Box]], gap: float = 14) -> None:
    """Heights: every box as near as can be to the middle of its neighbours, in the order given, ``gap`` apart."""
    for column in columns:
        y = 0.0
        for box in column:
            box.y = y + box.height / 2
            y += box.height + gap
    for sweep in range(16):
        for column in columns if sweep % 2 == 0 else columns[::-1]:
            offset, runs = 0.0, list[tuple[float, int]]()
            offsets = []
            for k, box in enumerate(column):
                offset += (column[k - 1].height + box.height) / 2 + gap if k else 0
                offsets.append(offset)
                near = box.before + box.after
                runs.append(((sum(b.y for b in near) / len(near) if near else box.y) - offset, 1))
                while len(runs) > 1 and runs[-2][0] > runs[-1][0]:  # too near: they move together, to their mean
                    (a, n), (b, m) = runs[-2:]
                    runs[-2:] = [((a * n + b * m) / (n + m), n + m)]
            spread = [mean for mean, count in runs for _ in range(count)]
            for box, mean, offset in zip(column, spread, offsets, strict=True):
                box.y = mean + offset


def columns_wide(text: str) -> int:
    """Columns that ``text`` fills where all letters are as wide; some scripts fill two a letter."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def shorten(name: str, length: int) -> str:
    """``name`` on one line in so many columns, its middle left out if need be."""
    name = " ".join(name.split())
    start, end = len(name) // 2, len(name) // 2
    while columns_wide(name[:start]) + columns_wide(name[end:]) > length - (start < end):
        start, end = (start - 1, end) if start > len(name) - end else (start, end + 1)
    return name if start == end else f"{name[:start]}…{name[end:]}"
