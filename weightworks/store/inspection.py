"""What a checkpoint holds, from headers alone unless zeros are to be counted, and the stages it came through."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from weightworks.errors import UsageError
from weightworks.store.adapted import AdaptedCheckpoint
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.gguffile import SUFFIX, GgufFile, read_gguf
from weightworks.store.manifest import read_provenance, understood
from weightworks.store.mixed import in_words
from weightworks.store.tensorfile import DTYPE_NAMES


def inspect(source: str, *, sparsity: bool = False, allow_pickle: bool = False) -> dict[str, Any]:
    """Facts about a checkpoint: ``tensors`` one by one, ``groups`` of alike ones (``layers.*.mlp.up_proj``), ``lineage``.

    ``source`` may be a GGUF file too.
    """
    if source.endswith(SUFFIX):
        if sparsity:
            raise UsageError("--sparsity counts zeros of checkpoint folders, not of GGUF files")
        return _inspect_gguf(read_gguf(Path(source)))
    checkpoint = Checkpoint.open(source, allow_pickle=allow_pickle)
    view = DenseView(checkpoint)
    tensors = [_row(view, name, sparsity) for name in view.names]
    parameters = sum(row["elements"] for row in tensors)
    with understood(checkpoint.root):
        stages = lineage(read_provenance(checkpoint.root))
    return {
        "model": "+".join(map(str, checkpoint.roots)),
        "architecture": ", ".join(map(str, _listed(checkpoint.config.get("architectures")) or ["unknown"])),
        "parameters": f"{parameters:,}",
        "bytes": f"{checkpoint.nbytes:,}",
        "bits_a_parameter": round(8 * checkpoint.nbytes / max(parameters, 1), 3),
        "format": "dense"
        if view.format is None or view.scheme is None
        else f"{view.format.name}, {in_words(view.scheme)}",
        "files": sorted({info.shard for info in checkpoint.tensors.values()}),
        **adapted(checkpoint),
        "tensors": tensors,
        "groups": _groups(tensors),
        "lineage": stages,
    }


def _inspect_gguf(file: GgufFile) -> dict[str, Any]:
    tensors: list[dict[str, Any]] = []
    for tensor in file.tensors.values():
        shape, elements = "x".join(map(str, tensor.shape)), math.prod(tensor.shape)
        row = {"name": tensor.name, "count": 1, "shape": shape, "elements": elements, "stored": tensor.kind}
        tensors.append({**row, "bits": round(8 * tensor.nbytes / max(elements, 1), 3), "bytes": tensor.nbytes})
    parameters, nbytes = sum(row["elements"] for row in tensors), sum(row["bytes"] for row in tensors)
    return {
        "model": str(file.path),
        "architecture": file.architecture,
        "parameters": f"{parameters:,}",
        "bytes": f"{nbytes:,}",
        "bits_a_parameter": round(8 * nbytes / max(parameters, 1), 3),
        "format": f"gguf, {', '.join(sorted({tensor.kind for tensor in file.tensors.values()}))}",
        "files": [file.path.name],
        "remarks": _listed(file.metadata.get("weightworks.remarks")),
        "metadata": {
            key: value if not isinstance(value, list) or len(value) <= 8 else f"{len(value)} values"
            for key, value in file.metadata.items()
        },
        "tensors": tensors,
        "groups": _groups(tensors),
        "lineage": [],
    }


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def adapted(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is added to the checkpoint, and what should be known of that."""
    if not isinstance(checkpoint, AdaptedCheckpoint):
        return {}
    lines = [
        f"{one.name}: rank {', '.join(map(str, sorted({pair.rank for pair in one.pairs.values()}))) or 'none'}, "
        f"{len(one.pairs)} modules, {len(one.whole)} whole tensors"
        for one in checkpoint.adapters
    ]
    return {"adapters": lines, "remarks": checkpoint.remarks}


def lineage(provenance: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The stages behind a checkpoint, latest first; of a merge, those behind every input."""
    stages: list[dict[str, Any]] = []
    waiting = [provenance] if provenance else []
    while waiting:
        made = waiting.pop(0)
        identity, source = made["identity"], made["source"]
        inputs = [source] if "models" not in source else [*source["models"], source["base"], source.get("earlier")]
        inputs = [one for one in inputs if one]
        stages.append(
            {
                "stage": made["stage"],
                "method": identity["method"],
                "options": ", ".join(
                    f"{key} {value}" for key, value in identity["options"].items() if value not in (None, [])
                ),
                "source": ", ".join(one["name"] for one in inputs),
                "source_digest": identity["input"],
            }
        )
        waiting += [one["made_by"] for one in inputs if one.get("made_by")]
    return stages


def _row(view: DenseView, name: str, sparsity: bool) -> dict[str, Any]:
    shape = view.shape(name)
    elements = math.prod(shape)
    if (format_ := view.format_of(name)) is not None and (scheme := view.scheme_of(name)) is not None:
        base = name.removesuffix(".weight")
        parts = [view.tensors[f"{base}.{suffix}"] for suffix in format_.suffixes if f"{base}.{suffix}" in view.tensors]
        size, stored = sum(part.nbytes for part in parts), f"{scheme.code} codes"
    else:
        size, stored = view.tensors[name].nbytes, DTYPE_NAMES[view.tensors[name].dtype]
    row = {
        "name": name,
        "count": 1,
        "shape": "x".join(map(str, shape)),
        "elements": elements,
        "stored": stored,
        "bits": round(8 * size / max(elements, 1), 3),
        "bytes": size,
    }
    if sparsity:
        row["zeros"] = float((view.read(name) == 0).sum()) / max(elements, 1)
    return row


def _groups(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tensors that differ in block or expert number only, as one row."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in tensors:
        name = re.sub(r"\.\d+\.", ".*.", re.sub(r"\.\d+\.", ".*.", row["name"]))
        key = (name, row["shape"], row["stored"])
        if key not in groups:
            groups[key] = {**row, "name": name}
            continue
        group = groups[key]
        if "zeros" in row:
            group["zeros"] = (group["zeros"] * group["elements"] + row["zeros"] * row["elements"]) / (
                group["elements"] + row["elements"]
            )
        for field in ("count", "elements", "bytes"):
            group[field] += row[field]
        group["bits"] = round(8 * group["bytes"] / max(group["elements"], 1), 3)
    return list(groups.values())
