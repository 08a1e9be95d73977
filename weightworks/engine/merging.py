"""The loop of merges: surveys first, then tensor by tensor in order of names, some rows of every model at a time.

No model is ever in memory. How many rows are held depends on shapes and the number of inputs alone, so that the bytes of
the output do not depend on the machine; sums are taken in order of names and rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from weightworks.engine.diagnosis import Diagnosis, stretches
from weightworks.engine.earlier import STATE_PREFIX
from weightworks.engine.machine import one_thread
from weightworks.engine.mergejob import MergeJob
from weightworks.engine.mergeplan import Part
from weightworks.errors import MethodError, VerificationError
from weightworks.stage.merging import STATE, Slab, Survey
from weightworks.store.masks import SUFFIX
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.memory import kept_for_reuse

JOURNAL_BYTES = 256 << 20  # of output between two journal entries: little is lost, the disk is not kept waiting
SLAB = 1 << 18  # elements of a slab to be merged: what is done to it in several steps stays in the processor's cache
LOOK = 1 << 20  # of a slab that is surveyed: its figures, such as histograms, are large beside fewer
HELD = 1 << 26  # elements of all inputs' slabs together
NOTED = 1 << 12  # numbers that sums may have to be journalled before a survey is over


def slab_rows(shape: tuple[int, ...], inputs: int, most: int = SLAB) -> int:
    """How many rows of a tensor of ``shape`` are held of each of ``inputs`` models at a time: ``most`` elements, all of a
    vector."""
    if len(shape) == 1:
        return max(1, shape[0])
    row = 1
    for length in shape[1:]:
        row *= length
    return max(1, min(most, HELD // (inputs + 2)) // max(row, 1))


@dataclass(frozen=True)
class Correction:
    """What rows of a merged weight [out, in] are multiplied by, float32 [out], and what is added to them then, for biases.
    ``transposed``: the tensor is stored as [in, out]. ``left``: how far means stay off, since there is nothing to add to."""

    scale: torch.Tensor
    shift: torch.Tensor | None = None
    transposed: bool = False
    left: float = 0.0

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Correction:
        """From what :meth:`facts` gave."""
        scale, shift = (None if facts[key] is None else torch.tensor(facts[key]) for key in ("scale", "shift"))
        assert scale is not None
        return cls(scale, shift, facts["transposed"], facts["left"])

    def facts(self) -> dict[str, Any]:
        """As JSON-compatible data, exactly."""
        shift = None if self.shift is None else self.shift.tolist()
        return {"scale": self.scale.tolist(), "shift": shift, "transposed": self.transposed, "left": self.left}

    def made(self, rows: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Rows ``start:`` of the stored tensor, corrected."""
        if self.transposed:
            return rows * self.scale.to(rows.device)
        stop = start + rows.shape[0]
        scale = self.scale[start:stop].to(rows.device).view(-1, *[1] * (rows.dim() - 1))
        return rows * scale if self.shift is None else rows * scale + self.shift[start:stop].to(rows.device)


class Merging:
    """A merge on its way. ``corrections``, by tensor, are made of what the method makes."""

    def __init__(self, job: MergeJob, writer: CheckpointWriter, diagnosis: Diagnosis, fitted: Any = None) -> None:
        self.job, self.writer, self.diagnosis, self.fitted = job, writer, diagnosis, fitted
        self.merged = job.merged
        self.corrections: dict[str, Correction] = {}
        self.surveyed: dict[int, Any] = {}  # what each method concluded, by its id
        self.found: Any = None  # what the merge's own method concluded

    def run(self) -> list[dict[str, Any]]:
        """Survey, merge and write all parts; returns the report's rows. What the journal has is not done again."""
        job, writer = self.job, self.writer
        self.survey()
        finished = {row["tensor"] for facts in writer.steps.values() for row in facts.get("rows", [])}
        names = [part.spec.name for part in job.parts]
        if finished:
            job.progress.say(f"resuming after {len(finished)} of {len(names)} tensors")
        job.progress.begin("tensor", len(names), len(finished), every=5.0)
        with self._workers(*((part.method, part) for part in self.merged)) as workers:
            for batch in batches([part for part in job.parts if part.spec.name not in finished]):
                rows = []
                for row in workers(self._part, batch):
                    rows.append(row)
                    job.progress.step(row["tensor"])
                writer.done(f"tensors to {batch[-1].spec.name}", {"rows": rows})
        job.progress.end()
        rows = [row for facts in writer.steps.values() for row in facts.get("rows", [])]
        return [row for row in rows if row["method"] != "copied"]

    def survey(self) -> None:
        """Have every method see what it wants of the whole models, unless it has."""
        if not self.surveyed:
            self.surveyed = {id(method): self._survey(number, method) for number, method in enumerate(self._methods())}
            self.found = self.surveyed.get(id(self.job.method))

    @contextmanager
    def _workers(self, *work: tuple[Any, Part]) -> Iterator[Callable[..., Iterator[Any]]]:
        """A ``map`` that keeps order. Slabs are too small to be divided among threads, so several tensors are worked on at
        once, each by one thread; whole tensors one after the other, by all threads."""
        threads = torch.get_num_threads()
        whole = any(self.job.whole(asking, part) for asking, part in work)
        if whole or self.job.device.type != "cpu":
            yield map
            return
        with one_thread(), kept_for_reuse():
            pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
            try:
                yield pool.map
            finally:
                pool.shutdown(cancel_futures=True)

    def _part(self, part: Part) -> dict[str, Any]:
        """Make one tensor; returns the report's line on it."""
        with torch.no_grad():
            if part.method is None:
                self._copy(part)
                return {"tensor": part.spec.name, "method": "copied"}
            self._merge(part)
            return self._row(part)

    def _methods(self) -> list[Any]:
        """The method of each part, each once: parts that some models lack have one of their own."""
        return list({id(part.method): part.method for part in self.merged}.values())

    # Surveys.

    def _survey(self, number: int, method: Any) -> Any:
        """What the whole-model surveys of ``method`` conclude."""
        found = self.job.continued.found if number == 0 and self.job.continued is not None else None
        found = self.fitted if found is None else found
        for place, survey in enumerate(surveys_of(method, "model")):
            step = f"survey {number}.{place}"
            if step not in self.writer.steps:
                self.job.progress.say(f"survey {place + 1}", detail=True)
                sums = self._sums(step, method, survey, found)
                self.writer.done(step, {"found": survey.conclude(sums, found)})
            found = self.writer.steps[step]["found"]
        return found

    def _sums(self, step: str, method: Any, survey: Survey, found: Any) -> dict[str, torch.Tensor]:
        """The figures of a survey added up over all tensors; short ones are journalled on the way."""
        parts = [part for part in self.merged if part.method is method]
        done: set[str] = set()
        sums: dict[str, torch.Tensor] = {}
        for name, facts in self.writer.steps.items():
            if name.startswith(f"{step} to "):
                sums = {key: torch.tensor(value, dtype=getattr(torch, dtype)) for key, dtype, value in facts["sums"]}
                done.update(facts["tensors"])
        if done:
            self.job.progress.say(f"resuming {step} after {len(done)} of {len(parts)} tensors")
        self.job.progress.begin(step, len(parts), len(done), every=5.0)
        with self._workers(*((survey, part) for part in parts)) as workers:
            for batch in batches([part for part in parts if part.spec.name not in done]):
                for part, figures in zip(
                    batch, workers(lambda part: self._look(part, survey, found), batch), strict=True
                ):
                    for key, value in figures.items():
                        sums[key] = sums[key] + value if key in sums else value
                    self.job.progress.step(part.spec.name)
                if sum(value.numel() for value in sums.values()) <= NOTED:
                    noted = [
                        [key, str(value.dtype).removeprefix("torch."), value.tolist()] for key, value in sums.items()
                    ]
                    names = [part.spec.name for part in batch]
                    self.writer.done(f"{step} to {names[-1]}", {"sums": noted, "tensors": names})
        self.job.progress.end()
        return sums

    def _look(self, part: Part, survey: Survey, found: Any) -> dict[str, torch.Tensor]:
        """The figures of one tensor; what is to be kept of it goes to the state."""
        sums: dict[str, torch.Tensor] = {}
        name, keep = STATE_PREFIX + part.spec.name, None
        with torch.no_grad(), ExitStack() as stack:
            for slab in self._slabs(part, survey, most=LOOK):
                figures = dict(survey.look(slab, found))
                if (state := figures.pop(STATE, None)) is not None:
                    keep = keep or stack.enter_context(self.writer.filling(name, part.spec.shape, torch.float32))
                    keep(state.float().cpu().contiguous())
                for key, value in figures.items():
                    sums[key] = sums[key] + value.cpu() if key in sums else value.cpu()
        return sums

    # Tensors.

    def made(self, part: Part) -> Iterator[torch.Tensor]:
        """A tensor as its method makes it, some rows at a time, in float32."""
        method: Any = part.method  # a part without one is not made
        found = self.surveyed[id(method)]
        for survey in surveys_of(method, "tensor"):
            found = survey.conclude(self._look(part, survey, found), found)
        carried = self.job.masks.get(part.spec.name)
        kept = None if carried is None else carried.kept().to(self.job.device)
        for slab in self._slabs(part, method):
            expected = slab.models[0].shape
            result = method.merge(slab, found)
            if result.shape != expected:
                raise VerificationError(
                    f"{self.job.label} made {list(result.shape)} of '{slab.name}', expected {list(expected)}"
                )
            if kept is not None:  # what is zero in all models may not be in what a method makes of them
                result = result.masked_fill(~kept[slab.start : slab.start + result.shape[0]], 0)
            yield result

    def _merge(self, part: Part) -> None:
        name, shape, dtype = part.spec.name, part.spec.shape, part.spec.dtype
        if (carried := self.job.masks.get(name)) is not None:
            self.writer.put(name + SUFFIX, carried.packed())
        correction, start = self.corrections.get(name), 0
        with self.writer.filling(name, shape, dtype) as append:
            for made in self.made(part):
                result = made if correction is None else correction.made(made, start)
                start += made.shape[0]
                stored = result.to(dtype)
                if dtype == torch.float16 and not torch.isfinite(stored).all() and torch.isfinite(result).all():
                    raise MethodError(
                        f"tensor '{name}' has values beyond float16's 65504", hint="pass --out-dtype bfloat16"
                    )
                append(stored.cpu().contiguous().reshape(shape) if not shape else stored.cpu().contiguous())

    def _copy(self, part: Part) -> None:
        """Copy a tensor that cannot be averaged; models that disagree on it are refused."""
        job, name = self.job, part.spec.name
        sources = [(job.base, part.base)] if job.base is not None and part.base is not None else []
        sources += [(job.models[number], tensor) for number, tensor in part.models]
        item, tensor = sources[0] if sources else (job.reference, name)
        for other, theirs in sources[1:]:
            if not torch.equal(other.reader.read(theirs), item.reader.read(tensor)):
                raise MethodError(
                    f"tensor '{name}' is {part.spec.dtype} and differs between {item.name} and {other.name}: "
                    "it cannot be merged",
                    hint="merge models that agree on it",
                )
        if item.reader is item.checkpoint:
            self.writer.copy_from(item.checkpoint, tensor, called=name)
        else:  # a view: the output's tensor is what it shows
            self.writer.put(name, item.reader.read(tensor))

    def _slabs(self, part: Part, asking: Any, *, most: int = SLAB) -> Iterator[Slab]:
        return slabs(self.job, part, asking, most=most, state=self._state)

    def _state(self, part: Part, start: int, stop: int) -> torch.Tensor | None:
        """What was kept of a tensor: by this run if it did already, else by the merge that is continued."""
        name = STATE_PREFIX + part.spec.name
        if self.writer.holds(name):
            return self.writer.read_rows(name, start, stop).to(self.job.device)
        kept = None if self.job.continued is None else self.job.continued.rows(part.spec.name, start, stop)
        return None if kept is None else kept.to(self.job.device)

    def _row(self, part: Part) -> dict[str, Any]:
        """The report's line on one tensor."""
        before = self.job.reference.tensors.get(part.spec.name, part.spec)
        return {
            "tensor": part.spec.name,
            "shape": list(part.spec.shape),
            "method": self.job.label,
            "bytes_in": before.nbytes,
            "bytes_out": part.spec.nbytes,
            **self.diagnosis.of(part.spec.name),
        }


def batches(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts in order, in stretches of about JOURNAL_BYTES of output: after each one, what is done is journalled."""
    batch: list[Part] = []
    held = 0
    for part in parts:
        batch.append(part)
        held += part.spec.nbytes
        if held > JOURNAL_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def slabs(
    job: MergeJob,
    part: Part,
    asking: Any,
    *,
    most: int = SLAB,
    state: Callable[[Part, int, int], torch.Tensor | None] = lambda part, start, stop: None,
) -> Iterator[Slab]:
    """The slabs of one tensor that a survey or the method asks for, in order of rows; ``state`` gives what a survey kept of
    its rows."""

    def rows(number: int, tensor: str, base: torch.Tensor | None) -> torch.Tensor:
        """Rows of a model; where it lacks the tensor, the base stands for it."""
        item = job.models[number]
        return job.read(item, tensor, start, stop) if tensor in item.tensors or base is None else base.clone()

    shape = part.spec.shape or (1,)
    step = max(1, shape[0] if job.whole(asking, part) else slab_rows(shape, len(part.models), most))
    keys = ContentKeys(job, part)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        base = None if job.base is None or part.base is None else job.read(job.base, part.base, start, stop)
        models = tuple(rows(number, tensor, base) for number, tensor in part.models)
        kept, side = state(part, start, stop), job.side_of(part, start, stop)
        yield Slab(part.spec.name, shape, start, models, base, keys, job.settings.seed, kept, side)


@dataclass(frozen=True)
class ContentKeys(Sequence[str]):
    """What stands for each model's content of a tensor, made when a method draws random numbers.

    A digest of the values of an even sample of rows: the files that hold them, and the order of models, do not count.
    """

    job: MergeJob
    part: Part

    def __len__(self) -> int:
        return len(self.part.models)

    def __getitem__(self, place: Any) -> Any:
        number, name = self.part.models[place]
        known = self.job.keys
        if (number, name) not in known:
            item, digest = self.job.models[number], hashlib.sha256()
            if name in item.tensors:  # else the base stands for it
                for start, stop in stretches(item.tensors[name].shape or (1,)):
                    digest.update(self.job.read(item, name, start, stop).cpu().contiguous().numpy().tobytes())
            known[number, name] = digest.hexdigest()
        return known[number, name]


def surveys_of(method: Any, scope: str) -> list[Survey]:
    """The surveys of a method that have ``scope``."""
    return [survey for survey in (method.surveys() if hasattr(method, "surveys") else ()) if survey.scope == scope]
