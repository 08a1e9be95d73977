"""One stage as a piece of work that any process or machine can do: small, picklable, no tensors."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from weightworks.engine.executor import Executor
from weightworks.errors import CheckpointError, ResourceError
from weightworks.plan.keys import differences, environment
from weightworks.plan.remote import Remote
from weightworks.plan.workspace import Workspace
from weightworks.stage import catalog
from weightworks.store.sources import Digests

SCORE = "score.json"
PLANNED = "environment"  # the part of a key that a worker must share


@dataclass(frozen=True)
class Task:
    """A stage with the folders of its inputs: (name in the recipe, folder or hub id) by role.

    ``values`` are options and settings by name; ``target`` is where the output goes, ``material`` what it depends on.
    """

    stage: str
    kind: str
    method: str
    inputs: Mapping[str, tuple[tuple[str, str], ...]]
    options: Mapping[str, Any]
    settings: Mapping[str, Any]
    target: Path
    material: Mapping[str, Any]
    quiet: bool = True


@dataclass(frozen=True)
class Production:
    """A task, the key its output is kept under, those of the outputs it reads, and where they are kept (``url``: on
    storage that ``workspace`` mirrors): all that a worker on any machine needs. ``parts`` makes an executor for parts of
    the stage."""

    task: Task
    key: str
    needs: tuple[str, ...]
    workspace: Path
    memo: Path
    url: str | None = None
    parts: Callable[[], Executor] | None = None


class Alike:
    """An executor all of whose workers must be such as the run was planned for."""

    parts: Callable[[], Executor] | None = None

    def __init__(self, executor: Executor, planned: Mapping[str, str]) -> None:
        self.executor, self.planned = executor, planned
        self.slots: int | None = executor.slots

    def submit(self, function: Callable[[Any], Any], task: Any, *, peak_bytes: int | None = None) -> Future[Any]:
        return self.executor.submit(do_alike, (self.planned, function, task), peak_bytes=peak_bytes)

    def close(self) -> None:
        self.executor.close()


def do_alike(order: tuple[Mapping[str, str], Callable[[Any], Any], Any]) -> Any:
    """``function(task)`` of ``(planned, function, task)``, by a worker that is as planned."""
    planned, function, task = order
    check_worker(planned)
    return function(task)


def check_worker(planned: Mapping[str, str]) -> None:
    """Refuse to work in another environment than the key of the output says."""
    if other := list(differences({PLANNED: planned}, {PLANNED: environment()})):
        raise ResourceError(
            f"the worker on {platform.node()} is another than the run was planned for ({'; '.join(other)}): "
            "its numbers could differ",
            hint="use machines of one kind with the same packages",
        )


def produce(order: Production) -> dict[str, Any]:
    """Have the output under its key: make it, or wait for another run that is making it."""
    planned = order.task.material[PLANNED]
    check_worker(planned)
    workspace = Workspace(order.workspace, Digests(order.memo), remote=Remote(order.url) if order.url else None)
    with workspace.only_one(order.key):
        if (found := workspace.find(order.key)) is not None:
            return {**found.record, "cached": True}
        for need in order.needs:
            if workspace.find(need) is None:
                raise CheckpointError(f"the input under {need[:12]} is gone or damaged", hint="run it again")
        with closing(Alike(order.parts(), planned)) if order.parts is not None else nullcontext() as executor:
            facts = perform(order.task, executor)
        output = workspace.keep(order.key, order.task.target, facts)
    workspace.digests.save()
    return {**output.record, "cached": False}


def estimate(task: Task) -> dict[str, Any]:
    """Time, peak memory, disk and output bytes of a task whose inputs exist; nothing is written. Empty for scores."""
    if task.kind == "score":
        return {}
    outcome = _run(task, dry_run=True)
    return outcome.estimate.facts() if outcome.estimate else {}


def perform(task: Task, executor: Executor | None = None) -> dict[str, Any]:
    """Do the work; returns what it cost. Unfinished work of an earlier try is continued, a damaged output replaced."""
    started = time.monotonic()
    _reset_peak()
    task.target.parent.mkdir(parents=True, exist_ok=True)
    if task.target.exists():  # not entered in the cache, or no longer what was entered
        shutil.rmtree(task.target)
    if task.kind == "score":
        _score(task)
    else:
        _run(task, dry_run=False, executor=executor)
    return {
        "stage": task.stage,
        "method": f"{task.kind}.{task.method}",
        "seconds": time.monotonic() - started,
        "peak_bytes": _peak(),
    }


def _run(task: Task, *, dry_run: bool, executor: Executor | None = None) -> Any:
    from weightworks.report.progress import Progress
    from weightworks.stage.settings import Settings

    settings, progress = Settings(**task.settings), Progress(quiet=task.quiet)
    cache = task.target.parent.parent
    called = {path: name for names in task.inputs.values() for name, path in names if cache in Path(path).parents}
    if task.kind == "merge":
        from weightworks.plan.merge import run_merge

        paths = {role: [path for _, path in names] for role, names in task.inputs.items()}
        return run_merge(
            task.method,
            paths["models"],
            dict(task.options),
            settings,
            base=next(iter(paths.get("base", ())), None),
            earlier=next(iter(paths.get("earlier", ())), None),
            output_dir=task.target,
            dry_run=dry_run,
            progress=progress,
            called=called,
        )
    if task.kind == "adapter":
        from weightworks.plan.adapters import run_adapter

        return run_adapter(
            task.method,
            [path for _, path in task.inputs["models"]],
            dict(task.options),
            settings,
            base=next((path for _, path in task.inputs.get("base", ())), None),
            output_dir=task.target,
            dry_run=dry_run,
            progress=progress,
            called=called,
        )
    _, model = task.inputs["model"][0]
    from weightworks.plan.chosen import SELECTED
    from weightworks.plan.select import run_select
    from weightworks.plan.stage import run_stage

    rows = next((Path(folder) / SELECTED for _, folder in task.inputs.get("data", ())), None)
    if rows is not None and (rows.is_file() or not dry_run):  # an estimate may come before they are chosen
        settings = settings.model_copy(update={"dataset": str(rows)})
    start = run_select if task.kind == "select" else partial(run_stage, task.kind, executor=executor)
    return start(
        task.method,
        model,
        dict(task.options),
        settings,
        teacher=next((path for _, path in task.inputs.get("teacher", ())), None),
        output_dir=task.target,
        dry_run=dry_run,
        progress=progress,
        called=called,
    )


def _score(task: Task) -> None:
    """Score the inputs; the result and its provenance appear together by one rename."""
    from weightworks.plan.evaluate import resolved
    from weightworks.stage.protocols import Subject
    from weightworks.stage.settings import Settings
    from weightworks.store.manifest import PROVENANCE
    from weightworks.store.sources import file_digest

    entry = catalog.find(task.kind, task.method)
    method = entry.load().Method(entry.load().Options(**task.options))
    subjects = {name: Subject(name, model) for names in task.inputs.values() for name, model in names}
    baseline = task.inputs.get("baseline", task.inputs["models"])[0][0]
    result = method.score(list(subjects.values()), baseline, resolved(Settings(**task.settings)), lambda line: None)
    staging = task.target.with_name(task.target.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    (staging / SCORE).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    provenance = {"identity": dict(task.material), "files": {SCORE: file_digest(staging / SCORE)}}
    (staging / PROVENANCE).write_text(json.dumps(provenance, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    staging.rename(task.target)


def _reset_peak() -> None:
    """Start counting the peak of resident memory anew, where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _peak() -> int | None:
    """The peak of resident memory since it was reset, bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
