"""What holds of every merge on the shelf, for random models and for degenerate ones. Exceptions are listed with reasons.

Weights are whole numbers over powers of two, so that task vectors, their sums and their multiples by four are exact in
float32 and many magnitudes are equal. Methods come from the catalog: a new one is held to all of this by being there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from merges import Tensors, method

from weightworks.stage import catalog
from weightworks.testing.merging import merged

SHAPES = {"blk.norm.weight": (4,), "blk.scale": (), "blk.up.weight": (5, 4), "embed.weight": (6, 4)}
COUNT = sum(int(numpy.prod(shape)) for shape in SHAPES.values())
UNIT = 2.0**-12
NAMES = [entry.name for entry in catalog.declared() if entry.kind == "merge" and entry.distribution is None]
METHODS = {name: catalog.find("merge", name).load() for name in NAMES}
METHODS = {name: module for name, module in METHODS.items() if not getattr(module.Method, "SIDE", None)}
few = settings(max_examples=6, deadline=None, derandomize=True, database=None)

# Options under which copies of a model merge to the model, where the defaults do not promise that.
IDENTITY: dict[str, dict[str, Any]] = {
    "breadcrumbs": {"density": 1.0, "scaling": 1.0, "normalize": True},
    "dare": {"density": 1.0},
    "della": {"density": 1.0, "scaling": 1.0},
    "magmax": {"scaling": 1.0},
    "nearswap": {"t": 1e9},
    "ram": {"epsilon": 0.0},
    "task_arithmetic": {"scaling": 1.0, "normalize": True},
    "ties": {"density": 1.0},
    "wise_ft": {"alpha": 1.0},
}
NO_IDENTITY = {
    "arcee_fusion": "takes over only what stands out",
    "iso": "makes singular values equal",
    "opcm": "what is added as it is, vectors and embeddings, adds up",
    "pcb": "keeps a share of each task vector, and clamps its outliers",
    "tsv": "keeps a share of the rank for each task",
}
# Sparse merges of copies are no identity, but what one copy gives.
AS_ONE: dict[str, dict[str, Any]] = {
    "breadcrumbs": {"normalize": True},
    "magmax": {},
    "ram": {},
    "ties": {},
}
ORDERED = {
    "ema": "the latest checkpoint counts most",
    "magmax": "of equal magnitudes the later wins",
    "opcm": "each model is projected away from those before it",
    "slerp": "t is counted from the first model",
}
NOT_COVARIANT = {
    "arcee_fusion": "the softmax of a row knows its scale",
    "nearswap": "t is an absolute distance",
    "ram": "epsilon is an absolute change",
}
RANDOM = {"dare", "della"}  # whose draws go by the names of tensors
BY_NAME = dict.fromkeys(("iso", "opcm", "tsv"), "embeddings are told by their names")


def unpacked(values: numpy.ndarray[Any, Any]) -> Tensors:
    """The tensors of a model from its weights [COUNT], whole numbers of units."""
    found, start = {}, 0
    for name, shape in SHAPES.items():
        stop = start + int(numpy.prod(shape))
        found[name] = torch.from_numpy(values[start:stop].astype(numpy.float32) * UNIT).reshape(shape).clone()
        start = stop
    return found


def plus(base: Tensors, tasks: Sequence[Tensors], factor: float = 1.0) -> list[Tensors]:
    return [{name: value + factor * task[name] for name, value in base.items()} for task in tasks]


def sizes(name: str) -> list[int]:
    """The numbers of models to try ``name`` with."""
    module = METHODS[name].Method
    return [count for count in (1, 2, 3) if module.LEAST <= count <= (module.MOST or 3)]


@st.composite
def ordinary(draw: Callable[..., Any], name: str) -> tuple[Tensors, list[Tensors]]:
    """A base, and task vectors an eighth its size."""
    generator = numpy.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.sampled_from(sizes(name)))
    base = unpacked(generator.integers(-8000, 8001, COUNT))
    return base, [unpacked(generator.integers(-1000, 1001, COUNT)) for _ in range(count)]


@st.composite
def degenerate(draw: Callable[..., Any], name: str) -> tuple[Tensors, list[Tensors]]:
    """Small whole numbers, most of them equal; task vectors may be zero, copies of each other, or opposed."""
    drawn = arrays(numpy.int64, COUNT, elements=st.integers(-2, 2))
    base = unpacked(draw(drawn))
    tasks = [unpacked(draw(drawn)) for _ in range(draw(st.sampled_from(sizes(name))))]
    factor = draw(st.sampled_from([None, 0.0, 1.0, -1.0]))
    if factor is not None:
        tasks[-1] = {key: factor * value for key, value in tasks[0].items()}
    return base, tasks


def run(name: str, base: Tensors, tasks: Sequence[Tensors], factor: float = 1.0, **how: Any) -> Tensors:
    """What ``name`` makes of base and task vectors; a method that takes a base gets it. ``how`` goes to the engine."""
    options = how.pop("options", {})
    given = None if METHODS[name].Method.BASE == "refused" else base
    return merged(method(name, **options), plus(base, tasks, factor), given, **how)


def close(found: Tensors, expected: Tensors, tolerance: float = 1e-6) -> None:
    """Equal within ``tolerance`` of the largest weight of the model."""
    size = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=0, atol=tolerance * size + 1e-12), name


every = pytest.mark.parametrize("name", METHODS)


def test_exceptions_are_of_methods_that_exist() -> None:
    tables = (IDENTITY, NO_IDENTITY, AS_ONE, ORDERED, NOT_COVARIANT, RANDOM, BY_NAME)
    assert {name for table in tables for name in table} <= set(METHODS)


@every
def test_copies_merge_to_themselves(name: str) -> None:
    if name in NO_IDENTITY:
        pytest.skip(NO_IDENTITY[name])

    @few
    @given(ordinary(name))
    def holds(case: tuple[Tensors, list[Tensors]]) -> None:
        base, tasks = case
        found = run(name, base, [tasks[0]] * len(tasks), options=IDENTITY.get(name, {}))
        close(found, plus(base, tasks)[0])

    holds()


@pytest.mark.parametrize("name", [name for name in AS_ONE if name in METHODS])
def test_sparse_merges_of_copies_are_those_of_one(name: str) -> None:
    @few
    @given(ordinary(name))
    def holds(case: tuple[Tensors, list[Tensors]]) -> None:
        base, tasks = case
        close(run(name, base, [tasks[0]] * 3, options=AS_ONE[name]), run(name, base, tasks[:1], options=AS_ONE[name]))

    holds()


@every
def test_the_base_is_a_fixed_point(name: str) -> None:
    """Without any change the result is the base, to the last bit."""

    @few
    @given(degenerate(name))
    def holds(case: tuple[Tensors, list[Tensors]]) -> None:
        base, tasks = case
        found = run(name, base, tasks, factor=0.0)
        assert all(torch.equal(found[key], value) for key, value in base.items())

    holds()


@every
def test_order_of_models(name: str) -> None:
    """Models in another order, with their weights and keys, merge to the same; where order counts, it does."""
    if METHODS[name].Method.MOST == 1:
        pytest.skip("takes one model")
    weighted = "weights" in METHODS[name].Options.model_fields
    options: dict[str, Any] = {"slerp": {"t": 0.25}, "ema": {"mu": 0.75}}.get(
        name, {}
    )  # one half is the same either way

    @few
    @given(ordinary(name))
    def holds(case: tuple[Tensors, list[Tensors]]) -> None:
        base, tasks = case
        assume(len(tasks) > 1)
        keys = [f"key {number}" for number in range(len(tasks))]
        weights = {"weights": [1.0, 2.0, 4.0][: len(tasks)]} if weighted else {}
        turned = {"weights": weights["weights"][::-1]} if weighted else {}
        first = run(name, base, tasks, keys=keys, options={**options, **weights})
        second = run(name, base, tasks[::-1], keys=keys[::-1], options={**options, **turned})
        if name == "ties":
            assert all(torch.equal(first[key], second[key]) for key in first)
        elif name not in ORDERED:
            close(first, second, 2e-6)
        elif name != "magmax":  # there only where magnitudes are equal
            assert any(not torch.allclose(first[key], second[key], rtol=1e-4) for key in first)

    holds()


@every
def test_scale(name: str) -> None:
    """Four times the task vectors give four times the change; without a base, four times the models."""
    if name in NOT_COVARIANT:
        pytest.skip(NOT_COVARIANT[name])

    @few
    @given(ordinary(name))
    def holds(case: tuple[Tensors, list[Tensors]]) -> None:
        base, tasks = case
        if METHODS[name].Method.BASE == "refused":
            base = {key: torch.zeros_like(value) for key, value in base.items()}
        once, fourfold = run(name, base, tasks), run(name, base, tasks, factor=4.0)
        close(fourfold, {key: value + 4 * (once[key] - value) for key, value in base.items()}, 4e-6)

    holds()


@every
@pytest.mark.parametrize("rows", [1, 4])
def test_rows_of_slabs(name: str, rows: int) -> None:
    """How many rows are held at a time changes nothing but the last bit."""

    @few
    @given(ordinary(name))
    def holds(case: tuple[Tensors, list[Tensors]]) -> None:
        close(run(name, *case, rows=rows), run(name, *case), 1.2e-7)

    holds()


@every
def test_names_of_tensors(name: str) -> None:
    """Tensors under names that sort the other way merge to the same."""
    if name in RANDOM or name in BY_NAME:
        pytest.skip("its result goes by the names")
    order = dict(zip(sorted(SHAPES), sorted(SHAPES, reverse=True), strict=True))

    @few
    @given(ordinary(name))
    def holds(case: tuple[Tensors, list[Tensors]]) -> None:
        base, tasks = ({order[key]: value for key, value in one.items()} for one in (case[0], {}))
        tasks = [{order[key]: value for key, value in task.items()} for task in case[1]]
        found = run(name, base, tasks)
        close({key: found[order[key]] for key in SHAPES}, run(name, *case))

    holds()


@every
def test_seeds(name: str) -> None:
    """The same seed draws the same; only random methods draw."""

    @few
    @given(ordinary(name))
    def holds(case: tuple[Tensors, list[Tensors]]) -> None:
        first, again, other = (run(name, *case, seed=seed) for seed in (1, 1, 2))
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert all(torch.equal(first[key], other[key]) for key in first) == (name not in RANDOM)

    holds()


@every
def test_nothing_is_lost_and_nothing_is_nan(name: str) -> None:
    """Every tensor comes out with its shape and finite, whatever the task vectors: zero, equal, or opposed."""

    @settings(few, max_examples=25)
    @given(degenerate(name))
    def holds(case: tuple[Tensors, list[Tensors]]) -> None:
        found = run(name, *case)
        assert {key: tuple(value.shape) for key, value in found.items()} == SHAPES
        assert all(bool(torch.isfinite(value).all()) for value in found.values())
        size = max(float(value.abs().max()) for one in (case[0], *case[1]) for value in one.values())
        assert all(float(value.abs().max()) <= 20 * size for value in found.values())

    holds()
