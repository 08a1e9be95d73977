"""The contract of methods, one function a clause. Each says in one sentence what a method did that it must not do."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightworks.errors import UsageError
from weightworks.testing.trial import Trial, demand, one_thread, told

if TYPE_CHECKING:
    import torch

HEAVY = ("torch", "numpy", "scipy", "transformers", "safetensors")
WIDTH, TOKENS, WINDOWS = 128, 256, 16  # of the matrices a method is tried on by itself


# What a method's file says.


def can_be_used(trial: Trial, folder: Path) -> None:
    """The method is found, its module imports, and has what a method needs."""
    demand(trial.module is not None, f"{trial.label} cannot be used")


def says_what_it_is(trial: Trial, folder: Path) -> None:
    """It has a summary, a paper and a version."""
    module, label = trial.module, trial.label
    demand(bool(trial.entry.summary), f"{label}: {module.__name__} has no docstring; its first sentence is the summary")
    said = " ".join((module.__doc__ or "").split("\n\n")[0].split())
    demand(trial.entry.summary == said, f"{label}: the summary {trial.entry.summary!r} is not that of its docstring")
    demand(isinstance(module.PAPER, str) and bool(module.PAPER.strip()), f"{label}: PAPER is empty; name the source")
    demand(
        type(module.VERSION) is int and module.VERSION >= 1, f"{label}: VERSION is {module.VERSION!r}, not 1 or more"
    )


def help_stays_quick(trial: Trial, folder: Path) -> None:
    """Importing it loads no heavy library, so that help and usage errors stay quick."""
    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from weightworks.stage import catalog\n"
        f"catalog.find({trial.entry.kind!r}, {trial.entry.name!r}).load().Options.model_json_schema()\n"
        f"print('loaded', *sorted({{name.partition('.')[0] for name in sys.modules if '.' in name}} & {set(HEAVY)!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    demand(done.returncode == 0, f"{trial.label} cannot be imported in a new process: {done.stderr.strip()[-300:]}")
    loaded = done.stdout.split()[1:]
    demand(
        not loaded,
        f"{trial.label}: importing it loads {', '.join(loaded)}, which makes every help slow; `import torch` alone does "
        "not, using it outside functions does, as in `from torch import nn`: import there what is needed there",
    )


def options_say_what_they_mean(trial: Trial, folder: Path) -> None:
    """Every option has a description, and a default but in scores, which must be told what to read."""
    for name, field in trial.module.Options.model_fields.items():
        demand(bool(field.description), f"{trial.label}: option '{name}' has no description")
        fits = trial.entry.kind == "score" or not field.is_required()
        demand(fits, f"{trial.label}: option '{name}' has no default")


def options_round_trip(trial: Trial, folder: Path) -> None:
    """Resolved options are JSON, in the order of the fields, and make the same options again."""
    options_class = trial.module.Options
    for options in [simplest(options_class), *accepted(options_class)]:
        resolved = options.resolved()
        order = list(options_class.model_fields)
        demand(list(resolved) == order, f"{trial.label}: resolved options are {list(resolved)}, the fields are {order}")
        with told(f"{trial.label}: {options!r} does not survive JSON"):
            again = options_class(**json.loads(json.dumps(resolved, allow_nan=False)))
        demand(again == options, f"{trial.label}: {options!r} resolved and read again is {again!r}")


def wrong_values_are_refused(trial: Trial, folder: Path) -> None:
    """Wrong types, values out of bounds and unknown options are refused by name."""
    options_class, label = trial.module.Options, trial.label
    base = simplest(options_class).model_dump(exclude_unset=True)
    for name in options_class.model_fields:
        for value in beyond(options_class, name):
            text = _refusal(trial, {**base, name: value})
            demand(text is not None, f"{label}: option '{name}' takes {value!r}, which its type or bounds exclude")
            named = re.match(rf"{re.escape(label)}: option '{re.escape(name)}(\.[^']*)?' = ", text or "")
            demand(named is not None, f"{label}: the refusal of {name} = {value!r} does not name the option: {text}")
    text = _refusal(trial, {**base, "no_such_option": 1})
    demand(text is not None, f"{label}: an option it does not have, no_such_option, is taken silently")
    said = f"{label} has no option 'no_such_option'"
    demand((text or "").startswith(said), f"{label}: the refusal of an unknown option is {text!r}, not {said!r}")


def has_one_shape(trial: Trial, folder: Path) -> None:
    """It is of one of the shapes that its kind has, and keeps the options it is made with."""
    module, label = trial.module, trial.label
    options = simplest(module.Options)
    with told(f"{label}: Method({options!r}) fails"):
        method = module.Method(options)
    demand(getattr(method, "options", None) == options, f"{label}: Method(options).options are not these options")
    if trial.reduces is not None:
        wanted = {
            "units": ("stays", "watch", "choose"),
            "blocks": ("leaves", "shorten"),
            "experts": ("leaves", "watch", "choose"),
        }
        demand(trial.reduces in wanted, f"{label}: Method.reduces is {trial.reduces!r}, not one of {', '.join(wanted)}")
        missing = [name for name in wanted[trial.reduces] if not callable(getattr(method, name, None))]
        demand(not missing, f"{label}: Method reduces {trial.reduces} and has no {', '.join(missing)}")
        return
    if trial.entry.kind == "select":
        demand(callable(getattr(method, "select", None)), f"{label}: Method has no `select`")
        demand(
            isinstance(getattr(method, "measures", None), bool), f"{label}: Method.measures is neither True nor False"
        )
        demand(
            callable(getattr(options, "count", None)),
            f"{label}: Options has no `count`, which makes rows of the budget",
        )
    if trial.entry.kind in ("quantize", "prune"):
        shapes = (
            ("apply",),
            ("watch", "solve"),
            ("trace", "traced", "answer"),
            ("regime", "subset", "begin", "rates", "end", "told"),
        )
        said = [" and ".join(f"`{name}`" for name in names) for names in shapes]
        has = [words for words, names in zip(said, shapes, strict=True) if all(hasattr(method, name) for name in names)]
        demand(bool(has), f"{label}: Method has neither {', nor '.join(said)}")
        demand(len(has) == 1, f"{label}: Method has {', and '.join(has)}: which is meant?")
        with told(f"{label}: Method.scheme() fails"):
            scheme = method.scheme()
        needed = scheme is not None or trial.entry.kind == "prune"
        demand(needed, f"{label}: Method.scheme() is None, so nothing would be quantized")
    if trial.entry.kind == "prune":
        kept = getattr(method, "masks", None) is True or hasattr(method, "factored")
        demand(kept, f"{label}: Method.masks is not True, so no mask would be kept, nor has it `factored`")
        callables = all(callable(getattr(method, name, None)) for name in ("refusal", "surveys"))
        demand(callables, f"{label}: Method has no `refusal` and `surveys`")


def _has(method: Any, names: tuple[str, ...]) -> bool:
    return all(hasattr(method, name) for name in names)


# What a method makes.


def defaults_run(trial: Trial, folder: Path) -> None:
    """With its defaults it runs on a small model, verified, without a fallback."""
    facts, label = trial.provenance, trial.label
    identity, defaults = facts["identity"], trial.options
    demand(identity["method"] == label, f"the provenance names the method {identity['method']}, not {label}")
    demand(identity["options"] == defaults, f"{label}: ran with {identity['options']}, the defaults are {defaults}")
    demand(not facts["fallbacks"], f"{label}: fell back with its defaults: {'; '.join(facts['fallbacks'][:3])}")
    for which, value in facts["quality"].items():
        demand(math.isfinite(value), f"{label}: the perplexity of the {which} model is {value}")


def same_seed_same_bytes(trial: Trial, folder: Path) -> None:
    """A second run makes the same files, byte for byte."""
    first, again = digests(trial.made), digests(trial.run(folder / trial.made.name))  # the model card has the name
    other = sorted(name for name in first.keys() | again.keys() if first.get(name) != again.get(name))
    demand(
        not other,
        f"{trial.label}: a second run of equal seed made other bytes: {', '.join(other)}; draw random numbers from a "
        "generator with a seed of its own, and depend on no clock and no order of a set",
    )


def remembers_nothing(trial: Trial, folder: Path) -> None:
    """A weight's result does not depend on the weights before it, so that a resumed run ends in the same bytes."""
    method = trial.module.Method(trial.module.Options())
    if not any(hasattr(method, name) for name in ("apply", "solve", "answer")):
        return  # it sees the whole model at once
    with told(f"{trial.label} cannot be applied to a random weight of {WIDTH} x {WIDTH}"), one_thread():
        for seed in (1, 2):
            first = _solved(trial.module.Method(trial.module.Options()), seed)
            after = _solved(method, seed)
            demand(
                bool((first == after).all()),
                f"{trial.label}: the result for a weight changed after another weight was done; keep no state in "
                "Method, and draw from no generator that others draw from",
            )


def other_tensors_untouched(trial: Trial, folder: Path) -> None:
    """What it does not report as changed is the same, bit for bit."""
    import torch

    demand(bool(trial.changed), f"{trial.label} changed nothing")
    unknown = sorted(trial.changed - set(trial.source.tensors))
    demand(not unknown, f"{trial.label} reports tensors that the model does not have: {', '.join(unknown)}")
    for name in sorted(set(trial.source.tensors) - trial.changed):
        demand(name in trial.result.checkpoint.tensors, f"{trial.label}: {name} is not in the result, and not reported")
        before, after = trial.source.read(name), trial.result.checkpoint.read(name)
        same = before.dtype == after.dtype and before.shape == after.shape
        same = same and torch.equal(before.view(torch.uint8), after.view(torch.uint8))  # bits, NaN or not
        demand(same, f"{trial.label}: {name} differs from the model's, and is not reported as changed")


def shapes_and_dtypes_are_kept(trial: Trial, folder: Path) -> None:
    """The result has the model's tensors, each with its shape, and its dtype where it is not packed."""
    names, expected = set(trial.result.names), set(trial.source.tensors)
    demand(names == expected, f"{trial.label}: tensors missing or added: {', '.join(sorted(names ^ expected))}")
    for name in sorted(expected):
        info, shape = trial.source.info(name), tuple(trial.result.read(name).shape)
        demand(shape == info.shape, f"{trial.label}: {name} has shape {shape}, the model's has {info.shape}")
        if name in trial.result.checkpoint.tensors:
            dtype = trial.result.checkpoint.info(name).dtype
            demand(dtype == info.dtype, f"{trial.label}: {name} has dtype {dtype}, the model's has {info.dtype}")


def values_are_finite(trial: Trial, folder: Path) -> None:
    """No weight is NaN or infinite, and none was lost: its error is smaller than the weight itself."""
    import torch

    for name in trial.result.names:
        after = trial.result.read(name).float()
        demand(bool(torch.isfinite(after).all()), f"{trial.label}: {name} holds NaN or infinite values")
        before = trial.source.read(name).float()
        error = float((after - before).norm() / before.norm().clamp(min=1e-30))
        demand(error < 1, f"{trial.label}: {name} is {error:.0%} off, which is no better than leaving it out")


def report_is_complete(trial: Trial, folder: Path) -> None:
    """The report has a line for every changed tensor, with true figures that JSON can hold."""
    for row in trial.provenance["report"]:
        info, where = trial.source.info(row["tensor"]), f"{trial.label}, report on {row['tensor']}"
        demand(row["method"] == trial.label, f"{where}: the method is {row['method']}")
        demand(
            row["shape"] == list(info.shape), f"{where}: the shape is {row['shape']}, in the model {list(info.shape)}"
        )
        demand(row["bytes_in"] == info.nbytes, f"{where}: {row['bytes_in']} bytes in, in the model {info.nbytes}")
        demand(row["bytes_out"] > 0, f"{where}: {row['bytes_out']} bytes out")
        wrong = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        demand(not wrong, f"{where}: {', '.join(wrong)} is not finite")
        errors = [key for key in row if key.startswith("relative_")]
        demand(
            bool(errors) or trial.entry.kind not in ("quantize", "prune"),
            f"{where}: no figure of the error; put `relative_weight_error` into Solution.facts",
        )


DECLARATION = (
    can_be_used, says_what_it_is, options_say_what_they_mean, options_round_trip, wrong_values_are_refused,
    has_one_shape,
)  # fmt: skip
COMMAND = (help_stays_quick,)
RUNS = (defaults_run, same_seed_same_bytes)
SAME = (
    remembers_nothing, other_tensors_untouched, shapes_and_dtypes_are_kept, values_are_finite, report_is_complete,
)  # fmt: skip  # what holds of methods that keep every tensor


# Aids.


def examples(options_class: Any, name: str) -> Iterator[Any]:
    """Values other than the default that the type of an option may allow; bounds and validators may refuse some."""
    field = options_class.model_fields[name]
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    for kind in _kinds(options_class, name):
        if "enum" in kind or "const" in kind:
            yield from (value for value in kind.get("enum", [kind.get("const")]) if value != default)
        elif kind.get("type") == "boolean":
            yield not default
        elif kind.get("type") in ("integer", "number"):
            step = 1 if kind["type"] == "integer" else 0.5
            number = (
                default if isinstance(default, int | float) else kind.get("minimum", kind.get("exclusiveMinimum", 0))
            )
            yield from (2 * number, number + step, number - step, number * step)
        elif kind.get("type") == "array":
            yield ["lm_head"]
        elif kind.get("type") == "string":
            yield from field.examples or ["lm_head"]


def simplest(options_class: Any) -> Any:
    """The defaults, and the first example of what has none."""
    required = [name for name, field in options_class.model_fields.items() if field.is_required()]
    return options_class(**{name: next(examples(options_class, name)) for name in required})


def accepted(options_class: Any) -> Iterator[Any]:
    """Options with one value other than the default, for every option and every value of ``examples`` it takes."""
    from pydantic import ValidationError

    base = simplest(options_class).model_dump(exclude_unset=True)
    for name in options_class.model_fields:
        for value in examples(options_class, name):
            try:
                yield options_class(**{**base, name: value})
            except ValidationError:
                continue


def beyond(options_class: Any, name: str) -> Iterator[Any]:
    """Values that the type and the bounds of an option exclude."""
    yield object()
    kinds = _kinds(options_class, name)
    free = any(kind.get("type") == "string" and "enum" not in kind and "const" not in kind for kind in kinds)
    if not free or options_class.model_fields[name].examples:  # a text that has examples has a form
        yield "no such choice"
    if any(kind.get("type") in ("integer", "number") for kind in kinds):
        yield "1"  # the text of a number is none
    for kind in kinds:
        yield from (kind[key] + sign for key, sign in (("minimum", -1), ("maximum", 1)) if key in kind)
        yield from (kind[key] for key in ("exclusiveMinimum", "exclusiveMaximum") if key in kind)


def _kinds(options_class: Any, name: str) -> list[dict[str, Any]]:
    """The JSON Schemas of an option: its own, and those of the parts of a union."""
    schema = options_class.model_json_schema()["properties"][name]
    return [schema, *schema.get("anyOf", [])]


def _refusal(trial: Trial, values: dict[str, Any]) -> str | None:
    """What is said against ``values``; None if they are taken."""
    with told(f"{trial.label}: {values!r} is not refused properly"):
        try:
            trial.module.Options.parse(values, where=trial.label)
        except UsageError as error:
            return str(error)
    return None


def _solved(method: Any, seed: int) -> torch.Tensor:
    """What a method makes of a random weight [out, in], the same for every call with this seed."""
    return solution(method, random_weight(seed)).dense()


def random_weight(seed: int) -> torch.Tensor:
    import torch

    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def solution(method: Any, weight: torch.Tensor) -> Any:
    """A method's answer for ``weight`` [out, in], whose inputs are the same for every call."""
    import torch

    from weightworks.stage.protocols import Target

    target = Target("weight", torch.float16)
    with torch.no_grad():
        if hasattr(method, "apply"):
            return method.apply(weight.clone(), target)
        generator = torch.Generator().manual_seed(7)
        if hasattr(method, "trace"):
            traced = method.trace(weight.numel(), WINDOWS, torch.device("cpu"))
            for _ in range(WINDOWS):
                traced.add(1e-3 * torch.randn(WIDTH, WIDTH, generator=generator))
            return method.answer(weight.clone(), traced, target)
        statistics = method.watch(WIDTH, torch.device("cpu"))
        statistics.add(torch.randn(TOKENS, WIDTH, generator=generator))
        return method.solve([weight.clone()], statistics, [target])[0]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    from weightworks.store.sources import file_digest

    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}
