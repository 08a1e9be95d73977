"""What runs share that write about a model and leave it as it is: statistics, thresholds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightworks.engine.estimate import Estimate
from weightworks.options import Options


@dataclass(frozen=True)
class Written:
    """What became of a request. ``facts`` are those of what was written, None after a dry run; ``notes`` tell what fell short
    or was left out."""

    target: Path
    estimate: Estimate | None
    facts: dict[str, Any] | None
    notes: tuple[str, ...] = ()
    cached: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Looking:
    """Stands where a job has its method: nothing is quantized, nothing ignored."""

    options: Options

    def scheme(self) -> None:
        return None
