"""What a stage's output depends on, and the sha256 of it: the key under which it is kept.

A key holds the keys of the stage's inputs, down to the contents of the sources, so keys of a whole graph are known before
anything runs, and change exactly downstream of what changed. No torch here: a run that finds everything done is quick.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import weightworks
from weightworks.errors import WeightworksError
from weightworks.plan.graph import Recipe, Stage
from weightworks.stage import catalog
from weightworks.stage.budget import budget_of
from weightworks.stage.settings import Settings
from weightworks.stage.tweaking import tweak_of
from weightworks.store.sources import Digests, folders

NUMERIC = ("torch", "numpy", "scipy", "transformers", "safetensors")  # versions that may change a bit of the output
# What methods have that look at inputs, gradients or rows of a text, or train on it.
READING = ("watch", "trace", "reduces", "regime", "select", "renormalises")
CALIBRATION = ("dataset", "num_samples", "seq_len", "dtype")  # settings of methods that look at inputs
SHARDS = "max_shard_size"


@dataclass(frozen=True)
class Key:
    """The sha256 of ``material``, what an output depends on."""

    digest: str
    material: Mapping[str, Any]


def stage_keys(recipe: Recipe, digests: Digests) -> dict[str, Key]:
    """The keys of all sources and stages of ``recipe``."""
    keys: dict[str, Key] = {}
    for name, model in recipe.sources.items():
        keys[name] = _key({"source": contents(model, digests)})
    for name, stage in recipe.stages.items():
        inputs: dict[str, list[Any]] = {}
        for role, names in stage.inputs.items():
            digests_of = [keys[i].digest for i in names]
            named = stage.kind == "score"  # its result calls the models by their names
            inputs[role] = [list(pair) for pair in zip(names, digests_of, strict=True)] if named else digests_of
        keys[name] = _key(material(stage, inputs, digests))
    return keys


def contents(source: str, digests: Digests) -> dict[str, str]:
    """Digests by name of the files of a source, those of its adapters after ``+`` and their number."""
    model, *adapters = folders(source)
    found = digests.folder(model)
    for number, adapter in enumerate(adapters, 1):
        found |= {f"+{number}/{name}": digest for name, digest in digests.folder(adapter).items()}
    return found


def material(stage: Stage, inputs: Mapping[str, Any], digests: Digests) -> dict[str, Any]:
    """All that the output of ``stage`` depends on, given the keys of its ``inputs`` by role."""
    entry = catalog.methods()[stage.label]
    module = entry.load()
    options = module.Options(**stage.options)
    settings = Settings(**stage.settings)
    method = made(module, options)
    watches = reads_text(method)
    matter = ["seed", "device", "trust_remote_code"]
    matter += [*CALIBRATION] if watches else []
    matter += [SHARDS] if stage.kind != "score" else []
    resolved = settings.resolved()
    facts: dict[str, Any] = {
        "method": stage.label,
        "method_version": module.VERSION,
        "weightworks": weightworks.__version__,
        "options": options.resolved(),
        "settings": {name: resolved[name] for name in matter},
        "inputs": dict(inputs),
        "environment": environment(),
    }
    if (distribution := getattr(entry, "distribution", None)) is not None:
        facts["distribution"] = distribution
    if watches:
        facts["calibration"] = calibration(settings.dataset, digests)
    if text := getattr(options, "renormalise", None):
        facts["calibration"] = calibration(text, digests)
    if hasattr(method, "files"):
        facts["files"] = {str(path): digests.file(path) for path in method.files()}
    return facts


def made(module: Any, options: Any) -> Any:
    """The method with ``options``; None for one that fails of a fault of its own, which its stage will tell when it runs."""
    try:
        return module.Method(options)
    except WeightworksError:
        raise
    except Exception:  # whatever a plug-in raises must not stop the other stages
        return None


def reads_text(method: Any) -> bool:
    """Whether a method, or a step before or after it, looks at the inputs that a text makes, trains on it or chooses from it."""
    merges = hasattr(method, "merge")  # their surveys are others
    surveys = method.surveys() if hasattr(method, "surveys") and not merges else ()
    smooths = hasattr(method, "smoother") or getattr(getattr(method, "options", None), "smooth", None) is not None
    steps = smooths or tweak_of(method) is not None or budget_of(method) is not None
    return steps or shaped_by_text(method) or any(survey.watch is not None for survey in surveys)


def shaped_by_text(method: Any) -> bool:
    """Whether a method, or the class of one, is of a shape that takes a text."""
    return any(hasattr(method, name) for name in READING)


def trains(method: Any) -> bool:
    """Whether a method is of the shape that trains."""
    return hasattr(method, "regime")


def calibration(dataset: str, digests: Digests) -> Any:
    """What stands for the calibration text: contents of files; the name of what is not a file."""
    path = Path(dataset).expanduser()
    if dataset == "builtin":
        spec = find_spec("weightworks.stream.builtin")
        assert spec is not None and spec.submodule_search_locations is not None
        texts = sorted(Path(spec.submodule_search_locations[0]).glob("*.txt"))
        return {"python": platform.python_version(), **{path.name: digests.file(path) for path in texts}}
    return digests.file(path) if path.is_file() else dataset


@cache
def environment() -> dict[str, str]:
    """Versions and hardware that numbers depend on."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
    found = {name: metadata.version(name) for name in NUMERIC}
    found |= {"machine": platform.machine(), "processor": _processor(), "threads": threads}
    return {**found, "accelerators": accelerators} if (accelerators := _accelerators()) else found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """In words, what makes a stage stale: ``bits: 4 -> 3``, ``input model``, ``torch 2.12 -> 2.13``."""
    for part, before in old.items():
        after = new.get(part)
        if before == after:
            continue
        if part in ("options", "settings", "environment"):
            for name in {**before, **(after or {})}:
                was, now = before.get(name), (after or {}).get(name)
                if was != now:
                    yield f"{name.replace('_', ' ')}: {_short(was)} -> {_short(now)}"
        elif part == "inputs":
            names = {**before, **(after or {})}
            yield from (f"input '{role}' changed" for role in names if before.get(role) != (after or {}).get(role))
        elif part in ("calibration", "files", "source"):
            yield {"calibration": "calibration text changed", "files": "a text changed"}.get(part, "files changed")
        else:
            yield f"{part.replace('_', ' ')}: {_short(before)} -> {_short(after)}"
    yield from (f"{part.replace('_', ' ')} is new" for part in new if part not in old)


def changed_files(source: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """In words, which files of a source changed."""
    before, after = old.get("source") or {}, new["source"]
    names = sorted(name for name in {**before, **after} if before.get(name) != after.get(name))
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} of '{source}' changed" if names else f"'{source}' changed"


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, list | dict) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _key(facts: Mapping[str, Any]) -> Key:
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
    return Key(hashlib.sha256(text.encode()).hexdigest(), facts)


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _accelerators(cards: Path = Path("/proc/driver/nvidia/gpus")) -> str:
    """The kinds of GPU that a stage may choose, without asking torch; "" if there is none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""
    models = set()
    for path in cards.glob("*/information"):
        with suppress(OSError):
            models.update(re.findall(r"^Model:\s*(.+?)\s*$", path.read_text(), re.MULTILINE))
    return ", ".join(sorted(models))
