"""Learning rates of a retraining: one for each of its steps.

Schedules are those of Zimmer et al., "How I Learned to Stop Worrying and Love Retraining" (arXiv:2111.00843), who name them
after Renda et al. (arXiv:2003.02389) and Le & Hua (arXiv:2105.03193). ``history`` are the rates of the original training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from weightworks.errors import MethodError

Schedule = Literal["ft", "lrw", "slr", "clr", "llr", "allr"]
SCHEDULES = (
    "llr: linear from lr to 0; clr: cosine; allr: llr from lr times the norm that pruning took away, against what a random "
    "choice would; ft: constant; lrw: the end of the original schedule; slr: all of it, compressed (these two need lr_history)"
)
MOST_STEPS = 10_000_000  # of an earlier training
WARM = ("slr", "clr", "llr", "allr")


def rates(
    schedule: Schedule, steps: int, *, top: float, warmup: float = 0.1, history: Sequence[float] = ()
) -> list[float]:
    """The rate of each of ``steps`` steps, the highest being ``top`` where the schedule does not follow ``history``.

    All but FT and LRW rise linearly over the share ``warmup`` of the steps first. Raises :class:`MethodError` where a
    schedule needs a history and has none, or a longer one.
    """
    if schedule in ("lrw", "slr") and len(history) < (steps if schedule == "lrw" else 1):
        had = f"has {len(history)} steps, a round {steps}" if history else "is not known"
        raise MethodError(
            f"schedule {schedule}: the original schedule {had}",
            hint="give the trainer_state.json of the original training as --lr-history, or take --schedule llr",
        )
    if schedule == "ft":
        last = next((rate for rate in reversed(history) if rate > 0), top)  # a schedule may end at 0
        return [last] * steps
    if schedule == "lrw":
        return list(history[len(history) - steps :])
    warm = round(warmup * steps)
    shapes: dict[str, Callable[[float], float]] = {
        "clr": lambda share: top * (1 + math.cos(math.pi * share)) / 2,
        "slr": lambda share: interpolated(history, share),
    }
    shape = shapes.get(schedule, lambda share: top * (1 - share))
    return [
        shape(0.0) * (step + 1) / (warm + 1) if step < warm else shape((step - warm) / (steps - warm))
        for step in range(steps)
    ]


def interpolated(history: Sequence[float], share: float) -> float:
    """The rate of the original schedule at this ``share`` of its way, 0 to 1."""
    place = share * (len(history) - 1)
    left = min(int(place), len(history) - 1)
    right = min(left + 1, len(history) - 1)
    return history[left] + (place - left) * (history[right] - history[left])


def adapted_top(lost: float, fraction: float, *, top: float, steps: int, original: int) -> float:
    """ALLR's highest rate: ``top`` times d / sqrt(p), at least the share of the original ``original`` steps that a round has.

    d = ``lost`` is ||W - W'|| / ||W|| of a pruning step W -> W' that takes the ``fraction`` p of the weights; were they chosen
    at random it would be sqrt(p). Without a known original (0) the lower bound is 0.
    """
    least = top * min(steps / original, 1.0) if original else 0.0
    return min(max(top * lost / math.sqrt(fraction), least), top) if fraction > 0 else top


def read_history(path: str) -> list[float]:
    """The rate of every step of an earlier training, from a ``trainer_state.json`` of transformers or a JSON list of numbers.

    Rates logged now and then are interpolated. Raises :class:`MethodError` for a file that is neither.
    """
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            logged = {
                int(row["step"]): float(row["learning_rate"]) for row in found["log_history"] if "learning_rate" in row
            }
            points = sorted(logged.items())
            last = max(int(found.get("global_step", 0)), points[-1][0])
        else:
            points = list(enumerate(map(float, found), 1))
            last = len(points)
        if not points:
            raise ValueError("there are none")
        if last > MOST_STEPS:
            raise ValueError(f"{last:,} steps are more than {MOST_STEPS:,}")
        if not all(math.isfinite(rate) and rate >= 0 for _, rate in points):
            raise ValueError("a rate is negative or not finite")
        return list(_filled(points, last))
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise MethodError(
            f"lr_history {path}: cannot be read as learning rates ({type(error).__name__}: {error})",
            hint="it is a trainer_state.json of transformers whose log_history has learning rates, or a JSON list of rates",
        ) from None


def _filled(points: Sequence[tuple[int, float]], last: int) -> list[float]:
    """Rates of the steps 1 to ``last``, linear between ``points`` (step, rate), constant outside."""
    found, place = [], 0
    for step in range(1, last + 1):
        while place + 1 < len(points) and points[place + 1][0] <= step:
            place += 1
        (before, low), (after, high) = points[place], points[min(place + 1, len(points) - 1)]
        share = (step - before) / (after - before) if after > before else 0.0
        found.append(low + max(0.0, share) * (high - low))
    return found
