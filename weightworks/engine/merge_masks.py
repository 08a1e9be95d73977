"""Masks of pruned models that are merged: the same in all of them and carried over, or the merge is refused.

The average of weights that are zero in different places has few zeros left (Zimmer et al., "Sparse Model Soups",
arXiv:2306.16788): what is averaged must have been pruned together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from weightworks.errors import MethodError
from weightworks.store.masks import SUFFIX, Masks, mask_spec
from weightworks.store.tensorfile import TensorSpec

if TYPE_CHECKING:
    from weightworks.engine.mergejob import MergeJob

SHOWN = 5  # tensors whose masks differ, told one by one


@dataclass(frozen=True)
class Carried:
    """The mask that a tensor of the output has: that of ``tensor`` among ``masks``."""

    masks: Masks
    tensor: str
    shape: tuple[int, ...]

    def packed(self) -> torch.Tensor:
        return self.masks.packed(self.tensor)

    def kept(self) -> torch.Tensor:
        """bool, in the shape of the tensor."""
        return self.masks.read(self.tensor, self.shape)

    def spec(self, name: str) -> TensorSpec:
        """Of the mask of the output's tensor ``name``."""
        rows, columns = self.shape
        return TensorSpec(name + SUFFIX, mask_spec(name, (rows, columns)).shape, torch.uint8)


def carried_masks(job: MergeJob) -> dict[str, Carried]:
    """The masks of the output, by tensor: of those that are pruned alike in every model, and in the base if there is one.

    Raises :class:`MethodError` with the tensors, and how many bits of each differ, where models are pruned otherwise.
    """
    masks = [Masks.of(item.checkpoint.root) for item in job.models]
    base = None if job.base is None else Masks.of(job.base.checkpoint.root)
    found: dict[str, Carried] = {}
    off: dict[str, int] = {}
    for part in job.merged:
        having = [
            (known, tensor)
            for known, tensor in ((masks[number], tensor) for number, tensor in part.models)
            if known is not None and tensor in known.infos
        ]
        if not having:
            continue
        first = having[0][0].packed(having[0][1])
        bits = max(_different(first, known.packed(tensor)) for known, tensor in having)
        if bits:
            off[part.spec.name] = bits
            continue
        dense_base = job.base is not None and part.base is not None
        if dense_base and base is not None and part.base in base.infos:
            assert part.base is not None
            dense_base = _different(first, base.packed(part.base)) > 0
        if len(having) == len(part.models) and not dense_base:
            found[part.spec.name] = Carried(*having[0], part.spec.shape)
    _refuse(job, off)
    if found and job.options.align:
        raise MethodError(
            f"{job.label}: these models are pruned alike, and --align would move units of one away from its masks",
            hint="leave out --align: copies of one pruned model are in one order",
        )
    return found


def _different(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many bits of two packed masks differ; all of the larger where their shapes do."""
    if one.shape != other.shape:
        return 8 * max(one.numel(), other.numel())
    differing = one ^ other
    return sum(int((differing >> place & 1).sum()) for place in range(8)) if bool(differing.any()) else 0


def _refuse(job: MergeJob, off: Mapping[str, int]) -> None:
    if off:
        shown = ", ".join(f"{name} {bits:,}" for name, bits in list(off.items())[:SHOWN])
        more = f", and {len(off) - SHOWN} more" if len(off) > SHOWN else ""
        raise MethodError(
            f"{job.label}: the models are pruned in different places, and a merge of them would be dense: the masks of "
            f"{len(off)} tensors differ, in {sum(off.values()):,} bits ({shown}{more})",
            hint="prune one model and retrain copies of it (recipes/sparse-soup.yaml); for a dense result take masks.safetensors "
            "out of the folders",
        )
