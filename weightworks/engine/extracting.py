"""The difference of two checkpoints as an adapter: which tensors can have a low-rank update, and each of them by itself.

A matrix is held in float32 once, its difference taken in place some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

import weightworks
from weightworks.engine.adapting import Solved, named, stored
from weightworks.engine.identity import environment, origin
from weightworks.engine.job import matches
from weightworks.errors import MethodError
from weightworks.report.card import adapter_card
from weightworks.report.progress import Progress
from weightworks.stage.adapting import Factors
from weightworks.stage.settings import Settings
from weightworks.store.adapters import PREFIX
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.layout import Format
from weightworks.stream.skeleton import build, is_transposed

SMALL = 1 << 20  # elements of a matrix
ROW_BYTES = 64 << 20  # of float32 rows held beside the difference


@dataclass
class ExtractJob:
    """An extraction planned but not run: an adapter that takes ``base`` as near to ``tuned`` as its rank allows."""

    label: str
    version: int
    method: Any
    settings: Settings
    base: Checkpoint
    tuned: Checkpoint
    target: Path
    progress: Progress
    device: torch.device
    returns_tuple: int = field(init=False, default=0)
    format: Format | None = field(init=False, default=None)
    left: dict[str, str] = field(init=False, default_factory=dict)  # tensors that changed and are not in the adapter

    @property
    def watched(self) -> list[Checkpoint]:
        """What is read, and must not change meanwhile."""
        return [self.base, self.tuned]

    def __post_init__(self) -> None:
        self._check()
        self.skeleton = build(DenseView(self.base), trust_remote_code=self.settings.trust_remote_code)
        linear = {name: self._layer(name) for name in self.skeleton.pieces}
        kinds = [transposed for transposed in linear.values() if transposed is not None]
        # One flag of the configuration says for all modules which way weights are held: the rarer kind is left out.
        self.transposed = sum(kinds) * 2 > len(kinds)
        self.linears = {
            name.removesuffix(".weight"): self.skeleton.pieces[name][0].tensor
            for name, transposed in linear.items()
            if transposed is self.transposed and not self._ignored(name)
        }
        taken = set(self.linears.values())
        self.others = {
            piece.tensor: name
            for name, pieces in self.skeleton.pieces.items()
            for piece in pieces
            if piece.tensor not in taken
        }

    def _check(self) -> None:
        """Both must be dense, with the same tensors of the same shapes; all that differ are named."""
        for checkpoint in (self.base, self.tuned):
            if DenseView(checkpoint).format is not None:
                raise MethodError(f"{checkpoint.name} is quantized: what an adapter corrects must be dense weights")
        a, b = self.base.tensors, self.tuned.tensors
        problems = [
            f"{name} is only in {(self.base if name in a else self.tuned).name}" for name in sorted(set(a) ^ set(b))
        ]
        problems += [
            f"{name} is {list(a[name].shape)} in {self.base.name}, {list(b[name].shape)} in {self.tuned.name}"
            for name in sorted(set(a) & set(b))
            if a[name].shape != b[name].shape
        ]
        if problems:
            shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
            raise MethodError(
                f"{len(problems)} tensors do not correspond: {shown}",
                hint="give a fine-tune and the base it started from",
            )

    def _layer(self, name: str) -> bool | None:
        """Whether a parameter is the weight of a linear layer held transposed; None if it is no plain linear's weight."""
        pieces, holders = self.skeleton.pieces[name], self.skeleton.holders(name)
        plain = len(pieces) == 1 and pieces[0].expert is None and name.endswith(".weight")
        if not plain or not all(isinstance(module, nn.Linear) or is_transposed(module) for module in holders):
            return None
        return is_transposed(holders[0])

    def _ignored(self, name: str) -> bool:
        return any(matches(pattern, name.removesuffix(".weight")) for pattern in self.options.ignored)

    @property
    def options(self) -> Any:
        return self.method.options

    @property
    def checkpoint(self) -> Checkpoint:
        return self.base

    @cached_property
    def units(self) -> list[str]:
        """Modules, then the other tensors."""
        return [*sorted(self.linears), *sorted(self.others), *sorted(self.skeleton.unused)]

    @property
    def small(self) -> bool:
        """Matrices of less than a megabyte or so are not worth dividing among threads."""
        return max((math.prod(info.shape) for info in self.base.tensors.values()), default=0) < SMALL

    def solve(self, unit: str) -> Solved:
        if unit in self.linears:
            return self._linear(unit)
        return self._other(unit)

    def difference(self, tensor: str) -> tuple[torch.Tensor, float]:
        """``tuned - base`` in float32, and the norm of the base's."""
        delta = self.tuned.read(tensor, torch.float32).contiguous()
        square = 0.0
        for start, stop in _pieces(delta):
            rows = self.base.read_rows(tensor, start, stop, torch.float32)
            square += float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2
            delta[start:stop] -= rows
        return delta, square**0.5

    def _linear(self, module: str) -> Solved:
        tensor, dtype = self.linears[module], getattr(torch, self.options.out_dtype)
        delta, before = self.difference(tensor)
        norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
        row: dict[str, Any] = {
            "tensor": tensor,
            "shape": list(delta.shape),
            "norm": norm,
            "relative": _share(norm, before),
        }
        if norm == 0:
            return Solved({}, {**row, "method": "unchanged", "rank": 0})
        delta = delta.T.contiguous() if self.transposed else delta
        made = self.method.extract(module, delta, self.settings.seed)
        result = stored(made.factors, dtype)
        row |= {"method": self.label, "rank": made.factors.rank}
        row |= {"residual": residual(delta, made.factors) / norm, "residual_stored": residual(delta, result) / norm}
        return Solved(named(module, made.factors, dtype), {**row, **made.facts})

    def _other(self, tensor: str) -> Solved:
        """A tensor that no low-rank update can change: saved whole if that is asked for and possible, else left out."""
        shape = self.base.tensors[tensor].shape
        delta, before = self.difference(tensor) if shape else (self._scalar(tensor), 0.0)
        norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
        row = {"tensor": tensor, "shape": list(shape), "norm": norm, "relative": _share(norm, before)}
        if norm == 0:
            return Solved({}, {**row, "method": "unchanged"})
        reason = self._not_whole(tensor)
        if reason is not None:
            text = f"changed by {row['relative']:.2%} of its norm, not in the adapter: {reason}"
            return Solved({}, {**row, "method": "left out", "fallbacks": [text]})
        key = PREFIX + self.others[tensor]
        return Solved(
            {key: self.tuned.read(tensor, getattr(torch, self.options.out_dtype))}, {**row, "method": "whole"}
        )

    def _scalar(self, tensor: str) -> torch.Tensor:
        return self.tuned.read(tensor, torch.float32) - self.base.read(tensor, torch.float32)

    def _not_whole(self, tensor: str) -> str | None:
        """Why a tensor is not saved whole; None if it is."""
        name = self.others.get(tensor)
        if name is None:
            return "the model has no place for it"
        if name.removesuffix(".weight") == name or name.rpartition(".")[0] in self.linears:
            return "PEFT keeps whole modules, and not a part of one that has a low-rank update"
        if self._ignored(name):
            return "ignored"
        if len(self.skeleton.pieces[name]) > 1:
            return "one of several that transformers holds fused"
        if not self.options.keep_whole:
            kind = "an embedding" if self._embedding(name) else "not a matrix product"
            return f"{kind} (--keep-whole saves it whole)"
        if any(
            sibling != name and sibling.rpartition(".")[0] == name.rpartition(".")[0]
            for sibling in self.skeleton.pieces
        ):
            return "its module has other parameters too, which PEFT would expect"
        return None

    def _embedding(self, name: str) -> bool:
        return any(isinstance(module, nn.Embedding) for module in self.skeleton.holders(name))

    # What the end of a stage asks.

    def traits(self) -> dict[str, Any]:
        tied = any(self._embedding(name) and len(self.skeleton.holders(name)) > 1 for name in self.skeleton.pieces)
        return {
            "base_model_name_or_path": self.base.name,
            "fan_in_fan_out": self.transposed,
            **({"ensure_weight_tying": True} if tied and self.options.keep_whole else {}),
        }

    def config(self) -> dict[str, Any]:
        raise NotImplementedError("an adapter has no config.json")

    def quantization_config(self) -> dict[str, Any]:
        raise NotImplementedError("an adapter is not quantized")

    def origin(self) -> dict[str, Any]:
        return {"models": [origin(self.tuned)], "base": origin(self.base)}

    def account(self) -> dict[str, Any]:
        return {
            "input": len(self.base.tensors),
            "inputs": {item.source: len(item.tensors) for item in (self.base, self.tuned)},
            "transformed": len(self.linears),
            "copied": 0,
            "dropped": len(self.units) - len(self.linears),
        }

    def uncovered(self) -> list[str]:
        """What should be known of the inputs; tensors left out speak for themselves."""
        return [text for item in (self.base, self.tuned) for text in item.remarks]

    def card(self, provenance: dict[str, Any]) -> str:
        return adapter_card([self.tuned.name], self.base, self.target.name, provenance)

    def identity(self, **facts: Any) -> dict[str, Any]:
        """What the output's bytes depend on."""
        return {
            "method": self.label,
            "method_version": self.version,
            "weightworks": weightworks.__version__,
            "options": {name: value for name, value in self.options.resolved().items() if name != "check"},
            "input": {"models": [self.tuned.digest], "base": self.base.digest},
            "seed": self.settings.seed,
            "environment": environment(self.device),
            **facts,
        }


def residual(delta: torch.Tensor, factors: Factors) -> float:
    """Frobenius norm of ``delta - b @ a``, some rows at a time, added up in float64."""
    b, a = factors.b.float(), factors.a.float()
    square = 0.0
    for start, stop in _pieces(delta):
        rows = torch.addmm(delta[start:stop], b[start:stop], a, alpha=-1)
        square += float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2
    return square**0.5


def _pieces(matrix: torch.Tensor) -> Iterator[tuple[int, int]]:
    rows = matrix.shape[0]
    step = max(1, ROW_BYTES * rows // max(matrix.numel() * 4, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _share(norm: float, before: float) -> float:
    return norm / before if before else float(norm > 0)
