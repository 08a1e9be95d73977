"""The report of a recipe: one HTML file that needs nothing else, and the same figures as a table for a terminal."""

from __future__ import annotations

import base64
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from weightworks.report.allocation import allocation_chart, allocation_table
from weightworks.report.charts import Point, depth_chart, pareto_front, quality_chart, swatch
from weightworks.report.figures import (
    Measure,
    Rows,
    as_json,
    block_and_kind,
    clean,
    duration,
    entries,
    fallbacks,
    figure,
    inputs_in_words,
    inputs_of,
    listed,
    number,
    read_measures,
    short_names,
    size,
    stages_of,
    verdict,
    words,
)
from weightworks.report.graph import columns_wide, graph, shorten
from weightworks.report.tables import ERRORS, MINUS, Cell, Table, score_tables, stage_table, table, tensor_table

if TYPE_CHECKING:
    from jinja2 import Template

NODE_HEIGHT = 62.0
OPEN = 6  # charts of one sort that are shown at once; what is more is folded away
LONGEST = 1000  # rows of a stage's table of tensors


def report_page(report: Mapping[str, Any]) -> str:
    """The report as HTML: same report, same text. Nothing is loaded from elsewhere, nothing in it can run.

    ``report`` is what JSON can hold; of a stage, ``name``, ``use`` and ``state`` are needed, all else may be missing
    or None, and then is not shown.
    """
    whole = entries(clean(report))
    stages, measures = stages_of(whole.get("stages")), read_measures(whole)
    compared = [score for score in measures if score.stage in listed(whole.get("compare"))] or measures
    errors, series = error_charts(stages)
    width_table, grids = widths(stages)
    recipe = entries(whole.get("recipe"))
    return _template().render(
        title=words(recipe.get("name")) or "report",
        path=words(recipe.get("path")),
        recipe=words(recipe.get("text")),
        verdict=verdict(whole),
        fallbacks=fallbacks(stages),
        drawing=draw_graph(stages),
        quality=[quality for k, score in enumerate(compared) if (quality := quality_of(score, k))],
        errors=errors,
        series=series,
        width_table=width_table,
        grids=grids,
        stage_table=stage_table(stages),
        score_tables=score_tables(whole),
        stages=[stage_facts(stage, k) for k, stage in enumerate(stages)],
        version=words(whole.get("weightworks")),
        environment=[(name, words(value)) for name, value in entries(whole.get("environment")).items()],
        open=OPEN,
    )


def report_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the same figures for a terminal: a row a stage, a column a metric with its change in brackets."""
    whole = entries(clean(report))
    measures = read_measures(whole)
    metrics = [score.metric for score in measures]
    head = ["stage", "state", "time", "peak", "size", "bits"]
    head += [
        score.metric if metrics.count(score.metric) == 1 else f"{score.stage}: {score.metric}" for score in measures
    ]
    rows = []
    scored = dict.fromkeys(model.name for score in measures for model in score.models)
    stages = stages_of(whole.get("stages"))
    known = {stage["name"] for stage in stages}
    for stage in stages + [{"name": name, "state": ""} for name in scored if name not in known]:
        row = [
            stage["name"],
            stage["state"],
            duration(number(stage.get("seconds"))),
            size(number(stage.get("peak_bytes"))),
            size(number(stage.get("bytes"))),
            figure(number(stage.get("bits_a_weight"))),
        ]
        for score in measures:
            found = next((model for model in score.models if model.name == stage["name"]), None)
            change = score.change(found) if found else ""
            row.append("" if found is None else figure(found.value) + (f" ({change})" if change else ""))
        rows.append(row)
    return head, rows


# Scores ---------------------------------------------------------------------------------------------------------------


def quality_of(score: Measure, k: int) -> dict[str, Any] | None:
    """What the page says of size against quality: a chart and the models on the front; None if there is nothing to draw."""
    drawn = [model for model in score.models if model.value is not None and model.size is not None]
    if not drawn:
        return None
    points = [
        Point(model.name, model.size or 0, model.value or 0, score.spread(model), model.name == score.baseline)
        for model in drawn
    ]
    known = score.better in ("lower", "higher")
    front = pareto_front([(point.size, point.value) for point in points], score.better) if known else []
    best = ", ".join(points[index].name for index in front)
    label = f"Size against {score.metric} of {len(points)} models" + (f"; on the Pareto front: {best}" if front else "")
    rows = [
        [
            Cell(drawn[index].name),
            Cell(size(drawn[index].size), drawn[index].size),
            Cell(figure(drawn[index].value), drawn[index].value),
            Cell(
                figure(drawn[index].delta, digits=2, percent=score.relative, sign=True).replace("-", MINUS),
                drawn[index].delta,
            ),
        ]
        for index in front
    ]
    return {
        "metric": score.metric,
        "stage": score.stage,
        "baseline": score.baseline if any(point.baseline for point in points) else "",
        "better": score.better if known else "",
        "svg": quality_chart(points, front, ident=f"q{k}", metric=score.metric, label=label),
        "front": table(["model", "size", score.metric, "change"], rows),
        "left_out": [model.name for model in score.models if model not in drawn],
    }


# Stages ---------------------------------------------------------------------------------------------------------------


def stage_facts(stage: dict[str, Any], k: int) -> dict[str, Any]:
    """What the page tells of one stage when asked."""
    rows = [entries(row) for row in listed(stage.get("rows"))]
    error_keys = [key for key in ERRORS if any(number(row.get(key)) is not None for row in rows)]
    worst = sorted(rows, key=lambda row: -max((number(row.get(key)) or 0 for key in error_keys), default=0))
    shown = rows if len(rows) <= LONGEST else worst[:LONGEST]
    facts = {
        "from": inputs_in_words(stage),
        "reason": words(stage.get("reason")),
        "options": ", ".join(f"{name}={as_json(value)}" for name, value in entries(stage.get("options")).items()),
        "folder": words(stage.get("folder")),
        "key": words(stage.get("key")),
    }
    chosen = entries(stage.get("allocation"))
    return {
        "id": f"stage-{k}",
        "name": stage["name"],
        "use": words(stage.get("use")),
        "state": stage["state"],
        "facts": [(name, value) for name, value in facts.items() if value],
        "error": words(stage.get("error")),
        "budget": allocation_chart(chosen, f"b{k}"),
        "allocation": allocation_table(chosen),
        "tensors": tensor_table(shown, error_keys) if rows else None,
        "left_out": f"the {LONGEST:,} largest errors of {len(rows):,} tensors" if len(rows) > LONGEST else "",
    }


def draw_graph(stages: Rows) -> dict[str, Any] | None:
    """Boxes and lines of the stages, with what is written in each box."""
    if not stages:
        return None
    index: dict[str, int] = {}
    parents: list[list[int]] = []
    for k, stage in enumerate(stages):
        names = dict.fromkeys(name for given in inputs_of(stage).values() for name in given)
        parents.append([index[name] for name in names if name in index])  # in run order, so inputs came before
        index.setdefault(stage["name"], k)
    nodes = []
    for k, stage in enumerate(stages):
        seconds, count = number(stage.get("seconds")), number(stage.get("bytes"))
        figures = [stage["state"], duration(seconds), size(count)]
        nodes.append(
            {
                "href": f"#stage-{k}",
                "name": shorten(stage["name"], 30),
                "use": shorten(words(stage.get("use")), 34),
                "state": stage["state"],
                "line": " · ".join(part for part in figures if part),
                "label": f"{stage['name']}: {', '.join(part for part in figures if part)}",
            }
        )
    wide = [
        max(150.0, 26 + 7.6 * columns_wide(n["name"]), 26 + 6.4 * columns_wide(n["use"]), 40 + 6.6 * len(n["line"]))
        for n in nodes
    ]
    drawing = graph(parents, wide, NODE_HEIGHT)
    boxes = [(box, nodes[box.stage]) for box in drawing.boxes if box.stage is not None]
    return {"boxes": boxes, "lines": drawing.lines, "width": drawing.width, "height": drawing.height}


# Tensors --------------------------------------------------------------------------------------------------------------


def error_charts(stages: Rows) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A chart a stage of its errors by depth, and the legend they share: one series a kind of linear."""
    found: list[tuple[str, str, dict[str, dict[int, list[float]]]]] = []  # stage, what error: kind, block, errors
    for stage in stages:
        for key in ERRORS:
            kinds: dict[str, dict[int, list[float]]] = {}
            for row in map(entries, listed(stage.get("rows"))):
                block, kind = block_and_kind(words(row.get("tensor")))
                value = number(row.get(key))
                if block is not None and value is not None:
                    kinds.setdefault(kind, {}).setdefault(block, []).append(value)
            if kinds:
                found.append((stage["name"], key, kinds))
    names = short_names(dict.fromkeys(kind for _, _, kinds in found for kind in kinds))
    series = {kind: k for k, kind in enumerate(names)}
    charts = []
    for k, (name, key, kinds) in enumerate(found):
        alike = [blocks for _, other, all_kinds in found if other == key for blocks in all_kinds.values()]
        scale = [error for blocks in alike for errors in blocks.values() for error in errors]
        lines = {
            series[kind]: [(block, sum(errors) / len(errors), min(errors), max(errors)) for block, errors in line]
            for kind, blocks in kinds.items()
            for line in [sorted(blocks.items())]
        }
        error, block, kind = max((max(e), b, names[kind]) for kind, blocks in kinds.items() for b, e in blocks.items())
        worst = f"worst {figure(error, percent=True)}, block {block} {kind}"
        svg = depth_chart(lines, scale=scale, ident=f"e{k}", label=f"{name}: {ERRORS[key]} by block; {worst}")
        charts.append({"stage": name, "of": ERRORS[key], "worst": worst, "svg": svg})
    return charts, [{"name": names[kind], **swatch(k)} for kind, k in series.items()]


def widths(stages: Rows) -> tuple[Table, list[dict[str, Any]]]:
    """Bits and sparsity of every stage's tensors in words, and, where they are not all alike, as blocks x kinds."""
    lines, grids = [], []
    for stage in stages:
        rows = [entries(row) for row in listed(stage.get("rows"))]
        line, heats = [Cell(stage["name"]), Cell(str(len(rows)), len(rows))], []
        for key, percent in (("bits", False), ("sparsity", True)):
            known = [(row, value) for row in rows if (value := number(row.get(key))) is not None]
            low, high = (end((value for _, value in known), default=0.0) for end in (min, max))
            told = _share(low, percent=percent) if known else ""
            if told != _share(high, percent=percent) and known:
                counts = [math.prod(int(number(side) or 1) for side in listed(row.get("shape"))) for row, _ in known]
                mean = sum(n * value for n, (_, value) in zip(counts, known, strict=True)) / max(sum(counts), 1)
                told = "{} to {}, mean {}".format(*(_share(value, percent=percent) for value in (low, high, mean)))
                heats.append(_heat(key, known, percent=percent))
            line.append(Cell(told + (f" in {len(known)} tensors" if told and len(known) < len(rows) else "")))
        if line[2].text or line[3].text:
            lines.append(line)
        if heats:
            grids.append({"stage": stage["name"], "tables": heats})
    return table(["stage", "tensors", "bits", "sparsity"], lines), grids


def _heat(key: str, known: Sequence[tuple[dict[str, Any], float]], *, percent: bool) -> dict[str, Any]:
    """Kinds x blocks: the mean in every cell, with how strongly it is coloured."""
    low, high = min(value for _, value in known), max(value for _, value in known)
    cells: dict[str, dict[int, list[float]]] = {}
    apart = []
    for row, value in known:
        block, kind = block_and_kind(words(row.get("tensor")))
        if block is None:
            apart.append((kind, _share(value, percent=percent)))
        else:
            cells.setdefault(kind, {}).setdefault(block, []).append(value)
    blocks = sorted({block for line in cells.values() for block in line})
    lines = []
    for kind, name in short_names(cells).items():
        means = [sum(v) / len(v) if (v := cells[kind].get(block)) else None for block in blocks]
        shown = ["" if v is None else f"{100 * v:.0f}" if percent else f"{v:.3g}" for v in means]
        strong = [8 + 47 * (v - low) / (high - low) if v is not None else 0 for v in means]
        lines.append((name, list(zip(shown, strong, strict=True))))
    return {"of": f"{key}, %" if percent else key, "blocks": blocks, "lines": lines, "apart": apart}


@functools.cache
def _template() -> Template:
    """The page's template, which escapes whatever it is given."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"fingerprint": _fingerprint, "breakable": _breakable}
    return environment.from_string(files("weightworks.report").joinpath("page.html.jinja").read_text("utf-8"))


def _share(value: float, *, percent: bool) -> str:
    """Bits or sparsity for people."""
    return figure(value, percent=True) if percent else f"{value:.4g}"


def _fingerprint(script: str) -> str:
    """What a page's security policy calls a script by, so that no other runs."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _breakable(name: str) -> str:
    """``name`` as HTML that may go on in the next line after a bracket or a comma."""
    from markupsafe import escape

    safe = escape(name)
    return type(safe)(safe.replace("[", "[\0").replace(",", ",\0").replace("\0", type(safe)("<wbr>")))
