"""Statistics of the models of a merge: the files opened and held against the models, read when a slab is asked for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from weightworks.errors import MethodError, UsageError
from weightworks.store.statistics import Statistics

if TYPE_CHECKING:
    from weightworks.engine.mergejob import Input, MergeJob


MATRICES = 4 + 4 + 8 + 8 + 8  # bytes an element: the triangle and the matrix, that in float64, the sum, the factor


@dataclass(frozen=True)
class Side(Mapping[str, torch.Tensor]):
    """What there is of one model's tensor ``name``, by kind; read each time it is asked for: matrices are large."""

    statistics: Statistics
    name: str
    start: int
    stop: int
    device: torch.device

    def __getitem__(self, kind: str) -> torch.Tensor:
        if kind not in iter(self):
            raise KeyError(kind)
        return self.statistics.read(self.name, self.start, self.stop).to(self.device)

    def __iter__(self) -> Iterator[str]:
        return iter([self.statistics.called(self.name)] if self.name in self.statistics.names else [])

    def __len__(self) -> int:
        return int(self.name in self.statistics.names)


def open_statistics(job: MergeJob) -> tuple[Statistics, ...]:
    """The files that the job's method asks for, one for each model; what does not fit is told at once."""
    kind = getattr(job.method, "SIDE", None)
    if kind is None:
        return ()
    paths: Sequence[str] = job.options.statistics
    way = f"compress stats MODEL --kind {kind} --dataset TEXT -o FILE, and --statistics FILE for each model, in their order"
    if len(paths) != len(job.models):
        raise UsageError(
            f"{job.label} needs a file of statistics for each model: {len(paths)} given, for {len(job.models)} models",
            hint=way,
        )
    if job.options.align:
        raise UsageError(
            f"{job.label}: statistics are of the models as they are, not of aligned ones", hint="leave out --align"
        )
    opened = tuple(map(Statistics.open, paths))
    problems: list[str] = []
    for item, statistics in zip(job.models, opened, strict=True):
        problems += _of_another(item, statistics, kind) or _misfits(item, statistics)
    problems = problems or _uneven(job, opened)
    if problems:
        lines = "\n".join(f"  {text}" for text in problems)
        raise MethodError(f"{job.label} cannot use these statistics:\n{lines}", hint=way)
    return opened


def matrix_bytes(opened: Sequence[Statistics]) -> int:
    """Memory that a method takes for the largest matrices of statistics: one as read and in float64, their sum, its factor."""
    widths = [one.shape(name)[0] for one in opened if one.kind == "gram" for name in one.names]
    return MATRICES * max(widths, default=0) ** 2


def _of_another(item: Input, statistics: Statistics, kind: str) -> list[str]:
    """A file that is of another kind, or of another model than it is given for."""
    if statistics.kind != kind:
        return [f"{statistics.path}: is of kind {statistics.kind}, {kind} is wanted"]
    if statistics.facts["model"] != item.checkpoint.digest:
        return [f"{statistics.path}: was made of {statistics.facts['source']}, and is given for {item.name}"]
    return []


def _misfits(item: Input, statistics: Statistics) -> list[str]:
    """Statistics that cannot be those of the tensor they are called after."""
    problems = []
    for name in sorted(statistics.names & set(item.tensors)):
        shape, seen = item.tensors[name].shape, statistics.shape(name)
        width = shape[:1] if statistics.called(name) != statistics.kind else shape[-1:]
        wanted = width * 2 if statistics.kind == "gram" else shape
        if seen != wanted:
            problems.append(f"{statistics.path}: {name} has statistics {list(seen)}, {list(wanted)} are wanted")
    return problems


def _uneven(job: MergeJob, opened: Sequence[Statistics]) -> list[str]:
    """Tensors of which some models have statistics and others none."""
    known: Mapping[str, Any] = {
        item.name: statistics.names for item, statistics in zip(job.models, opened, strict=True)
    }
    every = set().union(*known.values())
    return [
        f"{name}: no statistics of {model}, of others there are"
        for name in sorted(every)
        for model, item in zip(known, job.models, strict=True)
        if name not in known[model] and name in item.tensors
    ]
