"""A job that makes a model smaller, planned by the shape of its method."""

from __future__ import annotations

from typing import Any

from weightworks.engine.depth import Shorten
from weightworks.engine.mixtures import Thin
from weightworks.engine.narrowing import Narrow
from weightworks.engine.reducing import ReduceJob

SHAPES: dict[str, Any] = {"units": Narrow, "blocks": Shorten, "experts": Thin}  # by what a method ``reduces``


def plan_reduction(*fields: Any) -> ReduceJob:
    """The job of these fields with its plan; refuses what cannot be."""
    job = ReduceJob(*fields)
    job.plan = SHAPES[job.method.reduces](job)
    return job
