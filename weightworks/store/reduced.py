"""A smaller checkpoint: what each of its tensors is made of, read before it is written, and put back among zeros."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch

from weightworks.store.checkpoint import Checkpoint
from weightworks.store.tensorfile import TensorSpec


@dataclass(frozen=True)
class Cut:
    """How one tensor of a smaller checkpoint is made.

    ``sources`` (tensor, weight) are added up, then ``mix`` [new, old] combines places of the first axis, then along each
    axis of ``picks`` only the given places stay, int64, in their order.
    """

    name: str
    sources: tuple[tuple[str, float], ...]
    picks: Mapping[int, torch.Tensor] = field(default_factory=dict)
    mix: torch.Tensor | None = None

    @classmethod
    def copy(cls, name: str, called: str | None = None) -> Cut:
        """The tensor ``name`` as it is, under this or another name."""
        return cls(called or name, ((name, 1.0),))

    @property
    def base(self) -> str:
        """The tensor of the source whose place this one takes."""
        return self.sources[0][0]

    @property
    def plain(self) -> bool:
        """Whether it is a tensor of the source, byte for byte."""
        return len(self.sources) == 1 and self.sources[0][1] == 1 and not self.picks and self.mix is None

    def narrowed(self, axis: int, places: torch.Tensor) -> Cut:
        """The same with only ``places`` of an axis."""
        return replace(self, picks={**self.picks, axis: places})

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Its shape, from that of its source."""
        sizes = dict(enumerate(whole)) | ({} if self.mix is None else {0: self.mix.shape[0]})
        return tuple((sizes | {axis: len(places) for axis, places in self.picks.items()}).values())


class Reader(Protocol):
    """What gives tensors of the smaller checkpoint by name."""

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor: ...


class ReducedView:
    """The smaller checkpoint that ``cuts`` make of ``source``, its tensors computed when they are read."""

    def __init__(self, source: Checkpoint, cuts: Iterable[Cut]) -> None:
        self.source = source
        self.cuts = {cut.name: cut for cut in cuts}

    @property
    def names(self) -> list[str]:
        return list(self.cuts)

    def shape(self, name: str) -> tuple[int, ...]:
        cut = self.cuts[name]
        return cut.shape(self.source.info(cut.base).shape)

    def is_packed(self, name: str) -> bool:
        return False

    @cached_property
    def specs(self) -> list[TensorSpec]:
        return [TensorSpec(name, self.shape(name), self.source.info(cut.base).dtype) for name, cut in self.cuts.items()]

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole tensor, rounded to the dtype that it is stored in; sums are of float32."""
        cut = self.cuts[name]
        stored = self.source.info(cut.base).dtype
        if len(cut.sources) == 1 and cut.sources[0][1] == 1:
            tensor = self.source.read(cut.base)
        else:
            tensor = torch.zeros(self.source.info(cut.base).shape)
            for source, weight in (pair for pair in cut.sources if pair[1]):
                tensor.add_(self.source.read(source, torch.float32), alpha=weight)
        if cut.mix is not None:
            tensor = torch.tensordot(cut.mix, tensor.float(), dims=([1], [0]))
        for axis, places in cut.picks.items():
            tensor = tensor.index_select(axis, places)
        tensor = tensor.to(stored)
        return tensor if dtype is None else tensor.to(dtype)


class Restored:
    """The tensors of a smaller checkpoint, as ``reader`` gives them, in their places in the source, zeros elsewhere.

    Names and shapes are the source's: this is the model with its units masked. What the smaller one lacks altogether
    cannot be read.
    """

    def __init__(self, source: Checkpoint, cuts: Iterable[Cut], reader: Reader) -> None:
        self.source, self.reader = source, reader
        self.cuts = {cut.base: cut for cut in cuts}

    def is_packed(self, name: str) -> bool:
        return False

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor of the source ``name``."""
        cut = self.cuts[name]
        tensor = self.reader.read(cut.name, dtype)
        whole = self.source.info(name).shape
        for axis, places in cut.picks.items():
            shape = (*tensor.shape[:axis], whole[axis], *tensor.shape[axis + 1 :])
            tensor = torch.zeros(shape, dtype=tensor.dtype).index_copy(axis, places, tensor)
        return tensor
