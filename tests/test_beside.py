"""Adapters kept beside the model: on a pruned and on a quantized one, read back as PEFT's layout says, refused where merged."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from commands import Commands

from compress import prune, quantize, recover
from merge import merge as merge_models
from weightworks.errors import MethodError, UsageError
from weightworks.store.adapters import WEIGHTS, Adapter
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.sources import file_digest
from weightworks.testing.tiny import CALIBRATION_TEXT

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK: dict[str, Any] = {
    "dataset": str(CALIBRATION_TEXT), "seq_len": 32, "device": "cpu", "dtype": "float32", "steps": 3, "batch_size": 2,
    "held_out": 2, "lr": 1e-2, "rank": 4, "adapter": "lora",
}  # fmt: skip
DONE = "weightworks.store.writer:CheckpointWriter.done"
ALWAYS = [["constant", f"weightworks.engine.modelwise:SAVE_{name}", 0] for name in ("SECONDS", "SHARE")]


@pytest.fixture(scope="module")
def beside(sparse: Path, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter trained on the pruned model."""
    return recover(sparse, teacher=small, **QUICK, output_dir=tmp_path_factory.mktemp("beside") / "adapter").target


def test_the_output_is_an_adapter_and_says_what_it_is_worth(beside: Path, sparse: Path) -> None:
    assert {path.name for path in beside.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "provenance.json",
    }  # fmt: skip
    adapter = Adapter.open(beside)
    assert sorted(adapter.config["target_modules"]) == sorted(
        f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")
    )
    assert len(adapter.pairs) == 14
    assert not adapter.whole
    assert adapter.base == sparse.name
    facts = json.loads((beside / "provenance.json").read_text())
    assert facts["quality"]["result"] != facts["quality"]["dense"]
    assert facts["training"]["held_out"]["after"] != facts["training"]["held_out"]["before"]
    assert "PeftModel.from_pretrained" in (beside / "README.md").read_text()


@torch.no_grad()
def perplexity_of(source: str, folder: Path) -> float:
    """The perplexity of a checkpoint or sum, read by our reader, on the check text that runs report."""
    from weightworks.engine.finish import prove_written, stream_perplexity
    from weightworks.plan.texts import check_windows
    from weightworks.stream.skeleton import build

    total = DenseView(Checkpoint.open(source))
    run: Any = SimpleNamespace(device=torch.device("cpu"), target=folder, skeleton=build(total))
    probe = check_windows(total.checkpoint, run.skeleton, trust_remote_code=False)
    run.returns_tuple = prove_written(run, total, probe)
    return stream_perplexity(run, total, probe)


def test_model_and_adapter_are_what_was_trained(beside: Path, sparse: Path) -> None:
    """The sum of checkpoint and adapter has the perplexity the run reports of its own weights."""
    facts = json.loads((beside / "provenance.json").read_text())
    assert perplexity_of(f"{sparse}+{beside}", sparse) == pytest.approx(facts["quality"]["result"], rel=1e-3)


def test_a_sum_with_a_sparse_model_is_refused_where_it_would_be_written(
    beside: Path, sparse: Path, small: Path, tmp_path: Path
) -> None:
    text = r"the zeros of 14 pruned weights would be filled in: model.layers.0.*W \+ BA has none where W has, so the sum is dense"
    for run in (
        lambda: quantize(f"{sparse}+{beside}", method="rtn", output_dir=tmp_path / "out"),
        lambda: merge_models([f"{sparse}+{beside}", small], output_dir=tmp_path / "out"),
        lambda: recover(f"{sparse}+{beside}", output_dir=tmp_path / "out"),
    ):
        with pytest.raises(MethodError, match=text) as caught:
            run()
        assert "--adapter mask_lora" in caught.value.hint
    again = prune(f"{sparse}+{beside}", method="magnitude", pattern="2:4", output_dir=tmp_path / "out")
    assert again.provenance is not None  # it is pruned again, which is what was meant


def test_on_a_quantized_base(small: Path, tmp_path: Path) -> None:
    base = quantize(small, method="rtn", bits=4, group_size=32, device="cpu", output_dir=tmp_path / "w4").target
    before = file_digest(base / "model.safetensors")
    gently = {**QUICK, "steps": 24, "lr": 2e-3, "num_samples": 10, "batch_size": 8}  # the same rows in every step
    outcome = recover(base, teacher=small, **gently, method="distill", output_dir=tmp_path / "out")
    assert file_digest(base / "model.safetensors") == before
    assert outcome.provenance is not None
    curve = outcome.provenance["training"]["rounds"][0]["losses"]
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])
    adapter = Adapter.open(outcome.target)
    view = DenseView(Checkpoint.open(base))
    for module, pair in adapter.pairs.items():
        assert view.is_packed(f"{module}.weight")
        assert pair.shape == view.shape(f"{module}.weight")
    assert Checkpoint.open(f"{small}+{outcome.target}").tensors  # its layout is that of any adapter
    total, module = Checkpoint.open(f"{base}+{outcome.target}"), next(iter(adapter.pairs))
    assert total.remarks[0].endswith("is quantized (4 bits): its weights are decoded")
    a, b = adapter.factors(module)
    expected = view.read(f"{module}.weight") + adapter.pairs[module].scaling * b @ a
    assert torch.allclose(total.read(f"{module}.weight", torch.float32), expected, atol=1e-6)
    assert torch.equal(total.read_rows(f"{module}.weight", 3, 9), total.read(f"{module}.weight")[3:9])
    assert perplexity_of(f"{base}+{outcome.target}", base) == pytest.approx(
        outcome.provenance["quality"]["result"], rel=1e-3
    )
    with pytest.raises(MethodError, match="is already quantized"):
        recover(base, **{**QUICK, "adapter": "mask_lora"}, output_dir=tmp_path / "no")


def test_stages_after_it_read_model_and_adapter(compress: Commands, small: Path, tmp_path: Path) -> None:
    """In a recipe an adapter that was trained stands for the sum, whatever reads it."""
    recipe = {
        "version": 1,
        "sources": {"base": str(small)},
        "stages": {
            "coarse": {"use": "quantize.rtn", "from": "base", "with": {"bits": 2, "group_size": 32}},
            "beside": {"use": "recover.perp", "from": "coarse", "with": {**QUICK, "steps": 2}},
            "again": {"use": "quantize.rtn", "from": "beside", "with": {"bits": 8, "group_size": -1}},
            "scores": {
                "use": "score.perplexity",
                "from": ["coarse", "beside", "again"],
                "with": {"texts": [str(CALIBRATION_TEXT)], "seq_len": 32, "max_tokens": 256},
            },
        },
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    run = compress("run", "r.yaml", "--json", "-q", cwd=tmp_path)
    assert run.code == 0, run.err
    scores = json.loads((tmp_path / "runs" / "r" / "scores" / "score.json").read_text())
    coarse, beside, again = (model["metrics"]["perplexity"]["value"] for model in scores["models"])
    assert beside != pytest.approx(coarse, rel=1e-3)
    assert again == pytest.approx(beside, rel=1e-2)
    assert compress("run", "r.yaml", "-q", cwd=tmp_path).code == 0  # all of it is found


def test_layers_held_the_other_way(tmp_path: Path) -> None:
    source = ARCHITECTURES["gpt2"].save(tmp_path / "source")
    outcome = recover(source, **QUICK, output_dir=tmp_path / "out")
    assert Adapter.open(outcome.target).config["fan_in_fan_out"] is True
    total, base = Checkpoint.open(f"{source}+{outcome.target}"), Checkpoint.open(source)
    changed = [name for name in base.tensors if not torch.equal(total.read(name), base.read(name))]
    assert len(changed) == len(Adapter.open(outcome.target).pairs)


def test_killed_again_and_again(compress: Commands, sparse: Path, tmp_path: Path) -> None:
    words = [text for key, value in QUICK.items() for text in ("--" + key.replace("_", "-"), str(value))]
    command = ("recover", sparse, *words, "-q", "-o", "out")
    (tmp_path / "a").mkdir()
    assert compress(*command, cwd=tmp_path / "a").code == 0
    (tmp_path / "b").mkdir()
    faults, killed = [["signal_at", DONE, 1, {"after": True}], *ALWAYS], 0
    while (run := compress(*command, cwd=tmp_path / "b", faults=faults)).code == -signal.SIGKILL:
        killed += 1
        assert killed < 9
    assert run.code == 0, run.err
    assert killed == 5  # the proof, three steps, what was trained
    made, expected = (
        {path.name: file_digest(path) for path in (tmp_path / name / "out").iterdir()} for name in ("b", "a")
    )
    assert made == expected
    assert WEIGHTS in made


def test_what_cannot_be_is_refused(sparse: Path, small: Path) -> None:
    with pytest.raises(UsageError, match="adapter lora is kept beside the model, which stays as it is: norm cannot"):
        recover(sparse, **QUICK, train=["norm", "adapters"])
    with pytest.raises(UsageError, match="adapter lora is not merged, so no block can be written"):
        recover(sparse, teacher=small, **QUICK, mode="reconstruct")
