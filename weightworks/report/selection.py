"""The page of a choice of rows: what was chosen, the clusters and their shares, and a map of them coloured by degradation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from weightworks.report.charts import INK, MUTED, PANEL, drawing, inlined

if TYPE_CHECKING:
    from jinja2 import Template

MAPPED = 4000  # rows that are drawn: more make one blot, and a page too large to open
SHOWN = 40  # chosen rows that are listed
LONGEST = 280  # characters of a row's text in the list
COLOURS, DARKEST, BRIGHTEST = "viridis", 0.08, 0.88  # of a scale that is told apart on white and on black

Rows = Sequence[Mapping[str, Any]]


def selection_page(name: str, provenance: Mapping[str, Any], scores: Rows, chosen: Rows) -> str:
    """The page as HTML: same figures, same text. Nothing is loaded from elsewhere, nothing in it runs.

    ``scores`` are lines of ``scores.jsonl``, ``chosen`` those of ``selected.jsonl``.
    """
    facts = provenance["selection"]
    clusters = facts.get("clusters", [])
    mapped = [row for row in scores if "x" in row]
    drawn = mapped[:: math.ceil(len(mapped) / MAPPED) or 1]
    return _template().render(
        name=name,
        facts=facts,
        source=provenance["calibration"]["source"],
        method=provenance["identity"]["method"],
        shortfalls=provenance["fallbacks"],
        options=provenance["identity"]["options"],
        clusters=clusters,
        colours=colours([cluster["degradation"] for cluster in clusters]),
        map=cluster_map(drawn, clusters) if clusters else "",
        drawn=len(drawn),
        mapped=len(mapped),
        errors=facts.get("factorisation_errors", {}),
        rows=[{**row["selection"], "text": shortened(row)} for row in chosen[:SHOWN]],
    )


def cluster_map(rows: Rows, clusters: Rows) -> str:
    """Rows at their first two diffusion coordinates, coloured by the mean degradation of their cluster; chosen ones are ringed.

    Clusters are numbered at the median of their rows.
    """
    of = colours([cluster["degradation"] for cluster in clusters])
    told = ", ".join(f"{c['cluster']}: {c['chosen']} of {c['rows']} rows, {c['degradation']:.3f}" for c in clusters)
    with drawing(720, 480) as (figure, axes):
        axes.set_xlabel("first diffusion coordinate")
        axes.set_ylabel("second diffusion coordinate")
        axes.ticklabel_format(style="sci", scilimits=(-3, 4))
        for cluster, colour in zip(clusters, of, strict=True):
            inside = [row for row in rows if row["cluster"] == cluster["cluster"]]
            for taken in (False, True):
                part = [row for row in inside if (row["rank"] is not None) == taken]
                axes.scatter(
                    [row["x"] for row in part],
                    [row["y"] for row in part],
                    s=26 if taken else 10,
                    c=colour,
                    alpha=0.95 if taken else 0.45,
                    linewidths=0.8 if taken else 0,
                    edgecolors=INK if taken else "none",
                    zorder=3 if taken else 2,
                )
        for cluster in clusters:
            inside = [row for row in rows if row["cluster"] == cluster["cluster"]]
            if inside:
                x, y = (sorted(row[axis] for row in inside)[len(inside) // 2] for axis in ("x", "y"))
                box = {"boxstyle": "round,pad=0.25", "facecolor": PANEL, "edgecolor": MUTED, "linewidth": 0.8}
                axes.text(x, y, str(cluster["cluster"]), color=INK, ha="center", va="center", bbox=box, zorder=5)
        return inlined(figure, "map", f"Map of {len(clusters)} clusters (chosen, rows, degradation): {told}")


def colours(values: Sequence[float]) -> list[str]:
    """A colour for each value, from the least to the greatest."""
    if not values:
        return []
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    low, high = min(values), max(values)
    shares = [(value - low) / (high - low) if high > low else 0.5 for value in values]
    return [to_hex(colormaps[COLOURS](DARKEST + (BRIGHTEST - DARKEST) * share)) for share in shares]


def shortened(row: Mapping[str, Any]) -> str:
    """What a row says, cut short."""
    told = (value for key, value in row.items() if key != "selection" and isinstance(value, str))
    text = " / ".join(" ".join(value.split()) for value in told)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _template() -> Template:
    """The page's template, which escapes whatever it is given."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files("weightworks.report").joinpath("selection.html.jinja").read_text("utf-8"))
