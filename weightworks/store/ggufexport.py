"""A checkpoint written as one GGUF file, tensor by tensor: ``compress export --gguf``.

The file's header follows from the checkpoint's headers, so it is written first and every tensor goes to its place. A killed
export continues. Every tensor is read back and decoded before the file appears under its name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightworks import __version__
from weightworks.errors import MethodError, UsageError, VerificationError, nearest
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.ggml import F16, F32, Q8_0, TYPES, BlockType, exact
from weightworks.store.gguffile import SUFFIX, GgufSpec, Value, opening
from weightworks.store.ggufmodel import EMBEDDINGS, POSITIONS, Model, Part, model_of
from weightworks.store.ggufvocabulary import vocabulary_of
from weightworks.store.mixed import all_of
from weightworks.store.tensorfile import TensorSpec
from weightworks.store.writer import CheckpointWriter, check_finite

ROWS = 1 << 22  # elements encoded and compared at a time
STEP_BYTES = 256 << 20  # journalled each time so much of the file is written
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K": 14, "BF16": 32, "MXFP4": 38}  # general.file_type
KINDS = ("Q8_0", "Q4_0", "Q4_K", "MXFP4", "BF16", "F16")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Planned:
    """A tensor on its way: ``part`` of the model, ``spec`` in the file; ``exact`` where packed codes go over as they are."""

    part: Part
    spec: GgufSpec
    exact: bool


def export(
    source: str,
    kind: str,
    target: Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = True,
    allow_pickle: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Write ``source`` as a GGUF file of ``kind``; returns what became of it.

    ``target`` is a file if it ends in ``.gguf``, else a folder for it; by default NAME-KIND.gguf here. Embedding and head are at
    least Q8_0, tensors of one axis and positions F32; what a kind's blocks do not divide is Q8_0 or F16, and a remark.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown type '{kind}' ({nearest(kind, KINDS)})")
    checkpoint = Checkpoint.open(source, allow_pickle=allow_pickle)
    view = DenseView(checkpoint)
    model = model_of(view)
    remarks = [*checkpoint.remarks, *model.remarks]
    planned = _plan(view, model, TYPES[kind], remarks)
    rows = next(one.spec.shape[0] for one in planned if one.spec.name == EMBEDDINGS[0])
    vocabulary, more = vocabulary_of(checkpoint.root, checkpoint.config, rows)
    remarks += more
    specs = [one.spec for one in planned]
    metadata = {**_facts(checkpoint, kind, remarks), **model.metadata, **vocabulary}
    file = _file(checkpoint, kind, target)
    writer = CheckpointWriter(
        file,
        [],
        {"export": "gguf", "type": kind, "weightworks": __version__, "files": dict(checkpoint.files)},
        side={file.name: [TensorSpec(spec.name, (spec.room,), torch.uint8) for spec in specs]},
        openings={file.name: opening(model.architecture, metadata, specs)},
        overwrite=overwrite,
        resume=resume,
    )
    try:
        _write(writer, view, planned, say)
        digest = writer.read_back()[file.name]
        say("decoding what was written")
        errors = _prove(writer, view, planned)
        nbytes = writer.nbytes
        writer.commit(file.name)
    finally:
        writer.close()
    weights = [spec for spec in specs if len(spec.shape) > 1]
    return {
        "file": str(file),
        "sha256": digest,
        "architecture": model.architecture,
        "tensors": len(specs),
        "types": dict(Counter(spec.kind.name for spec in specs)),
        "bytes_in": checkpoint.nbytes,
        "bytes_out": nbytes,
        "bits_a_weight": 8 * sum(spec.nbytes for spec in weights) / sum(math.prod(spec.shape) for spec in weights),
        "relative_error": errors,
        "remarks": remarks,
    }


def _file(checkpoint: Checkpoint, kind: str, target: Path | None) -> Path:
    name = f"{Path(checkpoint.name).name}-{kind}{SUFFIX}"
    if target is None:
        return Path(name)
    return target if target.suffix == SUFFIX else target / name


def _facts(checkpoint: Checkpoint, kind: str, remarks: list[str]) -> dict[str, Value]:
    """What the file says of itself, and of where it comes from."""
    from gguf import GGML_QUANT_VERSION

    return {
        "general.type": "model",
        "general.name": checkpoint.name,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": int(GGML_QUANT_VERSION),
        "weightworks.version": __version__,
        "weightworks.source": checkpoint.source,
        "weightworks.source_digest": checkpoint.digest,
        "weightworks.remarks": list(remarks),
    }


def _plan(view: DenseView, model: Model, kind: BlockType, remarks: list[str]) -> list[Planned]:
    planned, narrow, again = [], Counter[str](), 0
    for part in model.parts:
        chosen = _kind(part, kind)
        if chosen not in (kind, F32) and part.name not in EMBEDDINGS:
            narrow[chosen.name] += 1
        packed = bool(part.source) and view.is_packed(part.source)
        fits = packed and _exact(view, part, chosen) is not None
        again += packed and not fits
        planned.append(Planned(part, GgufSpec(part.name, part.shape, chosen), fits))
    for name, count in narrow.items():
        remarks.append(
            f"{count} weights are {name}: their rows are no multiples of {kind.width}, which {kind.name} takes"
        )
    if again:
        remarks.append(
            f"{again} packed weights do not fit the grid of {kind.name} as they are: they were rounded again"
        )
    if view.scheme is not None and any(scheme.inputs is not None for scheme in all_of(view.scheme)):
        remarks.append(
            "the folder's layers round their inputs, which the file cannot say: engines of GGUF files do not"
        )
    return planned


def _kind(part: Part, kind: BlockType) -> BlockType:
    if len(part.shape) < 2 or part.name == POSITIONS:
        return F32
    if part.name in EMBEDDINGS and kind.bits < Q8_0.bits:
        kind = Q8_0
    return next(one for one in (kind, Q8_0, F16) if part.shape[-1] % one.width == 0)


def _exact(view: DenseView, part: Part, kind: BlockType) -> torch.Tensor | None:
    """Bytes [rows, row_bytes] that mean what the packed weight means to the last bit; None where there are none."""
    assert view.format is not None
    stored = exact(view.format.load(view.checkpoint, part.source.removesuffix(".weight"), view.scheme), kind)
    order = part.order()
    return stored if stored is None or order is None else stored[order]


def _rows(view: DenseView, part: Part) -> Iterator[torch.Tensor]:
    """The tensor as it is to stand in the file, float32 [rows, columns], a few rows at a time."""
    columns = part.shape[-1]
    step = max(1, ROWS // columns)
    if part.values is not None or len(part.shape) < 2 or part.transposed or part.heads or view.is_packed(part.source):
        whole = view.read(part.source) if part.values is None else part.values
        whole = whole.T if part.transposed else whole
        order = part.order()
        whole = whole if order is None else whole[order]
        yield from (rows.float().contiguous() for rows in whole.reshape(-1, columns).split(step))
        return
    for start in range(0, part.shape[0], step):
        yield view.read_rows(part.source, start, min(start + step, part.shape[0]), torch.float32)


def _write(writer: CheckpointWriter, view: DenseView, planned: list[Planned], say: Say) -> None:
    waiting = 0
    for one in planned:
        if writer.holds(one.spec.name):
            continue
        _put(writer, view, one)
        waiting += one.spec.room
        if waiting >= STEP_BYTES or one is planned[-1]:
            writer.done(f"to {one.spec.name}")
            say(f"written: up to {one.spec.name}")
            waiting = 0


def _put(writer: CheckpointWriter, view: DenseView, one: Planned) -> None:
    spec = one.spec
    with writer.filling(spec.name, (spec.room,), torch.uint8) as append:
        if one.exact:
            append(_known(_exact(view, one.part, spec.kind)).flatten())
        else:
            for rows in _rows(view, one.part):
                check_finite(one.part.source, rows)
                if (top := float(rows.abs().max())) > spec.kind.largest:
                    raise MethodError(
                        f"tensor '{one.part.source}' holds {top:g}; {spec.kind.name} goes up to {spec.kind.largest:g}",
                        hint="give --gguf BF16",
                    )
                append(spec.kind.encode(rows).flatten())
        if spec.room > spec.nbytes:
            append(torch.zeros(spec.room - spec.nbytes, dtype=torch.uint8))


def _known(stored: torch.Tensor | None) -> torch.Tensor:
    assert stored is not None, "planned as exact"
    return stored


def _prove(writer: CheckpointWriter, view: DenseView, planned: list[Planned]) -> float:
    """Decode every tensor from the file and hold it against its source; returns the relative error of all weights of more than
    one axis: the root of the ratio of sums of squares.

    Raises :class:`VerificationError` for an element that is further off than rounding goes.
    """
    wrong, whole = 0.0, 0.0
    for one in planned:
        spec, start = one.spec, 0
        width = spec.kind.row_bytes(spec.shape[-1])
        for rows in _rows(view, one.part):
            stored = writer.read_rows(spec.name, start, start + len(rows) * width)
            start += len(stored)
            error = (spec.kind.decode(stored.view(len(rows), width)) - rows).abs_()
            top = rows.abs().view(-1, spec.kind.width).amax(1, keepdim=True)
            allowed = 0 if one.exact else spec.kind.worst * top + spec.kind.least
            if (error.view(-1, spec.kind.width) > allowed).any():
                raise VerificationError(
                    f"{writer.staging / writer.target.name}: tensor '{spec.name}' does not decode to '{one.part.source}'",
                    hint="the file is left for inspection",
                )
            if len(spec.shape) > 1:
                wrong += float(error.double().square().sum())
                whole += float(rows.double().square().sum())
    return math.sqrt(wrong / whole) if whole else 0.0
