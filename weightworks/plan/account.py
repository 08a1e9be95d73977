"""What a run of a recipe came to, as data: the page, the terminal table and ``report.json`` are made from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import weightworks
from weightworks.plan.keys import environment
from weightworks.plan.run import Plan, Step
from weightworks.plan.task import SCORE
from weightworks.store.sources import folders

WEIGHTS = (".safetensors", ".bin")


def account(plan: Plan, seconds: float) -> dict[str, Any]:
    """The report of ``plan`` as it stands; ``seconds`` is what this run took."""
    steps = plan.steps.values()
    stages = [_source(plan, name) for name in plan.recipe.sources] + [_stage(plan, step) for step in steps]
    scores = [_score(step) for step in steps if step.stage.kind == "score" and step.output is not None]
    peaks = [step.facts.get("peak_bytes") or 0 for step in steps if step.state == "ran"]
    return {
        "version": 1,
        "recipe": {"name": plan.recipe.name, "path": plan.recipe.path, "text": plan.recipe.text},
        "weightworks": weightworks.__version__,
        "environment": environment(),
        "seconds": seconds,
        "peak_bytes": max(peaks, default=None),
        "stages": stages,
        "scores": scores,
        "compare": list(plan.recipe.report),
    }


def _source(plan: Plan, name: str) -> dict[str, Any]:
    places = folders(plan.recipe.sources[name])
    weights = [path.stat().st_size for place in places for path in place.iterdir() if path.suffix in WEIGHTS]
    return {
        "name": name,
        "use": "source",
        "from": {},
        "state": "source",
        "folder": "+".join(map(str, places)),
        "bytes": sum(weights),
        "key": plan.keys[name].digest,
    }


def _stage(plan: Plan, step: Step) -> dict[str, Any]:
    record: Mapping[str, Any] = step.output.record if step.output is not None else {}
    provenance = step.output.provenance() if step.output is not None else {}
    size = provenance.get("size", {})
    return {
        "name": step.stage.name,
        "use": step.stage.label,
        "from": {role: list(names) for role, names in step.stage.inputs.items()},
        "state": step.state,
        "reason": step.reason,
        "seconds": record.get("seconds"),
        "peak_bytes": record.get("peak_bytes"),
        "bytes": size.get("bytes_out"),
        "bits_a_weight": size.get("bits_a_weight"),
        "key": step.key.digest,
        "folder": str(step.output.folder) if step.output is not None else None,
        "options": step.key.material["options"],
        "fallbacks": provenance.get("fallbacks", []),
        "error": str(step.error) if step.error is not None else None,
        "rows": provenance.get("report", []),
        **({"allocation": provenance["allocation"]} if "allocation" in provenance else {}),
    }


def _score(step: Step) -> dict[str, Any]:
    assert step.output is not None
    result = json.loads((step.output.folder / SCORE).read_text(encoding="utf-8"))
    return {"stage": step.stage.name, "use": step.stage.label, **result}
