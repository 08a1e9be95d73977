"""Norm tweaking: its loss and its closed form, and what it does to a model, kept only where held-out windows say so."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from commands import FEW, SHORT_TEXT, TINY_LLAMA, Commands
from transformers import AutoModelForCausalLM

from compress import norms, quantize
from compress.quantize import rtn
from weightworks.engine.tweaking import scale
from weightworks.errors import CalibrationError
from weightworks.stage.protocols import Solution
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.sources import file_digest
from weightworks.stream.calibration import choose, load_windows
from weightworks.stream.selfwritten import first_tokens, script_of
from weightworks.stream.skeleton import straight_through

TEXT = {"dataset": str(SHORT_TEXT), "num_samples": 16, "seq_len": 64, "device": "cpu"}
DONE = "weightworks.store.writer:CheckpointWriter.done"
pytestmark = pytest.mark.usefixtures("one_thread")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.iterdir())}


def norms_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors if name.endswith("norm.weight")}


# Arithmetic


def test_the_distance_is_of_means_and_variances() -> None:
    output = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0))
    moved = output * torch.tensor([1.0, 2.0, 1.0, 1.0]) + torch.tensor([0.5, 0.0, 0.0, 0.0])
    first, second = norms.moments(output), norms.moments(moved)
    expected = [0.5, float(output[..., 1].mean().abs() + 3 * output[..., 1].var(correction=0)), 0.0, 0.0]
    assert float(norms.distance(second, first)) == pytest.approx(sum(expected) / 4, rel=1e-5)
    assert float(norms.distance(first, norms.moments(output.flip(1)))) == pytest.approx(0, abs=1e-6)  # order is nothing


def test_rates_grow_with_depth() -> None:
    assert [norms.rate(block, 4, first=0.1, growth=5) for block in range(4)] == pytest.approx([0.1, 0.225, 0.35, 0.475])


def test_the_closed_form_is_the_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    dense = [torch.randn(rows, 12, generator=generator) for rows in (20, 8)]
    pairs = [(weight, weight + 0.2 * torch.randn(weight.shape, generator=generator)) for weight in dense]
    found = norms.factors(inputs.T @ inputs / 400, pairs)
    columns = torch.cat([(inputs[:, None] * rounded).flatten(0, 1) for _, rounded in pairs]).double()
    aim = torch.cat([(inputs @ weight.T).flatten() for weight, _ in pairs]).double()
    ridge = norms.RIDGE * columns.square().sum(0).mean()
    exact = torch.linalg.solve(columns.T @ columns + ridge * torch.eye(12), columns.T @ aim + ridge)
    assert torch.allclose(found.double(), exact, atol=1e-4)
    assert float((found - 1).abs().max()) > 0.01


def test_weights_that_were_not_rounded_ask_for_no_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(99, 12, generator=generator), torch.randn(20, 12, generator=generator)
    assert torch.allclose(norms.factors(inputs.T @ inputs / 99, [(weight, weight)]), torch.ones(12), atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1.0], ids=["plain", "less one"])
def test_gains_are_scaled_however_they_are_stored(offset: float) -> None:
    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = (torch.nn.Parameter(torch.randn(6)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.square().mean(-1, keepdim=True).sqrt() * (offset + self.weight) + self.bias

    norm, x, factors = Norm(), torch.randn(5, 6), torch.rand(6) + 0.5
    before = norm(x)
    scale(norm, factors)
    assert torch.allclose(norm(x), before * factors, atol=1e-5)


# Models


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The embedded model rounded to 3 bits, its norms tuned; and its provenance."""
    folder = tmp_path_factory.mktemp("norms") / "tuned"
    options = {"method": "rtn", "bits": 3, "norm_tweak": "adam", "norm_rate": 0.002, "ignore": ["*.mlp.*"]}
    outcome = quantize(TINY_LLAMA, output_dir=folder, **options, **{**TEXT, "num_samples": 64})
    assert outcome.provenance is not None
    return folder, outcome.provenance


def test_norms_move_a_little_where_the_loss_falls(tuned: tuple[Path, dict[str, Any]]) -> None:
    folder, facts = tuned
    kept = {block["block"] for block in facts["norms"] if block["kept"]}
    assert [block["block"] for block in facts["norms"]] == list(range(6))
    assert len(kept) >= 3
    for block in facts["norms"]:
        assert block["kept"] == all(block["after"][name] < block["before"][name] for name in ("loss", "error"))
    before, after = norms_of(TINY_LLAMA), norms_of(folder)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {row["tensor"] for row in facts["report"] if "bits" not in row}
    assert {int(name.split(".")[2]) for name in moved} == kept
    for name in moved:
        assert after[name].dtype == before[name].dtype
        assert 0 < float((after[name] - before[name]).float().norm() / before[name].float().norm()) < 0.05
    assert facts["tensors"]["tuned"] == len(moved) and facts["tensors"]["transformed"] == 24
    assert facts["tensors"]["copied"] == 56 - 24 - len(moved)
    assert "| norms tuned | kept in " in (folder / "README.md").read_text()


def test_reported_losses_are_those_of_the_models(tuned: tuple[Path, dict[str, Any]]) -> None:
    """Of the first block, whose input is the embedding, by stock transformers on the very windows held out."""
    folder, facts = tuned
    found = load_windows(str(SHORT_TEXT), TINY_LLAMA, num_samples=64, held_out=8, seq_len=64, seed=0)
    assert found.digest == facts["calibration"]["digest"]
    outputs = []
    for source in (TINY_LLAMA, folder):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        with torch.no_grad():
            outputs.append(model(found.held_out, output_hidden_states=True).hidden_states[1])
    said = facts["norms"][0]["after" if facts["norms"][0]["kept"] else "before"]
    assert said["loss"] == pytest.approx(float(norms.loss(outputs[1], outputs[0])), rel=1e-2)
    assert said["error"] == pytest.approx(float(norms.error(outputs[1], outputs[0])), rel=1e-2)


def test_what_does_not_help_is_taken_back(tmp_path: Path) -> None:
    """A rate far too high makes every block worse: the result is that of rounding alone, byte for byte."""
    small = {**TEXT, "method": "rtn", "bits": 4, "ignore": ["*.mlp.*"]}
    outcome = quantize(
        TINY_LLAMA, norm_tweak="adam", norm_rate=0.1, norm_rate_growth=50.0, output_dir=tmp_path / "a", **small
    )
    quantize(TINY_LLAMA, output_dir=tmp_path / "b", **small)
    assert outcome.provenance is not None
    assert not any(block["kept"] for block in outcome.provenance["norms"])
    assert all(block["after"]["error"] > block["before"]["error"] for block in outcome.provenance["norms"])
    assert outcome.provenance["tensors"]["tuned"] == 0 and outcome.provenance["tensors"]["copied"] == 56 - 24
    assert contents(tmp_path / "a")["model.safetensors"] == contents(tmp_path / "b")["model.safetensors"]


@pytest.mark.parametrize("how", ["adam", "closed"])
def test_dense_weights_leave_norms_alone(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(rtn.Method, "apply", lambda self, weight, target: Solution(weight))
    outcome = quantize(small, method="rtn", format="dense", norm_tweak=how, output_dir=tmp_path / "out", **TEXT)
    assert outcome.provenance is not None
    for block in outcome.provenance["norms"]:
        assert block["before"]["error"] == 0 and block["after"]["error"] < 1e-9 and not block["kept"]
    assert contents(tmp_path / "out")["model.safetensors"] == contents(small)["model.safetensors"]


@pytest.mark.parametrize("how", ["adam", "closed"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral", "qwen3"])
def test_architectures(name: str, how: str, tmp_path: Path) -> None:
    """Norms with biases, with gains less one, after the products, inside heads, read by routers."""
    source = ARCHITECTURES[name].save(tmp_path / "source")
    options = {"method": "rtn", "bits": 2, "group_size": -1, "format": "dense", "dtype": "float32"}
    options |= {"norm_rate": 0.01} if how == "adam" else {}
    outcome = quantize(source, **options, norm_tweak=how, output_dir=tmp_path / "out", **TEXT)
    assert outcome.provenance is not None
    blocks = outcome.provenance["norms"]
    assert any(block["kept"] for block in blocks) or how == "closed", blocks
    for block in blocks:
        fell = [block["after"][name] < block["before"][name] for name in block["before"]]
        assert block["kept"] == all(fell)
        assert (block["largest_change"] > 0) == block["kept"]


def test_gradients_pass_inputs_that_are_rounded(small: Path, tmp_path: Path) -> None:
    x = torch.tensor([0.4, 1.6], requires_grad=True)
    rounded = straight_through(torch.round, x)
    assert rounded.tolist() == [0.0, 2.0]
    assert torch.autograd.grad(rounded @ torch.tensor([3.0, 5.0]), x)[0].tolist() == [3.0, 5.0]
    options = {"method": "rtn", "scheme": "MXFP4", "norm_tweak": "adam", "norm_rate": 0.003}
    asked = {**TEXT, "num_samples": 32, "seq_len": 128}
    outcome = quantize(small, output_dir=tmp_path / "out", **options, **asked)
    assert outcome.provenance is not None
    assert any(block["after"]["loss"] < block["before"]["loss"] for block in outcome.provenance["norms"])


SOME = (*FEW, "--bits", "2", "--group-size", "-1")


@pytest.mark.parametrize("how", ["adam", "closed"])
def test_killed_again_and_again(compress: Commands, small: Path, tmp_path: Path, how: str) -> None:
    words = ("quantize", small, *SOME, "--norm-tweak", how, "-o", "out")
    places = [tmp_path / "undisturbed", tmp_path / "killed"]
    for place in places:
        place.mkdir()
    run = compress(*words, cwd=places[0])
    assert run.code == 0 and "norms tuned" in run.err, run.err
    killed = 0
    fault = ["signal_at", DONE, 1, {"after": True}]
    while (run := compress(*words, cwd=places[1], faults=[fault])).code == -signal.SIGKILL:
        killed += 1
    assert run.code == 0, run.err
    assert killed >= 4  # after the proof, two blocks, the copied tensors
    assert contents(places[0] / "out") == contents(places[1] / "out")


RECIPE = """
version: 1
sources: {base: MODEL}
stages:
  small:
    use: quantize.rtn
    from: base
    matrix: {norm_tweak: [none, closed]}
    with: {bits: 3, dataset: TEXT, num_samples: 8, seq_len: 64}
"""


def test_recipes_tune_norms(compress: Commands, small: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("MODEL", str(small)).replace("TEXT", str(SHORT_TEXT)))
    run = compress("run", recipe, "--json", cwd=tmp_path)
    assert run.code == 0, run.err
    stages = [stage for stage in run.json["stages"] if stage["name"].startswith("small")]
    folders = {stage["name"]: Path(stage["folder"]) for stage in stages}
    facts = {name: json.loads((folder / "provenance.json").read_text()) for name, folder in folders.items()}
    assert "norms" not in facts["small[norm_tweak=none]"] and "calibration" not in facts["small[norm_tweak=none]"]
    assert len(facts["small[norm_tweak=closed]"]["norms"]) == 2
    assert facts["small[norm_tweak=closed]"]["calibration"]["windows_held_out"] == 1


def test_estimates_count_the_tuning(compress: Commands, small: Path, tmp_path: Path) -> None:
    plain, tuned = (
        compress("quantize", small, *SOME, "--norm-tweak", how, "--dry-run", "--json", cwd=tmp_path).json["estimate"]
        for how in ("none", "adam")
    )
    assert tuned["seconds"] > plain["seconds"]
    assert tuned["disk_bytes"] > plain["disk_bytes"] and tuned["output_bytes"] == plain["output_bytes"]


# Texts


def test_windows_held_out_are_others() -> None:
    stream = torch.arange(1000)
    plain, judged = choose(stream, "a", 6, 10, 3), choose(stream, "a", 6, 10, 3, held_out=2)
    assert judged.held_out is not None and judged.held_out.shape == (2, 10)
    assert torch.equal(plain.tokens, judged.tokens) and plain.digest != judged.digest
    assert not set(judged.held_out.flatten().tolist()) & set(judged.tokens.flatten().tolist())
    short = choose(stream[:40], "a", 6, 10, 3, held_out=2)
    assert short.held_out is not None and (len(short.tokens), len(short.held_out)) == (3, 1)
    with pytest.raises(CalibrationError, match="a single window of 10 tokens, so none can be held out"):
        choose(stream[:15], "a", 6, 10, 3, held_out=2)


def test_first_tokens_are_of_the_main_scripts(tmp_path: Path) -> None:
    chosen, told = first_tokens(TINY_LLAMA, 2048)
    assert told == "of Latin letters"
    assert 500 < len(chosen) < 2048
    assert first_tokens(tmp_path, 7)[0].tolist() == [*range(7)]
    assert "no tokenizer" in first_tokens(tmp_path, 7)[1]
    assert [script_of(text) for text in (" the", "да", "中", "12", "aд", "\ufffd")] == [
        "LATIN",
        "CYRILLIC",
        "CJK",
        None,
        None,
        None,
    ]


def test_zero_shot(tmp_path: Path) -> None:
    """The model writes the text its norms are tuned and judged on."""
    options = {
        "method": "rtn",
        "bits": 2,
        "group_size": 32,
        "ignore": ["*.mlp.*"],
        "norm_tweak": "adam",
        "norm_rate": 0.005,
    }
    asked = {**TEXT, "dataset": "self", "seq_len": 32}
    outcome = quantize(TINY_LLAMA, output_dir=tmp_path / "out", **options, **asked)
    assert outcome.provenance is not None
    assert "first tokens of Latin letters" in outcome.provenance["calibration"]["source"]
    assert any(block["kept"] for block in outcome.provenance["norms"])
