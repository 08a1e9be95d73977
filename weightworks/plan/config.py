"""``merge config``: a configuration of mergekit from file to published folder."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from weightworks.engine.machine import pick_device
from weightworks.engine.mergejob import Input, MergeJob, open_inputs
from weightworks.plan.located import Problems
from weightworks.plan.merge import carry_out, check_place, default_target
from weightworks.plan.mergekit import SEE, Configuration, read
from weightworks.plan.stacking import Stacking
from weightworks.plan.stage import Outcome
from weightworks.plan.tying import alike
from weightworks.plan.vocabularies import matched
from weightworks.report.progress import Progress
from weightworks.stage.merging import MergeOptions
from weightworks.stage.settings import Settings

LABEL, VERSION = "merge.config", 1
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"
TOKENIZER_CONFIG = "tokenizer_config.json"


class Options(MergeOptions):
    """What the command adds to a configuration."""


class EachItsOwn:
    """Stands where a merge has its method: here, every tensor has one of its own."""

    BASE: ClassVar = "optional"
    LEAST, MOST = 1, None

    def __init__(self, options: Options) -> None:
        self.options = options


def run_config(
    path: Path,
    options: Mapping[str, Any],
    settings: Settings,
    *,
    output_dir: Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    announce: Callable[[dict[str, Any]], None] = lambda resolved: None,
) -> Outcome:
    """Do what the configuration at ``path`` says. ``options`` are ``on_missing`` and ``check``.

    Raises :class:`UsageError` with all mistakes of the file by line, and all that is not supported.
    """
    started = time.monotonic()
    configuration, problems = read(path)
    given = {**options, "out_dtype": configuration.out_dtype, "vocabulary": configuration.vocabulary or "base"}
    chosen = Options.parse(given, where=LABEL)
    opened = open_inputs(ordered(configuration), allow_pickle=settings.allow_pickle)
    template = chat_template(configuration, opened, problems)
    problems.raise_if_any(str(path), hint=SEE)
    apart = configuration.base is not None and configuration.form.base in ("required", "optional")
    models, base = (
        ([item for item in opened if item.name != configuration.base], opened[0]) if apart else (opened, None)
    )
    target = (output_dir or default_target(models, base, "config")).absolute()
    check_place(target, opened, settings)
    numbers = {item.name: number for number, item in enumerate(models)}
    models, base, tying = alike(models, base, settings)
    models, base, vocabulary = matched(models, base, chosen, settings)
    if vocabulary is not None and configuration.vocabulary is None:
        configuration.notes.append(
            "tokenizers differ and no tokenizer_source is given: rows are matched by token, where mergekit takes them by number"
        )
    job = MergeJob(
        LABEL,
        VERSION,
        EachItsOwn(chosen),
        settings,
        models,
        base,
        target,
        progress or Progress(quiet=True),
        pick_device(settings.device),
        vocabulary=vocabulary,
        tied=tying.tied,
        copies=tying.copies,
        remarks=tying.notes,
        planner=Stacking(configuration, problems, numbers),
        replaced={} if template is None else templated(opened[0].checkpoint.root, template),
    )
    facts = {"configuration": configuration.plain, "method": configuration.entry.version_facts()}
    return carry_out(job, {"configured": facts}, started, dry_run=dry_run, announce=announce)


def ordered(configuration: Configuration) -> list[str]:
    """The models, first the one that the result has configuration and tokenizer of: the base, or the tokenizer's source."""
    models = configuration.models
    if configuration.tokenizer is not None and configuration.base is None and configuration.tokenizer.value in models:
        models.sort(key=lambda model: model != configuration.tokenizer.value)  # type: ignore[union-attr]
    return models


def chat_template(configuration: Configuration, inputs: Sequence[Input], problems: Problems) -> str | None:
    """The chat template of the result, None for that of the reference; what cannot be found is noted at its line."""
    if (tokenizer := configuration.tokenizer) is not None and tokenizer.value != inputs[0].name:
        text = f"tokenizer_source: only the tokenizer of {inputs[0].name} can be taken over, or union"
        problems.add(tokenizer.place, text)
    item = configuration.chat_template
    if item is None:
        return None
    known = [templates_of(one.checkpoint.root) for one in inputs]
    if item.value == "auto":
        found = Counter(templates["default"].strip() for templates in known if "default" in templates)
        if not found:
            configuration.notes.append("chat_template: auto: no input has one")
        return found.most_common(1)[0][0] if found else None
    if "{" in item.value:
        return str(item.value)
    named = [templates[item.value] for templates in known if item.value in templates]
    if not named:
        text = f"chat_template: no input has one called '{item.value}'; write the template of Jinja itself, or auto"
        problems.add(item.place, text)
    return named[0] if named else None


def templates_of(root: Path) -> dict[str, str]:
    """The chat templates in a checkpoint folder, by name; the one of the tokenizer is called default."""
    found: dict[str, str] = {}
    if (path := root / TOKENIZER_CONFIG).is_file():
        given = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        if isinstance(given, str):
            found["default"] = given
        elif isinstance(given, list):
            found |= {str(one["name"]): str(one["template"]) for one in given}
    if (path := root / TEMPLATE).is_file():
        found["default"] = path.read_text(encoding="utf-8")
    return found | {path.stem: path.read_text(encoding="utf-8") for path in sorted((root / TEMPLATES).glob("*.jinja"))}


def templated(root: Path, template: str) -> dict[str, str]:
    """The small files that hold a chat template: its own, and a tokenizer's configuration without one."""
    found = {TEMPLATE: template}
    if (path := root / TOKENIZER_CONFIG).is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("chat_template", None) is not None:
            found[TOKENIZER_CONFIG] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return found
