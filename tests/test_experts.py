"""Experts: what their worth is made of, against a pass with hooks of the test's own; dropped, merged, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from test_reduce import CLOSE, SETTINGS, loaded, logits, planned, reduce
from torch.overrides import TorchFunctionMode

from compress.prune.experts import Method, Options, Routed, merged
from weightworks.engine.mixtures import Thin
from weightworks.errors import ArchitectureError, MethodError
from weightworks.stream.calibration import load_windows

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("mixtral", "qwen2_moe", "qwen3_moe")


class Barred(TorchFunctionMode):
    """Router logits of experts that are gone are -inf."""

    def __init__(self, gone: dict[int, list[int]]) -> None:
        super().__init__()
        self.gone = gone  # by the address of the router's weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and (gone := self.gone.get(args[1].data_ptr())):
            output[..., gone] = -torch.inf
        return output


def mixtures(model: Any) -> list[tuple[Any, Any]]:
    """Router and experts of every block."""
    return [(layer.mlp.gate, layer.mlp.experts) for layer in model.model.layers]


@pytest.mark.parametrize("kind", KINDS)
def test_the_thinner_model_is_the_one_whose_router_passes_experts_by(kind: str, tmp_path: Path) -> None:
    source = ARCHITECTURES[kind].save(tmp_path / "source")
    outcome = reduce(source, tmp_path / "out", "experts", sparsity=0.5)
    assert outcome.provenance is not None
    model, small = loaded(source), loaded(tmp_path / "out")
    gone = {}
    for (router, experts), (_, left) in zip(mixtures(model), mixtures(small), strict=True):
        kept = [next(e for e in range(4) if torch.equal(experts.down_proj[e], one)) for one in left.down_proj]
        assert len(kept) == 2
        gone[router.weight.data_ptr()] = [expert for expert in range(4) if expert not in kept]
    with Barred(gone):
        expected = logits(model)
    torch.testing.assert_close(logits(small), expected, **CLOSE)
    assert outcome.estimate is not None
    assert outcome.estimate.output_bytes == sum(
        path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")
    )
    reduction = outcome.provenance["reduction"]
    assert 0.99 < reduction["multiply_adds_out"] / reduction["multiply_adds_in"] < 1
    assert "none: a token passes as many experts as before" in (tmp_path / "out" / "README.md").read_text()


@torch.no_grad()
def test_worth_is_what_experts_gave(tmp_path: Path) -> None:
    source = ARCHITECTURES["mixtral"].save(tmp_path / "source")
    model = loaded(source)
    windows = load_windows(
        SETTINGS.dataset, source, num_samples=SETTINGS.num_samples, seq_len=SETTINGS.seq_len, seed=SETTINGS.seed
    )
    counts, sums = torch.zeros(4), torch.zeros(4)

    def look(module: Any, args: Any) -> None:
        hidden, index, weights = args
        for token in range(len(hidden)):
            for slot, expert in enumerate(index[token].tolist()):
                gate, up = (module.gate_up_proj[expert] @ hidden[token]).chunk(2)
                given = module.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                counts[expert] += 1
                sums[expert] += weights[token, slot] * given.norm()

    model.model.layers[1].mlp.experts.register_forward_pre_hook(look)
    model(windows.tokens)
    worth = {"saliency": sums / counts, "frequency": counts}
    for importance, expected in worth.items():
        outcome = reduce(source, tmp_path / importance, "experts", sparsity=0.5, importance=importance)
        assert outcome.provenance is not None
        row = outcome.provenance["report"][1]
        kept = expected.topk(2).indices.sort().values
        assert row["tokens"] == int(counts.sum()) == 2 * windows.tokens.numel()
        assert row["lost_output"] == pytest.approx(1 - float(sums[kept].sum() / sums.sum()), rel=1e-4)
        left = loaded(tmp_path / importance).model.layers[1].mlp.experts.down_proj
        assert torch.equal(left, model.model.layers[1].mlp.experts.down_proj[kept])


def test_an_expert_joins_the_most_alike_weighed_by_its_tokens() -> None:
    statistics = Routed(4, torch.device("cpu"))
    logits = torch.tensor([[1.0, 0.0, 0.9, 0.1], [0.0, 1.0, 0.1, 0.9], [1.0, 1.0, 1.0, 1.0]])
    index = torch.tensor([[0], [1], [0]])
    statistics.add(logits, index, torch.ones(3, 1), torch.ones(3, 1))
    statistics.tokens = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    assert merged(statistics, [0, 1]) == [[(0, 0.75), (2, 0.25)], [(1, 1.0), (3, 0.0)]]


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_merged_experts_are_averages(kind: str, tmp_path: Path) -> None:
    """Where the checkpoint has a tensor an expert, and where it has one of all."""
    architecture = ARCHITECTURES["mixtral"] if kind == "mixtral" else GPT_OSS
    source = architecture.save(tmp_path / "source")
    job = planned(source, "experts", sparsity=0.5, removal="merge")
    mixed = [[[1, 0.25], [0, 0.75]], [[2, 1.0], [3, 0.0]]]
    assert isinstance(job.plan, Thin)
    job.settle([{"part": one.name, "mixtures": mixed} for one in job.plan.mixed])
    whole = loaded(source).model.layers[0].mlp
    smaller = {cut.name: job.reduced.read(cut.name) for cut in job.layout.cuts}
    experts = whole.experts.down_proj
    names = sorted(name for name in smaller if "layers.0." in name and ("w2" in name or name.endswith("down_proj")))
    made = torch.stack([smaller[name] for name in names]) if kind == "mixtral" else smaller[names[0]]
    torch.testing.assert_close(made, torch.stack([0.25 * experts[1] + 0.75 * experts[0], experts[2]]))
    router = next(name for name in smaller if "layers.0." in name and name.endswith(("gate.weight", "router.weight")))
    rows = whole.gate.weight if kind == "mixtral" else whole.router.weight
    assert torch.equal(smaller[router], rows[[1, 2]])


GPT_OSS = Architecture(
    "gpt_oss",
    {
        **ARCHITECTURES["mixtral"].options,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 24,
    },
)


def test_experts_in_one_tensor_with_biases(tmp_path: Path) -> None:
    source = GPT_OSS.save(tmp_path / "source")
    outcome = reduce(source, tmp_path / "out", "experts", sparsity=0.5, removal="merge")
    assert outcome.provenance is not None
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_local_experts"] == 2
    assert outcome.provenance["checks"]["loader"] == "stock transformers"


@pytest.mark.parametrize(
    ("kind", "options", "error", "text"),
    [
        ("llama", {}, ArchitectureError, "LlamaForCausalLM has no mixture of experts in its blocks"),
        ("mixtral", {"sparsity": 0.75}, MethodError, "1 of 4 experts would stay, and each token is given to 2"),
        ("mixtral", {"sparsity": 0.1}, MethodError, "4 of 4 experts would stay; 1 to 3 can"),
    ],
)
def test_what_cannot_be_is_refused(
    kind: str, options: dict[str, Any], error: type[Exception], text: str, tmp_path: Path
) -> None:
    source = ARCHITECTURES[kind].save(tmp_path / "source")
    with pytest.raises(error, match=text):
        reduce(source, tmp_path / "out", "experts", **options)


def test_experts_that_saw_nothing_are_told() -> None:
    statistics = Routed(3, torch.device("cpu"))
    statistics.add(torch.ones(2, 3), torch.tensor([[0], [2]]), torch.ones(2, 1), torch.tensor([[2.0], [3.0]]))
    found = Method(Options(sparsity=0.3)).choose(statistics, 3)
    assert found.mixtures == [[(0, 1.0)], [(2, 1.0)]]
    assert found.fallbacks == ["1 of 3 experts saw no tokens and count as worth nothing"]
