"""lm-eval called in process: its tasks loaded, its evaluation run, its noise kept from the terminal and from stdout."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import random
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from weightworks.errors import CalibrationError, ResourceError, UsageError, WeightworksError
from weightworks.score._tasks import TaskFile, scan
from weightworks.stream.memory import ran_out

SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
BOOTSTRAP = 1000  # samples behind the standard error of a metric without a formula: two digits of it
_ONE_AT_A_TIME = threading.Lock()  # lm-eval uses the global generators and logger, tqdm has one class


@dataclass(frozen=True)
class Loaded:
    """Tasks ready to be run on any number of models.

    ``objects`` are lm-eval's tasks and groups as asked for; ``tasks`` its tasks by name, ``groups`` its groups, ``shown``
    the names whose metrics are the result: a group that averages its tasks speaks for them.
    """

    objects: list[Any]
    manager: Any
    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)


def load_tasks(names: Sequence[str], include_path: str | None, scratch: Path) -> Loaded:
    """Find and load the named tasks, groups and tags; ``scratch`` takes what their data is converted to.

    Raises :class:`UsageError` that names all unknown ones, with near names; :class:`CalibrationError` for data that is
    not to be had.
    """
    local, tags, problems = scan(include_path) if include_path else ({}, {}, [])
    manager = _manager(names, include_path, local, tags)
    known = manager.all_tasks
    if unknown := [name for name in names if name not in known]:
        raise _unknown(unknown, known, include_path, sorted({*local, *tags}), problems)
    loaded = Loaded([], manager)
    with _local_data(local, scratch):
        for name in names:
            try:
                found = manager.load([name])
            except WeightworksError:
                raise
            except Exception as error:  # lm-eval, datasets and the task's own code raise many kinds
                reason = (str(error).strip() or "no text").splitlines()[0]
                raise CalibrationError(
                    f"task '{name}' cannot be loaded ({type(error).__name__}: {reason})",
                    hint="offline, a task's data set must be in the cache of the hub or beside the task's YAML",
                ) from error
            groups = found.get("groups", {})
            loaded.objects.extend([groups[name]] if name in groups else found["tasks"].values())
            loaded.tasks.update(found["tasks"])
            loaded.groups.update(groups)
            averaged = name in groups and groups[name].has_aggregation
            loaded.shown.extend([name] if averaged else found["tasks"])
    _check(loaded)
    return loaded


def _check(loaded: Loaded) -> None:
    """Refuse what lm-eval would refuse only once a model is loaded."""
    problems = []
    try:
        loaded.manager.load(loaded.objects)
    except ValueError as error:  # a task asked for twice, by itself and in a group
        problems.append(str(error))
    for name, task in loaded.tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            problems.append(f"task '{name}' runs code that the model writes, which is not done here")
        if getattr(task, "MULTIMODAL", False):
            problems.append(f"task '{name}' shows images or sounds, and only text models are scored")
    if problems:
        raise UsageError("; ".join(problems))


def _manager(
    names: Sequence[str], include_path: str | None, local: dict[str, TaskFile], tags: dict[str, list[str]]
) -> Any:
    """lm-eval's index of tasks; its own thousands, which take seconds to read, only where they are needed."""
    from lm_eval.tasks import TaskManager

    waiting, seen = [*names], set()
    while waiting:
        name = waiting.pop()
        if name not in local and name not in tags:
            return TaskManager(include_path=include_path)
        if name not in seen:
            seen.add(name)
            waiting += tags.get(name, [])
            waiting += (
                [inner for inner in local[name].members if f"{name}::{inner}" not in local] if name in local else []
            )
    return TaskManager(include_path=include_path, include_defaults=False)


def _unknown(
    unknown: Sequence[str], known: Sequence[str], include_path: str | None, own: Sequence[str], problems: Sequence[str]
) -> UsageError:
    """The refusal of names that no task, group or tag has."""
    sentences = []
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        sentences.append(f"unknown task '{name}'" + (f" (near names: {', '.join(near)})" if near else ""))
    if include_path:
        sentences.append(f"{include_path} defines {', '.join(own) or 'no task'}")
    hint = "lm-eval ls tasks lists lm-eval's own" + ("" if include_path else "; --include-path DIR adds yours")
    return UsageError("; ".join([*sentences, *problems]), hint=hint)


@contextlib.contextmanager
def _local_data(local: dict[str, TaskFile], scratch: Path) -> Iterator[None]:
    """While tasks load, relative paths to data mean the folder of the task's file, not the working directory.

    ``scratch`` is the cache of such data: the hub's own cache knows a file by its path and time alone.
    """
    from lm_eval.api.task import ConfigurableTask

    original = ConfigurableTask.download

    def download(task: Any, dataset_kwargs: dict[str, Any] | None = None, **rest: Any) -> None:
        if (found := local.get(task.config.task)) is not None:
            dataset, located = found.located(task.DATASET_PATH, dataset_kwargs)
            if dataset != task.DATASET_PATH or located != (dataset_kwargs or {}):
                task.DATASET_PATH, dataset_kwargs = dataset, {"cache_dir": str(scratch), **located}
        original(task, dataset_kwargs, **rest)

    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = original


def run(model: Any, tokenizer: Any, loaded: Loaded, *, seed: int, max_length: int, **options: Any) -> dict[str, Any]:
    """lm-eval's results for a causal model of transformers; ``options`` are num_fewshot, limit and batch_size.

    Raises :class:`ResourceError` when memory runs out.
    """
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that the model is already loaded
    try:
        # In 16 bits a sum of log-probabilities would have three digits: the softmax is in float32 in any case.
        wrapped = HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=options["batch_size"],
            max_length=max_length,
            softmax_dtype="float32",
        )
    finally:
        logger.setLevel(level)
    unused = {"get_git_commit_hash": lambda: None, "add_env_info": lambda storage: None}  # they start other programs
    kept = {name: getattr(lm_eval.evaluator, name, None) for name in unused}
    vars(lm_eval.evaluator).update(unused)
    try:
        return lm_eval.evaluator.simple_evaluate(
            model=wrapped,
            tasks=loaded.objects,
            task_manager=loaded.manager,
            bootstrap_iters=BOOTSTRAP,
            log_samples=True,
            **options,
            **{name: first + seed for name, first in SEEDS.items()},
        )
    except WeightworksError:
        raise
    except Exception as error:
        if ran_out(error):
            raise ResourceError(
                f"memory ran out in batches of {options['batch_size']} texts of up to {max_length} tokens",
                hint="give a smaller --batch-size or --max-length",
            ) from error
        reason = (str(error).strip() or "no text").splitlines()[0]
        raise CalibrationError(f"lm-eval failed ({type(error).__name__}: {reason})") from error
    finally:
        vars(lm_eval.evaluator).update(kept)


@contextlib.contextmanager
def quietly(say: Callable[[str], None], *, bars: bool) -> Iterator[Path]:
    """Run lm-eval in here: its warnings go to ``say``, each once; nothing goes to stdout; bars only if asked for.

    The global random generators are put back. Gives a folder that lives as long. One at a time in a process: a second
    thread waits.
    """
    with (
        _ONE_AT_A_TIME,
        tempfile.TemporaryDirectory(prefix="weightworks-") as folder,
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(action="ignore"),
        _logged(say),
        _generators(),
        contextlib.nullcontext() if bars else _no_bars(),
        _environment("DISABLE_MULTIPROC", "1"),  # bootstrapping would fork a process that runs threads
    ):
        yield Path(folder)


@contextlib.contextmanager
def _logged(say: Callable[[str], None]) -> Iterator[None]:
    logger, told = logging.getLogger("lm_eval"), set[str]()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = record.getMessage().strip().partition("\n")[0]
            if line not in told:
                told.add(line)
                say(f"lm-eval: {line}")

    handler, before = Handler(logging.WARNING), (logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


@contextlib.contextmanager
def _generators() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    original = tqdm.__init__

    def silent(bar: Any, *args: Any, **options: Any) -> None:
        original(bar, *args, **{**options, "disable": True})

    tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.__init__ = original


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
