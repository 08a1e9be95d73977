"""Masks of pruned weights, kept beside them in ``masks.safetensors``: one bit a weight, set where it is kept.

Zeros alone do not tell: a kept weight may be zero, or become it in a 16-bit dtype. Stock loaders do not look at the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from weightworks.errors import CheckpointError, VerificationError
from weightworks.store.checkpoint import MASKS
from weightworks.store.dense import DenseView
from weightworks.store.tensorfile import TensorInfo, TensorSpec, read_bytes, read_header

SUFFIX = ".mask"  # follows the name of the weight
PLACES = (1, 2, 4, 8, 16, 32, 64, 128)


def mask_spec(name: str, shape: tuple[int, int]) -> TensorSpec:
    """The tensor that stands for the mask of the weight ``name`` of this (stored) shape."""
    return TensorSpec(name + SUFFIX, (shape[0], math.ceil(shape[1] / 8)), torch.uint8)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """bool [rows, columns] to uint8 [rows, ceil(columns / 8)]: column i is bit i % 8 of byte i // 8, the last bits 0."""
    rows, columns = mask.shape
    padded = torch.zeros(rows, math.ceil(columns / 8) * 8, dtype=torch.uint8)
    padded[:, :columns] = mask
    places = torch.tensor(PLACES, dtype=torch.uint8)
    return (padded.view(rows, -1, 8) * places).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of :func:`pack_bits`: bool [rows, columns]."""
    places = torch.tensor(PLACES, dtype=torch.uint8)
    return (packed.unsqueeze(-1) & places).ne(0).flatten(1)[:, :columns]


class Masks:
    """The masks in a folder, by the names of the weights; ``shapes`` are those of the packed tensors."""

    def __init__(self, root: Path) -> None:
        self.path = root / MASKS
        self.infos: Mapping[str, TensorInfo] = {
            name.removesuffix(SUFFIX): info for name, info in read_header(self.path).items()
        }

    @classmethod
    def of(cls, root: Path) -> Masks | None:
        """The masks of a checkpoint folder; None if it has none."""
        return cls(root) if (root / MASKS).is_file() else None

    def packed(self, name: str) -> torch.Tensor:
        """The mask of the weight ``name`` as it is stored."""
        info = self.infos[name]
        return read_bytes(self.path, info.offset, torch.empty(info.shape, dtype=info.dtype))

    def kept(self, name: str) -> int:
        """How many weights of ``name`` are kept."""
        return int(unpack_bits(self.packed(name), 8 * self.infos[name].shape[1]).sum())

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The mask of the weight ``name`` of the given shape: bool, True where it is kept."""
        if len(shape) != 2 or self.infos[name].shape != mask_spec(name, shape).shape:
            raise CheckpointError(f"{self.path}: the mask of '{name}' does not fit its shape {list(shape)}")
        return unpack_bits(self.packed(name), shape[1])


def check_masks(view: DenseView) -> dict[str, int] | None:
    """Hold the weights of a folder against its masks: ``tensors`` pruned, their ``weights``, and how many are ``kept``.

    None if there are no masks. Raises :class:`VerificationError` for a pruned weight that is not zero, and a
    :class:`CheckpointError` for a mask that fits no weight.
    """
    masks = Masks.of(view.checkpoint.root)
    if masks is None:
        return None
    names, weights, kept = set(view.names), 0, 0
    for name in masks.infos:
        if name not in names:
            raise CheckpointError(f"{masks.path}: a mask of '{name}', which is not in the checkpoint")
        mask = masks.read(name, view.shape(name))
        wrong = int(((view.read(name) != 0) & ~mask).count_nonzero())
        if wrong:
            raise VerificationError(f"tensor '{name}': {wrong} weights that its mask says are pruned are not zero")
        weights, kept = weights + mask.numel(), kept + int(mask.sum())
    return {"tensors": len(masks.infos), "weights": weights, "kept": kept}
