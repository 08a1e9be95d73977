"""A packed checkpoint seen as the dense one it stands for: same names as the source, weights decoded when read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch

from weightworks.errors import CheckpointError
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.compressed import MIXED, layout_of
from weightworks.store.formats import packed_scheme
from weightworks.store.layout import Format, inputs_of
from weightworks.store.mixed import MixedScheme, scheme_for
from weightworks.store.packing import Scheme
from weightworks.store.tensorfile import TensorInfo, TensorSpec


class DenseView:
    """The dense tensors a checkpoint stands for. For a dense checkpoint this is the checkpoint itself.

    ``names`` lists them; ``read`` gives one, decoded in float32 where packed, else as stored.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        packed = packed_scheme(checkpoint)
        self.format: Format | None = packed[0] if packed else None
        self.scheme: Scheme | MixedScheme | None = packed[1] if packed else None

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.checkpoint.tensors

    @cached_property
    def packed(self) -> frozenset[str]:
        """Bases (names without ``.weight``) that are stored packed."""
        if self.format is None:
            return frozenset()
        ending = "." + self.format.marker
        found = frozenset(name.removesuffix(ending) for name in self.tensors if name.endswith(ending))
        if lost := sorted(base for base in found if self._scheme(base) is None):
            raise CheckpointError(
                f"{self.checkpoint.root}: {len(lost)} packed weights are in no group of quantization_config: {lost[0]}",
                hint="config.json and tensors disagree",
            )
        return found

    def _scheme(self, base: str) -> Scheme | None:
        return scheme_for(self.scheme, base)

    @cached_property
    def names(self) -> list[str]:
        """Names of the dense tensors, in file order."""
        if self.format is None:
            return list(self.tensors)
        names: dict[str, None] = {}
        for name in self.tensors:
            base, _, suffix = name.rpartition(".")
            packed = base in self.packed and suffix in self.format.suffixes
            names[f"{base}.weight" if packed else name] = None
        return list(names)

    @property
    def packed_names(self) -> list[str]:
        """Names of the dense tensors that are stored packed, in file order."""
        return [name for name in self.names if self.is_packed(name)]

    def is_packed(self, name: str) -> bool:
        return name.removesuffix(".weight") in self.packed

    def inputs(self, name: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What is done to inputs [..., in] before weight ``name`` multiplies them; None if nothing."""
        if not self.is_packed(name):
            return None
        return inputs_of(self.checkpoint, name.removesuffix(".weight"), self.scheme_of(name))

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of a packed tensor; None for others."""
        return self._scheme(name.removesuffix(".weight")) if self.is_packed(name) else None

    def format_of(self, name: str) -> Format | None:
        """The layout of a packed tensor; None for others."""
        scheme = self.scheme_of(name)
        return self.format if scheme is None or self.format is not MIXED else layout_of(scheme)

    @property
    def decodes_to(self) -> torch.dtype | None:
        """The dtype that stock loaders decode some weights to, whatever they are asked for; None if none."""
        forms = (self.format_of(name) for name in self.packed_names)
        return next((form.decodes_to for form in forms if form is not None and form.decodes_to), None)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the dense tensor, from headers alone (GPTQ layouts give [out, in])."""
        if not self.is_packed(name):
            return self.checkpoint.info(name).shape
        assert self.format is not None
        return self.format.shape(self.checkpoint, name.removesuffix(".weight"), self.scheme_of(name))

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that the packed weights had: that of most of the bytes that are not packed."""
        amounts: dict[torch.dtype, int] = {}
        for name in self.names:
            if not self.is_packed(name) and (info := self.checkpoint.info(name)).dtype.is_floating_point:
                amounts[info.dtype] = amounts.get(info.dtype, 0) + info.nbytes
        return max(amounts, key=lambda dtype: amounts[dtype], default=torch.float32)

    @cached_property
    def specs(self) -> list[TensorSpec]:
        """The dense tensors, a packed one as it was before: [out, in] in ``dtype``."""
        return [
            TensorSpec(name, self.shape(name), self.dtype if self.is_packed(name) else self.checkpoint.info(name).dtype)
            for name in self.names
        ]

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows ``start:stop`` of the dense tensor; a packed weight is decoded whole for it."""
        if not self.is_packed(name):
            return self.checkpoint.read_rows(name, start, stop, dtype)
        return self.read(name, dtype)[start:stop]

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense tensor; a packed weight is decoded to [out, in] in float32."""
        if not self.is_packed(name):
            return self.checkpoint.read(name, dtype)
        layout = self.format_of(name)
        assert layout is not None
        weight = layout.load(self.checkpoint, name.removesuffix(".weight"), self.scheme_of(name)).dequantize()
        return weight if dtype is None else weight.to(dtype)
