"""Hardware formats on architectures that stock loaders treat in their own ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from architectures import ARCHITECTURES

from weightworks.errors import MethodError
from weightworks.plan.stage import Outcome, default_target, run_stage
from weightworks.plan.verify import verify
from weightworks.stage import catalog
from weightworks.stage.settings import Settings
from weightworks.store.checkpoint import Checkpoint
from weightworks.testing.tiny import make_model

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = Settings(num_samples=4, seq_len=64, dtype="float32")


def run(source: Path, target: Path, **options: Any) -> Outcome:
    return run_stage("quantize", "rtn", str(source), options, SETTINGS, output_dir=target)


def checks(outcome: Outcome) -> dict[str, Any]:
    assert outcome.provenance is not None
    found: dict[str, Any] = outcome.provenance["checks"]
    return found


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_loaded_in_fp8_alone(name: str, tmp_path: Path) -> None:
    source = ARCHITECTURES[name].save(tmp_path / "source")
    seen = checks(run(source, tmp_path / "out", scheme="FP8"))
    assert seen["loader"] == "stock transformers"
    assert seen["perplexity_reloaded"] == pytest.approx(seen["perplexity_in_memory"], rel=1e-6)
    for scheme in ("W8A8", "NVFP4A16"):
        with pytest.raises(MethodError, match="use --scheme FP8"):
            run(source, tmp_path / scheme, scheme=scheme)


def test_layers_that_are_handed_tokens_without_windows(tmp_path: Path) -> None:
    """OPT flattens [batch, seq, hidden]; the library would take one scale for all tokens."""
    source = ARCHITECTURES["opt"].save(tmp_path / "source")
    outcome = run(source, tmp_path / "out", scheme="FP8")
    assert checks(outcome)["loader"] == "stock transformers, dequantize=True"
    assert "CompressedTensorsConfig(dequantize=True)" in (tmp_path / "out" / "README.md").read_text()
    assert all(check["ok"] for check in verify(str(tmp_path / "out")))


def test_conv1d_layers_are_refused(tmp_path: Path) -> None:
    source = ARCHITECTURES["gpt2"].save(tmp_path / "source")
    with pytest.raises(MethodError, match="Conv1D"):
        run(source, tmp_path / "out", scheme="FP8")


def test_widths_that_do_not_fit(tmp_path: Path) -> None:
    source = ARCHITECTURES["llama"].save(tmp_path / "source")
    with pytest.raises(MethodError, match="not divisible by the group size 128") as caught:
        run(source, tmp_path / "out", scheme="FP8_BLOCK")
    assert "choose a --scheme that divides them" in caught.value.hint


def test_a_damaged_code_is_found(tmp_path: Path) -> None:
    """What is stored is held against what was computed: another byte in a weight, and ``compress verify`` says so."""
    source, folder = make_model(tmp_path / "source"), tmp_path / "out"
    assert run(source, folder, scheme="NVFP4").provenance is not None
    assert all(check["ok"] for check in verify(str(folder)))
    info = Checkpoint.open(folder).info("model.layers.0.mlp.up_proj.weight_scale")
    raw = bytearray((folder / info.shard).read_bytes())
    raw[info.offset : info.offset + info.nbytes] = bytes([0x7E]) * info.nbytes
    (folder / info.shard).write_bytes(raw)
    failed = {check["check"] for check in verify(str(folder)) if not check["ok"]}
    assert {"files", "perplexity"} <= failed


def test_folders_are_called_after_their_format(tmp_path: Path) -> None:
    source = Checkpoint.open(str(make_model(tmp_path / "tiny")))
    module = catalog.find("quantize", "gptq").load()
    for scheme, named in (("FP8_BLOCK", "tiny-gptq-fp8-block"), ("W8A8", "tiny-gptq-w8a8"), ("W8A16", "tiny-gptq-w8")):
        assert default_target(source, "gptq", module.Options(scheme=scheme)).name == named
    steps = module.Options(scheme="W8A8", rotate=True, smooth=0.5, norm_tweak="closed")
    assert default_target(source, "gptq", steps).name == "tiny-gptq-w8a8-rotated-smooth-norms-closed"
