"""The contract of merges, one function a clause: on tensors in memory, and once from folder to folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightworks.testing.contract import digests, simplest
from weightworks.testing.merging import merged
from weightworks.testing.trial import Trial, demand, one_thread, told

if TYPE_CHECKING:
    import torch

SHAPES = {"layers.0.weight": (24, 16), "layers.1.weight": (16, 40), "norm.weight": (16,), "scale": ()}
SETTINGS: dict[str, Any] = {"device": "cpu"}
CLOSE = 2e-6  # relative: sums taken over other rows may differ in the last places


def has_the_shape_of_a_merge(trial: Trial, folder: Path) -> None:
    """It says whether it needs a base and how many models it takes, and can merge."""
    method, label = trial.module.Method, trial.label
    demand(callable(getattr(method, "merge", None)), f"{label}: Method has no `merge`")
    base = getattr(method, "BASE", None)
    demand(base in ("required", "optional", "refused"), f"{label}: Method.BASE is {base!r}")
    least, most = getattr(method, "LEAST", 0), getattr(method, "MOST", 0)
    demand(type(least) is int and least >= 1, f"{label}: Method.LEAST is {least!r}, not 1 or more")
    fits = most is None or (type(most) is int and most >= least)
    demand(fits, f"{label}: Method.MOST is {most!r}, neither None nor at least LEAST")
    surveys = method(simplest(trial.module.Options)).surveys() if hasattr(method, "surveys") else []
    scopes = [survey.scope for survey in surveys]
    demand(scopes == sorted(scopes), f"{label}: surveys of the whole model come before those of a tensor, not {scopes}")


def an_unmoved_base_stays(trial: Trial, folder: Path) -> None:
    """Models equal to the base merge to the base, bit for bit; without a base, equal models to themselves."""
    import torch

    models, base = tensors(trial, moved=False)
    result = act(trial, models, base)
    for name, before in models[0].items():
        after = result[name].to(before.dtype)
        demand(torch.equal(after, before), f"{trial.label}: {name} changed although no model differs")


def rows_make_no_difference(trial: Trial, folder: Path) -> None:
    """The result does not depend on how many rows are handed over at a time."""
    import torch

    models, base = tensors(trial)
    whole = act(trial, models, base)
    for rows in (1, 5):
        parts = act(trial, models, base, rows=rows)
        for name, expected in whole.items():
            error = float((parts[name] - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
            demand(
                error <= CLOSE,
                f"{trial.label}: {name} is another (by {error:.1e}) when handed over {rows} rows at a time; take figures "
                "of whole tensors in a survey, or say WHOLE = True",
            )
    demand(all(bool(torch.isfinite(value).all()) for value in whole.values()), f"{trial.label} made NaN or infinity")


def names_and_order_of_tensors_do_not_matter(trial: Trial, folder: Path) -> None:
    """A tensor's result does not depend on what else is in the model, unless a survey of the whole model is taken."""
    method = trial.module.Method
    surveys = method(simplest(trial.module.Options)).surveys() if hasattr(method, "surveys") else []
    if any(survey.scope == "model" for survey in surveys):
        return
    models, base = tensors(trial)
    name = next(iter(SHAPES))
    alone = act(trial, [{name: model[name]} for model in models], None if base is None else {name: base[name]})
    demand(
        bool((alone[name] == act(trial, models, base)[name]).all()),
        f"{trial.label}: {name} is merged differently when it is alone; keep no state in Method",
    )


def merges_folders(trial: Trial, folder: Path) -> None:
    """With its defaults it merges small models, every tensor accounted for, shapes and dtypes kept, the same bytes again."""
    from weightworks.store.checkpoint import Checkpoint
    from weightworks.store.manifest import read_provenance

    first, again = (run(trial, folder / place / "merged") for place in ("a", "b"))
    other = sorted(name for name, digest in digests(first).items() if digests(again).get(name) != digest)
    demand(not other, f"{trial.label}: a second run made other bytes: {', '.join(other)}")
    made, source = Checkpoint.open(first), Checkpoint.open(small_models()[0])
    demand(set(made.tensors) == set(source.tensors), f"{trial.label}: other tensors than the models have")
    for name, info in source.tensors.items():
        seen = made.info(name)
        same = seen.shape == info.shape and seen.dtype == info.dtype
        demand(same, f"{trial.label}: {name} is {seen.dtype} {list(seen.shape)}, was {info.dtype} {list(info.shape)}")
    provenance = read_provenance(first)
    assert provenance is not None
    demand(provenance["identity"]["method"] == trial.label, f"{trial.label}: the provenance names another method")
    demand(not provenance["fallbacks"], f"{trial.label}: fell back: {provenance['fallbacks'][:2]}")
    account = provenance["tensors"]
    demand(account["transformed"] == len(source.tensors), f"{trial.label}: {account} do not add up")


MERGE = (
    has_the_shape_of_a_merge, an_unmoved_base_stays, rows_make_no_difference, names_and_order_of_tensors_do_not_matter,
    merges_folders,
)  # fmt: skip


# Aids.


def count_of(method: Any) -> int:
    """How many models a method is tried on."""
    return max(method.LEAST, min(3, method.MOST or 3))


def tensors(
    trial: Trial, *, moved: bool = True
) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]:
    """Models in memory, bfloat16, and their base if the method takes one; all equal unless ``moved``."""
    import torch

    generator = torch.Generator().manual_seed(7)
    base = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}
    models = []
    for _ in range(count_of(trial.module.Method)):
        noise = {name: 0.1 * torch.randn(shape, generator=generator) * moved for name, shape in SHAPES.items()}
        models.append({name: (value + noise[name]).bfloat16() for name, value in base.items()})
    return models, None if trial.module.Method.BASE == "refused" else base


def act(trial: Trial, models: Any, base: Any, rows: int | None = None) -> dict[str, torch.Tensor]:
    """The merge of ``models`` with the method's defaults."""
    with told(f"{trial.label} fails on small tensors"), one_thread():
        method = trial.module.Method(simplest(trial.module.Options))
        return merged(method, models, base, rows=rows, side=statistics(method, models))


def statistics(method: Any, models: Any) -> list[dict[str, dict[str, torch.Tensor]]] | None:
    """Made-up statistics of each model's tensors, of the kind that ``method`` asks for; None if it asks for none."""
    import torch

    if (kind := getattr(method, "SIDE", None)) is None:
        return None
    found = []
    for number, model in enumerate(models):
        generator = torch.Generator().manual_seed(number)
        if kind == "gram":
            inputs = {
                name: torch.randn(64, value.shape[1], generator=generator)
                for name, value in model.items()
                if value.ndim == 2
            }
            found.append({name: {kind: x.T @ x / 64} for name, x in inputs.items()})
        else:
            found.append({name: {kind: torch.rand(value.shape, generator=generator)} for name, value in model.items()})
    return found


@cache
def small_models() -> list[Path]:
    """A small model and three that differ from it a little, as folders, made once a process."""
    import atexit
    import shutil
    import tempfile

    import torch
    from safetensors.torch import load_file, save_file

    from weightworks.testing.tiny import make_model

    place = Path(tempfile.mkdtemp(prefix="weightworks-merges-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    base = make_model(place / "base")
    folders = [base]
    for number in range(3):
        shutil.copytree(base, place / f"model{number}")
        generator = torch.Generator().manual_seed(number)
        weights = load_file(base / "model.safetensors")
        for name in sorted(weights):
            noise = 0.02 * torch.randn(weights[name].shape, generator=generator)
            weights[name] = (weights[name].float() + noise).bfloat16()
        save_file(weights, place / f"model{number}" / "model.safetensors", metadata={"format": "pt"})
        folders.append(place / f"model{number}")
    return folders


@cache
def gathered(kind: str) -> list[Path]:
    """Files of statistics of the small models, without their base, in order."""
    from weightworks.plan.stats import run_stats
    from weightworks.stage.settings import Settings
    from weightworks.stage.statistics import StatisticsOptions

    settings = Settings(**SETTINGS, num_samples=4, seq_len=32, dtype="float32")
    with one_thread():
        return [
            run_stats(
                str(model),
                StatisticsOptions.parse({"kind": kind}, where="stats"),
                settings,
                output=model.with_name(f"{model.name}.{kind}.safetensors"),
            ).target
            for model in small_models()[1:]
        ]


def run(trial: Trial, target: Path) -> Path:
    """Merge the small models with the method's defaults; returns the folder it made."""
    from weightworks.plan.merge import run_merge
    from weightworks.stage.settings import Settings

    base, *models = small_models()
    module = trial.module
    options = {**simplest(module.Options).resolved(), "check": "files"}
    chosen = [str(model) for model in models[: count_of(module.Method)]]
    if (kind := getattr(module.Method, "SIDE", None)) is not None:
        options["statistics"] = [str(path) for path in gathered(kind)[: len(chosen)]]
    with told(f"{trial.label} with its defaults does not merge {', '.join(chosen)}"), one_thread():
        run_merge(
            trial.entry.name,
            chosen,
            options,
            Settings(**SETTINGS),
            base=None if module.Method.BASE == "refused" else str(base),
            output_dir=target,
        )
    return target
