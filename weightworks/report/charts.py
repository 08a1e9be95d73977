"""The charts of a report: which models are worth their bytes, and errors by depth.

Charts come from matplotlib as SVG that is put into the page as it is: text stays text, colours are the page's
variables, so a chart follows light and dark.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from weightworks.report.graph import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours no chart would use otherwise; each is replaced by a variable of the page.
SERIES = 8
VARIABLES = {f"#fe00{k:02x}": f"--s{k}" for k in range(SERIES)} | {
    "#fd0001": "--ink",
    "#fd0002": "--muted",
    "#fd0003": "--line",
    "#fd0004": "--panel",
    "#fd0005": "--accent",
}
INK, MUTED, LINE, PANEL, ACCENT = (colour for colour, name in VARIABLES.items() if not name.startswith("--s"))
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "weightworks",
    "font.family": "DejaVu Sans",  # comes with matplotlib and is wider than the page's fonts: what fits here fits there
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "text.parse_math": False,  # a name with a dollar is a name
}
LOG_FROM = 6.0  # largest over smallest from which an axis is logarithmic


# Size against quality -------------------------------------------------------------------------------------------------


def pareto_front(points: Sequence[tuple[float, float]], better: str) -> list[int]:
    """Indices of the points (size, quality) that no other beats, by size.

    One point beats another if it is no worse in both and better in one; equal points are both kept. ``better`` is
    ``"lower"`` or ``"higher"``; sizes are better when smaller. Points that are not finite are left out.
    """
    sign = {"lower": 1.0, "higher": -1.0}[better]
    finite = [k for k, point in enumerate(points) if all(map(math.isfinite, point))]
    front: list[int] = []
    for k in sorted(finite, key=lambda k: (points[k][0], sign * points[k][1], k)):
        if not front or sign * points[k][1] < sign * points[front[-1]][1] or points[k] == points[front[-1]]:
            front.append(k)
    return front


@dataclass(frozen=True)
class Point:
    """A model in the chart of size against quality."""

    name: str
    size: float  # bytes
    value: float
    error: float = 0.0  # none if 0
    baseline: bool = False


def quality_chart(points: Sequence[Point], front: Sequence[int], *, ident: str, metric: str, label: str) -> str:
    """Size against quality, every point with its name; those in ``front`` are filled and joined by steps."""
    unit, scale = _size_unit(max(point.size for point in points))
    with drawing(690, 380 + 6 * min(len(points), 40)) as (figure, axes):
        xs, ys = [point.size / scale for point in points], [point.value for point in points]
        _axis(axes, "x", xs)
        _axis(axes, "y", ys + [point.value + e for point in points for e in (point.error, -point.error)])
        axes.set_xlabel(f"size, {unit}" + (" (log)" if axes.get_xscale() == "log" else ""))
        axes.set_ylabel(shorten(metric, 40) + (" (log)" if axes.get_yscale() == "log" else ""))
        for y in [point.value for point in points if point.baseline][:1]:
            axes.axhline(y, color=MUTED, linewidth=1, dashes=(2, 3))
        if front:
            axes.plot(
                [xs[k] for k in front], [ys[k] for k in front], color=ACCENT, drawstyle="steps-post", linewidth=1.5
            )
        for k, point in enumerate(points):
            fill, edge = (ACCENT, ACCENT) if k in front else (PANEL, MUTED)
            if point.error:
                axes.errorbar(xs[k], ys[k], point.error, ecolor=edge, elinewidth=1, capsize=3)
            axes.plot(
                [xs[k]],
                [ys[k]],
                marker="D" if point.baseline else "o",
                markersize=10 if point.baseline else 8,
                markerfacecolor=fill,
                markeredgecolor=edge,
                markeredgewidth=1.5,
                zorder=2.9 if point.baseline else 3,
            )
        _label(axes, points, front, scale)
        return inlined(figure, ident, label)


def _label(axes: Axes, points: Sequence[Point], front: Sequence[int], scale: float) -> None:
    """A name beside every point, where it covers neither a point, nor a line, nor another name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(axes.figure).get_renderer()  # type: ignore[arg-type]
    see = axes.transData.transform
    shown = [(float(x), float(y)) for x, y in see([(point.size / scale, point.value) for point in points])]
    obstacles = [(x - 6, y - 6, x + 6, y + 6) for x, y in shown]
    for (x, _), point in zip(shown, points, strict=True):
        if point.error:
            (_, low), (_, high) = see([(point.size / scale, point.value + e) for e in (-point.error, point.error)])
            obstacles.append((x - 3, low, x + 3, high))
    for (x, y), (x1, y1) in pairwise(shown[k] for k in front):  # the steps
        obstacles += [(x, y - 1, x1, y + 1), (x1 - 1, min(y, y1), x1 + 1, max(y, y1))]
    texts, sizes = [], []
    for k, point in enumerate(points):
        name = shorten(point.name, 34) + (" (baseline)" if point.baseline else "")
        weight = "bold" if k in front else "normal"
        text = axes.text(0, 0, name, fontsize=11.5, fontweight=weight, color=INK, transform=None, va="center", zorder=4)
        extent = text.get_window_extent(renderer)
        texts.append(text)
        sizes.append((extent.width, extent.height))
    room = axes.get_window_extent(renderer)
    for (x, y), text, spot in zip(
        shown, texts, place(shown, sizes, obstacles, (room.x0, room.y0, room.x1 + 12, room.y1 + 14)), strict=True
    ):
        text.set_position((spot.x, spot.y))
        text.set_horizontalalignment(spot.align)
        if spot.line:
            axes.plot([x, spot.x], [y, spot.y], color=MUTED, linewidth=0.8, transform=None, zorder=2, clip_on=False)


Rectangle = tuple[float, float, float, float]  # left, low, right, high


@dataclass(frozen=True)
class Spot:
    """Where a name stands: its anchor, whether that is the text's left, centre or right, and the box it fills."""

    x: float
    y: float
    align: Literal["left", "center", "right"]
    box: Rectangle
    line: list[tuple[float, float]]  # points on the line to what is named; none if it stands beside it
    cost: float


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Rectangle],
    room: Rectangle,
) -> list[Spot]:
    """A spot for the name of every point: near it, inside ``room``, off the ``obstacles`` and the other names."""
    choices = [list(_spots(k, points, size, obstacles, room)) for k, size in enumerate(sizes)]
    chosen = [min(spots, key=lambda spot: spot.cost) for spots in choices]
    for _ in range(4):  # each in turn takes the best spot, given where the others are
        for k, spots in enumerate(choices):
            others = chosen[:k] + chosen[k + 1 :]
            best, least = chosen[k], math.inf
            for spot in spots:
                cost = spot.cost
                for other in others:
                    if cost >= least:
                        break
                    cost += _shared(spot.box, other.box) + _crossed(spot, other)
                if cost < least:
                    best, least = spot, cost
            chosen[k] = best
    return chosen


def _spots(
    k: int,
    points: Sequence[tuple[float, float]],
    size: tuple[float, float],
    obstacles: Sequence[Rectangle],
    room: Rectangle,
) -> Iterator[Spot]:
    (px, py), (width, height) = points[k], size
    rivals = [point for point in points if point != points[k]]
    for radius in (10, 20, 30, 42, 56, 72, 90, 112):
        for step in range(16):
            angle = step * math.pi / 8
            x, y = px + radius * math.cos(angle), py + radius * math.sin(angle)
            align: Literal["left", "center", "right"] = (
                "center" if step in (4, 12) else "left" if math.cos(angle) > 0 else "right"
            )
            left = x - {"left": 0, "center": width / 2, "right": width}[align]
            box = (left - 2, y - height / 2, left + width + 2, y + height / 2)
            outside = sum(max(0, d) for d in (room[0] - box[0], room[1] - box[1], box[2] - room[2], box[3] - room[3]))
            cost = radius + 2 * abs(math.sin(angle)) + 100 * outside + sum(_shared(box, other) for other in obstacles)
            line = [(px + (x - px) * part / 6, py + (y - py) * part / 6) for part in range(1, 6)] if radius > 10 else []
            if not line:  # without a line it must be nearer to its own point than to any other
                cost += 60 * sum(_distance(point, box) < _distance((px, py), box) + 6 for point in rivals)
            cost += 60 * sum(math.dist(point, passed) < 7 for point in rivals for passed in line)
            yield Spot(x, y, align, box, line, cost)


def _shared(a: Rectangle, b: Rectangle) -> float:
    """A price for two boxes that overlap."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return 100 + 10 * min(width, height) if width > 0 and height > 0 else 0


def _crossed(a: Spot, b: Spot) -> float:
    """A price for a line that runs through the other's name."""
    return 60 * sum(_distance(point, box) == 0 for line, box in ((a.line, b.box), (b.line, a.box)) for point in line)


def _distance(point: tuple[float, float], box: Rectangle) -> float:
    (x, y), (left, low, right, high) = point, box
    return math.hypot(max(left - x, 0, x - right), max(low - y, 0, y - high))


# Errors by depth ------------------------------------------------------------------------------------------------------


def depth_chart(
    lines: Mapping[int, Sequence[tuple[int, float, float, float]]], *, scale: Sequence[float], ident: str, label: str
) -> str:
    """Errors by block: ``lines`` gives for the series of a kind its (block, mean, smallest, largest).

    ``scale`` holds all errors of the charts that are to be compared; their axes are alike.
    """
    with drawing(350, 214, left=54, top=8) as (figure, axes):
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        for series, line in lines.items():
            colour, dash, marker = line_style(series)
            blocks, means, lows, highs = zip(*line, strict=True)
            if lows != highs:
                axes.fill_between(blocks, lows, highs, color=colour, alpha=0.15, linewidth=0)
            axes.plot(
                blocks,
                means,
                color=colour,
                linestyle=dash,
                linewidth=1.3,
                marker=marker,
                markersize=5,
                markeredgewidth=0,
                markevery=max(1, len(line) // 12),
            )
        _axis(axes, "y", scale)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.10g}%"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("block")
        return inlined(figure, ident, label)


def line_style(series: int) -> tuple[str, Any, list[tuple[float, float]]]:
    """Colour, dashes and marker of a series; the first eight differ in colour and marker, later ones in dashes too."""
    dashes: list[Any] = ["solid", (0, (4, 2)), (0, (1, 1.5))]
    k = series % SERIES
    sides, turn = [(20, 0), (4, 45), (3, 90), (4, 0), (3, -90), (5, 90), (3, 0), (3, 180)][k]
    corners = [math.radians(turn + 360 * n / sides) for n in range(sides + 1)]
    return f"#fe00{k:02x}", dashes[series // SERIES % 3], [(math.cos(a), math.sin(a)) for a in corners]


def swatch(series: int) -> dict[str, str]:
    """What draws the line of a series in a legend: variable, dashes, corners of the marker."""
    colour, dash, corners = line_style(series)
    dashes = "" if dash == "solid" else " ".join(str(2 * part) for part in dash[1])
    points = " ".join(f"{12 + 4.5 * x:.1f},{7 - 4.5 * y:.1f}" for x, y in corners)
    return {"colour": VARIABLES[colour], "dashes": dashes, "points": points}


# What charts share ----------------------------------------------------------------------------------------------------


@contextmanager
def drawing(width: int, height: int, *, left: int = 66, top: int = 16) -> Iterator[tuple[Figure, Axes]]:
    """A figure of so many pixels with one pair of axes, in the style of the page."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), style.context(["default", STYLE]):
        warnings.simplefilter("ignore")  # letters that the font lacks: the browser has others
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # a point of the SVG is a pixel of the page
        box = (left / width, 46 / height, 1 - (left + 14) / width, 1 - (46 + top) / height)
        yield figure, figure.add_axes(box)


def _axis(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Scale, limits and ticks of an axis that holds ``values``."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = min(values), max(values)
    if low > 1e-200 and high / low > LOG_FROM:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        decades = math.log10(high / low)
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,), numticks=12))
        axis.set_minor_locator(NullLocator())
        limits = low / 10 ** (0.1 * decades), high * 10 ** (0.1 * decades)
    else:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        room = 0.1 * (high - low) or 0.05 * abs(high) or 1.0
        limits = low - room, high + room
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
    (axes.set_xlim if which == "x" else axes.set_ylim)(*limits)


def inlined(figure: Figure, ident: str, label: str) -> str:
    """The figure as an SVG element: named for those who do not see it, its ids its own, its colours the page's."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    width, height = (round(float(size)) for size in re.findall(r' (?:width|height)="([\d.]+)pt"', head))
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)

    def own(tag: re.Match[str]) -> str:
        text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{ident}-", tag[0]).replace("xlink:href", "href")
        text = re.sub(r"(font: [^;]*?px) [^;\"]*", r"\1 var(--font)", text)
        return re.sub("|".join(VARIABLES), lambda found: f"var({VARIABLES[found[0]]})", text)

    body = re.sub(r"<[^>]+>", own, body)  # in tags alone: what is between them may be somebody's name for a model
    body = re.sub(r"\n\s*", "\n", body).strip()
    label = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{body}'
    )


def _size_unit(largest: float) -> tuple[str, float]:
    """The unit sizes up to ``largest`` bytes are told in."""
    units = [("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)]
    return next((unit for unit in units if largest >= unit[1]), ("bytes", 1.0))
