"""Where an output comes from: its stages down to the sources, and the recipe that makes it again."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightworks.errors import CheckpointError
from weightworks.plan.keys import environment
from weightworks.plan.reader import NAME
from weightworks.stage import catalog
from weightworks.store.manifest import read_provenance, understood

NUMERIC = ("torch", "numpy", "scipy", "transformers", "safetensors", "machine", "threads")


@dataclass(frozen=True)
class Lineage:
    """All that an output comes from. ``sources`` are checkpoints nobody made here: path or hub id, and digest, by name.

    ``stages`` come inputs first, the output's own last; each has ``stage``, ``identity``, ``source`` and, if it was calibrated,
    ``calibration``, and ``from``: names of sources and stages by role.
    """

    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, made: Mapping[str, Any], called: str | None = None) -> str:
        """Take in a stage and all behind it, one of the same digest once; returns its name."""
        for name, known in self.stages.items():
            if known["stage"] == made["stage"]:
                return name
        found = _inputs(made["source"], made["identity"])
        inputs = {role: [self._input(*pair) for pair in pairs] for role, pairs in found.items()}
        name = self._free(called or made["identity"]["method"].partition(".")[2])
        facts = {key: made.get(key) for key in ("stage", "identity", "source", "calibration")}
        self.stages[name] = {**facts, "from": inputs}
        return name

    def _input(self, source: Mapping[str, Any], digest: str) -> str:
        if source.get("made_by"):
            return self.add(source["made_by"])
        for name, known in self.sources.items():
            if known == {"model": source["name"], "digest": digest}:
                return name
        name = self._free("source")
        self.sources[name] = {"model": source["name"], "digest": digest}
        return name

    def _free(self, name: str) -> str:
        taken, wanted, number = {*self.sources, *self.stages}, name, 2
        while name in taken:
            name, number = f"{wanted}-{number}", number + 1
        return name


def _inputs(source: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, list[tuple[Mapping[str, Any], str]]]:
    """The inputs of a stage by role, each with its digest: one model and perhaps its teacher, or those of a merge."""
    digests = identity["input"]
    if "models" not in source:
        taught = {"teacher": [(source["teacher"], identity["teacher"])]} if "teacher" in source else {}
        chosen = {"data": [(source["data"], "")]} if "data" in source else {}
        return {"model": [(source, digests)], **taught, **chosen}
    found = {"models": list(zip(source["models"], digests["models"], strict=True))}
    for role in ("base", "earlier"):
        if source.get(role):
            found[role] = [(source[role], digests[role])]
    return found


def lineage(root: Path) -> Lineage:
    """What is behind the output folder ``root``."""
    provenance = read_provenance(root) if root.is_dir() else None
    if provenance is None:
        raise CheckpointError(
            f"{root}: no provenance.json, so nothing is known of how it was made",
            hint="give an output folder of compress or merge",
        )
    found, name = Lineage(), root.resolve().name
    with understood(root):
        found.add(provenance, name if NAME.fullmatch(name) else None)  # the model card bears the folder's name
    return found


def rebuild(root: Path) -> str:
    """A recipe, as YAML, whose last stage has the bytes of ``root`` again where versions and machine are the same."""
    found = lineage(root)
    with understood(root):
        return _recipe(root, found)


def _recipe(root: Path, found: Lineage) -> str:
    last = list(found.stages)[-1]
    document: dict[str, Any] = {
        "version": 1,
        "sources": {name: source["model"] for name, source in found.sources.items()},
        "stages": {
            name: {"use": stage["identity"]["method"], "from": _from(stage["from"]), "with": values(stage)}
            for name, stage in found.stages.items()
        },
    }
    lines = [f"# Makes {root} again: {last} is stage {found.stages[last]['stage']}."]
    lines += [f"# {name} had the digest {source['digest']}." for name, source in found.sources.items()]
    lines += [f"# Here it may differ: {text}." for text in changed(found.stages[last]["identity"])]
    return "\n".join([*lines, _yaml(document)])


def _from(inputs: Mapping[str, list[str]]) -> Any:
    """``from`` of a recipe: a plain name where there is but one input."""
    if list(inputs) == ["model"]:
        return inputs["model"][0]
    return {role: names if role == "models" else names[0] for role, names in inputs.items()}


def values(stage: Mapping[str, Any]) -> dict[str, Any]:
    """Options and settings of a stage as a recipe gives them; those at their defaults are spelled out too."""
    identity = stage["identity"]
    given = {name: value for name, value in identity["options"].items() if value not in (None, [])}
    given["seed"] = identity["seed"]
    if "max_shard_size" in identity:  # adapters are one file
        given["max_shard_size"] = f"{identity['max_shard_size']}B"
    if calibration := stage.get("calibration"):
        if "data" not in stage["from"]:
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
