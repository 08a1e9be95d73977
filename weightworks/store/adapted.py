"""A checkpoint with adapters added to it: its tensors are ``W + scaling * B A``, computed as they are read."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from weightworks.errors import CheckpointError
from weightworks.store.adapters import Adapter, LoRA
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.decoded import DecodedCheckpoint
from weightworks.store.tensorfile import TensorInfo

BLOCK = 1 << 20  # elements computed at a time
SHOWN = 8  # names that get a suggestion; looking for one takes a while


class Update(Protocol):
    """What an adapter does to one tensor."""

    def delta(self, base: torch.Tensor, start: int) -> torch.Tensor:
        """What is added to rows ``start:`` of the tensor, whose float32 rows are ``base`` (not to be changed)."""


@dataclass(frozen=True)
class Product:
    """``scaling * B A``, [rows, columns], or its transpose; with DoRA's magnitudes m, ``m (W + s B A) / |W + s B A| - W``."""

    adapter: Adapter
    pair: LoRA

    def delta(self, base: torch.Tensor, start: int) -> torch.Tensor:
        pair, store, stop = self.pair, self.adapter.store, start + base.shape[0]
        if pair.transposed:
            left = store.read(pair.a, torch.float32)[:, start:stop].T  # [columns, rank]
            right = store.read(pair.b, torch.float32).T  # [rank, rows]
        else:
            left = store.read_rows(pair.b, start, stop, torch.float32)  # [rows, rank]
            right = store.read(pair.a, torch.float32)  # [rank, columns]
        product = (left @ right).mul_(pair.scaling)
        if pair.magnitude is None:
            return product
        # The norm of each row of the sum is set to its magnitude (Liu et al. 2024, arXiv:2402.09353, equation 5).
        total = product.add_(base)
        magnitude = store.read_rows(pair.magnitude, start, stop, torch.float32)
        return total.mul_((magnitude / torch.linalg.vector_norm(total, dim=1))[:, None]).sub_(base)


@dataclass(frozen=True)
class Bias:
    """``scaling`` times the bias of B, added to the bias of the module."""

    adapter: Adapter
    pair: LoRA

    def delta(self, base: torch.Tensor, start: int) -> torch.Tensor:
        assert self.pair.bias is not None
        return (
            self.adapter.store.read_rows(self.pair.bias, start, start + base.shape[0], torch.float32)
            * self.pair.scaling
        )


@dataclass(frozen=True)
class Whole:
    """A tensor that stands for the base's own."""

    adapter: Adapter
    tensor: str

    def delta(self, base: torch.Tensor, start: int) -> torch.Tensor:
        return self.adapter.store.read_rows(self.tensor, start, start + base.shape[0], torch.float32) - base


@dataclass(frozen=True)
class AdaptedCheckpoint(Checkpoint):
    """A checkpoint and ``adapters``, each added to the base's own weights: the order makes no difference but for rounding.

    Sums are made in float32 and rounded once. Blocks begin at fixed rows, so that what is read does not depend on which
    rows were asked for.
    """

    base: Checkpoint | None = None
    adapters: tuple[Adapter, ...] = ()
    updates: Mapping[str, tuple[Update, ...]] | None = None

    @classmethod
    def join(cls, base: Checkpoint, source: str, adapters: Sequence[Adapter]) -> AdaptedCheckpoint:
        """``base``, decoded if it is quantized, with the adapters; one that does not fit it is refused, all tensors at fault
        named."""
        if base.config.get("quantization_config"):
            base = DecodedCheckpoint.of(base)
        updates: dict[str, list[Update]] = {}
        for adapter in adapters:
            for name, update in fitted(adapter, base):
                updates.setdefault(name, []).append(update)
        return cls(
            base.root,
            source,
            base.config,
            base.tensors,
            base._pickles,
            base,
            tuple(adapters),
            {name: tuple(found) for name, found in updates.items()},
        )

    @property
    def name(self) -> str:
        return "+".join(one.name for one in (self.base, *self.adapters) if one is not None)

    @property
    def roots(self) -> list[Path]:
        return [self.root, *(adapter.root for adapter in self.adapters)]

    @property
    def as_stored(self) -> bool:
        return False

    @property
    def remarks(self) -> list[str]:
        assert self.base is not None
        name = self.base.name.split("@")[0].split("/")[-1]
        return self.base.remarks + [
            f"{adapter.name} says it was trained on {adapter.base}, not on {name}"
            for adapter in self.adapters
            if adapter.base is not None and adapter.base.rstrip("/").split("/")[-1] != name
        ]

    @cached_property
    def files(self) -> dict[str, str]:
        found = dict(super().files)
        for number, adapter in enumerate(self.adapters, 1):
            found |= {f"adapter {number}/{name}": digest for name, digest in adapter.files.items()}
        return found

    def known(self, path: Path) -> str | None:
        adapter = next((one for one in self.adapters if one.root == path.parent), None)
        return super().known(path) if adapter is None else adapter.files.get(path.name)

    def _read(self, info: TensorInfo, shape: tuple[int, ...], skip: int, dtype: torch.dtype | None) -> torch.Tensor:
        updates = (self.updates or {}).get(info.name, ())
        if not updates:
            return self._stored(info, shape, skip, dtype)
        start = skip // (info.nbytes // info.shape[0])
        if len(updates) == 1 and isinstance(updates[0], Whole):
            whole, stop = updates[0], start + shape[0]
            return whole.adapter.store.read_rows(whole.tensor, start, stop, dtype or info.dtype)
        result = torch.empty(shape, dtype=dtype or info.dtype)
        step = max(1, BLOCK // max(math.prod(info.shape[1:]), 1))
        for first in range(start - start % step, start + shape[0], step):
            last = min(first + step, info.shape[0])
            block = self._block(info, updates, first, last)
            low, high = max(first, start), min(last, start + shape[0])
            result[low - start : high - start] = block[low - first : high - first]  # the one rounding
        return result

    def _stored(self, info: TensorInfo, shape: tuple[int, ...], skip: int, dtype: torch.dtype | None) -> torch.Tensor:
        """What the base gives."""
        assert self.base is not None
        return self.base._read(info, shape, skip, dtype)

    def _block(self, info: TensorInfo, updates: Sequence[Update], first: int, last: int) -> torch.Tensor:
        """Rows ``first:last`` in float32."""
        row = info.nbytes // info.shape[0]
        base = self._stored(info, (last - first, *info.shape[1:]), first * row, torch.float32)
        total = updates[0].delta(base, first)
        for update in updates[1:]:
            total += update.delta(base, first)
        return total.add_(base)


def open_adapted(source: str, models: Sequence[str], *, allow_pickle: bool = False) -> AdaptedCheckpoint:
    """The checkpoint ``models[0]`` with the adapters ``models[1:]``; ``source`` is what was typed."""
    base = Checkpoint.open(models[0], allow_pickle=allow_pickle)
    return AdaptedCheckpoint.join(base, source, [Adapter.open(name, allow_pickle=allow_pickle) for name in models[1:]])


def fitted(adapter: Adapter, base: Checkpoint) -> Iterator[tuple[str, Update]]:
    """The updates of an adapter by the base's tensor names.

    Raises :class:`CheckpointError` with every tensor of the adapter that meets none in the base, or one of another shape, and
    for transposed layers of a base that is quantized: they are [out, in] there.
    """
    if isinstance(base, DecodedCheckpoint) and any(pair.transposed for pair in adapter.pairs.values()):
        raise CheckpointError(
            f"{base.root}: is quantized, and {adapter.name} adapts layers whose weights are [in, out]",
            hint="add the adapter to the dense checkpoint, then quantize",
        )
    wanted: list[tuple[str, tuple[int, ...], Update]] = []
    for pair in adapter.pairs.values():
        wanted.append((f"{pair.module}.weight", pair.shape, Product(adapter, pair)))
        if pair.bias is not None:
            wanted.append((f"{pair.module}.bias", (pair.rows,), Bias(adapter, pair)))
    wanted += [(name, adapter.store.tensors[key].shape, Whole(adapter, key)) for name, key in adapter.whole.items()]
    ends = _by_ending(base.tensors)
    found: list[tuple[str, Update]] = []
    lost, unlike = [], []
    for name, shape, update in wanted:
        target = _place(name, ends, base.tensors)
        if target is None:
            lost.append(name)
        elif base.tensors[target].shape != shape:
            unlike.append(f"{target} is {list(base.tensors[target].shape)}, the adapter's {list(shape)}")
        else:
            found.append((target, update))
    problems = [f"the model has no {name}{_near(name, base)}" for name in lost[:SHOWN]]
    problems += [f"no {name}" for name in lost[SHOWN:]] + unlike + _ties(adapter, base, found)
    if problems:
        raise CheckpointError(
            f"{adapter.root}: {len(problems)} of its {len(wanted)} tensors do not fit {base.name}: {'; '.join(problems)}",
            hint=f"it was trained on {adapter.base}" if adapter.base else "",
        )
    return iter(found)


def place(name: str, base: Checkpoint) -> str | None:
    """The base's tensor that an adapter means by ``name``; None if there is none."""
    return _place(name, _by_ending(base.tensors), base.tensors)


def _by_ending(tensors: Mapping[str, TensorInfo]) -> dict[str, list[str]]:
    """Tensor names by each of their endings of two words or more; checkpoints may lack the model's own prefix."""
    ends: dict[str, list[str]] = {}
    for name in tensors:
        words = name.split(".")
        for start in range(1, len(words) - 1):
            ends.setdefault(".".join(words[start:]), []).append(name)
    return ends


def _place(name: str, ends: Mapping[str, list[str]], tensors: Mapping[str, TensorInfo]) -> str | None:
    """The tensor ``name``, or the one whose name ends so, or is an ending of it; None if there is no such."""
    if name in tensors:
        return name
    if len(found := ends.get(name, [])) == 1:
        return found[0]
    words = name.split(".")
    shorter = [ending for start in range(1, len(words) - 1) if (ending := ".".join(words[start:])) in tensors]
    return shorter[0] if shorter else None


def _near(name: str, base: Checkpoint) -> str:
    close = difflib.get_close_matches(name, list(base.tensors), n=1, cutoff=0.6)
    return f" (near: {close[0]})" if close else ""


def _ties(adapter: Adapter, base: Checkpoint, found: Sequence[tuple[str, Update]]) -> list[str]:
    """An embedding that is also the output head of the model, but not to the adapter: the sum would be another model."""
    config = base.config.get("text_config") or base.config
    rows = config.get("vocab_size")
    wide = [name for name, info in base.tensors.items() if len(info.shape) == 2 and info.shape[0] == rows]
    tied = bool(base.config.get("tie_word_embeddings", config.get("tie_word_embeddings"))) or len(wide) == 1
    if not tied or adapter.config.get("ensure_weight_tying"):
        return []
    return [
        f"{name} is also the model's output head, while the adapter changes it as an embedding only"
        for name, update in found
        if name in wide and (isinstance(update, Whole) or (isinstance(update, Product) and update.pair.embedding))
    ]
