"""Factors that stand for weights, kept beside them in ``factors.safetensors``: W = A S B, A and B block-diagonal, S sparse.

The dense weight in the checkpoint is their product, rounded once; stock loaders do not look at the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from weightworks.errors import CheckpointError, VerificationError
from weightworks.store.checkpoint import FACTORS
from weightworks.store.dense import DenseView
from weightworks.store.masks import SUFFIX, mask_spec, pack_bits, unpack_bits
from weightworks.store.tensorfile import TensorInfo, TensorSpec, read_bytes, read_header

KEPT, OF = 2, 4  # of every four consecutive inputs of the core two are kept


@dataclass(frozen=True, slots=True)
class Factors:
    """A as ``left`` [out / b, b, b], S as ``core`` [out, in] with its ``mask`` bool [out, in], B as ``right`` [in / b, b, b]."""

    left: torch.Tensor
    core: torch.Tensor
    mask: torch.Tensor
    right: torch.Tensor

    def to(self, dtype: torch.dtype) -> Factors:
        """The same, its numbers rounded to ``dtype``."""
        return Factors(self.left.to(dtype), self.core.to(dtype), self.mask, self.right.to(dtype))

    def dense(self) -> torch.Tensor:
        """A S B, float32 [out, in]."""
        (rows, columns), size = self.core.shape, self.right.shape[-1]
        core = self.core.float().view(rows, columns // size, size).movedim(1, 0)  # [in / b, out, b]
        wide = torch.bmm(core, self.right.float()).movedim(0, 1).reshape(-1, size, columns)
        return torch.bmm(self.left.float(), wide).view(rows, columns)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What stands for the weight ``name`` in the file."""
        kept = self.core[self.mask].view(self.core.shape[0], -1)
        return {
            f"{name}.left": self.left,
            f"{name}.values": kept,
            f"{name}{SUFFIX}": pack_bits(self.mask.cpu()),
            f"{name}.right": self.right,
        }


def factor_specs(name: str, shape: tuple[int, int], size: int, dtype: torch.dtype) -> list[TensorSpec]:
    """The tensors of the weight ``name`` [out, in], as ``Factors.tensors`` makes them."""
    rows, columns = shape
    return [
        TensorSpec(f"{name}.left", (rows // size, size, size), dtype),
        TensorSpec(f"{name}.values", (rows, columns * KEPT // OF), dtype),
        mask_spec(name, shape),
        TensorSpec(f"{name}.right", (columns // size, size, size), dtype),
    ]


class FactorFile:
    """The factors in a folder; ``names`` are those of the weights they stand for."""

    def __init__(self, root: Path) -> None:
        self.path = root / FACTORS
        self.infos: Mapping[str, TensorInfo] = read_header(self.path)
        self.names = [name.removesuffix(".left") for name in self.infos if name.endswith(".left")]

    @classmethod
    def of(cls, root: Path) -> FactorFile | None:
        """The factors of a checkpoint folder; None if it has none."""
        return cls(root) if (root / FACTORS).is_file() else None

    def read(self, name: str) -> Factors:
        """The factors of the weight ``name``. Raises :class:`CheckpointError` if they are no such factors."""
        left, values, right = (self._tensor(name + part) for part in (".left", ".values", ".right"))
        size = left.shape[-1]
        shape = (len(left) * size, len(right) * size)
        specs = {spec.name: spec.shape for spec in factor_specs(name, shape, size, left.dtype)}
        packed = self._tensor(name + SUFFIX)
        if any(self.infos[part].shape != wanted for part, wanted in specs.items()):
            raise CheckpointError(f"{self.path}: the factors of '{name}' do not fit each other")
        mask = unpack_bits(packed, shape[1])
        if not bool((mask.view(shape[0], -1, OF).sum(-1) == KEPT).all()):
            raise CheckpointError(f"{self.path}: the core of '{name}' does not keep {KEPT} of every {OF} inputs")
        core = torch.zeros(shape, dtype=values.dtype)
        core[mask] = values.flatten()
        return Factors(left, core, mask, right)

    def _tensor(self, name: str) -> torch.Tensor:
        info = self.infos.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: has no '{name}'")
        return read_bytes(self.path, info.offset, torch.empty(info.shape, dtype=info.dtype))


def check_factors(view: DenseView) -> dict[str, int] | None:
    """Hold the weights of a folder against its factors: how many ``tensors``, their ``weights``, and ``kept`` in the cores.

    None if there are none. Raises :class:`VerificationError` for a weight that is not their product, up to the last bit or
    two of its dtype, and a :class:`CheckpointError` for factors that fit no weight.
    """
    factors = FactorFile.of(view.checkpoint.root)
    if factors is None:
        return None
    names, weights, kept = set(view.names), 0, 0
    for name in factors.names:
        found = factors.read(name)
        if name not in names or sorted(view.shape(name)) != sorted(found.core.shape):
            raise CheckpointError(f"{factors.path}: the factors of '{name}' stand for no weight of the checkpoint")
        stored, product = view.read(name), found.dense()
        ways = [product, product.T]  # some layers are stored [in, out]
        error = min(float((stored.float() - way).abs().max()) for way in ways if way.shape == stored.shape)
        allowed = 2 * torch.finfo(stored.dtype).eps * float(product.abs().max())
        if error > allowed:
            raise VerificationError(
                f"tensor '{name}': is not the product of its factors: off by {error:.3g}, rounding allows {allowed:.3g}"
            )
        weights, kept = weights + found.core.numel(), kept + int(found.mask.sum())
    return {"tensors": len(factors.names), "weights": weights, "kept": kept}
