"""A packed checkpoint as the dense one it stands for: its weights are decoded as they are read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.mixed import elements
from weightworks.store.tensorfile import TensorInfo


@dataclass(frozen=True)
class DecodedCheckpoint(Checkpoint):
    """What ``view`` shows, as a checkpoint. Packed weights [out, in] have the dtype that they had before, float32 if asked.

    ``last`` has the weight that was decoded last: a few rows are read at a time, and decoding takes the whole.
    """

    view: DenseView | None = None
    last: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

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
        if not self.view.is_packed(info.name):
            packed = self.view.checkpoint
            return packed._read(packed.info(info.name), shape, skip, dtype)
        start = skip // (info.nbytes // info.shape[0])
        return self._decoded(info.name)[start : start + shape[0]].to(dtype or info.dtype, copy=True)

    def _decoded(self, name: str) -> torch.Tensor:
        """A packed weight in float32, not to be changed."""
        assert self.view is not None
        if (weight := self.last.get(name)) is None:
            weight = self.view.read(name)
            self.last.clear()
            self.last[name] = weight
        return weight
