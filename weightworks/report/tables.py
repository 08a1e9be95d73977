"""The tables of a page: cells with what is read, and what is copied and sorted by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from weightworks.report.figures import (
    Rows,
    duration,
    entries,
    figure,
    inputs_in_words,
    listed,
    number,
    read_measures,
    size,
    words,
)

MINUS = "\N{MINUS SIGN}"
ERRORS = {"relative_error": "error of outputs", "relative_weight_error": "error of weights"}


@dataclass(frozen=True)
class Cell:
    """What is read, and what is copied and sorted by where that differs."""

    text: str
    raw: float | str | None = None

    @property
    def copied(self) -> str | None:
        return format(self.raw, ".15g") if isinstance(self.raw, int | float) else self.raw


@dataclass(frozen=True)
class Table:
    """A table without empty columns; ``numeric`` columns are right-aligned."""

    head: list[str]
    rows: list[list[Cell]]
    numeric: list[bool]


def table(head: Sequence[str], rows: Sequence[list[Cell]]) -> Table:
    kept = [k for k in range(len(head)) if k == 0 or any(row[k].text for row in rows)]
    numeric = [any(isinstance(row[k].raw, int | float) for row in rows) for k in kept]
    return Table([head[k] for k in kept], [[row[k] for k in kept] for row in rows], numeric)


def stage_table(stages: Rows) -> Table:
    head = ["stage", "state", "time", "peak memory", "size", "bits a weight", "use", "from", "reason", "key"]
    rows = []
    for stage in stages:
        seconds, peak, count, bits = (
            number(stage.get(key)) for key in ("seconds", "peak_bytes", "bytes", "bits_a_weight")
        )
        given, key = inputs_in_words(stage), words(stage.get("key"))
        rows.append(
            [
                Cell(stage["name"]),
                Cell(stage["state"]),
                Cell(duration(seconds), seconds),
                Cell(size(peak), peak),
                Cell(size(count), count),
                Cell(figure(bits), bits),
                Cell(words(stage.get("use"))),
                Cell(inputs_in_words(stage, most=3), given or None),
                Cell(words(stage.get("reason"))),
                Cell(key[:12], key or None),
            ]
        )
    return table(head, rows)


def score_tables(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table a score stage: every metric with error and change, then single texts, then what was scored."""
    measures, tables = read_measures(report), []
    for score in map(entries, listed(report.get("scores"))):
        mine = [measure for measure in measures if measure.stage == words(score.get("stage"))]
        models = {words(model.get("model")): model for model in map(entries, listed(score.get("models")))}
        texts = dict.fromkeys(
            (metric, text)
            for model in models.values()
            for metric, values in entries(model.get("by_text")).items()
            for text in entries(values)
        )
        head = ["model", "size"]
        for measure in mine:
            head += [measure.metric, "± error", f"change of {measure.metric}", "± error"]
        rows = []
        for name, model in models.items():
            found = [next((m for m in measure.models if m.name == name), None) for measure in mine]
            count = next((m.size for m in found if m), number(model.get("bytes")))
            row = [Cell(name + (" (baseline)" if name == score.get("baseline") else ""), name)]
            row.append(Cell(size(count), count))
            for measure, m in zip(mine, found, strict=True):
                for key in ("value", "error", "delta", "delta_error"):
                    value = getattr(m, key, None)
                    share = measure.relative and key.startswith("delta")
                    digits = {"value": 4, "delta": 3}.get(key, 2)
                    shown = figure(value, digits=digits, percent=share, sign=key == "delta").replace("-", MINUS)
                    row.append(Cell(shown, value))
            for metric, text in texts:
                value = number(entries(entries(model.get("by_text")).get(metric)).get(text))
                row.append(Cell(figure(value), value))
            row.append(Cell(words(model.get("content"))[:12], words(model.get("content")) or None))
            rows.append(row)
        several, called = len({metric for metric, _ in texts}) > 1, file_names([text for _, text in texts])
        head += [f"{metric}: {called[text]}" if several else called[text] for metric, text in texts] + ["content"]
        tables.append({"stage": words(score.get("stage")), "use": words(score.get("use")), "table": table(head, rows)})
    return tables


def file_names(paths: Sequence[str]) -> dict[str, str]:
    """Paths by their last part, where no other ends in the same."""
    last = {path: PurePath(path).name or path for path in paths}
    return {path: name if list(last.values()).count(name) == 1 else path for path, name in last.items()}


def tensor_table(rows: Rows, error_keys: Sequence[str]) -> Table:
    head = ["tensor", "shape", "method", "bits", "sparsity", *(ERRORS[key] for key in error_keys)]
    head += ["tokens", "damping", "size before", "size after", "fallbacks"]
    cells = []
    for row in rows:
        bits, sparsity, tokens, damping, before, after = (
            number(row.get(key)) for key in ("bits", "sparsity", "tokens", "damping", "bytes_in", "bytes_out")
        )
        line = [
            Cell(words(row.get("tensor"))),
            Cell(" x ".join(map(words, listed(row.get("shape"))))),
            Cell(words(row.get("method"))),
            Cell(figure(bits), bits),
            Cell(figure(sparsity, percent=True), sparsity),
        ]
        line += [Cell(figure(value, percent=True), value) for key in error_keys for value in [number(row.get(key))]]
        line += [Cell(figure(tokens), tokens), Cell(figure(damping), damping)]
        line += [Cell(size(before), before), Cell(size(after), after)]
        cells.append([*line, Cell("; ".join(map(words, listed(row.get("fallbacks")))))])
    return table(head, cells)
