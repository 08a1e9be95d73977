"""Masks: exact counts, ties by index, patterns; and the bits that keep them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CheckpointMaker
from safetensors.torch import save_file

from compress.masks import Pattern, pattern_mask, shares, top_mask
from weightworks.errors import CheckpointError, VerificationError
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.masks import MASKS, Masks, check_masks, mask_spec, pack_bits, unpack_bits

pytestmark = pytest.mark.usefixtures("one_thread")


def sorted_mask(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """The definition: a stable sort, the first of it pruned."""
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort(stable=True)[: scores.numel() - keep]] = False
    return mask.view_as(scores)


@pytest.mark.parametrize("seed", range(40))
def test_counts_are_exact_and_ties_go_by_index(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns, levels = (int(torch.randint(1, most, (), generator=generator)) for most in (7, 13, 6))
    scores = torch.randint(levels, (rows, columns), generator=generator).float()
    for keep in {0, 1, rows * columns // 2, int(0.7 * rows * columns), rows * columns}:
        assert torch.equal(top_mask(scores, keep), sorted_mask(scores, keep))
        by_row = top_mask(scores, keep, "row")
        for row, score, count in zip(by_row, scores, shares(rows * columns - keep, rows), strict=True):
            assert torch.equal(row, sorted_mask(score, columns - count))


@pytest.mark.parametrize("of", [2, 3, 4, 8, 9])
def test_patterns_are_exact_and_ties_go_by_index(of: int) -> None:
    scores = torch.randint(4, (5, 12 * of), generator=torch.Generator().manual_seed(of)).float()
    for kept in range(1, of):
        mask = pattern_mask(scores, Pattern(kept, of))
        for group, score in zip(mask.view(-1, of), scores.view(-1, of), strict=True):
            assert torch.equal(group, sorted_mask(score, kept))


def test_shares_are_even_and_add_up() -> None:
    assert shares(7, 3) == [2, 2, 3]
    assert shares(0, 4) == [0, 0, 0, 0]
    assert sum(shares(1001, 77)) == 1001


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:2", "2-4", "half", "2:4:8", ""])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="keeps N of every M"):
        Pattern.parse(text)


def test_patterns_say_what_is_kept() -> None:
    assert Pattern.parse("unstructured") is None
    pattern = Pattern.parse("1:4")
    assert pattern is not None
    assert pattern.sparsity == 0.75
    assert pattern_mask(torch.arange(8.0)[None], pattern).tolist() == [[False] * 3 + [True] + [False] * 3 + [True]]


# The bits on disk.


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64])
def test_bits_come_back(columns: int) -> None:
    mask = torch.rand(5, columns, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_bits(mask)
    assert packed.shape == mask_spec("w", (5, columns)).shape
    assert torch.equal(unpack_bits(packed, columns), mask)


def test_the_first_column_is_the_lowest_bit() -> None:
    mask = torch.tensor([[True, False, False, True, False, False, False, False, True]])
    assert pack_bits(mask).tolist() == [[0b1001, 0b1]]


@pytest.fixture
def pruned(make_checkpoint: CheckpointMaker) -> tuple[Path, torch.Tensor]:
    """A checkpoint of one weight with its mask, and the mask."""
    weight = torch.arange(1.0, 13.0).view(3, 4)
    mask = torch.tensor([[True, False, True, False]] * 3)
    folder = make_checkpoint({"a.weight": weight * mask, "norm.weight": torch.ones(4)})
    save_file({"a.weight.mask": pack_bits(mask)}, folder / MASKS)
    return folder, mask


def test_masks_are_read_and_hold(pruned: tuple[Path, torch.Tensor]) -> None:
    folder, mask = pruned
    masks = Masks.of(folder)
    assert masks is not None
    assert torch.equal(masks.read("a.weight", (3, 4)), mask)
    assert check_masks(DenseView(Checkpoint.open(folder))) == {"tensors": 1, "weights": 12, "kept": 6}
    assert MASKS in Checkpoint.open(folder).files  # another mask is another input


def test_a_pruned_weight_that_is_not_zero_is_found(pruned: tuple[Path, torch.Tensor]) -> None:
    folder, mask = pruned
    save_file({"a.weight.mask": pack_bits(~mask)}, folder / MASKS)
    with pytest.raises(VerificationError, match=r"'a.weight': 6 weights that its mask says are pruned are not zero"):
        check_masks(DenseView(Checkpoint.open(folder)))


def test_a_mask_without_a_weight_is_found(pruned: tuple[Path, torch.Tensor]) -> None:
    folder, mask = pruned
    save_file({"b.weight.mask": pack_bits(mask)}, folder / MASKS)
    with pytest.raises(CheckpointError, match=r"'b\.weight'"):
        check_masks(DenseView(Checkpoint.open(folder)))


def test_a_folder_without_masks_has_none(make_checkpoint: CheckpointMaker) -> None:
    folder = make_checkpoint({"a.weight": torch.ones(2, 2)})
    assert Masks.of(folder) is None
    assert check_masks(DenseView(Checkpoint.open(folder))) is None
