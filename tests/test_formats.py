"""Containers of quantized weights: as announced, read back exactly, and decoded alike by independent readers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from conftest import CheckpointMaker

from weightworks.errors import CheckpointError, MethodError, UsageError
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.formats import FORMATS, find_format, packed_scheme
from weightworks.store.layout import Format
from weightworks.store.packing import IntScheme, Quantized

BASE = "model.layers.0.mlp.up_proj"
FACTS = {"quantizer": "weightworks:0", "damp_percent": 0.05, "static_groups": True}
SYMMETRY = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
EVERY_FORMAT = pytest.mark.parametrize("format_", FORMATS.values(), ids=FORMATS)
EVERY_BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])
GROUPS = pytest.mark.parametrize("group_size", [32, -1])


def quantized(
    format_: Format,
    scheme: IntScheme,
    shape: tuple[int, int] = (64, 96),
    dtype: torch.dtype = torch.bfloat16,
) -> Quantized:
    """A random weight that uses every code and, where the scheme allows it, every zero point."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(scheme.bits + 10 * scheme.symmetric)
    groups, top = scheme.groups(columns), 1 << scheme.bits
    codes = torch.randint(0, top, shape, dtype=torch.uint8, generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) / 16 + 1e-3).to(format_.scale_dtype(dtype))
    lowest = 1 if format_.name == "gptq" else 0
    zero = torch.randint(lowest, top, (rows, groups), dtype=torch.uint8, generator=generator)
    zero[0, 0], zero[-1, -1] = lowest, top - 1
    if scheme.symmetric:
        zero = torch.full((rows, groups), scheme.midpoint, dtype=torch.uint8)
    index = None
    if scheme.reordered:
        index = (torch.arange(columns, dtype=torch.int32) // (columns // groups))[
            torch.randperm(columns, generator=generator)
        ]
    return Quantized(scheme, codes, scale, zero, index)


def packed_folder(make_checkpoint: CheckpointMaker, format_: Format, weight: Quantized) -> Path:
    """A checkpoint of one packed linear, its bias and a norm."""
    tensors = {
        "model.norm.weight": torch.ones(3, dtype=torch.bfloat16),
        f"{BASE}.bias": torch.arange(weight.codes.shape[0]).half(),
        **format_.tensors(BASE, weight),
    }
    return make_checkpoint(tensors, config={"quantization_config": format_.config(weight.scheme, ["lm_head"], FACTS)})


# What every format promises


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@GROUPS
@SYMMETRY
@EVERY_BITS
@EVERY_FORMAT
def test_tensors_are_as_announced(
    format_: Format, bits: int, symmetric: bool, group_size: int, dtype: torch.dtype
) -> None:
    scheme = IntScheme(bits, group_size, symmetric)
    specs = format_.specs(BASE, (64, 96), scheme, dtype)
    tensors = format_.tensors(BASE, quantized(format_, scheme, dtype=dtype))
    assert {spec.name: (spec.shape, spec.dtype) for spec in specs} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert {name.removeprefix(BASE + ".") for name in tensors} <= set(format_.suffixes)


@GROUPS
@SYMMETRY
@EVERY_BITS
@EVERY_FORMAT
def test_dense_view_reads_back_exactly(
    make_checkpoint: CheckpointMaker, format_: Format, bits: int, symmetric: bool, group_size: int
) -> None:
    weight = quantized(format_, IntScheme(bits, group_size, symmetric))
    view = DenseView(Checkpoint.open(packed_folder(make_checkpoint, format_, weight)))
    assert (view.format, view.scheme) == (format_, weight.scheme)
    assert sorted(view.names) == [f"{BASE}.bias", f"{BASE}.weight", "model.norm.weight"]
    assert view.packed == {BASE}
    assert view.shape(f"{BASE}.weight") == (64, 96) and view.shape("model.norm.weight") == (3,)
    decoded = view.read(f"{BASE}.weight")
    assert decoded.dtype == torch.float32 and torch.equal(decoded, weight.dequantize())
    assert torch.equal(view.read(f"{BASE}.weight", torch.bfloat16), weight.dequantize().bfloat16())
    assert torch.equal(view.read("model.norm.weight"), torch.ones(3, dtype=torch.bfloat16))
    loaded = format_.load(view.checkpoint, BASE, weight.scheme)
    assert torch.equal(loaded.codes, weight.codes) and torch.equal(loaded.zero, weight.zero)
    assert torch.equal(loaded.scale, weight.scale) and loaded.group_index is None


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
@SYMMETRY
@EVERY_BITS
def test_groups_in_another_order_are_kept(
    make_checkpoint: CheckpointMaker, name: str, bits: int, symmetric: bool
) -> None:
    format_ = FORMATS[name]
    weight = quantized(format_, IntScheme(bits, 32, symmetric, reordered=True))
    view = DenseView(Checkpoint.open(packed_folder(make_checkpoint, format_, weight)))
    assert view.scheme == weight.scheme
    assert torch.equal(view.read(f"{BASE}.weight"), weight.dequantize())


@pytest.mark.parametrize("shape", [(5, 45), (1, 7), (33, 31)])
@SYMMETRY
@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors_takes_any_shape_and_width(
    make_checkpoint: CheckpointMaker, bits: int, symmetric: bool, shape: tuple[int, int]
) -> None:
    format_ = FORMATS["compressed-tensors"]
    weight = quantized(format_, IntScheme(bits, -1, symmetric), shape)
    view = DenseView(Checkpoint.open(packed_folder(make_checkpoint, format_, weight)))
    assert view.shape(f"{BASE}.weight") == shape
    assert torch.equal(view.read(f"{BASE}.weight"), weight.dequantize())


def test_dense_checkpoint_is_its_own_view(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    view = DenseView(checkpoint)
    assert view.names == list(checkpoint.tensors) and not view.packed
    name = "model.layers.0.mlp.up_proj.weight"
    assert view.shape(name) == (768, 256) and torch.equal(view.read(name), checkpoint.read(name))


# Independent readers


def gptq_reference(tensors: Mapping[str, torch.Tensor], bits: int, stored_less_one: bool) -> list[list[float]]:
    """``w[o, i] = scales[g, o] * (u - z)`` with ``g = g_idx[i]``, every code cut out of its column of words."""
    qweight = [[word & 0xFFFFFFFF for word in row] for row in tensors["qweight"].tolist()]
    qzeros = [[word & 0xFFFFFFFF for word in row] for row in tensors["qzeros"].tolist()]
    scales, g_idx = tensors["scales"].float().tolist(), tensors["g_idx"].tolist()
    mask = (1 << bits) - 1

    def cut(words: list[int], place: int) -> int:
        word, shift = divmod(place * bits, 32)
        low = words[word] >> shift
        high = words[word + 1] << (32 - shift) if shift + bits > 32 else 0
        return (low | high) & mask

    rows, columns = len(scales[0]), len(g_idx)
    zeros = [[(cut(words, o) + stored_less_one) & mask for o in range(rows)] for words in qzeros]
    result = []
    for o in range(rows):
        words = [row[o] for row in qweight]
        result.append([scales[g_idx[i]][o] * (cut(words, i) - zeros[g_idx[i]][o]) for i in range(columns)])
    return result


@pytest.mark.parametrize("reordered", [False, True], ids=["plain", "reordered"])
@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
@SYMMETRY
@EVERY_BITS
def test_gptq_layout_against_a_slow_reader(name: str, bits: int, symmetric: bool, reordered: bool) -> None:
    weight = quantized(FORMATS[name], IntScheme(bits, 32, symmetric, reordered), (32, 64))
    tensors = {key.rpartition(".")[2]: value for key, value in FORMATS[name].tensors(BASE, weight).items()}
    expected = gptq_reference(tensors, bits, stored_less_one=name == "gptq")
    assert torch.equal(torch.tensor(expected), weight.dequantize())


@pytest.mark.parametrize(("name", "word"), [("gptq", 0x77777777), ("gptq_v2", -0x77777778)])
def test_symmetric_zero_words_are_the_known_ones(name: str, word: int) -> None:
    tensors = FORMATS[name].tensors(BASE, quantized(FORMATS[name], IntScheme(4, 32, True)))
    assert set(tensors[f"{BASE}.qzeros"].flatten().tolist()) == {word}  # -0x77777778 is 0x88888888


def test_gptq_version_1_refuses_a_zero_point_it_cannot_store() -> None:
    weight = quantized(FORMATS["gptq_v2"], IntScheme(4, 32, False))
    with pytest.raises(MethodError) as caught:
        FORMATS["gptq"].tensors(BASE, weight)
    assert str(caught.value) == f"{BASE}: zero point 0 cannot be stored in gptq version 1, lowest 1"


@EVERY_BITS
def test_gptq_version_1_of_others_may_hold_a_zero_point_that_wrapped(
    make_checkpoint: CheckpointMaker, bits: int
) -> None:
    weight = quantized(FORMATS["gptq"], IntScheme(bits, 32, False))
    tensors = FORMATS["gptq"].tensors(BASE, weight)
    tensors[f"{BASE}.qzeros"].fill_(-1)  # every stored zero point is 2**bits - 1, which stands for 0
    checkpoint = Checkpoint.open(make_checkpoint(tensors))
    assert not FORMATS["gptq"].load(checkpoint, BASE, weight.scheme).zero.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@GROUPS
@SYMMETRY
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_library_of_compressed_tensors_decodes_alike(
    bits: int, symmetric: bool, group_size: int, dtype: torch.dtype
) -> None:
    format_ = FORMATS["compressed-tensors"]
    weight = quantized(format_, IntScheme(bits, group_size, symmetric), dtype=dtype)
    config = QuantizationConfig.model_validate(format_.config(weight.scheme, ["lm_head"], {}))
    compressor = BaseCompressor.get_value_from_registry(config.format)
    state = {key.rpartition(".")[2]: value for key, value in format_.tensors(BASE, weight).items()}
    decoded = compressor.decompress(state, config.config_groups["group_0"])["weight"]
    # The library computes in the scale's dtype: one rounding of a product that float32 holds exactly.
    assert decoded.dtype == dtype and torch.equal(decoded, weight.dequantize().to(dtype))


@GROUPS
@SYMMETRY
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_library_of_compressed_tensors_writes_the_same_bytes(bits: int, symmetric: bool, group_size: int) -> None:
    format_ = FORMATS["compressed-tensors"]
    weight = quantized(format_, IntScheme(bits, group_size, symmetric), dtype=torch.float32)
    config = QuantizationConfig.model_validate(format_.config(weight.scheme, ["lm_head"], {}))
    compressor = BaseCompressor.get_value_from_registry(config.format)
    signed_zero = (weight.zero.int() - weight.scheme.midpoint).to(torch.int8)
    dense = {"weight": weight.dequantize(), "weight_scale": weight.scale, "weight_zero_point": signed_zero}
    written = compressor.compress(dense, config.config_groups["group_0"])
    ours = {key.rpartition(".")[2]: value for key, value in format_.tensors(BASE, weight).items()}
    assert set(written) == set(ours)
    assert all(torch.equal(written[key], value) and written[key].dtype == value.dtype for key, value in ours.items())


# Configurations, and what is refused


def test_gptq_config_says_what_was_done() -> None:
    scheme = IntScheme(3, 64, False, reordered=True)
    config = FORMATS["gptq"].config(scheme, ["lm_head", "model.layers.0.mlp.down_proj"], FACTS)
    assert json.loads(json.dumps(config)) == {
        "quant_method": "gptq",
        "bits": 3,
        "group_size": 64,
        "desc_act": True,
        "sym": False,
        "lm_head": False,
        "format": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "true_sequential": True,
        "damp_percent": 0.05,
        "static_groups": True,
        "dynamic": {"-:^model\\.layers\\.0\\.mlp\\.down_proj$": {}},
        "meta": {"quantizer": ["weightworks:0"]},
    }
    assert FORMATS["gptq_v2"].config(scheme, ["lm_head"], FACTS)["checkpoint_format"] == "gptq_v2"
    assert FORMATS["gptq_v2"].config(scheme, ["lm_head"], FACTS)["dynamic"] is None


def test_format_names() -> None:
    assert all(find_format(name).name == name for name in FORMATS)
    with pytest.raises(UsageError) as caught:
        find_format("gptqv2")
    assert str(caught.value) == "unknown format 'gptqv2' (did you mean 'gptq_v2'?)"


def test_what_formats_refuse_before_any_work() -> None:
    plain, reordered = IntScheme(4, 32, True), IntScheme(4, 32, True, reordered=True)
    packed, gptq = FORMATS["compressed-tensors"], FORMATS["gptq"]
    assert packed.refusal(plain, (5, 45), transposed=False) is None
    assert "Conv1D" in str(packed.refusal(plain, (64, 64), transposed=True))
    assert "no g_idx" in str(packed.refusal(reordered, (64, 64), transposed=False))
    assert gptq.refusal(reordered, (64, 96), transposed=True) is None
    expected = "its shape [64, 45] must be multiples of 32 for the gptq layout"
    assert gptq.refusal(plain, (64, 45), transposed=False) == expected
    assert gptq.refusal(plain, (45, 64), transposed=False) is not None


PACKED = FORMATS["compressed-tensors"].config(IntScheme(4, 32, True), [], {})
WEIGHTS = PACKED["config_groups"]["group_0"]["weights"]


def changed(**weights: Any) -> dict[str, Any]:
    return {**PACKED, "config_groups": {"group_0": {"weights": {**WEIGHTS, **weights}}}}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq/None"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes/None"),
        ({**PACKED, "format": "float-quantized"}, "compressed-tensors/float-quantized"),
        ({**PACKED, "config_groups": {"a": {"weights": WEIGHTS}, "b": {"weights": WEIGHTS}}}, "compressed-tensors/"),
        (changed(type="float"), "compressed-tensors/pack-quantized"),
        (changed(actorder="group"), "compressed-tensors/pack-quantized"),
        ({**PACKED, "config_groups": {"group_0": {"weights": None}}}, "compressed-tensors/pack-quantized"),
        ({**PACKED, "config_groups": None}, "compressed-tensors/pack-quantized"),
        ({**PACKED, "config_groups": {}}, "compressed-tensors/pack-quantized"),
        (changed(num_bits=16), "compressed-tensors/pack-quantized"),
        ({"quant_method": "gptq", "group_size": 128}, "gptq/None"),
        ({"quant_method": "gptq", "bits": "4", "group_size": 128}, "gptq/None"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "128"}, "gptq/None"),
        ("4 bits", "4 bits"),
    ],
)
def test_unknown_quantization_is_named(make_checkpoint: CheckpointMaker, config: object, named: str) -> None:
    folder = make_checkpoint({"a": torch.ones(1)}, config={"quantization_config": config})
    with pytest.raises(CheckpointError) as caught:
        packed_scheme(Checkpoint.open(folder))
    assert str(caught.value).startswith(f"{folder}: quantized as {named}")
    assert str(caught.value).endswith(", which cannot be decoded")
    assert "start from the dense checkpoint" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "suffix", "damaged", "needed"),
    [
        ("compressed-tensors", "weight_packed", torch.zeros(64, 13, dtype=torch.int32), "[64, 12]"),
        ("compressed-tensors", "weight_packed", torch.zeros(63, 12, dtype=torch.int32), "[64, 12]"),
        ("compressed-tensors", "weight_scale", torch.zeros(64, 2), "[64, 3]"),
        ("compressed-tensors", "weight_zero_point", torch.zeros(64, 3, dtype=torch.int32), "[8, 3]"),
        ("gptq", "qweight", torch.zeros(11, 64, dtype=torch.int32), "[12, 64]"),
        ("gptq", "qzeros", torch.zeros(3, 7, dtype=torch.int32), "[3, 8]"),
        ("gptq", "scales", torch.zeros(2, 64), None),
    ],
)
def test_tensors_that_do_not_fit_together(
    make_checkpoint: CheckpointMaker, name: str, suffix: str, damaged: torch.Tensor, needed: str | None
) -> None:
    format_ = FORMATS[name]
    weight = quantized(format_, IntScheme(4, 32, False))
    tensors = {**format_.tensors(BASE, weight), f"{BASE}.{suffix}": damaged}
    folder = make_checkpoint(tensors, config={"quantization_config": format_.config(weight.scheme, [], FACTS)})
    with pytest.raises(CheckpointError) as caught:
        DenseView(Checkpoint.open(folder)).read(f"{BASE}.weight")
    if needed:
        text = f"model.safetensors: tensor '{BASE}.{suffix}' is {list(damaged.shape)}, 4 bits need {needed}"
        assert str(caught.value) == text
    else:
        assert "bits need" in str(caught.value)


def test_g_idx_that_names_no_group(make_checkpoint: CheckpointMaker) -> None:
    weight = quantized(FORMATS["gptq"], IntScheme(4, 32, True))
    tensors = FORMATS["gptq"].tensors(BASE, weight)
    tensors[f"{BASE}.g_idx"][5] = 3
    folder = make_checkpoint(tensors, config={"quantization_config": FORMATS["gptq"].config(weight.scheme, [], FACTS)})
    with pytest.raises(CheckpointError) as caught:
        DenseView(Checkpoint.open(folder)).read(f"{BASE}.weight")
    assert str(caught.value) == f"tensor '{BASE}.g_idx' names groups 0 to 3, there are 3"


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_zero_point"])
def test_missing_part_is_named(make_checkpoint: CheckpointMaker, suffix: str) -> None:
    format_ = FORMATS["compressed-tensors"]
    weight = quantized(format_, IntScheme(4, 32, False))
    tensors = format_.tensors(BASE, weight)
    del tensors[f"{BASE}.{suffix}"]
    folder = make_checkpoint(tensors, config={"quantization_config": format_.config(weight.scheme, [], FACTS)})
    with pytest.raises(CheckpointError, match=rf"no tensor '{BASE}\.{suffix}'"):
        DenseView(Checkpoint.open(folder)).read(f"{BASE}.weight")
