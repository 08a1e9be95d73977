"""Scores of several models side by side, each against a baseline on the very same texts and questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from weightworks.engine.machine import free_memory, pick_device
from weightworks.errors import UsageError
from weightworks.stage import catalog
from weightworks.stage.protocols import Subject
from weightworks.stage.settings import Settings
from weightworks.store.checkpoint import Checkpoint


def evaluate(
    models: Sequence[str],
    texts: Sequence[str] = (),
    *,
    divergence: Sequence[str] = (),
    tasks: Sequence[str] = (),
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    dtype: str = "float32",
    baseline: str | None = None,
    seq_len: int = 2048,
    max_tokens: int | None = None,
    device: str = "auto",
    seed: int = 0,
    max_memory: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Perplexity on ``texts``, divergence from the baseline on ``divergence``, lm-eval's ``tasks``: any of them, at least one.

    ``baseline`` (default: the first model) is what changes refer to. Windows are as long as ``seq_len``, or as the
    shortest context of the models, so that all see the same; ``dtype``, ``batch_size`` and ``max_length`` are those of the
    tasks. Returns ``baseline``; ``seq_len`` as used, None without texts; ``scores``, the result of each score as
    :class:`~weightworks.stage.protocols.Scorer` describes it, with ``method`` and ``options``; and ``models``: ``model``,
    ``content``, ``bytes``, all ``metrics`` by name, and with perplexity the model's ``perplexity`` and ``tokens`` by text,
    their geometric ``mean``, and the relative ``change`` with its standard ``error`` (None where the baseline reads other
    tokens). Raises :class:`UsageError` when nothing is asked for.
    """
    on_text = {"seq_len": seq_len, "max_tokens": max_tokens}
    asked: dict[str, dict[str, Any]] = {}
    if texts:
        asked["perplexity"] = {"texts": list(texts), **on_text}
    if divergence:
        asked["divergence"] = {"texts": list(divergence), **on_text}
    if tasks:
        asked["harness"] = {
            "tasks": list(tasks),
            "include_path": include_path,
            "num_fewshot": num_fewshot,
            "limit": limit,
            "batch_size": batch_size,
            "max_length": max_length,
            "dtype": dtype,
        }
    if not asked:
        raise UsageError(
            "nothing to score: no perplexity, no divergence and no tasks asked for",
            hint="give --perplexity TEXT, --divergence TEXT or --tasks NAMES",
        )
    settings = Settings.parse(
        {
            "device": device,
            "seed": seed,
            "max_memory": max_memory,
            "trust_remote_code": trust_remote_code,
            "allow_pickle": allow_pickle,
        },
        where="evaluate",
    )
    base = baseline or models[0]
    subjects = [Subject(name, name) for name in dict.fromkeys([base, *models])]
    for subject in subjects:
        for remark in Checkpoint.open(subject.model, allow_pickle=allow_pickle).remarks:
            say(f"note: {remark}")
    scores = run_scores(asked, subjects, base, settings, say)
    return {
        "baseline": base,
        "seq_len": next((result["seq_len"] for result in scores if "seq_len" in result), None),
        "models": [_joined([result["models"][number] for result in scores]) for number in range(len(subjects))],
        "scores": scores,
    }


def run_scores(
    asked: dict[str, dict[str, Any]],
    subjects: Sequence[Subject],
    baseline: str,
    settings: Settings,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The result of each score ``asked`` for (its options by its name), with its ``method`` and ``options``.

    All options are checked, and refused together, before the first score runs.
    """
    modules = {name: catalog.find("score", name).load() for name in asked}
    problems = [
        problem for name, values in asked.items() for problem in modules[name].Options.problems(values, where=name)
    ]
    if problems:
        raise UsageError("; ".join(problems), hint="see: compress evaluate --help")
    methods = {name: modules[name].Method(modules[name].Options(**values)) for name, values in asked.items()}
    settings = resolved(settings)
    return [
        {
            "method": f"score.{name}",
            "options": method.options.resolved(),
            **method.score(subjects, baseline, settings, say),
        }
        for name, method in methods.items()
    ]


def resolved(settings: Settings) -> Settings:
    """``settings`` with the device named and the memory counted: no more than is free, control groups included."""
    free = free_memory()
    limit = free if settings.memory_limit is None else min(free, settings.memory_limit)
    return settings.model_copy(update={"device": str(pick_device(settings.device)), "max_memory": str(max(1, limit))})


def _joined(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the scores have found out about one model."""
    joined = {key: rows[0][key] for key in ("model", "content", "bytes")}
    joined["metrics"] = {name: figures for row in rows for name, figures in row["metrics"].items()}
    for row in rows:
        if (found := row["metrics"].get("perplexity")) is not None:
            joined |= {
                "perplexity": row["by_text"]["perplexity"],
                "tokens": row["tokens"],
                "mean": found["value"],
                "change": found["change"],
                "error": found["change_error"],
            }
    return joined
