"""Texts that a merge was chosen by and that a score downstream of it would report on: refused before anything runs."""

from __future__ import annotations

from pathlib import Path

from weightworks.errors import UsageError
from weightworks.plan.graph import Recipe, Stage
from weightworks.stage import catalog
from weightworks.store.sources import Digests


def refuse_leaks(recipe: Recipe, digests: Digests) -> None:
    """Raise :class:`UsageError` for every score on a file whose content chose one of the models it scores."""
    chosen: dict[str, dict[str, str]] = {}  # stage -> content of a text -> the stage that chooses by it
    problems = []
    for name, stage in recipe.stages.items():
        known = {content: by for need in stage.needs for content, by in chosen.get(need, {}).items()}
        if stage.kind == "score":
            problems += [
                f"{stage.place}: stage '{name}' reports on {path}, by which '{known[content]}' chooses"
                for path in _files(stage)
                if (content := digests.file(path)) in known
            ]
        if (text := _chooses_by(stage)) is not None and text.is_file():
            known[digests.file(text)] = name
        chosen[name] = known
    if problems:
        raise UsageError("; ".join(problems), hint="score on a text that had no part in the choice")


def _files(stage: Stage) -> list[Path]:
    module = catalog.methods()[stage.label].load()
    found: list[Path] = (
        module.Method(module.Options(**stage.options)).files() if hasattr(module.Method, "files") else []
    )
    return found


def _chooses_by(stage: Stage) -> Path | None:
    """The text that a stage chooses by, if it does."""
    module = catalog.methods()[stage.label].load()
    if not hasattr(module.Method, "held_out"):
        return None
    wanted = module.Method(module.Options(**stage.options)).held_out(len(stage.inputs.get("models", ())))
    return None if wanted is None else Path(wanted.text).expanduser()
