"""MODEL+ADAPTER: sums against their formulas and against PEFT, whatever rows are asked for; what is refused and why."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Commands
from conftest import AdapterMaker, CheckpointMaker
from safetensors.torch import load_file

from weightworks.errors import CheckpointError, SourceChangedError
from weightworks.plan.keys import contents
from weightworks.plan.reader import unreachable
from weightworks.store.adapted import BLOCK
from weightworks.store.adapters import Adapter
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.sources import Digests, parts

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + math.prod(shape)))


BASE = {
    "model.embed.weight": drawn(20, 6),
    "model.a.weight": drawn(8, 6),
    "model.a.bias": drawn(8),
    "model.b.weight": drawn(5, 8, seed=1),
    "head.weight": drawn(20, 6, seed=2),
}
CONFIG = {"model_type": "llama", "vocab_size": 20, "tie_word_embeddings": False}
PAIR = {"model.a.lora_A.weight": drawn(2, 6), "model.a.lora_B.weight": drawn(8, 2)}
DELTA = PAIR["model.a.lora_B.weight"] @ PAIR["model.a.lora_A.weight"]


@pytest.fixture
def base(make_checkpoint: CheckpointMaker) -> Path:
    return make_checkpoint(BASE, config=CONFIG)


def joined(base: Path, *adapters: Path, allow_pickle: bool = False) -> Checkpoint:
    return Checkpoint.open("+".join(map(str, (base, *adapters))), allow_pickle=allow_pickle)


def test_a_product_is_added_with_its_scaling(base: Path, make_adapter: AdapterMaker) -> None:
    checkpoint = joined(base, make_adapter(PAIR))
    torch.testing.assert_close(checkpoint.read("model.a.weight"), BASE["model.a.weight"] + 2 * DELTA)
    assert torch.equal(checkpoint.read("model.b.weight"), BASE["model.b.weight"])
    assert checkpoint.specs == Checkpoint.open(base).specs


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"use_rslora": True}, 4 / math.sqrt(2)),
        ({"alpha_pattern": {"model.a": 3}}, 1.5),
        ({"r": 8, "rank_pattern": {"a": 2}}, 2.0),
        (
            {"r": 8, "rank_pattern": {r"model\..": 2, "a": 7}, "alpha_pattern": {"b": 1}, "use_rslora": True},
            4 / math.sqrt(2),
        ),
    ],
)
def test_ranks_and_alphas_by_pattern(
    base: Path, make_adapter: AdapterMaker, config: dict[str, Any], scaling: float
) -> None:
    checkpoint = joined(base, make_adapter(PAIR, **config))
    torch.testing.assert_close(checkpoint.read("model.a.weight"), BASE["model.a.weight"] + scaling * DELTA)


def test_transposed_layers_embeddings_biases_and_whole_tensors(base: Path, make_adapter: AdapterMaker) -> None:
    a, b = drawn(2, 20, seed=3), drawn(6, 2, seed=4)
    across = make_adapter(
        {"model.b.lora_A.weight": drawn(2, 5), "model.b.lora_B.weight": drawn(8, 2)}, name="across", fan_in_fan_out=True
    )
    embedding = make_adapter(
        {
            "model.embed.lora_embedding_A": a,
            "model.embed.lora_embedding_B": b,
            "head.base_layer.weight": drawn(20, 6, seed=9),
        },
        name="embedding",
    )
    biased = make_adapter({**PAIR, "model.a.lora_B.bias": drawn(8, seed=5)}, name="biased", lora_bias=True)
    checkpoint = joined(base, across, embedding, biased)
    expected = {
        "model.b.weight": BASE["model.b.weight"] + 2 * (drawn(8, 2) @ drawn(2, 5)).T,
        "model.embed.weight": BASE["model.embed.weight"] + 2 * (b @ a).T,
        "model.a.bias": BASE["model.a.bias"] + 2 * drawn(8, seed=5),
        "model.a.weight": BASE["model.a.weight"] + 2 * DELTA,
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(checkpoint.read(name), tensor)
    assert torch.equal(checkpoint.read("head.weight"), drawn(20, 6, seed=9))


def test_dora_sets_the_norm_of_rows(base: Path, make_adapter: AdapterMaker) -> None:
    magnitude = drawn(8, seed=6).abs()
    adapter = make_adapter({**PAIR, "model.a.lora_magnitude_vector": magnitude}, use_dora=True)
    moved = BASE["model.a.weight"] + 2 * DELTA
    expected = magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(joined(base, adapter).read("model.a.weight"), expected)


def test_several_adapters_add_to_the_base(base: Path, make_adapter: AdapterMaker) -> None:
    """DoRA and whole tensors too: each is a difference from the base, so that the order means nothing."""
    adapters = [
        make_adapter(PAIR, name="one"),
        make_adapter({**PAIR, "model.a.lora_magnitude_vector": torch.ones(8)}, name="two", use_dora=True),
        make_adapter({"model.a.weight": drawn(8, 6, seed=7)}, name="three"),
    ]
    alone = [joined(base, adapter).read("model.a.weight") - BASE["model.a.weight"] for adapter in adapters]
    total = BASE["model.a.weight"] + sum(alone)
    for order in (adapters, adapters[::-1]):
        torch.testing.assert_close(joined(base, *order).read("model.a.weight"), total)


def test_rounded_once_and_the_same_for_any_rows(make_checkpoint: CheckpointMaker, make_adapter: AdapterMaker) -> None:
    width, rows = 700, BLOCK // 700 + 1300  # two blocks
    weight, a, b = drawn(rows, width).bfloat16(), drawn(4, width).bfloat16(), drawn(rows, 4) / 100
    base = make_checkpoint({"x.weight": weight}, config=CONFIG)
    checkpoint = joined(base, make_adapter({"x.lora_A.weight": a, "x.lora_B.weight": b}, r=4))
    exact = weight.double() + b.double() @ a.double()
    wide, stored = checkpoint.read("x.weight", torch.float32), checkpoint.read("x.weight")
    assert (wide.double() - exact).abs().max() < 1e-6
    assert torch.equal(wide.bfloat16(), stored)
    for step in (1, 97, 1000, rows):
        starts = range(0, rows, step) if step > 1 else (0, 1497, 1498, rows - 1)
        for start in starts:
            stop = min(start + step, rows)
            assert torch.equal(checkpoint.read_rows("x.weight", start, stop, torch.float32), wide[start:stop])
    assert checkpoint.read_rows("x.weight", 5, 5).shape == (0, width)


def test_names_without_the_models_own_prefix(make_checkpoint: CheckpointMaker, make_adapter: AdapterMaker) -> None:
    base = make_checkpoint({f"h.{k}.a.weight": BASE["model.a.weight"].clone() for k in range(2)})
    tensors = {key.replace("model.a", "transformer.h.1.a"): tensor for key, tensor in PAIR.items()}
    checkpoint = joined(base, make_adapter(tensors))
    assert torch.equal(checkpoint.read("h.0.a.weight"), BASE["model.a.weight"])
    torch.testing.assert_close(checkpoint.read("h.1.a.weight"), BASE["model.a.weight"] + 2 * DELTA)


def test_a_plus_in_the_name_of_a_folder(base: Path, make_adapter: AdapterMaker, tmp_path: Path) -> None:
    odd = tmp_path / "a+b"
    shutil.copytree(base, odd)
    adapter = make_adapter(PAIR, name="c+d")
    assert Checkpoint.open(odd).as_stored
    assert parts(f"{odd}+{adapter}+{adapter}") == [str(odd), str(adapter), str(adapter)]
    torch.testing.assert_close(joined(odd, adapter).read("model.a.weight"), BASE["model.a.weight"] + 2 * DELTA)
    assert parts("org/name@main+org/lora") == ["org/name@main", "org/lora"]
    with pytest.raises(CheckpointError, match=r"nothing stands on one side of a '\+'"):
        Checkpoint.open(f"{base}+")


def test_its_files_are_part_of_what_it_is(base: Path, make_adapter: AdapterMaker) -> None:
    adapter = make_adapter(PAIR)
    plain, before = Checkpoint.open(base), joined(base, adapter)
    assert set(before.files) == {*plain.files, "adapter 1/adapter_config.json", "adapter 1/adapter_model.safetensors"}
    key = contents(f"{base}+{adapter}", Digests(adapter / "none"))
    assert unreachable(f"{base}+{adapter}") is None
    assert "no such folder" in (unreachable(f"{base}+{adapter}x") or "")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 5}))
    assert joined(base, adapter).digest not in (before.digest, plain.digest)
    assert contents(f"{base}+{adapter}", Digests(adapter / "none")) != key


def test_another_base_is_told(base: Path, make_adapter: AdapterMaker) -> None:
    assert joined(base, make_adapter(PAIR)).remarks == []
    other = make_adapter(PAIR, name="other", base_model_name_or_path="org/large")
    assert joined(base, other).remarks == ["other says it was trained on org/large, not on checkpoint"]
    assert joined(base, other).name == "checkpoint+other"


def test_pickled_adapters_are_asked_for(base: Path, make_adapter: AdapterMaker) -> None:
    adapter = make_adapter(PAIR)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"weights are pickled \(adapter_model\.bin\)"):
        joined(base, adapter)
    checkpoint = joined(base, adapter, allow_pickle=True)
    torch.testing.assert_close(checkpoint.read("model.a.weight"), BASE["model.a.weight"] + 2 * DELTA)
    assert "adapter 1/adapter_model.bin" in checkpoint.files


ODD = {
    "of another kind": (PAIR, {"peft_type": "IA3"}, "peft_type is IA3; only LORA can be added to weights here"),
    "that changed its base": (PAIR, {"init_lora_weights": "pissa_niter_4"}, "changes the base's weights before training"),
    "with settings unknown": (
        PAIR,
        {"layer_replication": [[0, 2]], "use_later_idea": True},
        "layer_replication is set, which is not supported; use_later_idea is set, which is not supported",
    ),
    "without a rank": (PAIR, {"r": None}, "r is None, not a positive number"),
    "of another rank": (PAIR, {"r": 3}, "model.a: A is [2, 6], B is [8, 2], adapter_config.json says rank 3"),
    "with half a pair": (
        {"model.a.lora_A.weight": drawn(2, 6), "model.b.lora_B.weight": drawn(5, 2)},
        {},
        "model.a: has lora_A but no lora_B; model.b: has lora_B but no lora_A",
    ),
    "with parts unknown": ({**PAIR, "model.a.lora_C.weight": drawn(2)}, {}, "lora_C.weight: not a part of LoRA known here"),
    "with magnitudes but no DoRA": (
        {**PAIR, "model.a.lora_magnitude_vector": drawn(8)},
        {},
        "model.a: use_dora is False, its magnitudes say otherwise",
    ),
    "of DoRA on a transposed layer": (
        {**PAIR, "model.a.lora_magnitude_vector": drawn(8)},
        {"use_dora": True, "fan_in_fan_out": True},
        "DoRA is supported on linear layers only",
    ),
    "of convolutions": ({"model.a.lora_A.weight": drawn(2, 6, 3), "model.a.lora_B.weight": drawn(8, 2, 1)}, {}, "only matrices"),
    "that is empty": ({}, {}, "the adapter holds no tensors"),
    "of tensors the model lacks": (
        {"model.aa.lora_A.weight": drawn(2, 6), "model.aa.lora_B.weight": drawn(8, 2), "norm.weight": drawn(3)},
        {},
        "2 of its 2 tensors do not fit checkpoint: the model has no model.aa.weight (near: model.a.weight); "
        "the model has no norm.weight",
    ),
    "of another shape": (
        {"model.b.lora_A.weight": drawn(2, 6), "model.b.lora_B.weight": drawn(8, 2)},
        {},
        "model.b.weight is [5, 8], the adapter's [8, 6]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "config", "text"), ODD.values(), ids=ODD)
def test_adapters_refused(
    base: Path, make_adapter: AdapterMaker, tensors: dict[str, torch.Tensor], config: dict[str, Any], text: str
) -> None:
    with pytest.raises(CheckpointError) as refusal:
        joined(base, make_adapter(tensors, **config))
    assert text in str(refusal.value)


def test_a_sum_knows_when_its_files_change(base: Path, make_adapter: AdapterMaker) -> None:
    total = joined(base, folder := make_adapter(PAIR))
    weights = folder / "adapter_model.safetensors"
    assert {path.parent for path in total.stamps} == {base, folder}
    assert total.digest  # of what is there now
    os.utime(weights, (0, 0))  # touched, and the same
    total.refuse_changed()
    weights.write_bytes(weights.read_bytes()[::-1])
    with pytest.raises(SourceChangedError, match=r"adapter_model\.safetensors: was changed while it was read"):
        total.refuse_changed()


def test_bases_refused(make_checkpoint: CheckpointMaker, make_adapter: AdapterMaker, base: Path) -> None:
    packed = make_checkpoint(BASE, config={**CONFIG, "quantization_config": {"quant_method": "gptq"}}, name="packed")
    with pytest.raises(CheckpointError, match="quantized as gptq/None, which cannot be decoded"):
        joined(packed, adapter := make_adapter(PAIR))
    tied = make_checkpoint({key: BASE[key] for key in BASE if key != "head.weight"}, config=CONFIG, name="tied")
    embedding = {"model.embed.weight": BASE["model.embed.weight"]}
    with pytest.raises(
        CheckpointError, match=r"model\.embed\.weight is also the model's output head, while the adapter"
    ):
        joined(tied, make_adapter(embedding, name="apart"))
    together = joined(tied, make_adapter(embedding, name="together", ensure_weight_tying=True))
    assert torch.equal(together.read("model.embed.weight"), embedding["model.embed.weight"])
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json; an adapter folder holds it"):
        joined(base, base)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        joined(base, adapter)


# The same sums by PEFT itself, where it is installed.

WAYS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": "all-linear", "r": 4, "lora_alpha": 9},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "r": 4, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj"], "rank_pattern": {"k_proj": 3, r"layers\.1\..*up_proj": 5},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 7}, "layers_to_transform": [0, 1],
    },
    "dora": {"target_modules": ["v_proj", "gate_proj"], "use_dora": True},
    "whole": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "biases": {"target_modules": ["q_proj"], "bias": "all", "lora_bias": True},
    "conv1d": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
}  # fmt: skip


@pytest.mark.filterwarnings("default")  # PEFT warns of what it does
@pytest.mark.parametrize("way", WAYS)
def test_as_peft_merges(way: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "tie_word_embeddings": False}
    if way == "conv1d":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, **sizes))
    else:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**shape, **sizes, attention_bias=way == "biases"))
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **WAYS[way]))
    with torch.no_grad():
        for _, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    ours = joined(tmp_path / "base", tmp_path / "adapter")
    assert set(ours.tensors) <= set(merged)
    before, changed = Checkpoint.open(tmp_path / "base"), 0
    for name in ours.tensors:
        torch.testing.assert_close(ours.read(name), merged[name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(ours.read(name), before.read(name))
    assert changed >= len(Adapter.open(tmp_path / "adapter").pairs)


def test_a_trained_adapter_from_the_command_line(compress: Commands, shared: Path, tmp_path: Path) -> None:
    """Evaluated as a sum in float32, better on its own text than the base; quantized, with both named in the card."""
    model = shared / "models" / "tiny-llama"
    both, text = f"{model}+{shared / 'models' / 'lora-math'}", shared / "data" / "math.test.txt"
    run = compress("evaluate", model, both, "--perplexity", text, "--max-tokens", "2048", "--json")
    assert run.code == 0, run.err
    plain, adapted = (row["mean"] for row in run.json["models"])
    assert adapted < 0.98 * plain
    run = compress("quantize", both, "--method", "rtn", "--bits", "8", "-o", tmp_path / "out")
    assert run.code == 0, run.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:\n- tiny-llama\n- lora-math\n" in card
    files = json.loads((tmp_path / "out" / "provenance.json").read_text())["source"]["files"]
    assert "adapter 1/adapter_model.safetensors" in files
    run = compress("verify", both)
    assert run.code == 0, run.err
    run = compress("quantize", both, "-o", shared / "models" / "lora-math", "--overwrite", "--dry-run")
    assert run.code == 1
    assert "is an input, or holds one" in run.err
