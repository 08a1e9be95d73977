"""Folders of every format, loaded by stock transformers in a fresh process, compute what is stored in them."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from weightworks.plan import stage, texts
from weightworks.stage.settings import Settings
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.testing.stored import load_apart, stored_logits

pytestmark = pytest.mark.usefixtures("one_thread")
BITS = (2, 3, 4, 8)
KINDS = {  # how a folder is asked for
    "compressed-tensors": {"format": "compressed-tensors", "sym": True},
    "compressed-tensors-asym": {"format": "compressed-tensors", "sym": False},
    "gptq": {"format": "gptq", "sym": True},
    "gptq_v2": {"format": "gptq_v2", "sym": False},
    "dense": {"format": "dense", "sym": True},
}
ROUNDED = {
    f"{kind}-{bits}": {**options, "bits": bits, "group_size": 64, "clip": "off"}
    for kind, options in KINDS.items()
    for bits in BITS
}
ROUNDED["gptq-asym-2"] = {**ROUNDED["gptq-2"], "sym": False}  # many zero points at the edge of what version 1 can hold
CALIBRATED: dict[str, dict[str, Any]] = {
    "calibrated": {"group_size": 64},
    "calibrated-g_idx": {"group_size": 64, "act_order": "dynamic", "format": "gptq_v2"},
}
HARDWARE = ("W8A8", "FP8", "FP8_BLOCK", "MXFP8", "MXFP4", "MXFP4A16", "NVFP4", "NVFP4A16")
CALIBRATED["calibrated-NVFP4"] = {"scheme": "NVFP4"}
EVERY = {**ROUNDED, **CALIBRATED, **{name: {"scheme": name} for name in HARDWARE}}
PACKED = [name for name, options in EVERY.items() if options.get("format", "").startswith("gptq")]
STOCK = [name for name in EVERY if name not in PACKED]
READER = os.environ.get("GPTQ_PYTHON")  # an interpreter with optimum and gptqmodel: see benchmarks/README.md
NEEDED = [] if READER else [name for name in ("optimum", "gptqmodel") if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Every folder with its provenance: plain rounding in all formats and widths, and GPTQ."""
    root, made = tmp_path_factory.mktemp("folders"), {}
    settings = Settings(num_samples=8, seq_len=128, dtype="float32")
    patch = pytest.MonkeyPatch()
    patch.setattr(texts, "PROBE_WINDOWS", 2)  # every run checks itself, too; here that may be brief
    patch.setattr(texts, "PROBE_LENGTH", 64)
    for name, options in EVERY.items():
        method = "gptq" if name in CALIBRATED else "rtn"
        outcome = stage.run_stage("quantize", method, str(tiny_llama), options, settings, output_dir=root / name)
        assert outcome.provenance is not None
        made[name] = root / name, outcome.provenance
    patch.undo()
    return made


@pytest.fixture(scope="module")
def differences(
    folders: dict[str, tuple[Path, dict[str, Any]]], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, float]:
    """Largest difference of logits, relative to the largest logit, by folder that can be loaded here."""
    tokens = torch.randint(2048, (2, 64), generator=torch.Generator().manual_seed(0))
    copy, found = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), {}
    for python, names in ((sys.executable, STOCK), (READER or sys.executable, [] if NEEDED else PACKED)):
        asked = {name: (folders[name][0], folders[name][1]["checks"]) for name in names}
        if not asked:
            continue
        loaded, _ = load_apart(python, asked, tokens, tmp_path_factory.mktemp("logits"))
        for name, (folder, checks) in asked.items():
            expected = stored_logits(copy, folder, tokens, dequantize=checks["dequantize"])
            found[name] = loaded[name].difference(expected)
    return found


@pytest.mark.parametrize("name", STOCK)
def test_stock_transformers_computes_what_is_stored(name: str, differences: dict[str, float]) -> None:
    assert differences[name] < 1e-5


@pytest.mark.skipif(bool(NEEDED), reason=f"needs {' and '.join(NEEDED)}, or GPTQ_PYTHON")
@pytest.mark.parametrize("name", PACKED)
def test_stock_transformers_computes_what_gptq_folders_store(name: str, differences: dict[str, float]) -> None:
    assert differences[name] < 5e-3  # its kernels work in 16 bits


@pytest.mark.parametrize("name", STOCK)
def test_only_asymmetric_folders_need_dequantize(name: str, folders: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    folder, provenance = folders[name]
    asymmetric = name.startswith("compressed-tensors-asym")
    assert provenance["checks"]["dequantize"] == asymmetric
    assert ("CompressedTensorsConfig(dequantize=True)" in (folder / "README.md").read_text()) == asymmetric


# An independent decoder: the layout as its readers describe it, one weight at a time, in Python integers


def field(words: torch.Tensor, bits: int, index: int) -> int:
    """Number ``index`` of a stream of ``bits``-bit fields, least significant first, in a row of int32 words."""
    stream = 0
    first, last = index * bits // 32, (index * bits + bits - 1) // 32
    for word in range(last, first - 1, -1):
        stream = stream << 32 | int(words[word]) & 0xFFFFFFFF
    return stream >> (index * bits - 32 * first) & ((1 << bits) - 1)


@pytest.mark.parametrize("name", PACKED)
def test_gptq_folders_decode_by_the_book(name: str, folders: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    """``w[o, i] = scales[g_idx[i], o] (code - zero)``; version 1 stores ``zero - 1``; columns are streams of codes."""
    folder, _ = folders[name]
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config["quantization_config"]
    assert json.loads((folder / "quantize_config.json").read_text()) == config
    assert config["checkpoint_format"] == EVERY[name]["format"]
    bits, first_version = config["bits"], config["checkpoint_format"] == "gptq"
    base = "model.layers.3.mlp.down_proj"
    words, zeros, scales, index = (
        checkpoint.read(f"{base}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")
    )
    assert config["desc_act"] == (name == "calibrated-g_idx") == (index.tolist() != sorted(index.tolist()))
    decoded = DenseView(checkpoint).read(f"{base}.weight")
    assert decoded.shape == (256, 768)
    picks = torch.randint(256 * 768, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    for out, column in (divmod(pick, 768) for pick in picks):
        group = int(index[column])
        zero = (field(zeros[group], bits, out) + first_version) % (1 << bits)
        code = field(words[:, out], bits, column)
        assert float(decoded[out, column]) == pytest.approx(float(scales[group, out]) * (code - zero), rel=1e-6), (
            out,
            column,
        )


@pytest.mark.parametrize("bits", BITS)
def test_formats_lose_alike(bits: int, folders: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    """What a container stores scales in (float16, bfloat16, or none at all) costs next to nothing."""
    errors = {}
    for kind in KINDS:
        rows = folders[f"{kind}-{bits}"][1]["report"]
        errors[kind] = sum(row["relative_weight_error"] for row in rows) / len(rows)
    assert errors["compressed-tensors"] == pytest.approx(errors["dense"], rel=0.02)
    assert errors["gptq"] == pytest.approx(errors["dense"], rel=0.02)
    assert errors["compressed-tensors-asym"] == pytest.approx(errors["gptq_v2"], rel=0.02)
