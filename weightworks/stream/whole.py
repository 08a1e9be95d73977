"""A model whole in memory, for methods that train it: its values in float32, its masks, and the way back to tensors.

What is trained is held in float32, whatever the checkpoint's dtype; the rest in the dtype of the passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weightworks.stream.linears import Linear, read_linear, turned
from weightworks.stream.skeleton import DenseReader, Skeleton, place


@dataclass(frozen=True)
class Subset:
    """What is trained of a model: the parameters ``names``."""

    names: tuple[str, ...]

    def tensors(self, skeleton: Skeleton) -> set[str]:
        """The checkpoint's tensors that training changes."""
        return {piece.tensor for name in self.names for piece in skeleton.pieces[name]}


class Whole:
    """A model in memory. ``linears`` are its weights that may be pruned, by tensor, in the order of the model.

    ``values`` are what is trained, by name; ``masks`` bool by parameter, True where it is kept; ``extra`` what a method wants
    to keep beside them. All three survive an interruption. ``earlier`` gives the values that were put by, by name.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        reader: DenseReader,
        linears: Mapping[str, Linear],
        subset: Subset,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.skeleton, self.reader, self.linears, self.subset = skeleton, reader, linears, subset
        self.dtype, self.device = dtype, device
        self.values: dict[str, nn.Parameter] = {}
        self.masks: dict[str, torch.Tensor] = {}
        self.extra: dict[str, torch.Tensor] = {}
        self.earlier: Callable[[str], torch.Tensor] | None = None

    @property
    def model(self) -> Any:
        """The causal LM of transformers, in evaluation mode: no dropout."""
        return self.skeleton.model

    def load(self) -> None:
        """Read all weights."""
        trained = set(self.subset.names)
        for name in self.skeleton.pieces:
            self.skeleton.load(self.reader, [name], torch.float32 if name in trained else self.dtype, self.device)
        for name in self.subset.names:
            self.values[name] = value = self.skeleton.parameter(name)
            value.requires_grad_(True)

    def unload(self) -> None:
        """Give the memory back; the skeleton is as it was."""
        self.values, self.masks, self.extra = {}, {}, {}
        self.skeleton.unload(list(self.skeleton.pieces))

    def weight(self, tensor: str) -> torch.Tensor:
        """The live weight [out, in] that a checkpoint tensor stands for: a view."""
        linear = self.linears[tensor]
        return turned(place(self.skeleton.get(linear.full).data, linear.piece), linear)

    def mask(self, tensor: str) -> torch.Tensor:
        """The live mask [out, in] of that weight: a view, all True until something else is written into it."""
        linear = self.linears[tensor]
        if linear.full not in self.masks:
            shape = self.skeleton.get(linear.full).shape
            self.masks[linear.full] = torch.ones(shape, dtype=torch.bool, device=self.device)
        return turned(place(self.masks[linear.full], linear.piece), linear)

    def original(self, tensor: str) -> torch.Tensor:
        """The weight float32 [out, in] that the checkpoint has."""
        return read_linear(self.reader, self.linears[tensor]).to(self.device)

    @torch.no_grad()
    def hold(self) -> None:
        """Set to zero what the masks say is pruned."""
        for name, mask in self.masks.items():
            self.values[name].masked_fill_(~mask, 0)

    @torch.no_grad()
    def rewind(self, *, start: bool) -> None:
        """Bring all trained values back: to the checkpoint's, or (not ``start``) to those put by. Masks stay, and are held."""
        for name in self.subset.names:
            if start or self.earlier is None:
                self.values[name].copy_(self.skeleton.assemble(self.reader, name, torch.float32))
            else:
                self.values[name].copy_(self.earlier(name))
        self.hold()

    def stored(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every changed tensor in the checkpoint's shape, in float32."""
        for name in self.subset.names:
            pieces = self.skeleton.pieces[name]
            for piece in pieces:
                yield piece.tensor, place(self.values[name].data, piece) if len(pieces) > 1 else self.values[name].data
