"""A merge in memory: the contract of merges acted out on dictionaries of tensors that are small enough for that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from weightworks.stage.merging import STATE, Slab, Survey

Tensors = Mapping[str, torch.Tensor]


def merged(
    method: Any,
    models: Sequence[Tensors],
    base: Tensors | None = None,
    *,
    rows: int | None = None,
    seed: int = 0,
    keys: Sequence[str] | None = None,
    side: Sequence[Mapping[str, Tensors]] | None = None,
    state: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """What ``method`` makes of ``models``, by name; not cast.

    ``rows`` is how many rows a slab has (default: all). ``keys`` stand for the models' contents, ``side`` are their
    statistics by tensor. ``state``, if given, is read and filled as the engine would keep it.
    """
    kept = {} if state is None else state

    def slabs(name: str, whole: bool) -> Iterator[Slab]:
        shape = tuple(models[0][name].shape) or (1,)
        step = shape[0] if whole or rows is None else rows
        for start in range(0, shape[0], step):
            part = slice(start, start + step)
            yield Slab(
                name,
                shape,
                start,
                tuple(model[name].float().reshape(shape)[part].clone() for model in models),
                None if base is None else base[name].float().reshape(shape)[part].clone(),
                tuple(keys or (f"model {number}" for number in range(len(models)))),
                seed,
                kept[name].reshape(shape)[part].clone() if name in kept else None,
                () if side is None else tuple(statistics.get(name, {}) for statistics in side),
            )

    def survey(one: Survey, names: Sequence[str], found: Any) -> Any:
        sums: dict[str, torch.Tensor] = {}
        for name in names:
            for slab in slabs(name, one.whole):
                figures = dict(one.look(slab, found))
                if STATE in figures:
                    kept[name] = figures.pop(STATE)
                for key, value in figures.items():
                    sums[key] = sums[key] + value if key in sums else value
        return one.conclude(sums, found)

    names, surveys = sorted(models[0]), list(method.surveys()) if hasattr(method, "surveys") else []
    result, common = {}, None
    for number, one in enumerate(surveys):
        if one.scope == "model":
            assert all(earlier.scope == "model" for earlier in surveys[:number]), "surveys of the model come first"
            common = survey(one, names, common)
    for name in names:
        found = common
        for one in surveys:
            if one.scope == "tensor":
                found = survey(one, [name], found)
        shape = models[0][name].shape
        parts = [method.merge(replace(slab), found) for slab in slabs(name, getattr(method, "WHOLE", False))]
        result[name] = torch.cat(parts).reshape(shape)
    return result
