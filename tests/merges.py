"""What tests of merges share: small models, and the golden cases of other implementations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from weightworks.stage import catalog
from weightworks.testing.merging import merged

Tensors = dict[str, torch.Tensor]
SHAPES = {"embed.weight": (24, 8), "blk.norm.weight": (8,), "blk.up.weight": (16, 8), "blk.scale": ()}


def method(name: str, **options: Any) -> Any:
    """The method ``name`` of the shelf, with ``options``."""
    module = catalog.find("merge", name).load()
    return module.Method(module.Options.parse(options, where=f"merge.{name}"))


def merge(name: str, models: Sequence[Tensors], base: Tensors | None = None, **options: Any) -> Tensors:
    """What ``name`` makes of ``models``."""
    return merged(method(name, **options), models, base)


def model(seed: int, *, like: Tensors | None = None, scale: float = 1.0) -> Tensors:
    """Random tensors of ``SHAPES``; with ``like``, those plus random task vectors of ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) * scale for name, shape in SHAPES.items()}
    return drawn if like is None else {name: like[name] + value for name, value in drawn.items()}


def one(*rows: Sequence[float]) -> list[Tensors]:
    """Models of one matrix each, [1, n]."""
    return [{"w": torch.tensor([row])} for row in rows]


def zeros(columns: int) -> Tensors:
    """A base of one matrix [1, n] of zeros, so that models are their own task vectors."""
    return {"w": torch.zeros(1, columns)}


class Golden:
    """One golden case: its named tensors, by the part of the name before the first dot, and its facts."""

    def __init__(self, path: Path) -> None:
        self.tensors = load_file(path.with_suffix(".safetensors"))
        self.facts = json.loads(path.with_suffix(".json").read_text())

    def of(self, prefix: str) -> Tensors:
        """The tensors whose names begin with ``prefix`` and a dot, without it."""
        start = prefix + "."
        found = {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}
        return {name: value for name, value in found.items() if not name.startswith(("mask.", "keep_prob."))}

    def masks(self, run: str, count: int) -> list[Mapping[str, torch.Tensor]]:
        """For each fine-tuned model, the mask that ``run`` drew of every tensor; True is kept."""
        return [self.of(f"{run}.mask.ft{number}") for number in range(count)]


@cache
def golden(shared: Path, case: str) -> Golden:
    return golden_file(shared, f"{case}/three_finetunes")


def golden_file(shared: Path, name: str) -> Golden:
    return Golden(shared / "golden" / name)


def assert_golden(
    found: Tensors, expected: Tensors, *, strays: int = 0, rtol: float = 1e-5, atol: float = 1e-7
) -> None:
    """Equal tensors, but for at most ``strays`` elements of each."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close = torch.isclose(found[name], value, rtol=rtol, atol=atol)
        assert int((~close).sum()) <= strays, (name, (found[name] - value).abs().max())
