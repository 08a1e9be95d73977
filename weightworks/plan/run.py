"""A recipe's graph walked: what is there is found, what is not is made, what depends on a failure is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import nullcontext
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Any

from weightworks.engine.executor import Executor
from weightworks.errors import CheckpointError, WeightworksError
from weightworks.plan.graph import Recipe, Stage, base_name
from weightworks.plan.keys import Key, changed_files, differences, stage_keys
from weightworks.plan.leaks import refuse_leaks
from weightworks.plan.task import Production, Task, estimate, produce
from weightworks.plan.workspace import Output, Workspace
from weightworks.report.progress import Progress
from weightworks.store.sources import ADAPTER

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


class Plan:
    """What a run of ``recipe`` in ``workspace`` will do; nothing but headers and digests has been read."""

    def __init__(self, recipe: Recipe, workspace: Workspace) -> None:
        self.recipe, self.workspace = recipe, workspace
        refuse_leaks(recipe, workspace.digests)
        self.keys = stage_keys(recipe, workspace.digests)
        self._latest = workspace.latest()
        self.steps: dict[str, Step] = {}
        for name, stage in recipe.stages.items():
            step = self.steps[name] = Step(stage, self.keys[name])
            step.output = workspace.find(step.key.digest)
            if step.output is not None:
                step.state, step.reason = "cached", "nothing it depends on has changed"
            else:
                step.reason = self._reason(stage)
        workspace.digests.save()

    def _reason(self, stage: Stage) -> str:
        """Why a stage whose output is not there must run, in words."""
        before, key = self._latest.get(stage.name, {}), self.keys[stage.name]
        if "material" not in before:
            return "never run here"
        if before.get("key") == key.digest:
            return "its output is gone or damaged"
        texts = list(differences(before["material"], key.material))
        changes = [text for text in texts if not text.startswith("input ")]
        changes += filter(None, map(self._of_input, stage.needs)) if len(changes) < len(texts) else ()
        changes = changes or texts
        return "; ".join(changes[:4]) + ("; ..." if len(changes) > 4 else "")

    def _of_input(self, name: str) -> str | None:
        """What has become of an input that changed."""
        if name in self.steps:
            return f"'{name}' runs again" if self.steps[name].state == "to run" else None
        before = self._latest.get(name, {})
        if before.get("key") in (None, self.keys[name].digest):
            return None
        return changed_files(name, before.get("material", {}), self.keys[name].material)

    @property
    def to_run(self) -> list[Step]:
        return [step for step in self.steps.values() if step.state == "to run"]

    def model_of(self, name: str, *, alone: bool = False) -> str:
        """The folder or hub id of a source or of a finished stage's output. An adapter that a training left beside its model
        stands for the sum of both, unless it is wanted ``alone``."""
        if name in self.recipe.sources:
            return self.recipe.sources[name]
        output = self.steps[name].output
        assert output is not None, f"{name} has not run"
        beside = None if alone else self.beside(name)
        return str(output.folder) if beside is None else f"{self.model_of(beside)}+{output.folder}"

    def beside(self, name: str) -> str | None:
        """The model that the output of a stage is an adapter of, if it was trained as one."""
        step = self.steps.get(name)
        if step is None or step.output is None or step.stage.kind != "recover":
            return None
        return step.stage.inputs["model"][0] if (step.output.folder / ADAPTER).is_file() else None

    def ancestor(self, name: str, *, alone: bool = False) -> str:
        """What stands for the shape of an output that is not there yet: the nearest checkpoint it is made from."""
        while name in self.steps and self.steps[name].output is None:
            stage = self.steps[name].stage
            name = next(iter(stage.inputs.values()))[0]
        return self.model_of(name, alone=alone)

    def task(self, step: Step, *, model: Callable[..., str], run: Mapping[str, Any], quiet: bool) -> Task:
        """The step as a task; ``model`` gives its inputs, ``run`` are settings of the whole run. Merges of adapters get those
        alone."""
        stage = step.stage
        alone = stage.kind == "adapter"
        inputs = {
            role: tuple((name, model(name, alone=alone)) for name in names) for role, names in stage.inputs.items()
        }
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
        self.share = limit // (executor.slots or 1)  # memory of a stage that nobody can estimate
        self.ready: list[Step] = []
        self.estimating: dict[Future[Any], Step] = {}
        self.running: dict[Future[Any], Step] = {}
        self._places = {name: place for place, name in enumerate(plan.steps, 1)}
        self._estimated: set[str] = set()

    def run(self) -> int:
        """Run all steps; returns the exit code of the first failure, 0 if there is none."""
        steps, sorter = self.plan.steps, TopologicalSorter[str]()
        for name, step in steps.items():
            sorter.add(name, *(need for need in step.stage.needs if need in steps))
        sorter.prepare()
        needed = [step.key.digest for step in steps.values()]
        with self.plan.workspace.using(needed) if self.plan.to_run else nullcontext():
            try:
                self._remember()
                self._walk(sorter)
            finally:
                self.executor.close()
                self._remember()
        return next((step.error.exit_code for step in steps.values() if step.error is not None), 0)

    def _walk(self, sorter: TopologicalSorter[str]) -> None:
        while sorter.is_active():
            for name in sorter.get_ready():
                step = self.plan.steps[name]
                if self._settled(step):
                    sorter.done(name)
                else:
                    self.ready.append(step)
            self._launch()
            if self.running or self.estimating:
                done, _ = wait([*self.estimating, *self.running], return_when=FIRST_COMPLETED)
                for future in done:
                    if future in self.estimating:
                        step = self.estimating.pop(future)
                        step.costs = _costs(future)
                        self.ready.insert(0, step)
                        continue
                    step = self.running.pop(future)
                    self._finish(step, future)
                    sorter.done(step.stage.name)

    def _settled(self, step: Step) -> bool:
        """Whether there is nothing to do for a step whose inputs are settled."""
        needs = (self.plan.steps[need] for need in step.stage.needs if need in self.plan.steps)
        missing = next((need for need in needs if need.output is None), None)
        if step.state == "cached":
            assert step.output is not None
            self.plan.workspace.link(step.stage.name, step.output)
            self.plan.workspace.touch(step.key.digest)
            self._say(step, "cached")
        elif missing is not None:
            what = "failed" if missing.state == "failed" else "was skipped"
            step.state, step.reason = "skipped", f"'{missing.stage.name}' is missing: it {what}"
            self._say(step, f"skipped: {step.reason}")
        else:
            return False
        return True

    def _launch(self) -> None:
        """Start what is ready, as far as slots and memory go; one task alone may always run."""
        waiting, self.ready = self.ready, []
        slots = self.executor.slots
        for step in waiting:
            used = sum(map(self._peak, self.running.values()))
            if slots is not None and len(self.running) + len(self.estimating) >= slots:
                self.ready.append(step)
            elif slots != 1 and not step.costs and step.stage.name not in self._estimated:
                self._estimated.add(step.stage.name)
                task = self.plan.task(step, model=self.plan.model_of, run=self.run_settings, quiet=True)
                self.estimating[self.executor.submit(estimate, task)] = step
            elif slots is not None and self.running and used + self._peak(step) > self.limit:
                self.ready.append(step)
            else:
                self._start(step)

    def _peak(self, step: Step) -> int:
        """Bytes of memory that a step is expected to take."""
        return int(step.costs.get("peak_bytes") or self.share)

    def _start(self, step: Step) -> None:
        wait = "; waiting for another run that is making it" if self.plan.workspace.busy(step.key.digest) else ""
        self._say(step, f"{step.stage.label}: {step.reason}{wait}")
        slots, run = self.executor.slots, dict(self.run_settings)
        if step.stage.kind == "score" and slots is not None and slots > 1:
            run["max_memory"] = f"{max(self.share, 1)}B"
        alone = slots == 1 and self.progress.stream.isatty()  # then it may show its own bar
        task = self.plan.task(step, model=self.plan.model_of, run=run, quiet=not alone or self.progress.quiet)
        future = self.executor.submit(produce, self._order(step, task), peak_bytes=step.costs.get("peak_bytes"))
        self.running[future] = step

    def _order(self, step: Step, task: Task) -> Production:
        workspace, steps = self.plan.workspace, self.plan.steps
        names = list(step.stage.needs)
        for name in names:  # it grows by what stands beside an adapter
            names += [beside] if (beside := self.plan.beside(name)) is not None and beside not in names else []
        needs = tuple(steps[need].key.digest for need in names if need in steps)
        if workspace.remote is not None:  # each machine has its own copy: one of a stage's inputs is enough
            return Production(
                task, step.key.digest, needs, workspace.root, workspace.digests.memo, workspace.remote.url
            )
        return Production(
            task, step.key.digest, needs, workspace.root, workspace.digests.memo, parts=self.executor.parts
        )

    def _finish(self, step: Step, future: Future[Any]) -> None:
        try:
            step.facts = future.result()
        except WeightworksError as error:
            self._failed(step, error)
            return
        workspace = self.plan.workspace
        if (output := workspace.find(step.key.digest)) is None:
            self._failed(step, CheckpointError("its output is gone or damaged already"))
            return
        step.output = output
        step.state = "cached" if step.facts["cached"] else "ran"
        workspace.link(step.stage.name, step.output)
        self._say(step, f"done in {step.facts['seconds']:.1f} s" if step.state == "ran" else "another run has made it")
        self._remember()

    def _failed(self, step: Step, error: WeightworksError) -> None:
        step.state, step.error = "failed", error
        hint = f"\n  hint: {error.hint}" if error.hint else ""
        self._say(step, f"failed: {error}{hint}", always=True)

    def _say(self, step: Step, text: str, *, always: bool = False) -> None:
        line = f"[{self._places[step.stage.name]}/{len(self._places)}] {step.stage.name}: {text}"
        if always and self.progress.quiet:
            self.progress.stream.write(line + "\n")
        else:
            self.progress.say(line)

    def _remember(self) -> None:
        """Note which keys stand for the recipe's stages now: for reasons later, and as what is in use."""
        done = (name for name, step in self.plan.steps.items() if step.output is not None)
        keys = {name: self.plan.keys[name] for name in (*self.plan.recipe.sources, *done)}
        self.plan.workspace.remember(
            {name: {"key": key.digest, "material": key.material} for name, key in keys.items()}
        )
        self.plan.workspace.digests.save()


def _costs(future: Future[Any]) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = future.result()
    except WeightworksError:
        return {}  # the task itself will say what is wrong
    return found
