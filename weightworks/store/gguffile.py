"""GGUF files: what stands before the first tensor, planned and read; never a memory map.

The bytes of the header come from the ``gguf`` package, which knows how metadata is stored; this module adds the plan of a file
whose tensors do not exist yet, and a reader that takes headers alone and refuses what is torn.
"""

from __future__ import annotations

import math
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from weightworks.errors import CheckpointError
from weightworks.store.ggml import BlockType
from weightworks.store.tensorfile import MAX_HEADER_BYTES, read_bytes

SUFFIX = ".gguf"
ALIGNMENT = 32  # every tensor starts on a multiple of it
DECODED = 1 << 20  # bytes decoded at a time
NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
NESTED = 4  # arrays within arrays; ggml itself reads none

Value = str | int | float | bool | list[Any]  # integers are stored as uint32, floats as float32
Metadata = Mapping[str, Value]


@dataclass(frozen=True)
class GgufSpec:
    """A tensor of a file before it exists; ``shape`` [rows, columns] as in torch."""

    name: str
    shape: tuple[int, ...]
    kind: BlockType

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.kind.row_bytes(self.shape[-1])

    @property
    def room(self) -> int:
        """Bytes it takes in the file: up to where the next may start."""
        return padded(self.nbytes)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a file: name, ``shape`` as in torch, the ``kind`` ggml calls it, and where its bytes lie."""

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int
    offset: int  # from the start of the file


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file by its header: ``metadata`` by key, ``tensors`` by name in file order."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))


def padded(nbytes: int) -> int:
    """Bytes up to the next multiple of the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def opening(architecture: str, metadata: Metadata, specs: Iterable[GgufSpec]) -> bytes:
    """The bytes before the first tensor of a file that will hold ``specs`` in that order, filled up to the alignment."""
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer = GGUFWriter(path, architecture)
        for key, value in metadata.items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, list):
                writer.add_array(key, value)
            else:
                writer.add_key_value(key, value, kinds[type(value)])
        for spec in specs:
            kind = GGMLQuantizationType[spec.kind.name]
            writer.add_tensor_info(spec.name, spec.shape, np.dtype(np.float32), spec.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        data = path.read_bytes()
    return data.ljust(padded(len(data)), b"\0")


def read_gguf(path: Path) -> GgufFile:
    """A file by its header. What is no GGUF, torn, or of a version or type unknown is refused."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            return _read(path, _Cursor(file, path, size), size)
        except (ValueError, KeyError, struct.error) as error:
            raise CheckpointError(f"{path}: wrong header: {error}", hint="fetch or export the file again") from None


def decoded(file: GgufFile, tensor: GgufTensor) -> Iterator[torch.Tensor]:
    """What a tensor of any type means, float32 [elements], a few blocks at a time, as the ``gguf`` package decodes it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[tensor.kind]
    width = GGML_QUANT_SIZES[kind][1]
    step = max(1, DECODED // width)
    for start in range(0, tensor.nbytes // width, step):
        count = min(step, tensor.nbytes // width - start)
        blocks = torch.empty(count, width, dtype=torch.uint8)
        read_bytes(file.path, tensor.offset + start * width, blocks)
        yield torch.from_numpy(np.ascontiguousarray(dequantize(blocks.numpy(), kind))).flatten()


class _Cursor:
    """Reads values one after the other; what the file ends before is a ``ValueError``."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size = file, path, size

    def take(self, count: int) -> bytes:
        end = self.file.tell() + count
        if end > self.size:
            raise ValueError(f"the file ends at byte {self.size:,}, within the header")
        if end > MAX_HEADER_BYTES:
            raise ValueError(f"it is longer than {MAX_HEADER_BYTES:,} bytes")
        return self.file.read(count)

    def number(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def string(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if depth > NESTED:
            raise ValueError(f"arrays are nested more than {NESTED} deep")
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner not in NUMBERS:
                return [self.value(inner, depth + 1) for _ in range(count)]
            width = struct.calcsize(NUMBERS[inner])
            return list(struct.unpack(f"<{count}{NUMBERS[inner][1]}", self.take(count * width)))
        if kind not in NUMBERS:
            raise ValueError(f"a value of type {kind}")
        return self.number(NUMBERS[kind])


def _read(path: Path, cursor: _Cursor, size: int) -> GgufFile:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version, count, pairs = cursor.number("<I"), cursor.number("<Q"), cursor.number("<Q")
    if version not in (2, 3):
        raise ValueError(f"version {version}; 2 and 3 are known")
    metadata = {}
    for _ in range(pairs):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("<I"))
    entries = []
    for _ in range(count):
        name, axes = cursor.string(), cursor.number("<I")
        shape = tuple(cursor.number("<Q") for _ in range(axes))[::-1]
        entries.append((name, shape, GGMLQuantizationType(cursor.number("<I")), cursor.number("<Q")))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= MAX_HEADER_BYTES:
        raise ValueError(f"general.alignment is {alignment!r}, not a number of bytes")
    start = -(-cursor.file.tell() // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in entries:
        width, nbytes = GGML_QUANT_SIZES[kind]
        if shape and shape[-1] % width:
            raise ValueError(f"tensor '{name}' has rows of {shape[-1]}, {kind.name} takes multiples of {width}")
        if name in tensors:
            raise ValueError(f"tensor '{name}' is there twice")
        tensor = GgufTensor(name, shape, kind.name, math.prod(shape) // width * nbytes, start + offset)
        if tensor.offset + tensor.nbytes > size:
            raise ValueError(f"tensor '{name}' ends at byte {tensor.offset + tensor.nbytes:,}, the file at {size:,}")
        tensors[name] = tensor
    return GgufFile(path, metadata, tensors)
