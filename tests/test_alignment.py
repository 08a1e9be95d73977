"""Alignment: orders of units that change nothing are found, planted ones are undone, and what is close stays."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from commands import Run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from merge import merge as merge_models
from weightworks.engine.alignment import Similarity, best_order, products
from weightworks.errors import ArchitectureError
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.permuted import PermutedView, runs
from weightworks.stream.symmetry import GROUP, HEAD, Family, Shape, Symmetry, find_symmetry, random_order, spread


def symmetry_of(folder: Path) -> Symmetry:
    checkpoint = Checkpoint.open(folder)
    return find_symmetry(DenseView(checkpoint), checkpoint)


def moved(folder: Path, target: Path, families: tuple[Family, ...], seed: int = 5) -> dict[str, torch.Tensor]:
    """A copy of a model with all of its families in random orders; returns the order of each, by name."""
    generator = torch.Generator().manual_seed(seed)
    checkpoint = Checkpoint.open(folder)
    orders = {family.name: random_order(family.shape, generator) for family in families}
    told: dict[str, tuple[int, torch.Tensor]] = {}
    for family in families:
        told |= family.orders(orders[family.name], checkpoint)
    view = PermutedView(checkpoint, told)
    shutil.copytree(folder, target)
    tensors = {name: view.read(name).contiguous() for name in checkpoint.tensors}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return orders


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    result: torch.Tensor = model(torch.arange(30)[None] * 11 % model.config.vocab_size).logits
    return result


KNOWN = {  # heads and groups of the attention part of a block, and how many families a block has
    "llama": (2, 2, 2),
    "qwen2": (2, 2, 2),  # biases
    "qwen3": (2, 2, 2),  # norms of queries and keys
    "phi3": (2, 2, 2),  # query, key and value in one tensor, gate and up in another
    "opt": (4, 1, 2),
    "gpt2": (4, 1, 2),  # stored [in, out]
    "gpt_neox": (4, 1, 2),  # query, key and value of a head side by side
    "mixtral": (2, 2, 5),  # each expert is a family
    "bloom": (0, 0, 1),  # heads see distances differently: they cannot change places
}


@pytest.mark.parametrize("kind", KNOWN)
def test_random_orders_leave_the_logits(kind: str, tmp_path: Path) -> None:
    folder = ARCHITECTURES[kind].save(tmp_path / "model")
    found = symmetry_of(folder)
    groups, heads, count = KNOWN[kind]
    first = [family for family in found.families if family.block == 0]
    assert len(first) == count
    assert len(found.families) == 2 * count
    attention = [family.shape for family in first if "att" in family.name]
    assert attention == ([Shape(groups, heads)] if groups else [])
    assert bool(found.unknown) == (not groups)
    orders = moved(folder, tmp_path / "moved", found.families)
    assert any(not torch.equal(order, order.sort().values) for order in orders.values())
    expected = logits(folder)
    assert float((logits(tmp_path / "moved") - expected).abs().max()) < 2e-5 * float(expected.abs().max())


def test_what_is_not_understood_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match=r"no units of its blocks are known to be exchangeable"):
        symmetry_of(ARCHITECTURES["mamba2"].save(tmp_path / "model"))


def test_rows_of_groups_and_heads() -> None:
    """Two groups of two heads; a query row each of two, then a key row each of one."""
    shape, order = Shape(2, 2), torch.tensor([3, 2, 0, 1])  # the second group first, its heads the other way round
    assert spread(((HEAD, 2), (GROUP, 1)), shape, order).tolist() == [6, 7, 4, 5, 0, 1, 2, 3, 9, 8]
    for seed in range(5):
        drawn = random_order(Shape(3, 4), torch.Generator().manual_seed(seed)).view(3, 4)
        assert all(len({int(head) // 4 for head in group}) == 1 for group in drawn)
        assert sorted(drawn.flatten().tolist()) == list(range(12))


@pytest.mark.parametrize("shape", [Shape(5, 1), Shape(3, 2), Shape(2, 3)])
def test_no_order_is_better(shape: Shape) -> None:
    """Against all orders there are; never worse than leaving all in place."""
    count = shape.groups * shape.heads
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        heads = torch.randn(count, count, generator=generator, dtype=torch.float64)
        groups = torch.randn(shape.groups, shape.groups, generator=generator, dtype=torch.float64)
        value = Similarity(heads, groups, 1.0, 1.0)
        insides = list(itertools.permutations(range(shape.heads)))
        every = [
            torch.tensor(
                [group * shape.heads + head for group, inside in zip(outer, inner, strict=True) for head in inside]
            )
            for outer in itertools.permutations(range(shape.groups))
            for inner in itertools.product(insides, repeat=shape.groups)
        ]
        best = value.cosine(best_order(heads, groups, shape), shape)
        assert best == pytest.approx(max(value.cosine(order, shape) for order in every))
        assert best >= value.cosine(torch.arange(count), shape)


def test_products_are_those_of_the_whole() -> None:
    """Summed over what stays in place they are the inner product of the tensors."""
    shape, segments = Shape(2, 3), ((HEAD, 2), (GROUP, 4))
    a, b = torch.randn(2, 20, 7, generator=torch.Generator().manual_seed(0)).double()
    heads, groups = products(shape, segments, a, b)
    assert float(heads.trace() + groups.trace()) == pytest.approx(float((a * b).sum()))


def test_reordered_tensors_hold_the_same_rows(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    name = "model.layers.0.mlp.down_proj.weight"
    whole = checkpoint.read(name)
    for axis in (0, 1):
        order = torch.randperm(whole.shape[axis], generator=torch.Generator().manual_seed(axis))
        view = PermutedView(checkpoint, {name: (axis, order)})
        seen = view.read(name, torch.float32)
        assert torch.equal(seen.flatten().sort().values, whole.float().flatten().sort().values)
        assert torch.equal(seen, whole.float().index_select(axis, order))
        assert torch.equal(view.read_rows(name, 3, 9, torch.float32), seen[3:9])
        assert view.specs == checkpoint.specs
        assert torch.equal(view.read_rows("model.norm.weight", 0, 4), checkpoint.read("model.norm.weight")[:4])
    assert list(runs([4, 5, 6, 2, 0, 1])) == [(4, 7), (2, 3), (0, 2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks, four query heads in two groups, 96 units."""
    return ARCHITECTURES["llama"].save(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def other(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The model with its units in random orders, and those orders."""
    target = tmp_path_factory.mktemp("moved") / "moved"
    return target, moved(model, target, symmetry_of(model).families)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def options(**more: Any) -> dict[str, Any]:
    return {"device": "cpu", "check": "files", **more}


def test_planted_orders_are_undone(model: Path, other: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """A merge with the moved copy is the model itself, bit for bit; without alignment it is another."""
    folder, orders = other
    outcome = merge_models([model, folder], align=True, output_dir=tmp_path / "aligned", **options())
    expected, made = weights(model), weights(tmp_path / "aligned")
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())
    assert outcome.provenance is not None
    facts = outcome.provenance["alignment"]
    assert facts["reference"] == str(model)
    rows = facts["models"][str(folder)]
    assert len(rows) == len(orders) == 4
    for row in rows:
        order = orders[row["family"]]
        assert row["cosine"] + row["gain"] == pytest.approx(1.0, abs=1e-6)
        assert row["moved"] == int((order != torch.arange(len(order))).sum())  # its inverse moves as many
    assert "| units aligned | in 4 of 4 parts of blocks, nearer by a cosine of up to" in (
        tmp_path / "aligned" / "README.md"
    ).read_text(encoding="utf-8")
    merge_models([model, folder], output_dir=tmp_path / "plain", **options())
    plain = weights(tmp_path / "plain")
    assert sum(not torch.equal(plain[name], tensor) for name, tensor in expected.items()) == 14  # seven a block
    # To a base, and for a method that needs one:
    merge_models([folder], method="task_arithmetic", base=model, align=True, output_dir=tmp_path / "delta", **options())
    assert all(torch.equal(weights(tmp_path / "delta")[name], tensor) for name, tensor in expected.items())


def test_what_is_near_keeps_its_order(model: Path, tmp_path: Path) -> None:
    """A fine-tune of the reference: the merge has the bytes of one without alignment, and says that nothing was moved."""
    tuned = Path(shutil.copytree(model, tmp_path / "tuned"))
    generator = torch.Generator().manual_seed(2)
    noisy = {
        name: (tensor.float() + 0.01 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in weights(model).items()
    }
    save_file(noisy, tuned / "model.safetensors", metadata={"format": "pt"})
    outcome = merge_models([model, tuned], align=True, output_dir=tmp_path / "aligned", **options())
    merge_models([model, tuned], output_dir=tmp_path / "plain", **options())
    assert (tmp_path / "aligned/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    assert outcome.provenance is not None
    rows = outcome.provenance["alignment"]["models"][str(tuned)]
    assert all(row["gain"] < 1e-3 and row["cosine"] > 0.9 for row in rows)
    assert "no other order was nearer" in (tmp_path / "aligned" / "README.md").read_text(encoding="utf-8")


def test_a_killed_alignment_goes_on(
    merge: Callable[..., Run], model: Path, other: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    where = "weightworks.engine.alignment:_aligned"
    words = ("soup", model, other[0], "--align", "--check", "files", "-q", "-o", "soup")
    assert merge(*words, cwd=tmp_path, faults=[["signal_at", where, 3]]).code == -9
    again = merge(*words, cwd=tmp_path, faults=[["count_calls", where, str(tmp_path / "calls")]])
    assert again.code == 0, again.err
    assert (tmp_path / "calls").read_text() == "2"  # the first block's two parts had been journalled
    assert all(torch.equal(weights(tmp_path / "soup")[name], tensor) for name, tensor in weights(model).items())
