"""A checkpoint with many zeros stored compactly, and back to the very bytes: ``compress export --sparse``, ``densify``.

Every safetensors file F becomes ``sparse-F``. A tensor NAME in it is there as it is, or as ``NAME.bitmask`` (one bit an
element, as in ``masks.safetensors``) and ``NAME.values`` (the elements whose bit is set, in order). ``F.header`` holds the
bytes before F's first tensor. ``sparse.json`` has the digests of both sides; all other files are copied.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightworks.errors import CheckpointError, OutputError, VerificationError
from weightworks.store.checkpoint import MASKS, Checkpoint
from weightworks.store.documents import is_plain
from weightworks.store.formats import packed_scheme
from weightworks.store.masks import SUFFIX, Masks, pack_bits, unpack_bits
from weightworks.store.sources import file_digest
from weightworks.store.tensorfile import (
    TensorInfo,
    TensorSpec,
    bytes_of,
    header_bytes,
    parse_header,
    read_bytes,
    read_header,
)
from weightworks.store.writer import CheckpointWriter, check_target, refuse_links, remove, staging_of, writing

MANIFEST, PREFIX, LAYOUT = "sparse.json", "sparse-", 1
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """A tensor on its way into ``sparse-F``: whole (``kept`` None), or as bits and the ``kept`` elements they are set for."""

    info: TensorInfo
    kept: int | None

    @property
    def specs(self) -> list[TensorSpec]:
        if self.kept is None:
            return [TensorSpec(self.info.name, self.info.shape, self.info.dtype)]
        bits = (self.info.shape[0], math.ceil(math.prod(self.info.shape[1:]) / 8))
        return [
            TensorSpec(f"{self.info.name}.bitmask", bits, torch.uint8),
            TensorSpec(f"{self.info.name}.values", (self.kept,), self.info.dtype),
        ]


def export(
    source: str, target: Path, *, overwrite: bool = False, resume: bool = True, say: Say = lambda line: None
) -> dict[str, Any]:
    """Write ``source`` compactly to ``target``; returns its manifest. A killed export continues where it was.

    Where the source has masks, they are the bits; elsewhere, the elements that are not zero to the bit. What was written
    is decoded again and compared before the folder appears.
    """
    checkpoint = Checkpoint.open(source)
    if packed_scheme(checkpoint) is not None:
        raise CheckpointError(
            f"{checkpoint.root}: is quantized; a zero takes as many bits as any code, so there is nothing to gain"
        )
    masks = Masks.of(checkpoint.root)
    files = weight_files(checkpoint)
    say("counting")
    parts = {file: [_part(checkpoint.root, info, masks) for info in infos.values()] for file, infos in files.items()}
    side = {PREFIX + file: [_header_spec(checkpoint.root / file), *_specs(of)] for file, of in parts.items()}
    if masks is not None:
        side[PREFIX + MASKS] = [_header_spec(masks.path)]
    before = {file: file_digest(checkpoint.root / file) for file in [*files, *([MASKS] if masks else [])]}
    writer = CheckpointWriter(
        target,
        [],
        {"export": "sparse", "layout": LAYOUT, "files": before},
        side=side,
        overwrite=overwrite,
        resume=resume,
    )
    try:
        for file in before:
            _write(writer, checkpoint.root, file, parts.get(file, []), masks)
            say(f"written: {PREFIX}{file}")
        after = writer.read_back()
        manifest = {"layout": LAYOUT, "files": before, "sparse": after, "bytes_in": _total(checkpoint.root, before)}
        manifest["bytes_out"] = _total(writer.staging, after)
        writer.write_text(MANIFEST, json.dumps(manifest, indent=1) + "\n")
        _copy_others(checkpoint.root, writer.staging, {*before, MANIFEST})
        say("decoding what was written")
        _prove(writer.staging, manifest)
        writer.commit()
    finally:
        writer.close()
    return manifest


def densify(source: str, target: Path, *, overwrite: bool = False, say: Say = lambda line: None) -> dict[str, Any]:
    """Bring the folder that was exported to ``source`` back, byte for byte, every file held against its digest.

    A killed run is continued: files that are complete are not written again.
    """
    root = Path(source)
    manifest = read_manifest(root)
    check_target(target, overwrite=overwrite)
    staging = staging_of(target.absolute())
    with writing(staging):
        staging.mkdir(parents=True, exist_ok=True)
        refuse_links(staging)
        for file, digest in manifest["files"].items():
            path = staging / file
            if not (path.is_file() and file_digest(path) == digest):
                _write_file(root, file, path, digest)
            say(f"written: {file}")
        _copy_others(root, staging, {MANIFEST, *manifest["sparse"]})
        if os.path.lexists(target):
            old = target.with_name(target.name + ".replaced")
            remove(old)
            target.rename(old)
            staging.rename(target)
            remove(old)
        else:
            staging.rename(target)
    return manifest


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of an exported folder, its files held against their digests."""
    path = root / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{root}: no {MANIFEST}", hint="give a folder that `compress export --sparse` wrote")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = {**manifest["sparse"]} if manifest["layout"] == LAYOUT else {}
        for name in (*{**manifest["files"]}, *files):
            if not is_plain(name):
                raise ValueError(f"{name!r} is not a file name")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a manifest of a sparse export ({error})") from None
    if not files:
        raise CheckpointError(f"{path}: layout {manifest['layout']}, known: {LAYOUT}", hint="use a newer weightworks")
    for name, digest in files.items():
        if not (root / name).is_file() or file_digest(root / name) != digest:
            raise CheckpointError(f"{root / name}: missing, or not what was exported", hint="export it again")
    found: dict[str, Any] = manifest
    return found


def weight_files(checkpoint: Checkpoint) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of every safetensors file that holds weights."""
    shards = sorted({info.shard for info in checkpoint.tensors.values()})
    return {shard: read_header(checkpoint.root / shard) for shard in shards}


def _header_spec(path: Path) -> TensorSpec:
    return TensorSpec(f"{path.name}.header", (len(header_bytes(path)),), torch.uint8)


def _specs(parts: list[Part]) -> list[TensorSpec]:
    return [spec for part in parts for spec in part.specs]


def _total(root: Path, names: Mapping[str, Any]) -> int:
    return sum((root / name).stat().st_size for name in names)


def _read(root: Path, info: TensorInfo) -> torch.Tensor:
    return read_bytes(root / info.shard, info.offset, torch.empty(info.shape, dtype=info.dtype))


def _bits(root: Path, info: TensorInfo, masks: Masks | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor as integers [rows, columns], and which of them are stored."""
    whole = _read(root, info).view(INTEGERS[info.dtype.itemsize]).flatten(1)
    if masks is None or info.name not in masks.infos:
        return whole, whole != 0
    mask = masks.read(info.name, info.shape)
    if whole[~mask].any():
        raise CheckpointError(f"{root}: '{info.name}' is not zero where its mask says so", hint="see: compress verify")
    return whole, mask


def _part(root: Path, info: TensorInfo, masks: Masks | None) -> Part:
    masked = masks is not None and info.name in masks.infos
    if len(info.shape) < 2 or (masks is not None and not masked):
        return Part(info, None)
    kept = int(_bits(root, info, masks)[1].sum())
    part = Part(info, kept)
    return part if masked or sum(spec.nbytes for spec in part.specs) < info.nbytes else Part(info, None)


def _write(writer: CheckpointWriter, root: Path, file: str, parts: list[Part], masks: Masks | None) -> None:
    """All tensors of ``sparse-FILE``, unless the journal has them."""
    if f"file {file}" in writer.steps:
        return
    header = header_bytes(root / file)
    writer.put(f"{file}.header", torch.frombuffer(bytearray(header), dtype=torch.uint8))
    for part in parts:
        name = part.info.name
        if part.kept is None:
            writer.put(name, _read(root, part.info))
        else:
            whole, stored = _bits(root, part.info, masks)
            writer.put(f"{name}.bitmask", pack_bits(stored))
            writer.put(f"{name}.values", whole[stored].view(part.info.dtype))
    writer.done(f"file {file}")


def _copy_others(root: Path, target: Path, left_out: set[str]) -> None:
    """Every other file of the folder, one level of folders too."""
    for path in sorted([*root.glob("*"), *root.glob("*/*")]):
        if path.is_file() and path.name not in left_out and not path.name.startswith("."):
            place = target / path.relative_to(root)
            with writing(place):
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, place)


def _restored(root: Path, file: str) -> Iterator[torch.Tensor]:
    """The bytes of the file that ``sparse-FILE`` stands for, in pieces: flat tensors of bytes."""
    try:
        yield from _decoded(root, file)
    except (LookupError, TypeError, RuntimeError) as error:  # a tensor is missing, or of another kind or shape
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{root / (PREFIX + file)}: does not decode ({reason})", hint="export it again") from None


def _decoded(root: Path, file: str) -> Iterator[torch.Tensor]:
    tensors = read_header(root / f"{PREFIX}{file}")
    header = _read(root, tensors[f"{file}.header"])
    yield header
    infos = parse_header(bytes(header.numpy().tobytes()), file)
    every = (
        tensors
        if file != MASKS
        else {k: v for path in sorted(root.glob(f"{PREFIX}*")) for k, v in read_header(path).items()}
    )
    for info in sorted(infos.values(), key=lambda info: (info.offset, info.nbytes)):
        if file == MASKS:
            yield _read(root, every[info.name.removesuffix(SUFFIX) + ".bitmask"]).flatten()
        elif info.name in tensors:
            yield _read(root, tensors[info.name]).reshape(-1).view(torch.uint8)
        else:
            bits = unpack_bits(_read(root, tensors[f"{info.name}.bitmask"]), math.prod(info.shape[1:]))
            whole = torch.zeros(bits.shape, dtype=INTEGERS[info.dtype.itemsize])
            whole[bits] = _read(root, tensors[f"{info.name}.values"]).view(whole.dtype)
            yield whole.flatten().view(torch.uint8)


def _prove(root: Path, manifest: Mapping[str, Any]) -> None:
    for file, digest in manifest["files"].items():
        found = hashlib.sha256()
        for piece in _restored(root, file):
            found.update(bytes_of(piece))
        if found.hexdigest() != digest:
            raise VerificationError(
                f"{root}: decoding {PREFIX}{file} does not give the bytes of {file}", hint=str(root)
            )


def _write_file(root: Path, file: str, path: Path, digest: str) -> None:
    found = hashlib.sha256()
    with path.open("wb") as out:
        for piece in _restored(root, file):
            data = bytes_of(piece)
            out.write(data)
            found.update(data)
        out.flush()
        os.fsync(out.fileno())
    if found.hexdigest() != digest:
        path.unlink()
        raise OutputError(f"{path}: what {PREFIX}{file} decodes to has another digest than {file} had")
