"""The contract of methods that prune, beside that of all methods: masks, counts, patterns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightworks.testing.contract import random_weight, solution
from weightworks.testing.trial import Trial, demand, one_thread, told

if TYPE_CHECKING:
    import torch


def masks_tell_what_was_pruned(trial: Trial, folder: Path) -> None:
    """Every pruned weight has a mask beside it; where the mask has none the weight is zero, and the report counts them.

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
    pruned = {row["tensor"] for row in trial.provenance["report"] if "kept" in row}
    demand(bool(pruned), f"{label}: the report says of no weight how many are kept")
    demand(set(masks.infos) == pruned, f"{label}: masks of {sorted(set(masks.infos) ^ pruned)} are amiss")
    with told(f"{label}: weights and masks do not fit"):
        found = check_masks(trial.result)
    counted = sum(row["kept"] for row in trial.provenance["report"] if "kept" in row)
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
        with told(f"{label} cannot prune with {values}"), one_thread():
            for pairs in _pruned(trial, folder, values):
                loose = any(weight[~mask].any() for weight, mask in pairs)
                demand(not loose, f"{label}, {values}: a weight outside the mask is not zero")
                if of == 10:
                    count, right = (
                        sum(int((~mask).sum()) for _, mask in pairs),
                        sum(round(0.7 * mask.numel()) for _, mask in pairs),
                    )
                    demand(count == right, f"{label}, {values}: {count} weights are pruned, not {right}")
                    continue
                groups = [mask.view(len(mask), -1, of).sum(-1) for _, mask in pairs]
                exact = all(bool(torch.all(group == kept)) for group in groups)
                demand(exact, f"{label}: a group of {of} does not keep exactly {kept}")


PRUNING = (masks_tell_what_was_pruned, patterns_and_counts_are_exact)


def _pruned(trial: Trial, folder: Path, values: dict[str, Any]) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Weights and their masks: of a random weight, and of one whose weights are all as large; or of a model it trains. Of a
    product, those of its core."""
    from weightworks.store.checkpoint import Checkpoint
    from weightworks.store.masks import Masks

    method = trial.module.Method(trial.module.Options(**values))
    if hasattr(method, "regime"):
        made = trial.run(folder / "-".join(map(str, values.values())).replace(":", "of"), values)
        checkpoint, masks = Checkpoint.open(made), Masks.of(made)
        demand(masks is not None, "no masks.safetensors in the result")
        assert masks is not None
        weights = ((name, checkpoint.read(name)) for name in masks.infos)
        yield [(weight, masks.read(name, tuple(weight.shape))) for name, weight in weights]
        return
    for equal in (False, True):
        weight = random_weight(3)
        answer = solution(method, weight.sign() if equal else weight)
        if answer.factors is not None:
            yield [(answer.factors.core, answer.factors.mask)]
            continue
        demand(answer.mask is not None, "a solution without a mask")
        yield [(answer.dense(), answer.mask)]
