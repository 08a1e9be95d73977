"""Low-bit floats: against compressed-tensors and its golden files, the errors of the literature, and every code there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from conftest import CheckpointMaker
from safetensors.torch import load_file

from compress.floatgrid import FloatGrid
from compress.grids import AnyGrid, Grid, grouped
from compress.hessian import Hessian
from compress.quantize import gptq, rtn
from compress.schemes import HARDWARE
from weightworks.errors import CheckpointError, UsageError
from weightworks.stage.protocols import Target
from weightworks.store import floats
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.compressed import layout_of
from weightworks.store.dense import DenseView
from weightworks.store.floats import FloatScheme, decode, encode, rounding, tensor_scale
from weightworks.store.packing import Encoded, IntScheme
from weightworks.store.quantargs import INPUTS, scheme_of

pytestmark = pytest.mark.usefixtures("one_thread")
BASE = "model.layers.0.mlp.up_proj"
EVERY = pytest.mark.parametrize("name", HARDWARE)
PRESETS = {name: "FP8_DYNAMIC" if name == "FP8" else name for name in HARDWARE}  # what compressed-tensors calls it


def rounded(weight: torch.Tensor, grid: AnyGrid) -> Encoded:
    groups = grouped(weight, grid.scheme.group_size)
    scale, zero = grid.fit(groups)
    return grid.encoded(grid.codes(groups, scale, zero), scale, zero)


def grid_of(
    scheme: IntScheme | FloatScheme, weight: torch.Tensor, dtype: torch.dtype, *, clip: bool = False
) -> AnyGrid:
    if isinstance(scheme, IntScheme):
        return Grid(scheme, dtype, clip=clip)
    local = scheme.scales == "E4M3"
    top = tensor_scale(weight.abs().max()) if local else None
    return FloatGrid(scheme, dtype, top, torch.tensor([7.0]) if local and scheme.inputs else None, clip=clip)


def normal(rows: int = 384, columns: int = 2048) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


# Elements


@pytest.mark.parametrize("kind", ["E2M1", "E4M3"])
def test_every_element_means_itself_and_what_is_between_goes_to_the_nearer(kind: str) -> None:
    codes = torch.tensor([code for code in range(16 if kind == "E2M1" else 256) if code not in (0x7F, 0xFF)]).byte()
    values = decode(codes, kind)
    sign = 0x08 if kind == "E2M1" else 0x80
    assert torch.equal(encode(values, kind), torch.where(codes == sign, 0, codes))  # zero has no sign
    levels = values.unique()
    for x in torch.linspace(-1.2 * float(levels[-1]), 1.2 * float(levels[-1]), 997):
        nearest = levels[(levels - x).abs().argmin()]
        assert decode(encode(x.reshape(1), kind), kind) == nearest
    dense = torch.linspace(-2 * float(levels[-1]), 2 * float(levels[-1]), 100_001)
    assert torch.equal(floats.nearest(dense, kind), decode(encode(dense, kind), kind))
    halfway = (levels[1:] + levels[:-1]) / 2
    assert torch.equal(floats.nearest(halfway, kind), decode(encode(halfway, kind), kind))


def test_golden_ties(shared: Path) -> None:
    golden = load_file(shared / "golden" / "compressed_tensors" / "packing.safetensors")
    assert torch.equal(decode(encode(golden["fp4_ties.in"], "E2M1"), "E2M1"), golden["fp4_ties.out"])


# Weights


@pytest.mark.parametrize("name", ["NVFP4A16", "MXFP4A16"])
def test_golden_weights(shared: Path, name: str) -> None:
    golden = load_file(shared / "golden" / "compressed_tensors" / "packing.safetensors")
    weight, scheme, case = golden["fp4.weight"], HARDWARE[name], name[:5].lower()
    result = rounded(weight, grid_of(scheme, weight, torch.bfloat16))
    tensors = layout_of(scheme).tensors("a", result)
    scales = golden["nvfp4.weight_scale_f8e4m3_bytes" if case == "nvfp4" else "mxfp4.weight_scale"]
    assert torch.equal(tensors["a.weight_scale"].view(torch.uint8), scales)
    packed = golden[f"{case}.weight_packed"]
    for ours, theirs in (
        (tensors["a.weight_packed"] & 15, packed & 15),
        (tensors["a.weight_packed"] >> 4, packed >> 4),
    ):
        assert torch.equal(ours, theirs.masked_fill(theirs == 8, 0))  # a zero with a sign
    assert torch.equal(result.dequantize(), golden[f"{case}.dequantized_f32"])
    if case == "nvfp4":
        assert torch.equal(tensors["a.weight_global_scale"], golden["nvfp4.weight_global_scale"])


def relative_error(scheme: IntScheme | FloatScheme, *, clip: bool = False) -> float:
    weight = normal()
    result = rounded(weight, grid_of(scheme, weight, torch.float32, clip=clip)).dequantize()
    return float((result - weight).square().sum() / weight.square().sum())


SIZES = (2048, 128, 64, 32)
GAUSSIAN = {  # relative squared errors of a normal weight: bits, symmetric, clipped -> by group size
    (2, True, False): (0.470, 0.303, 0.261, 0.223),
    (3, True, False): (0.0910, 0.0564, 0.0485, 0.0412),
    (4, True, False): (0.0198, 0.0123, 0.0106, 0.0090),
    (8, True, False): (6.9e-5, 4.3e-5, 3.7e-5, 3.1e-5),
    (2, False, False): (0.429, 0.253, 0.208, 0.165),
    (3, False, False): (0.0815, 0.0464, 0.0380, 0.0299),
    (4, False, False): (0.0177, 0.0101, 0.0083, 0.0065),
    (8, False, False): (6.1e-5, 3.5e-5, 2.9e-5, 2.3e-5),
    (2, True, True): (0.149, 0.146, 0.143, 0.136),
    (3, True, True): (0.0403, 0.0380, 0.0358, 0.0321),
    (4, True, True): (0.0118, 0.0102, 0.0090, 0.0077),
}


@pytest.mark.parametrize(("bits", "symmetric", "clip"), GAUSSIAN)
def test_integers_lose_what_is_known(bits: int, symmetric: bool, clip: bool) -> None:
    for size, known in zip(SIZES, GAUSSIAN[bits, symmetric, clip], strict=True):
        assert relative_error(IntScheme(bits, size, symmetric), clip=clip) == pytest.approx(known, rel=0.03)


@pytest.mark.parametrize(
    ("scheme", "known"),
    [
        (FloatScheme("E2M1", 64), 0.0112),
        (FloatScheme("E2M1", 128), 0.0119),
        (HARDWARE["NVFP4A16"], 0.00906),
        (HARDWARE["MXFP4A16"], 0.0125),
    ],
    ids=str,
)
def test_floats_lose_what_is_known(scheme: FloatScheme, known: float) -> None:
    assert relative_error(scheme) == pytest.approx(known, rel=0.03)


@pytest.mark.parametrize("name", ["NVFP4A16", "MXFP4A16"])
def test_a_searched_scale_is_never_worse(name: str) -> None:
    weight, scheme = normal(64, 256), HARDWARE[name]
    plain, searched = (
        (rounded(weight, grid_of(scheme, weight, torch.float32, clip=clip)).dequantize() - weight)
        for clip in (False, True)
    )
    by_group = [grouped(error, scheme.group_size).square().sum(-1) for error in (plain, searched)]
    assert bool((by_group[1] <= by_group[0] * (1 + 1e-5)).all()) and by_group[1].sum() < 0.999 * by_group[0].sum()


@EVERY
def test_zero_and_huge_weights_are_kept(name: str) -> None:
    weight = normal(256, 256) / 50
    weight[:130, :130] = 0
    weight[200, 200] = 3e4
    scheme = HARDWARE[name]
    result = rounded(weight, grid_of(scheme, weight, torch.bfloat16)).dequantize()
    assert bool(torch.isfinite(result).all()) and not result[:128, :128].any()
    assert float(result[200, 200]) == pytest.approx(3e4, rel=0.26)  # MX may lay it below the next power of two


# Containers


@EVERY
def test_the_library_of_compressed_tensors_reads_and_writes_alike(name: str, make_checkpoint: CheckpointMaker) -> None:
    weight, scheme = normal(200, 256) / 50, HARDWARE[name]
    result, format_ = rounded(weight, grid_of(scheme, weight, torch.bfloat16)), layout_of(scheme)
    tensors = format_.tensors(BASE, result)
    specs = format_.specs(BASE, (200, 256), scheme, torch.bfloat16)
    assert {spec.name: (spec.shape, spec.dtype) for spec in specs} == {
        key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()
    }
    config = format_.config(scheme, ["lm_head"], {})
    theirs = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    state = {key.rpartition(".")[2]: value for key, value in tensors.items()}
    decoded = compressor.decompress(dict(state), theirs)["weight"]
    assert torch.equal(decoded, result.dequantize().to(decoded.dtype))
    if not name.startswith(("MX", "NV")):
        dense = {"weight": result.dequantize(), "weight_scale": state["weight_scale"].float()}
        assert torch.equal(compressor.compress(dense, theirs)["weight"], state["weight"])
    view = DenseView(Checkpoint.open(make_checkpoint(tensors, config={"quantization_config": config})))
    assert view.scheme == scheme and view.names == [f"{BASE}.weight"] and view.shape(f"{BASE}.weight") == (200, 256)
    assert torch.equal(view.read(f"{BASE}.weight"), result.dequantize())


@EVERY
def test_presets_are_those_of_compressed_tensors(name: str) -> None:
    theirs = preset_name_to_scheme(PRESETS[name], ["Linear"])
    assert scheme_of(json.loads(theirs.model_dump_json())) == HARDWARE[name]
    ours = layout_of(HARDWARE[name]).config(HARDWARE[name], [], {})["config_groups"]["group_0"]
    mine = QuantizationConfig.model_validate({"config_groups": {"group_0": ours}}).config_groups["group_0"]
    for args, known in ((mine.weights, theirs.weights), (mine.input_activations, theirs.input_activations)):
        assert (args is None) == (known is None)
        if args is not None and known is not None:
            assert args.model_dump(exclude={"observer"}) == known.model_dump(exclude={"observer"})


@pytest.mark.parametrize("inputs", INPUTS, ids=str)
def test_inputs_are_rounded_as_compressed_tensors_rounds_them(inputs: object) -> None:
    scheme = next(scheme for scheme in HARDWARE.values() if scheme.inputs == inputs)
    config = layout_of(scheme).config(scheme, [], {})
    theirs = QuantizationConfig.model_validate(config).config_groups["group_0"].input_activations
    x = normal(6, 512).view(2, 3, 512) * torch.tensor([1e-4, 1.0, 300.0]).view(1, 3, 1)
    x[0, 1, :256] = 0
    whole = tensor_scale(x.abs().max())
    module = torch.nn.Module()
    module.quantization_status = QuantizationStatus.COMPRESSED
    if theirs.dynamic == "local":
        module.input_global_scale = torch.nn.Parameter(whole)
    assert torch.equal(rounding(scheme.inputs, whole)(x), forward_quantize(module, x, "input", theirs))


def test_a_weight_that_is_not_of_its_format_is_named(make_checkpoint: CheckpointMaker) -> None:
    scheme = HARDWARE["W8A8"]
    tensors = layout_of(scheme).tensors(BASE, rounded(normal(32, 64), grid_of(scheme, normal(32, 64), torch.bfloat16)))
    tensors[f"{BASE}.weight"] = tensors[f"{BASE}.weight"].float()
    config = {"quantization_config": layout_of(scheme).config(scheme, [], {})}
    view = DenseView(Checkpoint.open(make_checkpoint(tensors, config=config)))
    with pytest.raises(CheckpointError, match=r"is torch\.float32, int-quantized means torch\.int8"):
        view.read(f"{BASE}.weight")


# Methods


@pytest.mark.parametrize("name", ["FP8_BLOCK", "NVFP4A16", "MXFP4A16", "W8A8"])
def test_error_feedback_beats_rounding(name: str) -> None:
    """On correlated inputs the output's error falls; layers that were solved together share the scale of the tensor."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(256, 256, generator=generator) / 16 + torch.eye(256) / 2
    inputs = torch.randn(2048, 256, generator=generator) @ mixing
    weights = [normal(200, 256) / 50, normal(72, 256) / 30]
    targets = [Target("model.layers.0.self_attn.q_proj.weight", torch.bfloat16)] * 2
    watched = Hessian(256)
    watched.add(inputs)
    method = gptq.Method(gptq.Options(scheme=name))
    solved = method.solve([weight.clone() for weight in weights], watched, targets)
    plain = rtn.Method(rtn.Options(scheme=name))
    for weight, solution in zip(weights, solved, strict=True):
        nearest = plain.apply(weight.clone(), targets[0]).dense()
        ours, theirs = (((inputs @ (dense - weight).T) ** 2).sum() for dense in (solution.dense(), nearest))
        assert ours < 0.8 * theirs and solution.dense().shape == weight.shape
    if name == "NVFP4A16":
        assert torch.equal(solved[0].weight.global_scale, solved[1].weight.global_scale)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scheme": "FP8", "clip": "on"}, "8 bits have room"),
        ({"scheme": "NVFP4", "bits": 3}, "NVFP4 means bits = 4"),
        ({"scheme": "MXFP4", "format": "gptq"}, "cannot hold scheme MXFP4"),
        ({"scheme": "NVFP4", "act_order": "dynamic"}, "act_order must be static or none"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        gptq.Options.parse(options, where="quantize.gptq")
