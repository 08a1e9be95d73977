"""Tensors of unfinished work put by in one file, durable before it bears its name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from weightworks.store.tensorfile import TensorSpec, build_header, read_bytes, read_header, write_bytes
from weightworks.store.writer import writing


def write_snapshot(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write ``tensors`` to ``path`` in the safetensors layout, one at a time."""
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    header, infos = build_header(specs, path.name)
    unfinished = path.with_suffix(".new")
    with writing(path):
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            if os.pwrite(descriptor, header, 0) != len(header):
                raise OSError(f"{unfinished}: a short write")
            for info in infos:
                write_bytes(descriptor, info.offset, tensors[info.name].detach().cpu().contiguous())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        unfinished.rename(path)


class Snapshot:
    """A file of tensors, read one at a time."""

    def __init__(self, path: Path) -> None:
        self.path, self.infos = path, read_header(path)

    def read(self, name: str) -> torch.Tensor:
        info = self.infos[name]
        return read_bytes(self.path, info.offset, torch.empty(info.shape, dtype=info.dtype))
