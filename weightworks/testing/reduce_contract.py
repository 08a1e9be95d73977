"""The contract of methods that make a model smaller, in place of that of methods that keep every tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from weightworks.testing.trial import Trial, demand, told

Clause = Callable[[Trial, Path], None]


def unless_smaller(look: Clause) -> Clause:
    """``look``, for methods that keep every tensor; of the others nothing is asked."""

    @wraps(look)
    def clause(trial: Trial, folder: Path) -> None:
        if trial.reduces is None:
            look(trial, folder)

    return clause


def if_smaller(look: Clause) -> Clause:
    """``look``, for methods that make a model smaller alone."""

    @wraps(look)
    def clause(trial: Trial, folder: Path) -> None:
        if trial.reduces is not None:
            look(trial, folder)

    return clause


def is_smaller_and_whole(trial: Trial, folder: Path) -> None:
    """The result has fewer parameters, and stock transformers loads it with none missing, left over or of another shape."""
    from transformers import AutoModelForCausalLM

    label = trial.label
    before, after = (
        sum(math.prod(info.shape) for info in one.tensors.values()) for one in (trial.source, trial.result)
    )
    demand(after < before, f"{label}: the result has {after:,} parameters, the model {before:,}")
    with told(f"{label}: stock transformers does not load the result"):
        model, seen = AutoModelForCausalLM.from_pretrained(trial.made, output_loading_info=True)
    wrong = {key: value for key, value in seen.items() if value}
    demand(not wrong, f"{label}: tensors and config.json do not fit: {wrong}")
    count = trial.provenance["reduction"]["parameters_out"]
    held = sum(parameter.numel() for parameter in model.parameters())
    demand(count == held, f"{label}: the report says {count:,} parameters, the model holds {held:,}")


def what_stays_is_the_models(trial: Trial, folder: Path) -> None:
    """Values are finite, dtypes the model's, and what lies outside the blocks is the same, bit for bit."""
    import torch

    from weightworks.stream.skeleton import build

    skeleton = build(trial.result)
    outside = {piece.tensor for name in skeleton.names_of(None) for piece in skeleton.pieces[name]}
    for name in trial.result.names:
        tensor = trial.result.read(name)
        demand(bool(torch.isfinite(tensor.float()).all()), f"{trial.label}: {name} holds NaN or infinite values")
        if name in outside:
            same = torch.equal(tensor.view(torch.uint8), trial.source.read(name).view(torch.uint8))
            demand(same, f"{trial.label}: {name}, which is in no block, differs from the model's")
    dtypes = [{info.dtype for info in one.tensors.values()} for one in (trial.source, trial.result)]
    demand(dtypes[1] <= dtypes[0], f"{trial.label}: dtypes are {dtypes[1]}, in the model {dtypes[0]}")


def report_says_what_went(trial: Trial, folder: Path) -> None:
    """The report has lines with figures that JSON can hold, and says in words what went."""
    label, facts = trial.label, trial.provenance
    demand(bool(facts["report"]), f"{label}: the report is empty")
    demand(all(isinstance(text, str) and text for text in facts["reduction"]["done"]), f"{label}: says not what it did")
    for row in facts["report"]:
        wrong = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        demand(not wrong, f"{label}, report on {row['part']}: {', '.join(wrong)} is not finite")


REDUCING = tuple(map(if_smaller, (is_smaller_and_whole, what_stays_is_the_models, report_says_what_went)))
