"""The safetensors layout, read and planned by header: names, dtypes, shapes, offsets; never a memory map.

The library's own reader maps files into memory. Mapped pages count against a process's memory limit, and a writer that
appends finished tensors needs the header before the data, so both ends of the format live here. Files written here
are read back by the library in the tests.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightworks.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors reader


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor before it exists: name, shape, dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file: name, shape, dtype, and where its bytes lie."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    shard: str  # file name inside the checkpoint folder
    offset: int  # of the first byte, from the start of the file


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in file order, by reading its header alone.

    Every header a careful reader would refuse is refused here: truncated data, holes, overlaps, unknown dtypes.
    """
    raw = header_bytes(path)
    return parse_header(raw, path, size=path.stat().st_size)


def header_bytes(path: Path) -> bytes:
    """What lies before the first tensor of a safetensors file: the length of the header, and the header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path}: {size} bytes is too short for a safetensors file (header length needs 8)")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES or 8 + length > size:
            raise CheckpointError(
                f"{path}: wrong header: it claims {length:,} bytes, the file has {size:,}",
                hint="the file is not safetensors or its download was cut; fetch it again",
            )
        return prefix + file.read(length)


def parse_header(raw: bytes, path: Path | str, *, size: int | None = None) -> dict[str, TensorInfo]:
    """The tensors that the ``header_bytes`` ``raw`` of ``path`` list, in file order; they must fill ``size`` bytes if given."""
    path, begin = Path(path), len(raw)
    try:
        entries = json.loads(raw[8:])
        entries.pop("__metadata__", None)
        infos = [_entry(path, name, entry, begin) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: wrong header: not the JSON that safetensors defines ({error})", hint="fetch the file again"
        ) from None
    infos.sort(key=lambda info: (info.offset, info.nbytes))  # an empty tensor shares its place with the next
    position = begin
    for info in infos:
        if info.offset != position:
            raise CheckpointError(f"{path}: wrong header: tensor '{info.name}' begins at {info.offset}, not {position}")
        position += info.nbytes
    if size is not None and position != size:
        kind = "truncated" if size < position else "longer than its header says"
        raise CheckpointError(
            f"{path}: {kind}: the header needs {position:,} bytes, the file has {size:,}",
            hint="fetch the shard again; nothing was written",
        )
    return {info.name: info for info in infos}


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; nothing if its header is not what it should be."""
    try:
        found = json.loads(header_bytes(path)[8:]).get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _entry(path: Path, name: str, entry: Mapping[str, Any], base: int) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: tensor '{name}' has dtype {entry['dtype']}, known: {', '.join(DTYPES)}")
    shape = entry["shape"]
    begin, end = entry["data_offsets"]
    name.encode()  # a lone surrogate, which JSON can spell, could be written nowhere
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"tensor '{name}' has shape {shape}")
    if type(begin) is not int or type(end) is not int:
        raise TypeError(f"tensor '{name}' has offsets {begin}, {end}")
    spec = TensorSpec(name, tuple(shape), DTYPES[entry["dtype"]])
    if end - begin != spec.nbytes:
        raise ValueError(f"tensor '{name}' spans {end - begin} bytes, its shape needs {spec.nbytes}")
    return TensorInfo(name, spec.shape, spec.dtype, spec.nbytes, path.name, base + begin)


def read_bytes(path: str | Path, offset: int, out: torch.Tensor) -> torch.Tensor:
    """Fill the contiguous tensor ``out`` with the file's bytes from ``offset`` on."""
    if out.numel() == 0:
        return out
    view, place = bytes_of(out), offset
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while view.nbytes:
            count = os.preadv(descriptor, [view], place)
            if not count:
                raise CheckpointError(f"{path}: ended {view.nbytes:,} bytes early while reading at offset {offset:,}")
            view, place = view[count:], place + count
    finally:
        os.close(descriptor)
    return out


def write_bytes(descriptor: int, offset: int, tensor: torch.Tensor) -> memoryview:
    """Write the contiguous ``tensor`` at ``offset``; returns its bytes, for hashing."""
    data = bytes_of(tensor) if tensor.numel() else memoryview(b"")
    view = data
    while view.nbytes:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
    return data


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, in place."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def build_header(
    specs: Iterable[TensorSpec], shard: str, metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[TensorInfo]]:
    """Header bytes and tensor places of a file that will hold ``specs``, and says ``metadata`` of itself.

    Wider dtypes come first, as the library writes them, so that every tensor starts on a multiple of its item size.
    """
    ordered: Sequence[TensorSpec] = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for spec in ordered:
        entries[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base, infos = 8 + len(text), []
    for spec in ordered:
        infos.append(TensorInfo(spec.name, spec.shape, spec.dtype, spec.nbytes, shard, base))
        base += spec.nbytes
    return len(text).to_bytes(8, "little") + text, infos
