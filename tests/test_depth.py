"""Depth: block influence and layer collapse, against their formulas; names, configuration, what cannot go."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, LLAMA, Architecture
from safetensors.torch import load_file
from test_reduce import SETTINGS, TOKENS, loaded, planned, reduce

from compress.prune.laco import Method, Options, collapsed, similarity
from compress.prune.shortgpt import Influence
from weightworks.engine.depth import Shorten
from weightworks.errors import ArchitectureError, MethodError
from weightworks.stage.reducing import Mixture
from weightworks.stream.calibration import load_windows

pytestmark = pytest.mark.usefixtures("one_thread")
DEEP = Architecture("llama", {**LLAMA, "num_hidden_layers": 4})


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks; the third does next to nothing."""

    def weaken(model: Any) -> None:
        for weight in (model.model.layers[2].self_attn.o_proj.weight, model.model.layers[2].mlp.down_proj.weight):
            weight.mul_(1e-3)

    return DEEP.save(tmp_path_factory.mktemp("deep") / "source", change=weaken)


def test_influence_is_one_minus_the_mean_cosine() -> None:
    before = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    after = torch.tensor([[[2.0, 0.0], [3.0, 3.0]]])
    pairs = Influence()
    pairs.add(before, after)
    pairs.add(before, before)
    assert pairs.figure() == pytest.approx(1 - (3 + 0.5**0.5) / 4)


@torch.no_grad()
def test_the_block_that_does_least_is_dropped(deep: Path, tmp_path: Path) -> None:
    outcome = reduce(deep, tmp_path / "out", "shortgpt", layers=1)
    assert outcome.provenance is not None
    rows = outcome.provenance["report"]
    assert [row["dropped"] for row in rows] == [False, False, True, False]
    windows = load_windows(
        SETTINGS.dataset, deep, num_samples=SETTINGS.num_samples, seq_len=SETTINGS.seq_len, seed=SETTINGS.seed
    )
    states = loaded(deep).model(windows.tokens, output_hidden_states=True).hidden_states
    for row, before, after in zip(rows[:-1], states, states[1:], strict=False):  # the last comes normed
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
        assert row["influence"] == pytest.approx(1 - float(cosine), abs=1e-6)
    kept, made = load_file(deep / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for place, block in enumerate((0, 1, 3)):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(made[name.format(place)], kept[name.format(block)])
    assert len(made) == len(kept) - 9


def test_a_share_of_the_blocks_and_counts_that_make_no_sense(deep: Path, tmp_path: Path) -> None:
    assert planned(deep, "shortgpt", sparsity=0.5).config()["num_hidden_layers"] == 2
    for options in ({"layers": 4}, {"sparsity": 0.1}):
        with pytest.raises(MethodError, match=r"of 4 blocks would be dropped; 1 to 3 can be"):
            reduce(deep, tmp_path / "out", "shortgpt", **options)


def test_what_is_collapsed_telescopes() -> None:
    """theta_l + sum of (theta_l+k - theta_l), also of sums that were made before."""
    single: list[Mixture] = [[(block, 1.0)] for block in range(5)]
    once = collapsed(single, 2, 2)
    assert once == [[(0, 1.0)], [(1, 1.0)], [(2, -1.0), (3, 1.0), (4, 1.0)]]
    twice = collapsed(once, 1, 1)
    assert twice == [[(0, 1.0)], [(1, 0.0), (2, -1.0), (3, 1.0), (4, 1.0)]]


class Acted:
    """A model whose likeness depends on nothing but how many blocks are left."""

    def __init__(self, blocks: int, fixed: Sequence[int] = ()) -> None:
        self.blocks, self.fixed = blocks, fixed
        self.tried: list[list[list[int]]] = []

    def removable(self, block: int) -> bool:
        return block not in self.fixed

    def alike(self, one: int, other: int) -> bool:
        return True

    def trial(self, mixtures: Sequence[Mixture], compare: Any, rows: int, length: int) -> float:
        self.tried.append([[block for block, _ in mixture] for mixture in mixtures])
        return len(mixtures) / self.blocks

    def figures(self, make: Callable[[], Any]) -> list[Any]:
        raise AssertionError


def test_collapse_goes_down_from_the_top() -> None:
    model = Acted(8)
    method = Method(Options(merge_layers=3, threshold=0.45, lowest_layer=1))
    found = method.shorten(model)
    assert [[block for block, _ in mixture] for mixture in model.tried[0][-1:] and found.mixtures] == [
        [0], [1], [2], [3, 4, 5, 6, 7],
    ]  # fmt: skip
    assert model.tried[0] == [[0], [1], [2], [3], [4], [5, 6, 7]]
    assert model.tried[1] == [[0], [1], [2], [3, 4, 5, 6, 7]]
    assert [row["merged"] for row in found.rows] == [True, True, False]  # 3/8 left would be too unlike
    with pytest.raises(
        MethodError, match=r"no merge keeps final hidden states as alike as 0.99; the best came to 0.750"
    ):
        Method(Options(merge_layers=3, threshold=0.99)).shorten(Acted(8))


def test_blocks_that_must_stay_are_not_collapsed() -> None:
    found = Method(Options(merge_layers=2, threshold=0.5)).shorten(Acted(4, fixed=[2]))
    assert [[block for block, _ in mixture] for mixture in found.mixtures] == [[0], [1], [2, 3]]


@torch.no_grad()
def test_a_collapsed_model_is_the_sum_and_is_as_alike_as_told(deep: Path, tmp_path: Path) -> None:
    options = {"merge_layers": 3, "lowest_layer": 1, "threshold": -0.9, "sentences": 2, "sentence_length": 16}
    outcome = reduce(deep, tmp_path / "out", "laco", **options)
    assert outcome.provenance is not None
    before, after = load_file(deep / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for tensor in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
        one, two, three = (before[f"model.layers.{block}.{tensor}"] for block in (1, 2, 3))
        torch.testing.assert_close(after[f"model.layers.1.{tensor}"], one + (two - one) + (three - one))
    windows = load_windows(
        SETTINGS.dataset, deep, num_samples=SETTINGS.num_samples, seq_len=SETTINGS.seq_len, seed=SETTINGS.seed
    )
    states = [loaded(folder).model(windows.tokens[:2, :16]).last_hidden_state for folder in (deep, tmp_path / "out")]
    expected = sum(similarity(*pair) for pair in zip(*states, strict=True)) / 2
    (row,) = outcome.provenance["report"]
    assert (row["block"], row["with"], row["merged"]) == (1, [2, 3], True)
    assert row["similarity"] == pytest.approx(expected, abs=1e-5)
    assert loaded(tmp_path / "out").generate(TOKENS[:1, :4], max_new_tokens=4, min_new_tokens=4).shape == (1, 8)


def test_a_block_of_another_kind_goes_only_if_the_configuration_can_say_so(tmp_path: Path) -> None:
    """Lists of blocks follow those that stay; a number of dense blocks at the beginning does not."""
    options = {**ARCHITECTURES["qwen3_moe"].options, "num_hidden_layers": 4, "mlp_only_layers": [1]}
    source = Architecture("qwen3_moe", options).save(tmp_path / "source")
    job = planned(source, "shortgpt", layers=2)
    assert not job.plan.settled  # what is written depends on which go
    outcome = reduce(source, tmp_path / "out", "shortgpt", layers=2)
    assert outcome.provenance is not None
    kept = [row["block"] for row in outcome.provenance["report"] if not row["dropped"]]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mlp_only_layers"] == [place for place, block in enumerate(kept) if block == 1]
    dense = first_dense(tmp_path / "dense")
    plan = planned(dense, "shortgpt", layers=1).plan
    assert isinstance(plan, Shorten)
    assert [plan.removable(block) for block in range(3)] == [False, False, True]
    with pytest.raises(ArchitectureError, match=r"2 of 3 blocks cannot go: .* without only 1 of them"):
        planned(dense, "shortgpt", layers=2)


def first_dense(folder: Path) -> Path:
    """A mixture of three blocks, the first two of them dense because a number says so."""
    options = {
        **LLAMA, "num_hidden_layers": 3, "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "kv_lora_rank": 16,
        "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
    }  # fmt: skip
    options.pop("head_dim")
    return Architecture("deepseek_v3", options).save(folder)
