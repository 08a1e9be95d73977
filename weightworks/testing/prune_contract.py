"""The contract of methods that prune, beside that of all methods: masks, counts, patterns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightworks.testing.contract import random_weight, solution
from weightworks.testing.trial import Trial, demand, one_thread, told

if TYPE_CHECKING:
    import torch


def masks_tell_what_was_pruned(trial: Trial, folder: Path) -> None:
    """Every changed weight has a mask beside it; where the mask has none the weight is zero, and the report counts them.

    A method that factors has factors beside it instead, whose product the weight is.
    """
    from weightworks.store.factors import FactorFile, check_factors
    from weightworks.store.masks import Masks, check_masks

    if hasattr(trial.module.Method, "factored"):
        factors = FactorFile.of(trial.made)
        demand(factors is not None, f"{trial.label}: no factors.safetensors in the result")
        assert factors is not None
        demand(set(factors.names) == trial.changed, f"{trial.label}: its factors are not those of the changed weights")
        with told(f"{trial.label}: weights are not the products of their factors"):
            check_factors(trial.result)
        return
    masks, label = Masks.of(trial.made), trial.label
    demand(masks is not None, f"{label}: no masks.safetensors in the result")
    assert masks is not None
    demand(set(masks.infos) == trial.changed, f"{label}: masks of {sorted(set(masks.infos) ^ trial.changed)} are amiss")
    with told(f"{label}: weights and masks do not fit"):
        found = check_masks(trial.result)
    counted = sum(row["kept"] for row in trial.provenance["report"])
    assert found is not None
    demand(found["kept"] == counted, f"{label}: the report says {counted} weights are kept, the masks {found['kept']}")


def patterns_and_counts_are_exact(trial: Trial, folder: Path) -> None:
    """Of a weight exactly the asked share is pruned, under N:M exactly M - N of every M inputs, also among equals."""
    import torch

    options, label = trial.module.Options, trial.label
    for kept, of in ((3, 10), (2, 4), (1, 8)):
        values: dict[str, Any] = {"sparsity": 0.7} if of == 10 else {"pattern": f"{kept}:{of}"}
        if options.problems(values, where=label):
            continue
        method = trial.module.Method(options(**values))
        with told(f"{label} cannot prune with {values}"), one_thread():
            for equal in (False, True):
                weight, mask = _pruned(method, equal=equal)  # of a product, those of its core
                demand(not weight[~mask].any(), f"{label}, {values}: a weight outside the mask is not zero")
                if of == 10:
                    count, right = int((~mask).sum()), round(0.7 * mask.numel())
                    demand(count == right, f"{label}, {values}: {count} weights are pruned, not {right}")
                    continue
                groups = mask.view(len(mask), -1, of).sum(-1)
                demand(bool(torch.all(groups == kept)), f"{label}: a group of {of} does not keep exactly {kept}")


PRUNING = (masks_tell_what_was_pruned, patterns_and_counts_are_exact)


def _pruned(method: Any, *, equal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What a method makes of a random weight, or of one whose weights are all as large, and the mask."""
    weight = random_weight(3)
    answer = solution(method, weight.sign() if equal else weight)
    if answer.factors is not None:
        return answer.factors.core, answer.factors.mask
    mask = answer.mask
    demand(mask is not None, "a solution without a mask")
    return answer.dense(), mask
