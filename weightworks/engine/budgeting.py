"""Bits chosen layer by layer under a budget: sensitivities measured or remembered, schemes allotted, the loss held to a bound.

A budget of bits counts what is stored for quantized weights, to the byte: codes, scales, zero points, shapes, padding. One of
bytes counts the weight files whole, headers and all that is not quantized included.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from weightworks.engine.allocation import Plan
from weightworks.engine.blockwise import Blockwise, prove_first
from weightworks.engine.decisions import Problem, named, named_all, weights_of
from weightworks.engine.estimate import Estimate
from weightworks.engine.identity import digest_of
from weightworks.engine.job import Job, packed_bytes
from weightworks.engine.sensitivity import Sensitivity
from weightworks.engine.units import Unit
from weightworks.errors import MethodError
from weightworks.store.sources import cache_folder
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.calibration import Calibration

ALIKE = ("budget", "max_perplexity_increase")  # options that sensitivities do not depend on
STEP = 0.9  # the most of the loss hoped for that is hoped for again, once it was exceeded


def allowed(job: Job) -> dict[str, str]:
    """The budget's choices, and the range that it can lie in, for people; nothing where there is none."""
    if job.budget is None:
        return {}
    least, most = span(job)
    scale, rest = 8 / weights_of(job), job.weight_bytes - most
    text = f"{rounded_up(least * scale):g} to {rounded_up(most * scale):g} bits a weight"
    return {
        "choices": f"{named_all(job)}: {text}" + (f", {least + rest:,} to {most + rest:,} bytes" if job.format else "")
    }


def check_budget(job: Job) -> None:
    """Refuse a budget that the choices cannot meet, or that all of them meet."""
    budget = job.budget
    if budget is None or budget.increase is not None:
        return
    least, most = span(job)
    if budget.bits is not None:
        scale = 8 / weights_of(job)
        small, large = budget.bits < least * scale, budget.bits > rounded_up(most * scale)
        asked = f"{budget.bits:g} bits a weight"
    else:
        assert budget.nbytes is not None
        rest = job.weight_bytes - most
        small, large = budget.nbytes < least + rest, budget.nbytes > most + rest
        asked = f"{budget.nbytes:,} bytes"
    if small or large:
        raise MethodError(
            f"{job.label}: a budget of {asked} is {'less' if small else 'more'} than the choices can take: "
            f"{allowed(job)['choices']}",
            hint="raise it, or add smaller --bit-choices" if small else "lower it, or add larger --bit-choices",
        )


def rounded_up(bits: float) -> float:
    """Bits a weight to three digits, none of them lost."""
    return math.ceil(bits * 1000) / 1000


def allot(
    job: Job,
    writer: CheckpointWriter,
    identity: Mapping[str, Any],
    calibration: Calibration,
    probe: torch.Tensor,
    dtype: torch.dtype,
    costs: Estimate,
) -> dict[str, Any]:
    """Give every weight of the job its scheme, and lay the output out; returns ``allocation``, what is told of it."""
    assert job.budget is not None
    key = digest_of(shared(identity))
    if "sensitivities" not in writer.steps:
        found = recalled(key)
        if found is None:
            sensitivity = Sensitivity(
                job,
                writer,
                calibration,
                probe,
                dtype,
                job.choices,
                job.budget,
                on_disk=costs.on_disk,
                statistics_bytes=costs.statistics_bytes,
            )
            found = [asdict(unit) for unit in sensitivity.run()]
            remember(key, found)
        else:
            job.progress.say("sensitivities: as an earlier run of this model, text and choices has measured them")
        writer.done("sensitivities", {"units": json.loads(json.dumps(found))})
    units = [unit_of(facts) for facts in writer.steps["sensitivities"]["units"]]
    problem = Problem(job, units)
    plans = problem.plans()
    trials: list[dict[str, float]] = []
    if job.budget.increase is not None:
        plan = held(job, writer, problem, plans, trials, calibration, probe, dtype, costs)
    else:
        plan = affordable(job, problem, plans)
    job.allot(problem.schemes(plan))
    writer.lay_out(job.specs, job.settings.shard_bytes)
    return {"allocation": {"sensitivities": key, **problem.told(plan, plans), **({"trials": trials} if trials else {})}}


def affordable(job: Job, problem: Problem, plans: Sequence[Plan]) -> Plan:
    """The plan of least cost within the budget."""
    assert job.budget is not None
    if job.budget.bits is not None:
        limit = math.floor(job.budget.bits * weights_of(job) / 8 + 1e-6)
        return within(plans, limit)
    assert job.budget.nbytes is not None
    over, limit = 0, job.budget.nbytes
    while True:  # headers differ by a few digits from plan to plan
        limit -= over
        plan = within(plans, limit)
        job.allot(problem.schemes(plan))
        over = job.weight_bytes - job.budget.nbytes
        if over <= 0:
            return plan


def within(plans: Sequence[Plan], limit: int) -> Plan:
    """The largest plan of at most ``limit`` bytes, which is the one of least cost."""
    fitting = [plan for plan in plans if plan.size <= limit]
    if not fitting:
        raise MethodError(
            f"the budget leaves {limit:,} bytes for quantized weights; least is {plans[0].size:,}",
            hint="raise it, or add smaller --bit-choices",
        )
    return fitting[-1]


def held(
    job: Job,
    writer: CheckpointWriter,
    problem: Problem,
    plans: Sequence[Plan],
    trials: list[dict[str, float]],
    calibration: Calibration,
    probe: torch.Tensor,
    dtype: torch.dtype,
    costs: Estimate,
) -> Plan:
    """The smallest plan expected to keep to the bound, or the next ones, until one does on windows held out."""
    assert job.budget is not None and job.budget.increase is not None
    bound = math.log1p(job.budget.increase)
    aim, place = bound, -1
    while True:
        place = next((k for k in range(place + 1, len(plans)) if plans[k].cost <= aim), len(plans) - 1)
        plan = plans[place]
        if (step := f"trial {len(trials)}") not in writer.steps:
            job.allot(problem.schemes(plan))
            job.returns_tuple = prove_first(job, writer, probe)
            seen = rehearsed(job, writer, step, calibration, dtype, costs)
            writer.done(step, {"increase": seen})
        seen = writer.steps[step]["increase"]
        bits = 8 * plan.size / weights_of(job)
        trials.append({"bits_a_weight": bits, "expected_increase": math.expm1(plan.cost), "increase": seen})
        job.progress.say(
            f"{bits:.3f} bits a weight: perplexity {seen:+.2%} on windows held out, allowed {job.budget.increase:+.2%}"
        )
        if seen <= job.budget.increase:
            return plan
        if place == len(plans) - 1:
            raise MethodError(
                f"{job.label}: perplexity rises by {seen:.2%} even with the largest choices {named_all(job)}, "
                f"{job.budget.increase:.2%} are allowed",
                hint="allow more, or add larger --bit-choices",
            )
        aim = plan.cost * min(STEP, bound / math.log1p(seen))


def rehearsed(
    job: Job, writer: CheckpointWriter, step: str, calibration: Calibration, dtype: torch.dtype, costs: Estimate
) -> float:
    """By what share perplexity rises on the windows held out when the job is done as allotted; nothing is kept of it."""
    assert calibration.held_out is not None
    schemes = {name: named(scheme) for name, scheme in (job.allotted or {}).items()}
    scrap = CheckpointWriter(writer.scratch / step.replace(" ", ""), job.specs, {"schemes": schemes})
    if "proof" not in scrap.steps:
        scrap.done("proof", writer.steps["proof"])  # of the same unchanged model
    try:
        found = Blockwise(
            job,
            scrap,
            calibration,
            calibration.held_out,
            dtype,
            on_disk=costs.on_disk,
            statistics_bytes=costs.statistics_bytes,
            reload_blocks=len(job.skeleton.blocks),
        ).run()
    except BaseException:
        scrap.close()
        raise
    scrap.discard()
    return float(found["result"] / found["dense"] - 1)


def span(job: Job) -> tuple[int, int]:
    """The least and the most bytes that quantized weights can take."""
    assert job.budget is not None
    sizes = [
        [packed_bytes(job.linears[name], job.budget.choices[number]) for number in fitting]
        for name, fitting in job.choices.items()
    ]
    return sum(map(min, sizes)), sum(map(max, sizes))


def shared(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What sensitivities depend on: all that the output does, but for the budget and how files are cut."""
    options = {name: value for name, value in identity["options"].items() if name not in ALIKE}
    return {**{name: value for name, value in identity.items() if name != "max_shard_size"}, "options": options}


def recalled(key: str) -> list[dict[str, Any]] | None:
    """Sensitivities that a run on this machine has measured before."""
    try:
        found: list[dict[str, Any]] = json.loads(_path(key).read_text())
    except (OSError, ValueError):
        return None
    return found


def remember(key: str, units: Sequence[Mapping[str, Any]]) -> None:
    """Keep them for other budgets; where nothing can be kept, these measure again."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(units))
        temporary.replace(path)
    except OSError:
        pass


def unit_of(facts: Mapping[str, Any]) -> Unit:
    """A unit as it was journalled."""
    noise = tuple((float(error), float(value)) for error, value in facts["noise"])
    return Unit(tuple(facts["tensors"]), tuple(facts["errors"]), facts["alpha"], noise, facts["beyond"])


def _path(key: str) -> Path:
    return cache_folder() / "sensitivities" / f"{key}.json"
