"""One threshold of magnitude for the whole model, found exactly by counting: no weight is sorted, one is held at a time.

The bits of a float32 magnitude, read as an integer, are in the order of the magnitudes. Three passes settle 11, 10 and
10 of its 31 bits: each counts, tensor by tensor, the weights whose settled bits are the threshold's by their next bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from weightworks.stage.protocols import Survey, Target

DIGITS = ((20, 11), (10, 10), (0, 10))  # lowest bit and number of bits, pass by pass


def one_threshold(sparsity: float, floor: float) -> list[Survey]:
    """The surveys that share ``1 - sparsity`` out by magnitude, each tensor keeping at least the share ``floor``."""
    last = len(DIGITS) - 1
    return [
        Survey(
            look=partial(count, shift=shift, bits=bits),
            conclude=partial(narrow, bits=bits, sparsity=sparsity, floor=floor, last=number == last),
        )
        for number, (shift, bits) in enumerate(DIGITS)
    ]


def count(
    weights: Sequence[torch.Tensor], statistics: Any, targets: Sequence[Target], found: Any, *, shift: int, bits: int
) -> dict[str, Any]:
    """Of one weight, how many magnitudes have the settled bits, by the next ``bits`` bits."""
    codes = weights[0].abs().flatten().view(torch.int32)
    size = codes.numel()
    if found is not None:
        codes = codes[codes >> (shift + bits) == found["prefix"]]
    bins = torch.bincount((codes >> shift) & ((1 << bits) - 1), minlength=1 << bits)
    return {"name": targets[0].name, "size": size, "bins": bins}


def narrow(
    figures: Sequence[Mapping[str, Any]], found: Any, *, bits: int, sparsity: float, floor: float, last: bool
) -> dict[str, Any]:
    """The threshold's bits so far and, by tensor, how many magnitudes are above them; at ``last`` how many stay."""
    names, sizes = [one["name"] for one in figures], [one["size"] for one in figures]
    keep = sum(sizes) - round(sum(sizes) * sparsity)
    floors = torch.tensor([math.ceil(floor * size) for size in sizes])  # [tensors]
    above = torch.tensor(found["above"] if found else [0] * len(sizes))
    bins = torch.stack([one["bins"].cpu() for one in figures])  # [tensors, 2^bits]
    reached = above[:, None] + bins.flip(1).cumsum(1).flip(1)  # with a threshold of each digit
    stay = torch.maximum(reached, floors[:, None]).sum(0)  # [2^bits], falling
    digit = int((stay >= keep).sum()) - 1
    above = reached[:, digit] - bins[:, digit]
    if not last:
        return {"prefix": ((found["prefix"] if found else 0) << bits) + digit, "above": above.tolist()}
    counts, most = torch.maximum(above, floors), torch.maximum(reached[:, digit], floors)
    missing = keep - int(counts.sum())
    for place in reversed(range(len(names))):  # of equal weights the first are pruned first
        more = min(missing, int(most[place] - counts[place]))
        counts[place] += more
        missing -= more
    return dict(zip(names, counts.tolist(), strict=True))
