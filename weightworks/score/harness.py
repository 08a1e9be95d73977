"""Any task of lm-eval, the same for all models, with paired differences to the baseline question by question.

The whole model is in memory. Prompts, dtype, batch and context are the same for all models; offline tasks of one's own come
from a folder of YAML files. lm-eval's caches are not used: their keys do not say which model gave the answers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from weightworks.errors import MethodError, ResourceError
from weightworks.options import Options as BaseOptions
from weightworks.score._subjects import device_of, figures, memory_of, open_all, row, shared_length
from weightworks.stage.protocols import Subject
from weightworks.stage.settings import Settings

if TYPE_CHECKING:
    from weightworks.score._lm_eval import Loaded
    from weightworks.store.dense import DenseView

PAPER = "Gao et al. 2021, EleutherAI/lm-evaluation-harness; pairing as in Miller 2024 (arXiv:2411.00640)"
VERSION = 1
PARTS = 100  # of the questions, left out in turn where a metric has no formula for its error


class Options(BaseOptions):
    """Options of the harness score."""

    tasks: list[str] = Field(min_length=1, description="tasks, groups or tags of lm-eval, or of --include-path")
    include_path: str | None = Field(None, description="folder of task YAML files of your own")
    num_fewshot: int | None = Field(None, ge=0, description="examples in the prompt; default: as the task says")
    limit: int | None = Field(None, ge=1, description="ask only so many questions of each task")
    batch_size: int = Field(8, ge=1, description="texts a forward pass; the same for all models")
    max_length: int | None = Field(None, ge=2, description="longest input in tokens; capped by the shortest context")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of all models")


class Method:
    """A score: ``TASK METRIC`` for every task or averaging group asked for; changes are absolute. ``by_task`` has all tasks."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def files(self) -> list[Path]:
        """Local files whose content the result depends on; lm-eval's own tasks are known by its version."""
        from weightworks.score._tasks import files_of, scan

        package = [_package_metadata()]
        if self.options.include_path is None:
            return package
        tasks, tags, _ = scan(self.options.include_path)
        return package + files_of(self.options.tasks, tasks, tags)

    def score(
        self, subjects: Sequence[Subject], baseline: str, settings: Settings, say: Callable[[str], None]
    ) -> dict[str, Any]:
        """See :class:`~weightworks.stage.protocols.Scorer`.

        Raises, before a model loads: :class:`UsageError` for unknown tasks, :class:`CalibrationError` for data that is not
        to be had, :class:`ResourceError` for a model that does not fit in memory.
        """
        from weightworks.score import _lm_eval

        options = self.options
        views = open_all(subjects, baseline, settings)
        length = shared_length(views, options.max_length)
        _fits(views, getattr(torch, options.dtype), settings)
        with _lm_eval.quietly(say, bars=sys.stderr.isatty()) as scratch:
            loaded = _lm_eval.load_tasks(list(dict.fromkeys(options.tasks)), options.include_path, scratch)
            results, loaders = {}, {}
            for name, view in views.items():
                say(f"asking {name}: {', '.join(loaded.shown)}; the whole model in memory, in {options.dtype}")
                results[name], loaders[name] = self._ask(view, loaded, length, settings)
            for task in loaded.tasks:
                if options.num_fewshot not in (None, used := results[baseline]["n-shot"].get(task)):
                    say(f"{task} was asked with {used} examples, not {options.num_fewshot}: its YAML allows no others")
            scored = {name: compare(results[name], results[baseline], loaded, same=name == baseline) for name in views}
        rows = []
        for name, view in views.items():
            by_task = {task: _named(scored[name][task]) for task in loaded.tasks}
            metrics = {
                f"{shown} {metric}": found
                for shown in loaded.shown
                for metric, found in _named(scored[name][shown]).items()
            }
            rows.append(row(name, view, metrics, loader=loaders[name], by_task=by_task))
        return {
            "metrics": {
                f"{name} {_short(key)}": {"better": _better(results[baseline], name, key), "change": "absolute"}
                for name in loaded.shown
                for key in scored[baseline][name]
            },
            "baseline": baseline,
            "tasks": {task: _asked(results[baseline], task) for task in loaded.tasks},
            "max_length": length,
            "lm_eval": distribution("lm-eval").version,
            "models": rows,
        }

    def _ask(self, view: DenseView, loaded: Loaded, length: int, settings: Settings) -> tuple[dict[str, Any], str]:
        """lm-eval's results of one model, which is freed again, and who loaded it."""
        from transformers import AutoTokenizer

        from weightworks.score import _lm_eval, _stock
        from weightworks.stream.memory import release

        options = self.options
        tokenizer = AutoTokenizer.from_pretrained(view.checkpoint.root, trust_remote_code=settings.trust_remote_code)
        model, loader = _stock.load(view, getattr(torch, options.dtype), settings)
        found = _lm_eval.run(
            model,
            tokenizer,
            loaded,
            seed=settings.seed,
            max_length=length,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            batch_size=options.batch_size,
        )
        del model
        release()
        return found, loader


def _package_metadata() -> Path:
    """The file of the installation that says which lm-eval it is."""
    package = distribution("lm-eval")
    usual = Path(str(package.locate_file(f"lm_eval-{package.version}.dist-info/METADATA")))
    if usual.is_file():
        return usual
    return next(Path(str(path.locate())) for path in package.files or [] if path.name == "METADATA")  # slow: thousands


def _fits(views: Mapping[str, DenseView], dtype: torch.dtype, settings: Settings) -> None:
    """Refuse models that do not fit in memory, all of them named."""
    from weightworks.score._stock import needed_bytes

    free, where, device = memory_of(settings), "memory", device_of(settings)
    if device.type == "cuda":
        free, where = min(free, torch.cuda.mem_get_info(device)[0]), "memory of machine and device"
    needs = {name: needed_bytes(view, dtype) for name, view in views.items()}
    if large := [f"{name} ({needed / 1e9:.3g} GB)" for name, needed in needs.items() if needed > free]:
        kind = str(dtype).removeprefix("torch.")
        raise ResourceError(
            f"the tasks of lm-eval take the whole model in memory, and {', '.join(large)} in {kind} "
            f"does not fit in {free / 1e9:.3g} GB of free {where}",
            hint="--dtype bfloat16 takes half of float32; perplexity and divergence hold one block at a time",
        )


def compare(
    mine: dict[str, Any], base: dict[str, Any], loaded: Loaded, *, same: bool
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Figures by task or averaging group, and by lm-eval's key ``metric,filter``, of results ``mine`` against ``base``."""
    scored = {name: _task(name, mine, base, task, same=same) for name, task in loaded.tasks.items()}
    for name, group in loaded.groups.items():
        if group.has_aggregation:
            scored[name] = _group(group, mine, base, scored)
    return scored


def _task(
    name: str, mine: dict[str, Any], base: dict[str, Any], task: Any, *, same: bool
) -> dict[str, dict[str, float | None]]:
    """Figures of one task by ``metric,filter``."""
    from lm_eval.api.metrics import mean

    mine_asked, base_asked = ([_question(sample) for sample in part["samples"][name]] for part in (mine, base))
    if mine_asked != base_asked:
        raise MethodError(
            f"task '{name}' asked two models different questions, so their answers cannot be compared",
            hint="its prompts depend on the model or on chance; report the task",
        )
    found = {}
    for key, value in _numbers(mine["results"][name]).items():
        metric, _, chosen = key.partition(",")
        answers = [
            [sample[metric] for sample in part["samples"][name] if sample["filter"] == chosen and metric in sample]
            for part in (mine, base)
        ]
        by = task.aggregation().get(metric, mean)
        error = mine["results"][name].get(f"{metric}_stderr,{chosen}")
        if not isinstance(error, int | float):  # lm-eval has no formula for it
            error = spread(partial(aggregated, by, answers[:1]), len(answers[0]))
        before = _numbers(base["results"][name]).get(key)  # None where it is no number
        change = None if before is None else value - before
        if same:
            change_error: float | None = 0.0
        elif change is None:
            change_error = None
        elif by is mean:
            change_error = mean_error([float(a) - float(b) for a, b in zip(*answers, strict=True)])
        else:
            change_error = spread(partial(aggregated, by, answers), len(answers[0]))
        found[key] = figures(value, None if error is None else float(error), change, change_error)
    return found


def _group(
    group: Any, mine: dict[str, Any], base: dict[str, Any], scored: Mapping[str, dict[str, dict[str, float | None]]]
) -> dict[str, dict[str, float | None]]:
    """Figures of a group by ``metric,filter``: lm-eval's averages, changes with the errors of the tasks combined."""
    found = {}
    weighted = {part.metric: part.weight_by_size for part in group.aggregate_metric_list}
    for key, value in _numbers(mine["results"][group.name]).items():
        metric, _, chosen = key.partition(",")
        tasks = [task.task_name for task in group.get_all_tasks() if key in scored.get(task.task_name, {})]
        sizes = [mine["n-samples"][task]["effective"] if weighted.get(metric, True) else 1 for task in tasks]
        errors = [scored[task][key]["change_error"] for task in tasks]
        combined = (
            math.hypot(*(size * error for size, error in zip(sizes, errors, strict=True) if error is not None))
            / sum(sizes)
            if None not in errors
            else None
        )
        error = mine["results"][group.name].get(f"{metric}_stderr,{chosen}")
        before = _numbers(base["results"][group.name]).get(key)
        change = None if before is None else value - before
        found[key] = figures(value, float(error) if isinstance(error, int | float) else None, change, combined)
    return found


def _question(sample: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two samples the same question."""
    return tuple(sample[key] for key in ("doc_id", "filter", "doc_hash", "prompt_hash", "target_hash"))


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """The metrics among lm-eval's results of a task, by its key ``metric,filter``."""
    return {
        key: float(value)
        for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float) and math.isfinite(value)
    }


def _short(key: str) -> str:
    """``acc`` for ``acc,none``, ``exact_match (strict-match)`` for ``exact_match,strict-match``."""
    metric, _, chosen = key.partition(",")
    return metric if chosen in ("", "none") else f"{metric} ({chosen})"


def _named(found: Mapping[str, Any]) -> dict[str, Any]:
    """``found`` by the names that reports use."""
    return {_short(key): value for key, value in found.items()}


def _asked(results: dict[str, Any], task: str) -> dict[str, Any]:
    """What the result says of a task: questions, examples in each prompt, the task's version."""
    return {
        "samples": results["n-samples"][task]["effective"],
        "num_fewshot": results["n-shot"].get(task),
        "version": results["versions"].get(task),
    }


def _better(results: dict[str, Any], name: str, key: str) -> str:
    """Which direction is the better one, by lm-eval; higher where it does not say."""
    return "lower" if results["higher_is_better"].get(name, {}).get(key.partition(",")[0]) is False else "higher"


def aggregated(by: Callable[[list[Any]], float], answers: Sequence[Sequence[Any]], kept: Sequence[int]) -> float:
    """A metric of the ``kept`` questions for the first list of answers, less that for the second if there is one."""
    first, *second = (float(by([part[i] for i in kept])) for part in answers)
    return first - sum(second)


def mean_error(values: Sequence[float]) -> float | None:
    """The standard error of a mean; None for a single value."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def spread(statistic: Callable[[list[int]], float], count: int) -> float | None:
    """The standard error of a statistic of ``count`` questions by the jackknife: it is taken again without each part.

    ``statistic`` takes the numbers of the questions that are kept. For means this is the usual formula.
    """
    parts = min(count, PARTS)
    if parts < 2:
        return None
    without = [float(statistic([i for i in range(count) if i % parts != part])) for part in range(parts)]
    mean = math.fsum(without) / parts
    return math.sqrt((parts - 1) / parts * math.fsum((value - mean) ** 2 for value in without))
