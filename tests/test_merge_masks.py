"""Merges of pruned models: masks that are alike are carried over and held, those that differ are told and refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import prune, recover
from merge import merge as merge_models
from weightworks.errors import MethodError
from weightworks.store.checkpoint import MASKS, Checkpoint
from weightworks.store.masks import Masks
from weightworks.store.sources import file_digest

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS: dict[str, Any] = {"device": "cpu", "check": "files"}


@pytest.fixture(scope="module")
def copies(sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two copies of the pruned model whose kept weights moved apart."""
    place, found = tmp_path_factory.mktemp("copies"), []
    masks = Masks.of(sparse)
    assert masks is not None
    for seed in (1, 2):
        found.append(shutil.copytree(sparse, place / f"copy-{seed}"))
        tensors, generator = load_file(sparse / "model.safetensors"), torch.Generator().manual_seed(seed)
        for name in masks.infos:
            noise = 0.01 * torch.randn(tensors[name].shape, generator=generator)
            tensors[name] = (tensors[name] + noise * masks.read(name, tensors[name].shape)).bfloat16()
        save_file(tensors, found[-1] / "model.safetensors", metadata={"format": "pt"})
        (found[-1] / "provenance.json").unlink()
    return found


def zeros_are_held(folder: Path, sparse: Path) -> None:
    masks, view = Masks.of(sparse), Checkpoint.open(folder)
    assert masks is not None
    made, given = (load_file(one / MASKS) for one in (folder, sparse))
    assert made.keys() == given.keys()
    assert all(torch.equal(made[name], given[name]) for name in given)
    for name in masks.infos:
        weight = view.read(name)
        assert not weight[~masks.read(name, tuple(weight.shape))].view(torch.int16).any()


def test_a_soup_of_copies_has_their_masks_and_recovers_on(copies: list[Path], sparse: Path, tmp_path: Path) -> None:
    soup = merge_models(copies, device="cpu", output_dir=tmp_path / "soup")  # loaded and held against its masks
    assert soup.provenance is not None
    assert soup.provenance["checks"]["masks"]["kept"] * 2 == soup.provenance["checks"]["masks"]["weights"]
    zeros_are_held(soup.target, sparse)
    first, second, mean = (Checkpoint.open(one) for one in (*copies, soup.target))
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(
        mean.read(name).float(), (first.read(name).float() + second.read(name).float()) / 2, atol=1e-3, rtol=1e-2
    )
    quick: dict[str, Any] = {"steps": 1, "batch_size": 2, "seq_len": 32, "train": ["norm"], "device": "cpu"}
    again = recover(soup.target, **quick, output_dir=tmp_path / "again")
    assert file_digest(again.target / MASKS) == file_digest(soup.target / MASKS)


@pytest.mark.parametrize("method", ["slerp", "ties", "opcm"])
def test_other_merges_hold_them_too(method: str, copies: list[Path], sparse: Path, tmp_path: Path) -> None:
    """With a base that is pruned alike where one is needed: what is zero in all inputs is zero in the result."""
    base = {} if method == "slerp" else {"base": sparse}
    outcome = merge_models(copies, method=method, **base, **OPTIONS, output_dir=tmp_path / "out")
    zeros_are_held(outcome.target, sparse)


def test_a_dense_base_makes_it_dense(copies: list[Path], small: Path, tmp_path: Path) -> None:
    outcome = merge_models(copies, method="task-arithmetic", base=small, **OPTIONS, output_dir=tmp_path / "out")
    assert not (outcome.target / MASKS).exists()


def test_models_that_were_pruned_apart_are_refused(copies: list[Path], small: Path, tmp_path: Path) -> None:
    other = prune(small, method="magnitude", sparsity=0.5, device="cpu", output_dir=tmp_path / "other").target
    one, two = (load_file(folder / MASKS) for folder in (copies[0], other))
    bits = {
        name.removesuffix(".mask"): sum(int(((one[name] ^ two[name]) >> place & 1).sum()) for place in range(8))
        for name in one
    }
    first = min(bits)  # in order of names
    text = (
        rf"merge.soup: the models are pruned in different places.*the masks of {len(bits)} tensors differ, in "
        rf"{sum(bits.values()):,} bits \({first} {bits[first]:,}, "
    )
    with pytest.raises(MethodError, match=text) as caught:
        merge_models([copies[0], other], **OPTIONS, output_dir=tmp_path / "out")
    assert "recipes/sparse-soup.yaml" in caught.value.hint
    assert not (tmp_path / "out.partial").exists()
    (other / MASKS).unlink()
    assert merge_models([copies[0], other], **OPTIONS, output_dir=tmp_path / "out").target.exists()


def test_aligned_units_would_leave_their_masks(copies: list[Path], tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="--align would move units of one away from its masks"):
        merge_models(copies, align=True, device="cpu", output_dir=tmp_path / "out")
