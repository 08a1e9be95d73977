"""What a merge makes: every tensor of the output and what it is made of, decided from headers alone.

All that does not fit is told at once. A merge by one method takes names, shapes and dtypes from the base, or else the first
model; a configuration decides for itself (:class:`Planner`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from weightworks.errors import MethodError, UsageError
from weightworks.store.tensorfile import TensorSpec

if TYPE_CHECKING:
    from weightworks.engine.mergejob import MergeJob

SHOWN = 40  # tensors that do not fit, told one by one


@dataclass(frozen=True)
class Part:
    """A tensor of the output. ``models`` are (number of the input, its tensor) in argument order, ``base`` the base's tensor.

    ``method`` makes it; None: it is copied from the base, or the first of ``models``, byte for byte.
    """

    spec: TensorSpec
    models: tuple[tuple[int, str], ...]
    base: str | None
    method: Any | None


@dataclass(frozen=True)
class Layout:
    """The parts in order of names, and what else there is to say of them.

    ``left_out`` are input tensors that go nowhere although they might have been wanted, ``unused`` those that nothing was
    asked of, both with the reason; ``notes`` is what a user should know of the parts; ``config`` replaces entries of the
    reference's configuration.
    """

    parts: Sequence[Part]
    left_out: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


class Planner(Protocol):
    """Decides what a merge makes."""

    def layout(self, job: MergeJob) -> Layout:
        """The layout of what ``job`` makes of its ``members``; raises if that cannot be."""


class OneMethod:
    """All tensors by one method, each made of those of its name."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def layout(self, job: MergeJob) -> Layout:
        """The layout; the number of models is checked first, that of those that have each tensor then."""
        self._check_counts(job)
        problems: list[str] = []
        whole = len(job.members) == len(job.models)
        method = self.method if whole else type(self.method)(job.options.only(job.members, len(job.models)))
        found = [_part(job, name, spec, method, problems) for name, spec in sorted(job.reference.tensors.items())]
        left_out = dict(_extra(job, problems))
        refuse(job.label, problems)
        parts = [part for part in found if part is not None]
        return Layout(parts, left_out, notes=list(_notes(job, parts)))

    def _check_counts(self, job: MergeJob) -> None:
        """As many models as the method takes, and a base where it needs one."""
        method, count, problems = self.method, len(job.models), job.options.lengths(len(job.models))
        most = method.MOST
        if count < method.LEAST or (most is not None and count > most):
            problems.append(f"takes {counted(method)} models, {count} given")
        if method.BASE == "required" and job.base is None:
            problems.append("needs a base: --base MODEL, the checkpoint the models were fine-tuned from")
        if method.BASE == "refused" and job.base is not None:
            problems.append("takes no base")
        if job.options.on_missing == "base" and job.base is None:
            problems.append("on-missing base needs a base")
        if job.earlier is not None and not getattr(method, "CONTINUES", False):
            problems.append("cannot be continued; opcm can")
        if problems:
            name = job.label.partition(".")[2]
            raise UsageError("; ".join(f"{job.label} {text}" for text in problems), hint=f"see: merge {name} --help")


def counted(method: Any) -> str:
    """How many models a method takes, in words."""
    if method.MOST == method.LEAST:
        return f"exactly {method.MOST}"
    return f"at least {method.LEAST}" + (f" and at most {method.MOST}" if method.MOST is not None else "")


def refuse(label: str, problems: Sequence[str]) -> None:
    """Raise :class:`MethodError` with a line for each tensor that does not fit."""
    if problems:
        shown = "\n".join(f"  {text}" for text in problems[:SHOWN])
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise MethodError(
            f"{label} cannot merge these models: {len(problems)} tensors do not fit:\n{shown}{more}",
            hint="merge models of one shape; for tensors that some lack, --on-missing base or skip-model",
        )


def stored(spec: TensorSpec, out_dtype: str) -> TensorSpec:
    """``spec`` with the dtype that the option ``out_dtype`` asks for."""
    return spec if out_dtype == "same" else TensorSpec(spec.name, spec.shape, getattr(torch, out_dtype))


def _part(job: MergeJob, name: str, spec: TensorSpec, method: Any, problems: list[str]) -> Part | None:
    having = [number for number in job.members if name in job.models[number].tensors]
    lacking = [job.models[number].name for number in job.members if number not in having]
    policy = job.options.on_missing
    if lacking and policy == "error":
        problems.append(f"{name}: not in {', '.join(lacking)}")
        return None
    for number in having:
        seen = job.models[number].tensors[name].shape
        if seen != spec.shape:
            item = job.models[number].name
            problems.append(f"{name}: {list(seen)} in {item}, {list(spec.shape)} in {job.reference.name}")
    models = tuple((number, name) for number in having)
    base = None if job.base is None else name
    if not spec.dtype.is_floating_point:
        return Part(spec, models, base, None)
    result = stored(spec, job.options.out_dtype)
    if lacking and policy == "base":
        return Part(result, tuple((number, name) for number in job.members), base, method)
    if not having:
        return Part(spec, (), base, None)
    if lacking:
        if getattr(method, "STATE", False):
            problems.append(f"{name}: not in {', '.join(lacking)}; {job.label} has one scale for the whole model")
        if len(having) < method.LEAST:
            names = ", ".join(job.models[number].name for number in having)
            problems.append(f"{name}: only in {names}, and {job.label} takes at least {method.LEAST} models")
        method = type(method)(job.options.only(having, len(job.models)))
    return Part(result, models, base, method)


def _extra(job: MergeJob, problems: list[str]) -> Iterator[tuple[str, str]]:
    """Tensors that the reference lacks: the output's architecture has no place for them."""
    for item in job.models:
        for name in sorted(set(item.tensors) - set(job.reference.tensors)):
            if job.options.on_missing == "error":
                problems.append(f"{name}: in {item.name}, not in {job.reference.name}")
            else:
                yield f"{item.name}: {name}", f"{job.reference.name} has no such tensor"


def _notes(job: MergeJob, parts: Sequence[Part]) -> Iterator[str]:
    """Tensors that some members lack."""
    what = "the base stands for" if job.options.on_missing == "base" else "merged without"
    for part in parts:
        members = [job.models[number] for number in job.members]
        lacking = [item.name for item in members if part.spec.name not in item.tensors]
        if lacking and part.method is not None:
            yield f"{part.spec.name}: {what} {', '.join(lacking)}"
