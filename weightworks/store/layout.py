"""What a container of quantized weights is: which tensors stand for a weight, and the configuration that says so.

A format turns a weight in codes into named tensors and back. ``base`` is the tensor's name without ``.weight``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from weightworks.errors import CheckpointError, nearest
from weightworks.store.floats import rounding
from weightworks.store.packing import Encoded, Scheme
from weightworks.store.tensorfile import TensorInfo, TensorSpec


class TensorReader(Protocol):
    """Anything that has named tensors: a checkpoint, or one being written."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor: ...


class Format(Protocol):
    """A container of quantized weights."""

    @property
    def name(self) -> str:
        """What ``--format`` calls it."""

    @property
    def marker(self) -> str:
        """The ending of a tensor's name that only packed weights have."""

    @property
    def decodes_to(self) -> torch.dtype | None:
        """The dtype that stock loaders decode weights to, whatever they are asked for; None for the one asked for."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Endings of the names of all tensors that may stand for a weight."""

    def refusal(self, scheme: Scheme, shape: tuple[int, int], *, transposed: bool, expert: bool = False) -> str | None:
        """Why a weight [out, in] of this scheme cannot be stored, or None; ``expert``: models fuse it with others."""

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """The dtype scales are stored in; codes must be computed against it."""

    def specs(self, base: str, shape: tuple[int, int], scheme: Any, dtype: torch.dtype) -> list[TensorSpec]:
        """The tensors that will stand for the weight."""

    def tensors(self, base: str, weight: Any) -> dict[str, torch.Tensor]:
        """The tensors that stand for the weight, as :meth:`specs` announced them."""

    def config(self, scheme: Any, ignore: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
        """The ``quantization_config`` of ``config.json``."""

    def shape(self, reader: TensorReader, base: str, scheme: Any) -> tuple[int, int]:
        """The shape [out, in] of a weight of this scheme."""

    def load(self, reader: TensorReader, base: str, scheme: Any) -> Encoded:
        """Read the weight back."""


def inputs_of(reader: TensorReader, base: str, scheme: Scheme | None) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What is done to inputs before a packed weight multiplies them; None if nothing."""
    if scheme is None or scheme.inputs is None:
        return None
    local = scheme.inputs.scales == "E4M3"
    return rounding(scheme.inputs, part(reader, f"{base}.input_global_scale", (1,), scheme.bits) if local else None)


def shape_of(reader: TensorReader, name: str) -> tuple[int, ...]:
    """The shape of a tensor that must be there."""
    if name not in reader.tensors:
        raise CheckpointError(f"no tensor '{name}' ({nearest(name, reader.tensors)})", hint="the weight is incomplete")
    return reader.tensors[name].shape


def part(reader: TensorReader, name: str, shape: tuple[int, ...], bits: int) -> torch.Tensor:
    """Tensor ``name``, whose shape must be the one that the others and the bit width ask for."""
    seen = shape_of(reader, name)
    if seen != shape:
        raise CheckpointError(
            f"{reader.tensors[name].shard}: tensor '{name}' is {list(seen)}, {bits} bits need {list(shape)}",
            hint="quantization_config and tensors disagree, or the layout is older than compressed-tensors 0.18",
        )
    return reader.read(name)
