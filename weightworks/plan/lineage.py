"""Where an output comes from: its chain of stages down to the source, and the recipe that makes it again."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightworks.errors import CheckpointError
from weightworks.plan.keys import environment
from weightworks.plan.reader import NAME
from weightworks.stage import catalog
from weightworks.store.manifest import read_provenance

NUMERIC = ("torch", "numpy", "scipy", "transformers", "safetensors", "machine", "threads")


def chain(root: Path) -> list[dict[str, Any]]:
    """The stages behind the output folder ``root``, the first one first; each has ``stage``, ``identity``, ``source`` and,
    if it was calibrated, ``calibration``."""
    provenance = read_provenance(root) if root.is_dir() else None
    if provenance is None:
        raise CheckpointError(
            f"{root}: no provenance.json, so nothing is known of how it was made",
            hint="give an output folder of compress or merge",
        )
    stages: list[dict[str, Any]] = []
    while provenance:
        stages.insert(0, {key: provenance.get(key) for key in ("stage", "identity", "source", "calibration")})
        provenance = provenance["source"].get("made_by")
    return stages


def rebuild(root: Path) -> str:
    """A recipe, as YAML, whose last stage has the bytes of ``root`` again where versions and machine are the same."""
    stages = chain(root)
    document: dict[str, Any] = {"version": 1, "sources": {"source": stages[0]["source"]["name"]}, "stages": {}}
    before = "source"
    for stage in stages:
        label: str = stage["identity"]["method"]
        name = method = label.partition(".")[2]
        if stage is stages[-1] and NAME.fullmatch(root.resolve().name):
            name = root.resolve().name  # the model card bears the folder's name
        number = 2
        while name in document["stages"]:
            name, number = f"{method}-{number}", number + 1
        document["stages"][name] = {"use": label, "from": before, "with": values(stage)}
        before = name
    lines = [f"# Makes {root} again: {before} is stage {stages[-1]['stage']}."]
    lines.append(f"# The source had the digest {stages[0]['identity']['input']}.")
    lines += [f"# Here it may differ: {text}." for text in changed(stages[-1]["identity"])]
    return "\n".join([*lines, _yaml(document)])


def values(stage: Mapping[str, Any]) -> dict[str, Any]:
    """Options and settings of a stage as a recipe gives them; those at their defaults are spelled out too."""
    identity = stage["identity"]
    given = {name: value for name, value in identity["options"].items() if value not in (None, [])}
    given["seed"] = identity["seed"]
    given["max_shard_size"] = f"{identity['max_shard_size']}B"
    if calibration := stage.get("calibration"):
        given["dataset"] = calibration["dataset"]
        given["num_samples"] = calibration["windows_requested"]
        given["seq_len"] = calibration["seq_len"]
        given["dtype"] = calibration["dtype"]
    return given


def changed(identity: Mapping[str, Any]) -> list[str]:
    """What is otherwise here than where an output was made, in words."""
    then, now = identity["environment"], environment()
    found = [
        f"{name} {then[name]} then, {now[name]} now"
        for name in NUMERIC
        if name in then and str(then[name]) != now[name] and not str(then[name]).startswith(now[name] + "+")
    ]
    entry = catalog.methods().get(identity["method"])
    if entry is None:
        return [*found, f"the method {identity['method']} is not installed"]
    version = entry.load().VERSION
    if version != identity["method_version"]:
        found.append(f"{identity['method']} version {identity['method_version']} then, {version} now")
    return found


def _yaml(document: Mapping[str, Any]) -> str:
    from ruamel.yaml import YAML

    writer = YAML()
    writer.width = 100
    text = io.StringIO()
    writer.dump(dict(document), text)
    return text.getvalue()
