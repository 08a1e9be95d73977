"""Mixed precision: containers of several schemes, sensitivities, budgets, and what is made of them."""

from __future__ import annotations

import itertools
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import save_file

from compress import quantize
from compress.quantize import gptq
from weightworks.engine import budgeting
from weightworks.engine.allocation import front
from weightworks.engine.sensitivity import Sensitivity
from weightworks.errors import CheckpointError, MethodError, UsageError
from weightworks.report.allocation import allocation_chart
from weightworks.report.page import report_page
from weightworks.stage.budget import parse_budget, parse_increase
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.comparison import compare
from weightworks.store.compressed import MIXED
from weightworks.store.dense import DenseView
from weightworks.store.inspection import inspect
from weightworks.store.mixed import MixedScheme
from weightworks.store.packing import IntScheme
from weightworks.store.writer import CheckpointWriter
from weightworks.testing.stored import load_apart, stored_logits

TWO, THREE, FOUR = (IntScheme(bits, 32, True) for bits in (2, 3, 4))
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}


# Containers


def test_a_name_goes_before_an_expression_and_that_before_a_class() -> None:
    mixed = MixedScheme(((("Linear",), TWO), (("re:.*up_proj", "re:.*proj"), THREE), (("a.up_proj",), FOUR)))
    assert [mixed.of(name) for name in ("a.up_proj", "b.up_proj", "b.o_proj", "c")] == [FOUR, THREE, THREE, TWO]
    assert MixedScheme(((("a",), TWO),)).of("b") is None


@pytest.fixture(scope="module")
def theirs(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The small model as compressed-tensors itself writes it in two layouts and three groups, and what it decodes that to."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    groups = {
        "a": {"targets": ["re:.*self_attn.*"], "weights": INT4, "format": "pack-quantized"},
        "b": {"targets": ["model.layers.0.mlp.up_proj"], "weights": FP8, "format": "float-quantized"},
        "c": {"targets": ["Linear"], "weights": INT8, "format": "pack-quantized"},
    }
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], format="mixed-precision")
    with warnings.catch_warnings(action="ignore"):
        apply_quantization_config(model, config)
        for module in model.modules():
            if (scheme := getattr(module, "quantization_scheme", None)) is None:
                continue
            rows, size = module.weight.shape[0], scheme.weights.group_size or module.weight.shape[1]
            top = module.weight.detach().view(rows, -1, size).abs().amax(-1)
            largest = {4: 7.5, 8: 127.5}[scheme.weights.num_bits] if scheme.weights.type == "int" else 448.0
            module.weight_scale.data.copy_(top / largest)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        folder = tmp_path_factory.mktemp("theirs")
        model.config.save_pretrained(folder)
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors"
        )
        compressor.update_config(str(folder))
        compressor.decompress_model(model)
    return folder, dict(model.state_dict())


def test_a_checkpoint_that_compressed_tensors_wrote_is_read(
    theirs: tuple[Path, dict[str, torch.Tensor]], small: Path
) -> None:
    folder, decoded = theirs
    view = DenseView(Checkpoint.open(folder))
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == "mixed-precision"
    assert view.format is MIXED and len(view.packed) == 14
    for name in view.names:
        assert torch.equal(view.read(name).float(), decoded[name].float()), name
    kinds = {name: scheme.code for name in view.packed_names if (scheme := view.scheme_of(name))}
    assert kinds["model.layers.1.self_attn.q_proj.weight"] == "4-bit"
    assert (
        kinds["model.layers.0.mlp.up_proj.weight"] == "E4M3" and kinds["model.layers.1.mlp.up_proj.weight"] == "8-bit"
    )
    told = inspect(str(folder))
    assert "mixed precision: 4 bits, groups of 32" in told["format"]
    rows = {row["name"]: row for row in told["tensors"]}
    assert rows["model.layers.0.mlp.down_proj.weight"]["stored"] == "8-bit codes"
    assert compare(str(folder), str(small))["counts"] == {"differs": 14, "equal": len(view.names) - 14}


def test_a_weight_of_no_group_is_named(theirs: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, _ = theirs
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    del groups[next(name for name, group in groups.items() if group["targets"] == ["Linear"])]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"in no group of quantization_config: model\.layers\.0\.mlp\.down_proj"):
        _ = DenseView(Checkpoint.open(tmp_path)).packed


# Allocation


def brute_force(
    sizes: list[list[int]], costs: list[list[float]], pairs: list[np.ndarray] | None, limit: int
) -> dict[int, float]:
    """Sizes and costs of all choices within the limit that no others beat."""
    found: dict[int, float] = {}
    every = []
    for chosen in itertools.product(*(range(len(one)) for one in sizes)):
        cost = sum(costs[unit][choice] for unit, choice in enumerate(chosen))
        if pairs is not None:
            cost += sum(float(pairs[unit][pair]) for unit, pair in enumerate(itertools.pairwise(chosen)))
        every.append((sum(sizes[unit][choice] for unit, choice in enumerate(chosen)), cost))
    for size, cost in sorted(every):
        if size <= limit and all(cost < one for one in found.values()):
            found[size] = cost
    return found


@pytest.mark.parametrize("together", [False, True])
def test_allocation_is_that_of_brute_force(together: bool) -> None:
    random = np.random.default_rng(together)
    for _ in range(100):
        counts = random.integers(1, 4, random.integers(1, 5)).tolist()
        sizes = [random.integers(1, 12, count).tolist() for count in counts]
        costs = [random.integers(0, 9, count).astype(float).tolist() for count in counts]
        pairs = (
            [random.integers(-2, 3, shape).astype(float) for shape in itertools.pairwise(counts)] if together else None
        )
        limit = int(random.integers(1, 40))
        plans = front(sizes, costs, pairs, limit)
        assert {plan.size: plan.cost for plan in plans} == brute_force(sizes, costs, pairs, limit)
        for plan in plans:
            assert sum(sizes[unit][choice] for unit, choice in enumerate(plan.choices)) == plan.size


def test_of_equal_allocations_the_first_choices_are_taken() -> None:
    (plan,) = front([[2, 2], [3, 3]], [[1.0, 1.0], [0.5, 0.5]])
    assert plan.choices == (0, 0)


# Budgets as they are typed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": "3.5"}, "bits a weight such as 3.5bpw, or the size"),
        ({"budget": "two"}, "bits a weight such as 3.5bpw"),
        ({"max_perplexity_increase": "0%"}, "a share above nothing such as 2%"),
        ({"budget": "3bpw", "max_perplexity_increase": "2%"}, "exclude each other"),
        ({"budget": "3bpw", "bit_choices": "2,5"}, "different bits out of 2, 3, 4 and 8"),
        ({"budget": "3bpw", "bits": 3}, "a budget chooses bits layer by layer, yet bits 3 was given"),
        ({"budget": "3bpw", "scheme": "FP8"}, "yet scheme FP8 was given"),
        ({"budget": "3bpw", "format": "gptq"}, "format gptq holds one width for all"),
        ({"budget": "1GB", "format": "dense"}, "format dense is as large as the source"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        gptq.Options.parse(options, where="quantize.gptq")


def test_budgets_are_bits_or_bytes() -> None:
    assert parse_budget("3.5bpw") == (3.5, None) and parse_budget("4 bits") == (4.0, None)
    assert parse_budget("2.5GB") == (None, 2_500_000_000) and parse_budget("800MiB") == (None, 800 << 20)
    assert parse_increase("2%") == 0.02


# Whole runs

FEW: dict[str, Any] = {"num_samples": 8, "seq_len": 64, "device": "cpu", "dtype": "float32"}
CHOICES: dict[str, Any] = {"bit_choices": "2g32,3g32,4g32,8g32"}
BUDGET: dict[str, Any] = {**FEW, **CHOICES, "budget": "3.5bpw"}


@pytest.fixture(scope="module")
def mixed(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model within 3.5 bits a weight; not to be changed."""
    return quantize(small, **BUDGET, output_dir=tmp_path_factory.mktemp("mixed") / "out").target


def told(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "provenance.json").read_text())
    return facts


def test_a_budget_is_kept_to_the_byte_and_siblings_share(mixed: Path) -> None:
    facts, view = told(mixed), DenseView(Checkpoint.open(mixed))
    allocation = facts["allocation"]
    weights = sum(math.prod(view.shape(name)) for name in view.packed_names)
    stored = sum(info.nbytes for name, info in view.tensors.items() if ".weight_" in name)
    assert 8 * stored / weights == facts["size"]["bits_a_weight"] <= 3.5
    assert allocation["bits_a_weight"] == pytest.approx(8 * stored / weights)
    config = json.loads((mixed / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and {one["format"] for one in config["config_groups"].values()} == {
        "pack-quantized"
    }
    schemes = {name: view.scheme_of(name) for name in view.packed_names}
    assert len(set(schemes.values())) > 1
    for block in range(2):
        for siblings in (
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
        ):
            assert len({schemes[f"model.layers.{block}.{name}.weight"] for name in siblings}) == 1
    assert [len(unit["tensors"]) for unit in allocation["units"]] == [3, 1, 2, 1] * 2
    assert "2g32" in (mixed / "README.md").read_text() and "bits chosen" in (mixed / "README.md").read_text()
    assert facts["checks"]["loader"] == "stock transformers" and facts["fallbacks"] == []


def test_logits_are_those_of_the_dequantised_weights(mixed: Path, small: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(40).view(2, 20)
    loaded, _ = load_apart(sys.executable, {"mixed": (mixed, told(mixed)["checks"])}, tokens, tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    assert loaded["mixed"].difference(stored_logits(dense, mixed, tokens)) < 1e-5


def test_another_budget_measures_nothing_again(
    mixed: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Sensitivity, "run", never)
    size = sum(path.stat().st_size for path in mixed.glob("*.safetensors"))
    again = quantize(small, **{**BUDGET, "budget": f"{size}B"}, output_dir=tmp_path / "out").target
    assert size - 64 < sum(path.stat().st_size for path in again.glob("*.safetensors")) <= size
    assert told(again)["allocation"]["units"] == told(mixed)["allocation"]["units"]
    with pytest.raises(AssertionError, match="measured again"):
        quantize(small, **{**BUDGET, "seed": 1}, output_dir=tmp_path / "other")


def test_more_bits_cost_less(mixed: Path, small: Path, tmp_path: Path) -> None:
    richer = told(quantize(small, **{**BUDGET, "budget": "4.6bpw"}, output_dir=tmp_path / "out").target)
    poorer = told(mixed)
    assert richer["allocation"]["expected_increase"] < poorer["allocation"]["expected_increase"]
    losses = [loss for _, loss in poorer["allocation"]["curve"]]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("2.2bpw", r"2\.2 bits a weight is less than .* take: 2g32,3g32,4g32,8g32: 2\.50\d to 8\.50\d bits a weight, "),
        ("9bpw", r"a budget of 9 bits a weight is more than the choices can take"),
        ("1kB", r"a budget of 1,000 bytes is less than the choices can take.* bytes"),
    ],
)
def test_a_budget_out_of_reach_is_refused_before_work(small: Path, tmp_path: Path, budget: str, said: str) -> None:
    with pytest.raises(MethodError, match=said):
        quantize(small, **{**BUDGET, "budget": budget}, output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_loss_on_windows_held_out_is_bounded(small: Path, tmp_path: Path) -> None:
    bound: dict[str, Any] = {**FEW, **CHOICES, "max_perplexity_increase": "1%"}
    facts = told(quantize(small, **bound, output_dir=tmp_path / "out").target)
    trials = facts["allocation"]["trials"]
    assert trials[-1]["increase"] <= 0.01 and all(one["increase"] > 0.01 for one in trials[:-1])
    assert trials[-1]["bits_a_weight"] == facts["size"]["bits_a_weight"]


def test_a_bound_that_is_missed_is_stepped_back_from(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = iter([0.04, 0.02, 0.009])
    monkeypatch.setattr(budgeting, "rehearsed", lambda *_: next(seen))
    bound: dict[str, Any] = {**FEW, **CHOICES, "max_perplexity_increase": "1%"}
    facts = told(quantize(small, **bound, output_dir=tmp_path / "out").target)
    bits = [trial["bits_a_weight"] for trial in facts["allocation"]["trials"]]
    assert len(bits) == 3 and bits == sorted(set(bits)) and bits[-1] == facts["size"]["bits_a_weight"]
    monkeypatch.setattr(budgeting, "rehearsed", lambda *_: 0.5)
    with pytest.raises(MethodError, match=r"rises by 50\.00% even with the largest choices 2g32.*, 1\.00% are allowed"):
        quantize(small, **bound, output_dir=tmp_path / "no")


def test_what_neighbours_do_together_is_counted(small: Path, tmp_path: Path) -> None:
    facts = told(quantize(small, **BUDGET, inter_layer=True, output_dir=tmp_path / "out").target)
    units = facts["allocation"]["units"]
    assert facts["size"]["bits_a_weight"] <= 3.5
    assert all(unit["beyond"] for unit in units[:-1]) and units[-1]["beyond"] == 0
    assert math.expm1(sum(unit["expected"] for unit in units)) != facts["allocation"]["expected_increase"]


def test_interrupted_at_every_entry_the_bytes_are_the_same(
    mixed: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = CheckpointWriter.done
    interrupted = 0
    while interrupted < 20:
        count = itertools.count()

        def fail(self: CheckpointWriter, step: str, facts: Any = None, count: Any = count) -> None:
            done(self, step, facts)
            if next(count) == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(CheckpointWriter, "done", fail)
        try:
            target = quantize(small, **BUDGET, output_dir=tmp_path / "out").target
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "out").exists()
            interrupted += 1
    assert 7 <= interrupted < 20  # the proof, two blocks of sensitivities, what they are, the layout, two blocks
    for path in mixed.iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes(), path.name


def test_experts_of_a_block_share(tmp_path: Path) -> None:
    model = ARCHITECTURES["mixtral"].save(tmp_path / "mixtral")
    facts = told(quantize(model, **{**BUDGET, "budget": "4bpw"}, method="rtn", output_dir=tmp_path / "out").target)
    units = facts["allocation"]["units"]
    assert [len(unit["tensors"]) for unit in units] == [3, 1, 12] * 2
    assert units[2]["choice"] == units[5]["choice"]
    assert facts["checks"]["loader"] == "stock transformers"
    assert facts["size"]["bits_a_weight"] <= 4


# What people see


def test_the_page_draws_what_bytes_are_expected_to_buy(mixed: Path) -> None:
    facts = told(mixed)["allocation"]
    page = report_page({"stages": [{"name": "small", "use": "quantize.gptq", "state": "done", "allocation": facts}]})
    assert "Bytes and expected loss" in page and ">3g32<" in page and "Bits layer by layer" in page
    assert allocation_chart({}, "x") is None


def test_a_dry_run_tells_the_most_bytes(small: Path, tmp_path: Path) -> None:
    outcome = quantize(small, **BUDGET, output_dir=tmp_path / "out", dry_run=True)
    assert outcome.estimate is not None
    whole = quantize(small, **BUDGET, output_dir=tmp_path / "out").target
    assert 0 <= outcome.estimate.output_bytes - (whole / "model.safetensors").stat().st_size < 20_000
