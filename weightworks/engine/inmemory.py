"""A merge in memory: the contract of merges acted out on dictionaries of tensors that are small enough for that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightworks.stage.merging import STATE, Slab, Survey, is_whole

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]


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
    found: dict[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """What ``method`` makes of ``models``, by name; not cast.

    ``rows`` is how many rows a slab has (default: all). ``keys`` stand for the models' contents, ``side`` are their
    statistics by tensor and kind. ``state`` and ``found``, if given, are read and filled as the engine would keep them:
    what the surveys keep of every tensor, and what they conclude of the model.
    """
    import torch

    kept = {} if state is None else state

    def slabs(name: str, asking: Any) -> Iterator[Slab]:
        shape = tuple(models[0][name].shape) or (1,)
        known = side is None or any(own.get(name) for own in side)
        step = shape[0] if rows is None or len(shape) == 1 or (known and is_whole(asking, name, shape)) else rows
        for start in range(0, shape[0], step):
            part = slice(start, start + step)
            yield Slab(
                name,
                shape,
                start,
                tuple(_cut(model[name], shape, part) for model in models),
                None if base is None else _cut(base[name], shape, part),
                tuple(keys or (f"model {number}" for number in range(len(models)))),
                seed,
                _cut(kept[name], shape, part) if name in kept else None,
                tuple({kind: _cut(one, shape, part) for kind, one in own.get(name, {}).items()} for own in side or ()),
            )

    def survey(one: Survey, names: Sequence[str], found: Any) -> Any:
        sums: dict[str, torch.Tensor] = {}
        for name in names:
            states = []
            for slab in slabs(name, one):
                figures = dict(one.look(slab, found))
                if STATE in figures:
                    states.append(figures.pop(STATE))
                for key, value in figures.items():
                    sums[key] = sums[key] + value if key in sums else value
            if states:
                kept[name] = torch.cat(states)
        return one.conclude(sums, found)

    names, surveys = sorted(models[0]), list(method.surveys()) if hasattr(method, "surveys") else []
    result, common = {}, found or None
    for number, one in enumerate(surveys):
        if one.scope == "model":
            assert all(earlier.scope == "model" for earlier in surveys[:number]), "surveys of the model come first"
            common = survey(one, names, common)
    if found is not None and common is not None:
        found.update(common)
    for name in names:
        told = common
        for one in surveys:
            if one.scope == "tensor":
                told = survey(one, [name], told)
        parts = [method.merge(slab, told) for slab in slabs(name, method)]
        result[name] = torch.cat(parts).reshape(models[0][name].shape)
    return result


def _cut(tensor: torch.Tensor, shape: tuple[int, ...], part: slice) -> torch.Tensor:
    """Rows of a tensor that has ``shape`` (or no axes, for [1]), all of any other; float32, a copy."""
    if (tuple(tensor.shape) or (1,)) != shape:
        return tensor.float().clone()
    return tensor.float().reshape(shape)[part].clone()
