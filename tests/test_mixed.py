"""Mixed precision: containers of several schemes, sensitivities, budgets, and what is made of them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightworks.errors import CheckpointError
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.comparison import compare
from weightworks.store.compressed import MIXED
from weightworks.store.dense import DenseView
from weightworks.store.inspection import inspect
from weightworks.store.mixed import MixedScheme
from weightworks.store.packing import IntScheme

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
