"""A recipe's graph walked: what is there is found, what is not is made, what depends on a failure is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from weightworks.engine.executor import Executor
from weightworks.errors import CheckpointError, WeightworksError
from weightworks.plan.graph import Recipe, Stage, base_name
from weightworks.plan.keys import Key, differences, stage_keys
from weightworks.plan.remote import Remote
from weightworks.plan.task import Task, estimate, perform
from weightworks.plan.workspace import Output, Workspace
from weightworks.report.progress import Progress
from weightworks.store.sources import Digests

EXACT = 24  # stages to be run that are each estimated; of more, one of each that a matrix made


@dataclass
class Step:
    """A stage on its way: what is known of its output, and why it must run (``reason``), if it must.

    ``state``: to run, cached, ran, failed, skipped. ``costs`` is its estimate, ``facts`` what it took.
    """

    stage: Stage
    key: Key
    state: str = "to run"
    reason: str = ""
    output: Output | None = None
    costs: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: WeightworksError | None = None


@dataclass(frozen=True)
class Production:
    """A task, the key its output is kept under, those of the outputs it reads, and where they are kept (``url``: on
    storage that ``workspace`` mirrors): all that a worker on any machine needs."""

    task: Task
    key: str
    needs: tuple[str, ...]
    workspace: Path
    memo: Path
    url: str | None = None


def produce(order: Production) -> dict[str, Any]:
    """Have the output under its key: make it, or wait for another run that is making it."""
    workspace = Workspace(order.workspace, Digests(order.memo), remote=Remote(order.url) if order.url else None)
    with workspace.only_one(order.key):
        if (found := workspace.find(order.key)) is not None:
            return {**found.record, "cached": True}
        for need in order.needs:
            if workspace.find(need) is None:
                raise CheckpointError(f"the input under {need[:12]} is gone or damaged", hint="run it again")
        facts = perform(order.task)
        output = workspace.keep(order.key, order.task.target, facts)
    workspace.digests.save()
    return {**output.record, "cached": False}


class Plan:
    """What a run of ``recipe`` in ``workspace`` will do; nothing but headers and digests has been read."""

    def __init__(self, recipe: Recipe, workspace: Workspace) -> None:
        self.recipe, self.workspace = recipe, workspace
        self.keys = stage_keys(recipe, workspace.digests)
        latest = workspace.latest()
        self.steps: dict[str, Step] = {}
        for name, stage in recipe.stages.items():
            step = self.steps[name] = Step(stage, self.keys[name])
            stale = [need for need in stage.needs if need in self.steps and self.steps[need].state == "to run"]
            step.output = workspace.find(step.key.digest)
            if step.output is not None:
                step.state, step.reason = "cached", "nothing it depends on has changed"
            else:
                step.reason = self._reason(name, latest.get(name), stale)
        workspace.digests.save()

    def _reason(self, name: str, before: Mapping[str, Any] | None, stale: Sequence[str]) -> str:
        if before is None:
            return "never run here"
        if before.get("key") == self.keys[name].digest:
            return "its output is gone or damaged"
        changes = list(differences(before["material"], self.keys[name].material))
        changes = (
            [text for text in changes if not text.startswith("input")]
            or [f"'{need}' runs again" for need in stale]
            or changes
        )
        return "; ".join(changes[:4]) + ("; ..." if len(changes) > 4 else "")

    @property
    def to_run(self) -> list[Step]:
        return [step for step in self.steps.values() if step.state == "to run"]

    def model_of(self, name: str) -> str:
        """The folder or hub id of a source or of a finished stage's output."""
        if name in self.recipe.sources:
            return self.recipe.sources[name]
        output = self.steps[name].output
        assert output is not None, f"{name} has not run"
        return str(output.folder)

    def ancestor(self, name: str) -> str:
        """What stands for the shape of an output that is not there yet: the nearest checkpoint it is made from."""
        while name in self.steps and self.steps[name].output is None:
            stage = self.steps[name].stage
            name = next(iter(stage.inputs.values()))[0]
        return self.model_of(name)

    def task(self, step: Step, *, model: Callable[[str], str], run: Mapping[str, Any], quiet: bool) -> Task:
        """The step as a task; ``run`` are settings of the whole run."""
        stage = step.stage
        inputs = {role: tuple((name, model(name)) for name in names) for role, names in stage.inputs.items()}
        target = self.workspace.place(step.key.digest, stage.name)
        settings = {**stage.settings, **run}
        return Task(
            stage.name, stage.kind, stage.method, inputs, stage.options, settings, target, step.key.material, quiet
        )

    def estimate(self, run: Mapping[str, Any]) -> None:
        """Estimate every step that will run; of very many, one of each that a matrix made stands for the others."""
        known: dict[str, Mapping[str, Any]] = {}
        every = len(self.to_run) <= EXACT
        for step in self.to_run:
            name = step.stage.name if every else base_name(step.stage.name)
            if name not in known:
                known[name] = estimate(self.task(step, model=self.ancestor, run=run, quiet=True))
            step.costs = known[name]


class Runner:
    """Walks a plan with an executor."""

    def __init__(
        self, plan: Plan, executor: Executor, progress: Progress, *, run: Mapping[str, Any], limit: int
    ) -> None:
        self.plan, self.executor, self.progress = plan, executor, progress
        self.run_settings, self.limit = run, limit
        self.running: dict[Future[Any], Step] = {}
        self.ready: list[str] = []

    def run(self) -> int:
        """Run all steps; returns the exit code of the first failure, 0 if there is none."""
        steps, sorter = self.plan.steps, TopologicalSorter[str]()
        for name, step in steps.items():
            sorter.add(name, *(need for need in step.stage.needs if need in steps))
        sorter.prepare()
        try:
            while sorter.is_active():
                for name in sorter.get_ready():
                    if self._settled(steps[name]):
                        sorter.done(name)
                    else:
                        self.ready.append(name)
                self._launch()
                if self.running:
                    done, _ = wait(self.running, return_when=FIRST_COMPLETED)
                    for future in done:
                        step = self.running.pop(future)
                        self._finish(step, future)
                        sorter.done(step.stage.name)
        finally:
            self.executor.close()
            self._remember()
        return next((step.error.exit_code for step in steps.values() if step.error is not None), 0)

    def _settled(self, step: Step) -> bool:
        """Whether there is nothing to do for a step whose inputs are settled."""
        failed = [need for need in step.stage.needs if need in self.plan.steps and self.plan.steps[need].output is None]
        if step.state == "cached":
            assert step.output is not None
            self.plan.workspace.link(step.stage.name, step.output)
            self.plan.workspace.touch(step.key.digest)
            self._say(step, "cached")
        elif failed:
            step.state, step.reason = "skipped", f"'{failed[0]}' is missing"
            self._say(step, f"skipped: {step.reason}")
        else:
            return False
        return True

    def _launch(self) -> None:
        """Start what is ready, as far as slots and memory go; one task alone may always run."""
        waiting, self.ready = self.ready, []
        for name in waiting:
            step = self.plan.steps[name]
            slots = self.executor.slots
            full = slots is not None and len(self.running) >= slots
            if not full and slots != 1 and not step.costs:
                step.costs = self._estimate(step)
            used = sum(int(other.costs.get("peak_bytes", 0)) for other in self.running.values())
            crowded = bool(self.running) and used + int(step.costs.get("peak_bytes", 0)) > self.limit
            if full or (crowded and slots is not None):
                self.ready.append(name)
                continue
            alone = slots == 1 and self.progress.stream.isatty()  # then it may show its own bar
            self._say(step, f"{step.stage.label}: {step.reason}")
            task = self.plan.task(
                step, model=self.plan.model_of, run=self.run_settings, quiet=not alone or self.progress.quiet
            )
            order = self._order(step, task)
            future = self.executor.submit(produce, order, peak_bytes=step.costs.get("peak_bytes"))
            self.running[future] = step

    def _order(self, step: Step, task: Task) -> Production:
        workspace, steps = self.plan.workspace, self.plan.steps
        needs = tuple(steps[need].key.digest for need in step.stage.needs if need in steps)
        url = workspace.remote.url if workspace.remote is not None else None
        return Production(task, step.key.digest, needs, workspace.root, workspace.digests.memo, url)

    def _estimate(self, step: Step) -> Mapping[str, Any]:
        task = self.plan.task(step, model=self.plan.model_of, run=self.run_settings, quiet=True)
        try:
            found: Mapping[str, Any] = self.executor.submit(estimate, task).result()
        except WeightworksError:
            return {}  # the task itself will say what is wrong
        return found

    def _finish(self, step: Step, future: Future[Any]) -> None:
        try:
            step.facts = future.result()
        except WeightworksError as error:
            step.state, step.error = "failed", error
            self._say(step, f"failed: {error}")
            if error.hint:
                self.progress.say(f"  hint: {error.hint}")
            return
        workspace = self.plan.workspace
        if (output := workspace.find(step.key.digest)) is None:
            step.state, step.error = "failed", CheckpointError("its output is gone or damaged already")
            self._say(step, f"failed: {step.error}")
            return
        step.output = output
        step.state = "cached" if step.facts["cached"] else "ran"
        workspace.link(step.stage.name, step.output)
        self._say(step, f"done in {step.facts['seconds']:.1f} s" if step.state == "ran" else "another run has made it")

    def _say(self, step: Step, text: str) -> None:
        place = list(self.plan.steps).index(step.stage.name) + 1
        self.progress.say(f"[{place}/{len(self.plan.steps)}] {step.stage.name}: {text}")

    def _remember(self) -> None:
        done = {
            name: {"key": step.key.digest, "material": step.key.material}
            for name, step in self.plan.steps.items()
            if step.output is not None
        }
        self.plan.workspace.remember(done)
        self.plan.workspace.digests.save()
