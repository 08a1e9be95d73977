"""A packed checkpoint as the dense one it stands for: its weights are decoded as they are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.mixed import elements
from weightworks.store.tensorfile import TensorInfo


@dataclass(frozen=True)
class DecodedCheckpoint(Checkpoint):
    """What ``view`` shows, as a checkpoint. Packed weights [out, in] have the dtype that they had before, float32 if asked."""

    view: DenseView | None = None

    @classmethod
    def of(cls, packed: Checkpoint) -> DecodedCheckpoint:
        """Raises :class:`CheckpointError` for a quantization we cannot decode."""
        view = DenseView(packed)
        assert view.format is not None
        tensors = {}
        for spec in view.specs:
            stored = (
                f"{spec.name.removesuffix('weight')}{view.format.marker}" if view.is_packed(spec.name) else spec.name
            )
            shard = packed.info(stored).shard
            tensors[spec.name] = TensorInfo(spec.name, spec.shape, spec.dtype, spec.nbytes, shard, 0)
        config = {key: value for key, value in packed.config.items() if key != "quantization_config"}
        return cls(packed.root, packed.source, config, tensors, view=view)

    @property
    def as_stored(self) -> bool:
        return False

    @property
    def remarks(self) -> list[str]:
        assert self.view is not None
        assert self.view.scheme is not None
        found = [f"{self.name} is quantized ({elements(self.view.scheme)}): its weights are decoded"]
        if any(self.view.inputs(name) is not None for name in self.view.packed_names):
            found.append(f"{self.name} rounds the inputs of its layers too, which decoded weights do not")
        return found

    def _read(self, info: TensorInfo, shape: tuple[int, ...], skip: int, dtype: torch.dtype | None) -> torch.Tensor:
        assert self.view is not None
        start = skip // max(info.nbytes // max(info.shape[0], 1), 1) if info.shape else 0
        rows = shape[0] if shape else 0
        if shape == info.shape:
            tensor = self.view.read(info.name, dtype)
        else:
            tensor = self.view.read_rows(info.name, start, start + rows, dtype)
        return tensor if dtype is not None else tensor.to(info.dtype)
