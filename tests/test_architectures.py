"""Models are streamed by structure: one run on many architectures, checked against stock transformers; refusals."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, GPT2, LLAMA, MIXTRAL, SLIDING, TIED, Architecture, add_tokenizer, randomise
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel

from weightworks.errors import ArchitectureError, MethodError
from weightworks.plan.stage import Outcome, run_stage
from weightworks.plan.texts import check_windows
from weightworks.stage.settings import Settings
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.writer import staging_of
from weightworks.stream.activations import Activations
from weightworks.stream.linears import Linear, find_stages
from weightworks.stream.passes import Windows, perplexity, shell, stream_losses, window_losses
from weightworks.stream.replay import BlockCall, prove
from weightworks.stream.skeleton import Piece, Skeleton, build

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOWS, LENGTH = 8, 64
SETTINGS = Settings(num_samples=WINDOWS, seq_len=LENGTH, dtype="float32")
CPU = torch.device("cpu")
ROUTERS = (".gate.weight", ".shared_expert_gate.weight")


def quantize(source: Path, target: Path, *, method: str = "gptq", **options: Any) -> Outcome:
    return run_stage("quantize", method, str(source), {"group_size": 32, **options}, SETTINGS, output_dir=target)


@dataclass
class Run:
    """An architecture, its checkpoint, and what GPTQ at 4 bits in groups of 32 made of it."""

    name: str
    source: Path
    target: Path
    provenance: dict[str, Any]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp(request.param)
    source = ARCHITECTURES[request.param].save(folder / "source")
    container = "gptq" if request.param.startswith("gpt2") else "compressed-tensors"
    outcome = quantize(source, folder / "out", format=container)
    assert outcome.provenance is not None
    return Run(request.param, source, folder / "out", outcome.provenance)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def expected_linears(source: Path) -> set[str]:
    """The matrices inside numbered blocks, routers and convolutions left out: what a reader of the files would name."""
    return {
        name
        for name, tensor in tensors(source).items()
        if tensor.ndim == 2 and re.search(r"\b\d+\.", name) and not name.endswith(ROUTERS)
    }


@torch.no_grad()
def stock_losses(folder: Path, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    return window_losses(model(tokens, use_cache=False).logits, tokens)


def streamed_losses(folder: Path, tokens: torch.Tensor, blocks: int | None = None) -> torch.Tensor:
    view = DenseView(Checkpoint.open(folder))
    skeleton = build(view)
    with shell(skeleton, view, CPU):
        returns_tuple = prove(skeleton, view, tokens[:2, :16])
    states = Activations((*tokens.shape, 64), torch.float32, folder, "unused")
    windows = Windows(tokens)
    return stream_losses(skeleton, view, windows, states, returns_tuple=returns_tuple, device=CPU, blocks=blocks)


# What every architecture promises


def test_streamed_losses_are_those_of_stock_transformers(run: Run) -> None:
    tokens = torch.randint(2048, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(streamed_losses(run.source, tokens), stock_losses(run.source, tokens), atol=2e-5, rtol=0)
    view = DenseView(Checkpoint.open(run.source))
    probe = check_windows(view.checkpoint, build(view), trust_remote_code=False)
    recorded = run.provenance["quality"]["dense"]
    assert recorded == pytest.approx(perplexity(stock_losses(run.source, probe)), rel=1e-6)


def test_every_linear_is_quantized(run: Run) -> None:
    rows = {row["tensor"]: row for row in run.provenance["report"]}
    assert set(rows) == expected_linears(run.source)
    assert all(row["bits"] == 4 and row["method"] == "quantize.gptq" for row in rows.values())
    assert run.provenance["tensors"]["transformed"] == len(rows)


def test_inputs_of_every_linear_are_seen(run: Run) -> None:
    """Plain linears see every token, the experts of a mixture those routed to them: two experts a token."""
    counts: dict[str, int] = {}
    for row in run.provenance["report"]:
        assert 0 < row["relative_error"] < 0.05, row
        kind = re.sub(r"\bexperts\.\d+", "experts.*", row["tensor"])
        counts[kind] = counts.get(kind, 0) + row["tokens"]
    for kind, count in counts.items():
        assert count == WINDOWS * LENGTH * (2 if ".experts." in kind else 1), kind
    assert run.provenance["fallbacks"] == []


def test_the_rest_is_byte_identical(run: Run) -> None:
    before, after = tensors(run.source), tensors(run.target)
    rest = set(before) - {row["tensor"] for row in run.provenance["report"]}
    assert {name for name in after if name in before} == rest
    for name in rest:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name].flatten().view(torch.uint8), before[name].flatten().view(torch.uint8)), name


def test_the_folder_reloads(run: Run) -> None:
    checks = run.provenance["checks"]
    assert checks["blocks_loaded"] == checks["blocks"]
    assert checks["perplexity_reloaded"] == pytest.approx(checks["perplexity_in_memory"], rel=1e-6)
    if not run.name.startswith("gpt2"):
        assert checks["loader"].startswith("stock transformers")


def test_the_card_says_how_to_load_it(run: Run) -> None:
    asked = "CompressedTensorsConfig(dequantize=True)" in (run.target / "README.md").read_text()
    assert asked == run.provenance["checks"]["dequantize"]
    # Their own initialisation reaches for a dense weight while transformers 5.23 loads packed ones.
    assert not asked or run.name in ("falcon", "mamba2")


# Particular architectures


def test_a_sliding_window_matters(tmp_path: Path) -> None:
    """Else the tests above would say nothing of sliding attention."""
    tokens = torch.randint(2048, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    sliding = ARCHITECTURES["mistral"].save(tmp_path / "sliding")
    full = Architecture("mistral", {**LLAMA, "sliding_window": None}, torch.float16).save(tmp_path / "full")
    difference = (stock_losses(sliding, tokens) - stock_losses(full, tokens)).abs()
    assert float(difference[:, : SLIDING - 1].max()) < 1e-4
    assert float(difference[:, SLIDING:].max()) > 0.1


@pytest.mark.parametrize("blocks", [1, 2])
def test_leading_blocks_stream_like_a_shorter_model(blocks: int, tmp_path: Path) -> None:
    source = ARCHITECTURES["gemma3"].save(tmp_path / "source")
    tokens = torch.randint(2048, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    config = AutoConfig.from_pretrained(source)
    config.num_hidden_layers, config.layer_types = blocks, config.layer_types[:blocks]
    stock = stock_losses(source, tokens, config=config)
    torch.testing.assert_close(streamed_losses(source, tokens, blocks), stock, atol=2e-5, rtol=0)


def test_conv1d_does_not_go_into_compressed_tensors(tmp_path: Path) -> None:
    source = ARCHITECTURES["gpt2"].save(tmp_path / "source")
    with pytest.raises(MethodError, match="cannot quantize 8 of 8 tensors") as caught:
        quantize(source, tmp_path / "out")
    for name in expected_linears(source):
        assert f"{name}: its layer is a Conv1D" in str(caught.value)
    assert "--format gptq or dense" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("container", ["gptq_v2", "dense"])
def test_conv1d_goes_into_other_formats(container: str, tmp_path: Path) -> None:
    source = ARCHITECTURES["gpt2"].save(tmp_path / "source")
    outcome = quantize(source, tmp_path / "out", format=container, sym=False)
    assert outcome.provenance is not None
    checks = outcome.provenance["checks"]
    assert checks["perplexity_reloaded"] == pytest.approx(checks["perplexity_in_memory"], rel=1e-6)
    assert outcome.provenance["quality"]["result"] == pytest.approx(outcome.provenance["quality"]["dense"], rel=0.05)
    for name, weight in tensors(source).items():
        decoded = DenseView(Checkpoint.open(tmp_path / "out")).read(name, torch.float32)
        decoded = decoded.T if container != "dense" and name in expected_linears(source) else decoded
        assert float((decoded - weight).norm() / weight.norm()) < 0.15, name


def test_tensors_the_model_has_no_place_for_are_kept(tmp_path: Path) -> None:
    """Old GPT-2 files carry their causal masks."""
    source = Architecture("gpt2", GPT2, base=True).save(tmp_path / "source")
    old = load_file(source / "model.safetensors") | {"h.0.attn.bias": torch.ones(1, 1, 128, 128).tril()}
    save_file(old, source / "model.safetensors", metadata={"format": "pt"})
    outcome = quantize(source, tmp_path / "out", method="rtn", format="gptq")
    assert outcome.provenance is not None
    assert outcome.provenance["tensors"]["left_as_they_are"] == {"h.0.attn.bias": "unused by the model"}
    assert torch.equal(tensors(tmp_path / "out")["h.0.attn.bias"], old["h.0.attn.bias"])


def test_a_head_stored_beside_the_embedding_it_is_tied_to_is_kept(tmp_path: Path) -> None:
    source = Architecture("llama", TIED).save(tmp_path / "source")
    stored = load_file(source / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    quantize(source, tmp_path / "out", method="rtn")
    assert torch.equal(tensors(tmp_path / "out")["lm_head.weight"], stored["lm_head.weight"])


# Mixtures of experts


def starve(model: Any) -> None:
    """Route every token to expert 0 or 1: the logits are t, -t, 0, 0."""
    for layer in model.model.layers:
        layer.mlp.gate.weight[1] = -layer.mlp.gate.weight[0]
        layer.mlp.gate.weight[2:] = 0


def test_an_expert_without_tokens_is_a_recorded_fallback(tmp_path: Path) -> None:
    source = Architecture("mixtral", {**MIXTRAL, "num_experts_per_tok": 1}).save(tmp_path / "source", change=starve)
    outcome, plain = quantize(source, tmp_path / "out"), quantize(source, tmp_path / "rtn", method="rtn")
    assert outcome.provenance is not None
    assert plain.provenance is not None
    rows = {row["tensor"]: row for row in outcome.provenance["report"]}
    starved = {name for name in rows if re.search(r"experts\.[23]\.", name)}
    assert len(starved) == 2 * 2 * 3
    decoded, rounded = (DenseView(Checkpoint.open(tmp_path / name)) for name in ("out", "rtn"))
    for name, row in rows.items():
        same = torch.equal(decoded.read(name), rounded.read(name))
        if name in starved:
            assert row["tokens"] == 0
            assert row["fallbacks"] == ["saw 0 tokens (fewer than 64), rounded without error compensation"]
            assert same
        else:
            assert row["tokens"] > 64
            assert "fallbacks" not in row
            assert not same
    assert len(outcome.fallbacks) == len(starved)
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"- {name}: saw 0 tokens" in card for name in starved)


def test_experts_with_few_tokens_are_recorded_fallbacks(tmp_path: Path) -> None:
    source = ARCHITECTURES["mixtral"].save(tmp_path / "source")
    settings = Settings(num_samples=1, seq_len=LENGTH, dtype="float32")
    outcome = run_stage("quantize", "gptq", str(source), {"group_size": 32}, settings, output_dir=tmp_path / "out")
    assert outcome.provenance is not None
    for row in outcome.provenance["report"]:
        assert ("fallbacks" in row) == (row["tokens"] < 64), row
    assert any(0 < row["tokens"] < 64 for row in outcome.provenance["report"])


def test_a_mixture_loads_with_and_without_dequantize(tmp_path: Path) -> None:
    from transformers import CompressedTensorsConfig

    source = ARCHITECTURES["qwen2_moe"].save(tmp_path / "source")
    quantize(source, tmp_path / "out")
    tokens = torch.randint(2048, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    ours = streamed_losses(tmp_path / "out", tokens)
    with pytest.warns(UserWarning, match="loading attributes"):
        dense = stock_losses(tmp_path / "out", tokens, quantization_config=CompressedTensorsConfig(dequantize=True))
    torch.testing.assert_close(dense, ours, atol=2e-5, rtol=0)
    torch.testing.assert_close(stock_losses(tmp_path / "out", tokens), ours, atol=2e-5, rtol=0)


def test_asymmetric_experts_do_not_go_into_compressed_tensors(tmp_path: Path) -> None:
    source = ARCHITECTURES["mixtral"].save(tmp_path / "source")
    with pytest.raises(MethodError, match="cannot quantize 24 of 32 tensors") as caught:
        quantize(source, tmp_path / "out", sym=False)
    assert "use --sym, or --format gptq_v2" in str(caught.value)
    quantize(source, tmp_path / "out", sym=False, format="gptq_v2")


def test_fused_experts_that_stay_dense_are_said_to(tmp_path: Path) -> None:
    options = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
    source = Architecture("granitemoe", options).save(tmp_path / "source")
    outcome = quantize(source, tmp_path / "out", method="rtn")
    names = [
        f"model.layers.{n}.block_sparse_moe.{kind}_linear.weight" for n in range(2) for kind in ("input", "output")
    ]
    assert outcome.fallbacks == [f"{name}: left as it is, not a plain linear layer" for name in names]


def test_an_expert_the_first_windows_miss_is_still_watched() -> None:
    """Experts kept as separate layers: one that only later tokens reach belongs to the stage of the others."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
            self.orphan = nn.Linear(4, 4, bias=False)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.experts[0](hidden)

    block = Block()
    linears = [
        Linear(name, (4, 4), name, Piece(name), name.removesuffix(".weight"), False, torch.float32)
        for name, _ in block.named_parameters()
    ]
    skeleton = Skeleton(block, [("blocks.0", block)], {}, [])
    stages, never = find_stages(skeleton, 0, BlockCall((), {}, by_keyword=False), torch.ones(1, 2, 4), linears)
    assert [[group.leader[0] for group in stage.groups] for stage in stages] == [
        [f"experts.{index}.weight" for index in range(3)]
    ]
    assert [linear.tensor for linear in never] == ["orphan.weight"]


def test_inputs_changed_in_place_are_not_shared() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            out = self.first(hidden) + self.second(hidden)
            hidden += 1
            return out + hidden @ self.third.weight.T

    block = Block()
    linears = [
        Linear(name, (4, 4), name, Piece(name), name.removesuffix(".weight"), False, torch.float32)
        for name, _ in block.named_parameters()
    ]
    skeleton = Skeleton(block, [("blocks.0", block)], {}, [])
    stages, never = find_stages(skeleton, 0, BlockCall((), {}, by_keyword=False), torch.ones(1, 2, 4), linears)
    groups = [[linear.tensor for linear in group.linears] for stage in stages for group in stage.groups]
    assert groups == [["first.weight", "second.weight"], ["third.weight"]]
    assert never == []


# What cannot be streamed


class OddConfig(PreTrainedConfig):
    model_type = "weightworks-odd"

    def __init__(self, kind: str = "plain", **rest: Any) -> None:
        self.kind, self.vocab_size, self.hidden_size, self.num_hidden_layers = kind, 2048, 64, 3
        super().__init__(**rest)


class OddBlock(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, hidden: torch.Tensor, extra: torch.Tensor | None = None, *, pair: bool = False) -> Any:
        inner = self.up(hidden)
        out = hidden + self.down(torch.tanh(inner if extra is None else inner + extra))
        return (out, inner) if pair else out


class OddModel(PreTrainedModel, GenerationMixin):
    """A causal LM whose blocks get more than hidden states, in the way its configuration names."""

    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(OddBlock(config.hidden_size) for _ in range(0 if config.kind == "none" else 3))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        kind, hidden = self.config.kind, self.embed(input_ids)
        first = extra = hidden
        for block in reversed(self.blocks) if kind == "backwards" else self.blocks:
            if kind == "tokens":  # every block sees the embedding of the text
                hidden = block(hidden, first)
            elif kind == "earlier":  # every block sees the one before the last
                hidden, extra = block(hidden, extra), hidden
            elif kind == "pair":  # every block gets the last one's inner state
                hidden, extra = block(hidden, extra, pair=True)
            elif kind == "flat":
                hidden = block(hidden.flatten(0, 1)).view_as(hidden)
            else:
                hidden = block(hidden)
        return CausalLMOutputWithPast(logits=self.head(hidden))


AutoConfig.register(OddConfig.model_type, OddConfig)
AutoModelForCausalLM.register(OddConfig, OddModel)


def odd(kind: str, folder: Path) -> Path:
    model = OddModel(OddConfig(kind=kind))
    randomise(model)
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("tokens", r"gives logits that differ by \d\.\d+e[-+]\d+ of their range .* so it cannot be streamed"),
        ("earlier", r"gives logits that differ by \d\.\d+e[-+]\d+ of their range .* so it cannot be streamed"),
        ("pair", "fails once its blocks are called one by one|gives logits that differ"),
        ("backwards", "calls block 2 of its list where block 0 is due"),
        ("flat", r"blocks do not take hidden states \[batch, seq, hidden\]"),
    ],
)
def test_a_model_that_fails_the_proof_is_refused(kind: str, text: str, method: str, tmp_path: Path) -> None:
    source = odd(kind, tmp_path / "source")
    with pytest.raises(ArchitectureError, match=text):
        quantize(source, tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()
    assert not staging_of(tmp_path / "out").exists()


def test_an_unknown_model_that_passes_the_proof_is_streamed(tmp_path: Path) -> None:
    """The refusals above are not for being unknown."""
    outcome = quantize(odd("plain", tmp_path / "source"), tmp_path / "out")
    assert outcome.provenance is not None
    assert outcome.provenance["tensors"]["transformed"] == 6


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match="OddModel: no list of decoder blocks found in the module tree"):
        quantize(odd("none", tmp_path / "source"), tmp_path / "out")


def test_an_encoder_decoder_model_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=2048, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    with pytest.raises(ArchitectureError, match="t5 is an encoder-decoder model; only causal LMs can be streamed"):
        quantize(tmp_path / "source", tmp_path / "out")


def test_a_model_of_another_task_is_refused(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    ViTModel(config).save_pretrained(tmp_path / "source")
    with pytest.raises(ArchitectureError, match=r"transformers cannot build a causal LM from config\.json"):
        quantize(tmp_path / "source", tmp_path / "out")


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    source = Architecture("llama", LLAMA).save(tmp_path / "source")
    stored = load_file(source / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        del stored[name]
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArchitectureError, match="2 tensors that LlamaForCausalLM needs are missing") as caught:
        quantize(source, tmp_path / "out")
    assert "model.layers.1.mlp.up_proj.weight" in str(caught.value)
    assert "model.norm.weight" in str(caught.value)
