"""A checkpoint in another basis of the residual stream: gains of norms folded into weights, all computed as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from weightworks.store.checkpoint import Checkpoint
from weightworks.store.rotations import Rotation
from weightworks.store.tensorfile import TensorInfo


@dataclass(frozen=True, slots=True)
class Turn:
    """What becomes of one tensor W [rows, columns], or of a vector, whose rows are its entries.

    Columns are first multiplied by ``gain``, a tensor of the checkpoint plus ``offset``; then ``right`` makes W Q and ``left``
    Q' W, and ``heads`` Q' of the last ``tail`` rows. ``filled`` puts one value everywhere instead.
    """

    gain: str | None = None
    offset: float = 0.0
    right: Rotation | None = None
    left: Rotation | None = None
    heads: Rotation | None = None
    tail: int = 0
    filled: float | None = None

    @property
    def by_rows(self) -> bool:
        """Whether a row depends on no other."""
        return self.left is None and self.heads is None

    def apply(self, tensor: torch.Tensor, base: Checkpoint) -> torch.Tensor:
        """``tensor`` (rows of it where that is enough) turned, in float64."""
        if self.filled is not None:
            return torch.full_like(tensor, self.filled, dtype=torch.float64)
        turned = tensor.double()
        if self.gain is not None:
            turned = turned * (base.read(self.gain, torch.float64) + self.offset)
        if self.right is not None:
            turned = self.right.right(turned)
        if self.left is not None:
            turned = self.left.left(turned)
        if self.heads is not None:
            start = len(turned) - self.tail
            turned = torch.cat([turned[:start], self.heads.left(turned[start:])])
        return turned


@dataclass(frozen=True)
class RotatedCheckpoint(Checkpoint):
    """``base`` with ``turns`` by tensor. ``heads`` are tensors that are read in place of others, by the name they get: the
    embedding for an output head that was shared with it."""

    base: Checkpoint | None = None
    turns: Mapping[str, Turn] | None = None
    heads: Mapping[str, str] | None = None

    @classmethod
    def of(cls, base: Checkpoint, turns: Mapping[str, Turn], heads: Mapping[str, str]) -> RotatedCheckpoint:
        """``base`` seen so; an output head of its own is told in the configuration."""
        tensors = dict(base.tensors)
        for name, source in heads.items():
            tensors[name] = replace(base.info(source), name=name)
        config: dict[str, Any] = dict(base.config)
        if heads:
            config["tie_word_embeddings"] = False
            if isinstance(nested := config.get("text_config"), Mapping):
                config["text_config"] = {**nested, "tie_word_embeddings": False}
        return cls(base.root, base.source, config, tensors, base._pickles, base, dict(turns), dict(heads))

    @property
    def name(self) -> str:
        assert self.base is not None
        return self.base.name

    @property
    def roots(self) -> Any:
        assert self.base is not None
        return self.base.roots

    @property
    def as_stored(self) -> bool:
        return False

    @property
    def untied(self) -> bool:
        return bool(self.heads)

    @property
    def remarks(self) -> list[str]:
        assert self.base is not None
        return self.base.remarks

    @property
    def files(self) -> dict[str, str]:
        assert self.base is not None
        return self.base.files

    def _read(self, info: TensorInfo, shape: tuple[int, ...], skip: int, dtype: torch.dtype | None) -> torch.Tensor:
        assert self.base is not None and self.turns is not None and self.heads is not None
        turn = self.turns.get(info.name)
        source = self.base.info(self.heads.get(info.name, info.name))
        if turn is None:
            return self.base._read(source, shape, skip, dtype)
        if turn.by_rows:
            rows = self.base._read(source, shape, skip, torch.float64)
            return turn.apply(rows, self.base).to(dtype or info.dtype)
        start = skip // (info.nbytes // info.shape[0])
        whole = turn.apply(self.base._read(source, source.shape, 0, torch.float64), self.base)
        return whole[start : start + shape[0]].to(dtype or info.dtype).contiguous()
