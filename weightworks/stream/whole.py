"""A model whole in memory, for methods that train it: its values in float32, its masks, and the way back to tensors.

What is trained is held in float32, whatever the checkpoint's dtype; the rest in the dtype of the passes. A weight may be
trained through an adapter: it stays as it is, and the model multiplies with what the adapter makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from weightworks.errors import ArchitectureError
from weightworks.stream.lessons import keyed
from weightworks.stream.linears import Linear, read_linear, turned
from weightworks.stream.skeleton import DenseReader, Skeleton, place

Adapt = Callable[[torch.Tensor, torch.Tensor, torch.Generator], nn.Module]
"""Makes an adapter for a weight float [out, in] with a mask bool [out, in], drawing from a generator: a module that takes the
weight to the one that is multiplied with, in float32. Its own parameters are trained."""


@dataclass(frozen=True)
class Outline:
    """What there is to train, before anything is loaded: ``linears`` by tensor, and the ``head`` unless it is the embedding.

    What is drawn of it follows from ``seed``.
    """

    skeleton: Skeleton
    linears: Mapping[str, Linear]
    head: Linear | None
    seed: int = 0

    @property
    def weights(self) -> list[str]:
        """Parameters that are made of ``linears`` alone."""
        names = dict.fromkeys(linear.full for linear in self.linears.values())
        return [name for name in names if all(piece.tensor in self.linears for piece in self.skeleton.pieces[name])]

    @property
    def half(self) -> list[str]:
        """Half of ``weights``, of each block as near to it as it can be (Hui et al., "HFT", arXiv:2404.18466)."""
        drawn: set[str] = set()
        for number, (prefix, _) in enumerate(self.skeleton.blocks):
            inside = [name for name in self.weights if name.startswith(prefix + ".")]
            order = torch.randperm(len(inside), generator=keyed(self.seed, f"half of block {number}"))
            count = (len(inside) + number % 2) // 2  # of an odd number: more and less in turn
            drawn |= {inside[place] for place in order[:count]}
        return [name for name in self.weights if name in drawn]

    def inside(self, name: str) -> bool:
        """Whether a parameter is one of a block."""
        return any(name.startswith(prefix + ".") for prefix, _ in self.skeleton.blocks)

    def halves(self, index: int) -> tuple[str, str]:
        """The modules of a block that hold its attention and its MLP, by their names in it.

        Raises :class:`ArchitectureError` for a block whose linears are not in two such modules.
        """
        prefix = self.skeleton.blocks[index][0] + "."
        counts: dict[str, int] = {}
        for name in self.skeleton.names_of(index):
            if self.skeleton.get(name).ndim > 1:
                child = name.removeprefix(prefix).partition(".")[0]
                counts[child] = counts.get(child, 0) + 1
        found = [child for child, count in counts.items() if count > 1]
        if len(found) != 2 or len(counts) != 2:
            raise ArchitectureError(
                f"{type(self.skeleton.blocks[index][1]).__name__}: its weights are in {', '.join(counts)}, not in a module for "
                "attention and one for the MLP",
                hint="take --window block",
            )
        return found[0], found[1]

    @property
    def biases(self) -> list[str]:
        """What is added: of linear layers, of normalisation, of experts."""
        return [name for name in self.skeleton.learnable if name.rpartition(".")[2].endswith("bias")]

    @property
    def norms(self) -> list[str]:
        """Gains and biases of normalisation: vectors called weight, and the biases beside them."""
        found = set()
        for name in self.skeleton.learnable:
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" and self.skeleton.get(name).ndim == 1:
                found |= {name, f"{module}.bias"}
        return [name for name in self.skeleton.learnable if name in found]


@dataclass(frozen=True)
class Subset:
    """What is trained of a model: the parameters ``names``, and the linears ``adapters`` (by tensor) through an adapter.

    ``added`` is how many parameters the adapters have; ``fallbacks`` say in words what was asked for and is not done.
    """

    names: tuple[str, ...]
    adapters: Mapping[str, Adapt] = field(default_factory=dict)
    added: int = 0
    fallbacks: tuple[str, ...] = ()

    def tensors(self, skeleton: Skeleton) -> set[str]:
        """The checkpoint's tensors that training changes."""
        return {piece.tensor for name in self.names for piece in skeleton.pieces[name]} | set(self.adapters)


class Whole:
    """A model in memory. ``linears`` are its weights that may be pruned or adapted, by tensor, in the order of the model.

    ``values`` are what is trained, by name; ``masks`` bool by parameter, True where it is kept; ``extra`` what a method wants
    to keep beside them. ``earlier`` gives the values that were put by, by name.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        reader: DenseReader,
        linears: Mapping[str, Linear],
        subset: Subset,
        dtype: torch.dtype,
        device: torch.device,
        *,
        seed: int = 0,
    ) -> None:
        self.skeleton, self.reader, self.linears, self.subset = skeleton, reader, linears, subset
        self.dtype, self.device, self.seed = dtype, device, seed
        self.values: dict[str, nn.Parameter] = {}
        self.masks: dict[str, torch.Tensor] = {}
        self.extra: dict[str, torch.Tensor] = {}
        self.adapters: dict[str, nn.Module] = {}
        self.earlier: Callable[[str], torch.Tensor] | None = None
        self.names: list[str] = []  # parameters that are loaded

    @property
    def model(self) -> Any:
        """The causal LM of transformers, in evaluation mode: no dropout."""
        return self.skeleton.model

    def load(self, names: Sequence[str] | None = None, masks: Iterable[tuple[str, torch.Tensor]] = ()) -> None:
        """Read the parameters ``names`` (all), and make adapters; ``masks`` bool [out, in], by tensor, are those there are."""
        self.names = list(self.skeleton.pieces if names is None else names)
        trained = set(self.subset.names)
        for name in self.names:
            self.skeleton.load(self.reader, [name], torch.float32 if name in trained else self.dtype, self.device)
            if name in trained:
                self.values[name] = value = self.skeleton.parameter(name)
                value.requires_grad_(True)
        for tensor, mask in masks:
            if self.linears[tensor].full in self.names:
                self.mask(tensor).copy_(mask)
        places: dict[str, list[Linear]] = {}
        for tensor in self.subset.adapters:
            if self.linears[tensor].full in self.names:
                places.setdefault(self.linears[tensor].full, []).append(self.linears[tensor])
        for full, linears in places.items():
            self._adapt(full, linears)

    def _adapt(self, full: str, linears: Sequence[Linear]) -> None:
        """Let the layer multiply with what adapters make of the weights ``linears`` of its parameter ``full``."""
        for linear in linears:
            weight, name = self.weight(linear.tensor), linear.tensor
            mask = self.mask(name) if full in self.masks else weight != 0
            adapter = self.subset.adapters[name](weight, mask, keyed(self.seed, f"adapter {name}"))
            self.adapters[name] = adapter.to(self.device)
            self.values.update((f"{name}: {leaf}", value) for leaf, value in adapter.named_parameters())
        effective = Effective([(linear, self.adapters[linear.tensor]) for linear in linears])
        module, leaf = self.skeleton.holder(full), full.rpartition(".")[2]
        register_parametrization(module, leaf, effective, unsafe=True)  # it may be float32 of a weight that is not

    def unload(self) -> None:
        """Give the memory back; the skeleton is as it was."""
        for full in {self.linears[tensor].full for tensor in self.adapters}:
            remove_parametrizations(self.skeleton.holder(full), full.rpartition(".")[2], leave_parametrized=False)
        self.values, self.masks, self.extra, self.adapters = {}, {}, {}, {}
        self.skeleton.unload(self.names)

    def weight(self, tensor: str) -> torch.Tensor:
        """The weight [out, in] that a checkpoint tensor stands for: a view of it, unless it is adapted."""
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
    def merged(self, tensor: str) -> torch.Tensor:
        """The weight float32 [out, in] that stands for an adapted one: made of the checkpoint's, not of one that was rounded."""
        if tensor not in self.adapters:
            return self.weight(tensor)
        merged: torch.Tensor = self.adapters[tensor](self.original(tensor))
        return merged

    def mask_zeros(self) -> None:
        """Take the zeros of trained weights that have no mask as pruned."""
        bare = {name for name in self.values if name not in self.masks}
        for tensor, linear in self.linears.items():
            if linear.full in bare and bool((zeros := self.weight(tensor) == 0).any()):
                self.mask(tensor).copy_(~zeros)

    @torch.no_grad()
    def hold(self) -> None:
        """Set to zero what the masks say is pruned."""
        for name, mask in self.masks.items():
            if name in self.values:
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

    def stored(self) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
        """Every changed tensor with what makes it, in float32 and in the checkpoint's shape: not all are held at once."""
        for name in self.subset.names:
            if name in self.values:
                pieces, value = self.skeleton.pieces[name], self.values[name].data
                for piece in pieces:
                    yield piece.tensor, partial(place, value, piece) if len(pieces) > 1 else partial(_same, value)
        for tensor in self.adapters:
            yield tensor, partial(self._turned, tensor)

    def _turned(self, tensor: str) -> torch.Tensor:
        return turned(self.merged(tensor), self.linears[tensor])


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class Effective(nn.Module):
    """A parameter as a layer multiplies with it, some or all of its weights adapted. Always computed in float32."""

    def __init__(self, parts: Sequence[tuple[Linear, nn.Module]]) -> None:
        super().__init__()
        self.linears = [linear for linear, _ in parts]
        self.adapters = nn.ModuleList([adapter for _, adapter in parts])

    def forward(self, parameter: torch.Tensor) -> torch.Tensor:
        with torch.autocast(parameter.device.type, enabled=False):
            if len(self.linears) == 1 and self.linears[0].piece.expert is None:
                linear = self.linears[0]
                return turned(self.adapters[0](turned(parameter, linear)), linear)
            whole = parameter.float().clone()
            for linear, adapter in zip(self.linears, self.adapters, strict=True):
                part = place(whole, linear.piece)
                part.copy_(adapter(place(parameter, linear.piece)))
            return whole
