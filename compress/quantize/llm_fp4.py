"""LLM-FP4: four-bit floats, their exponent bits and each row's clipping range searched for the output of the layer.

Liu et al., "LLM-FP4: 4-Bit Floating-Point Quantized Transformers" (arXiv:2310.16836). W [out, in] is a weight, X [tokens, in]
its inputs. An exponent bias, any real number, stands for a scale: one a row of W; one a layer for X, to which each channel
adds a whole number, so that the shift can move into the exponents of W's column and products stay plain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from compress.floatgrid import FloatGrid
from compress.minifloat import Minifloat, formats
from compress.schemes import ALWAYS_IGNORED, HARDWARE, IGNORE, Patterns
from compress.sweep import COLD
from weightworks.options import Options as BaseOptions
from weightworks.stage.protocols import Solution, Target
from weightworks.store.floats import FloatScheme, fp8_scale, rounding, tensor_scale

PAPER = "Liu et al. 2023, arXiv:2310.16836"
VERSION = 1
FACTORS = tuple(0.01 + step * 1.19 / 100 for step in range(100))  # of the bias that clips nothing (released code, FPQ)
TOKENS = 1024  # inputs that outputs are compared on, at least, where there are as many
FEWER = 256  # of them, for the search of the inputs' own bias, whose candidates each take a whole product
E2M1 = Minifloat(2, 1)


class Options(BaseOptions):
    """Options of LLM-FP4."""

    scheme: Literal["W4A16", "W4A8", "W4A4"] = Field(
        "W4A16", description="bits of weights and of the inputs they are searched for"
    )
    rounds: int = Field(3, ge=1, le=10, description="times that weights and inputs are searched in turn")
    format: Literal["compressed-tensors", "dense"] = Field(
        "compressed-tensors",
        description="compressed-tensors takes E2M1 and scales that NVFP4 can hold; dense, the default for W4A8, searches all "
        "formats and writes dequantized weights",
    )
    ignore: Patterns = Field(default=[], description=IGNORE)

    @model_validator(mode="before")
    @classmethod
    def _default(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"format": "dense", **values} if values.get("scheme") == "W4A8" else values

    @model_validator(mode="after")
    def _held(self) -> Self:
        if self.scheme == "W4A8" and self.format != "dense":
            raise ValueError(
                "no container has E2M1 weights and inputs of 8 bits: use scheme W4A4 or W4A16, or format dense"
            )
        return self

    @property
    def ignored(self) -> list[str]:
        """Patterns of all layers left as they are."""
        return [*ALWAYS_IGNORED, *self.ignore]

    @property
    def input_bits(self) -> int:
        return int(self.scheme.partition("A")[2])


class Samples:
    """Inputs of a linear, evenly picked from all batches, in float32: ``TOKENS`` of them to twice as many."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.rows = torch.empty(0, columns, device=device)
        self.tokens, self.dropped, self.stride = 0, 0, 1

    def add(self, inputs: torch.Tensor) -> None:
        """Take in a batch of inputs [tokens, in]; one that is not finite is left out."""
        x = inputs[:: self.stride].to(self.rows)
        if not torch.isfinite(x).all():
            self.dropped += len(inputs)
            return
        self.tokens += len(inputs)
        self.rows = torch.cat([self.rows, x])
        while len(self.rows) > 2 * TOKENS:
            self.rows, self.stride = self.rows[::2], 2 * self.stride

    def inputs(self) -> torch.Tensor:
        """X [samples, in]; a unit matrix where there were too few to tell anything."""
        return torch.eye(self.rows.shape[1]).to(self.rows) if self.tokens < COLD else self.rows


@dataclass(frozen=True)
class Found:
    """A weight searched: it, and each row's ``bias`` [out, 1] under ``kind``; the mean squared error of the output.

    ``input_kind`` and ``input_bias``, that of the layer and of each channel [in], are those of rounded inputs.
    """

    weight: torch.Tensor
    kind: Minifloat
    bias: torch.Tensor
    error: float
    input_kind: Minifloat | None = None
    input_bias: torch.Tensor | None = None
    channel_bias: torch.Tensor | None = None


def losses(weight: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of a rounded weight [out, in]: the mean squared difference of each output [out, 1] to ``outputs``.

    By products with all ``inputs`` [tokens, in], or where there are fewer columns, by their moments: with E = rounded - W and
    R = X W' - Y it is the mean of (X E' + R)^2.
    """
    tokens, columns = inputs.shape
    if tokens <= columns:
        return lambda rounded: (inputs @ rounded.T).sub_(outputs).square_().mean(0).unsqueeze(1)
    rest = (inputs @ weight.T).sub_(outputs)  # [tokens, out]
    square, cross, fixed = inputs.T @ inputs / tokens, rest.T @ inputs / tokens, rest.square().mean(0)

    def loss(rounded: torch.Tensor) -> torch.Tensor:
        error = rounded - weight
        return (error @ square).add_(cross, alpha=2).mul_(error).sum(1).add_(fixed).unsqueeze(1)

    return loss


def search_weight(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    kinds: Sequence[Minifloat] = formats(4),
    scaled: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Found:
    """The format, and the bias of each row, under which ``weight`` [out, in] makes of ``inputs`` most nearly ``outputs``.

    Biases are the ``FACTORS`` of the one that clips nothing; ``scaled(weight, bias)`` rounds in place of the format.
    """
    best: Found | None = None
    loss = losses(weight, inputs, outputs)
    for kind in kinds:
        first = kind.bias(weight.abs().amax(1, keepdim=True))  # [out, 1]
        lowest, bias = torch.full_like(first, torch.inf), first
        for factor in FACTORS:
            rounded = kind.round(weight, first * factor) if scaled is None else scaled(weight, first * factor)
            error = loss(rounded)
            bias = torch.where(error < lowest, first * factor, bias)
            lowest = torch.minimum(error, lowest)
        if best is None or float(lowest.mean()) < best.error:
            rounded = kind.round(weight, bias) if scaled is None else scaled(weight, bias)
            best = Found(rounded, kind, bias, float(lowest.mean()))
    assert best is not None
    return best


def channel_biases(inputs: torch.Tensor, kind: Minifloat, bias: torch.Tensor) -> torch.Tensor:
    """Each channel's bias [in] under the layer's ``bias``: more by the whole number that fits the channel best, as far as
    the format's exponents reach (paper, equation 11)."""
    own = kind.bias(inputs.abs().amax(0)).round()
    whole = bias.round()
    return torch.minimum(torch.maximum(own, whole), whole + kind.reach) + (bias - whole)


def search_inputs(inputs: torch.Tensor, weight: torch.Tensor, outputs: torch.Tensor, bits: int) -> Iterator[Any]:
    """Per format the layer's bias under which rounded ``inputs`` make most nearly ``outputs``: error, format, bias."""
    for kind in formats(bits):
        first = kind.bias(inputs.abs().max())
        tried = []
        for factor in FACTORS:
            rounded = kind.round(inputs, channel_biases(inputs, kind, first * factor))
            tried.append(float((rounded @ weight.T).sub_(outputs).square_().mean()))
        least = min(range(len(FACTORS)), key=tried.__getitem__)
        yield tried[least], kind, first * FACTORS[least]


def search(weight: torch.Tensor, inputs: torch.Tensor, *, input_bits: int, rounds: int) -> Found:
    """Formats and biases of ``weight`` [out, in] and of ``inputs`` [tokens, in], searched in turn (paper, section 4.1)."""
    outputs = inputs @ weight.T
    if input_bits == 16:
        return search_weight(weight, inputs, outputs)
    kind = E2M1 if input_bits == 4 else Minifloat(4, 3)
    rounded = kind.round(inputs, kind.bias(inputs.abs().amax(0)))
    few = slice(None, None, max(1, len(inputs) // FEWER))
    best: Found | None = None
    for _ in range(rounds):
        found = search_weight(weight, rounded, outputs)
        tried = search_inputs(inputs[few], found.weight, outputs[few], input_bits)
        _, kind, bias = min(tried, key=lambda one: one[0])
        channels = channel_biases(inputs, kind, bias)
        rounded = kind.round(inputs, channels)
        error = float((rounded @ found.weight.T).sub_(outputs).square_().mean())
        if best is not None and error >= best.error:
            break
        best = Found(found.weight, found.kind, found.bias, error, kind, bias, channels)
    assert best is not None
    return best


class Method:
    """LLM-FP4 as a blockwise method."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def scheme(self) -> FloatScheme:
        if self.options.format == "dense":
            return FloatScheme("E2M1", -1)
        scheme = HARDWARE["NVFP4A16" if self.options.input_bits == 16 else "NVFP4"]
        assert isinstance(scheme, FloatScheme)
        return scheme

    def held(self, columns: int) -> int:
        """Bytes of the inputs that are kept."""
        return 8 * TOKENS * columns

    def working(self, columns: int) -> int:
        """Bytes of their rounded copies."""
        return 24 * TOKENS * columns + 4 * min(columns, 2 * TOKENS) ** 2

    def watch(self, columns: int, device: torch.device) -> Samples:
        return Samples(columns, device)

    def solve(self, weights: list[torch.Tensor], statistics: Samples, targets: Sequence[Target]) -> list[Solution]:
        inputs, fallbacks = statistics.inputs(), []
        if statistics.dropped:
            fallbacks.append(f"{statistics.dropped} inputs were not finite and left out")
        if statistics.tokens < COLD:
            fallbacks.append(f"saw {statistics.tokens} tokens (fewer than {COLD}), searched for the weight itself")
        top = torch.stack([weight.abs().max() for weight in weights]).max()
        solutions = []
        for weight in weights:
            outputs = inputs @ weight.T
            solution = (
                self._dense(weight, inputs) if self.options.format == "dense" else self._packed(weight, inputs, top)
            )
            energy = float(outputs.square().mean())
            solution.facts["relative_error"] = solution.facts.pop("error") / energy if energy else 0.0
            solution.facts["tokens"] = statistics.tokens
            solution.fallbacks += fallbacks
            solutions.append(solution)
        return solutions

    def _dense(self, weight: torch.Tensor, inputs: torch.Tensor) -> Solution:
        """All formats, and inputs rounded as the paper has it."""
        found = search(weight, inputs, input_bits=self.options.input_bits, rounds=self.options.rounds)
        facts: dict[str, Any] = {"bits": 4, "weight_format": str(found.kind), "error": found.error}
        if found.input_kind is None or found.input_bias is None or found.channel_bias is None:
            return Solution(found.weight, facts)
        shifts = (found.channel_bias - found.input_bias).round()
        facts |= {"input_format": str(found.input_kind), "input_bias": float(found.input_bias)}
        facts |= {"largest_shift": int(shifts.max())}
        unheld = f"searched for inputs in {found.input_kind}, which a dense checkpoint does not round"
        return Solution(found.weight, facts, [unheld])

    def _packed(self, weight: torch.Tensor, inputs: torch.Tensor, top: torch.Tensor) -> Solution:
        """E2M1 with scales as NVFP4 stores them, one value a row, and inputs as its engines round them."""
        scheme, whole = self.scheme(), tensor_scale(top)
        input_scale = None if scheme.inputs is None else tensor_scale(inputs.abs().max())
        rounded = inputs if scheme.inputs is None else rounding(scheme.inputs, input_scale)(inputs)
        grid = FloatGrid(scheme, torch.float32, whole, input_scale)

        def scaled(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            scale = fp8_scale(torch.exp2(1 - bias), whole)  # E2M1's smallest step is half of the scale, 2^-bias
            return grid.nearest(weight, scale)

        found = search_weight(weight, rounded, inputs @ weight.T, (E2M1,), scaled)
        scale = fp8_scale(torch.exp2(1 - found.bias), whole)
        codes = grid.snap(weight, scale, scale)[0]
        scales = scale.expand(-1, scheme.groups(weight.shape[1])).contiguous()
        return Solution(grid.encoded(codes, scales, torch.zeros_like(scales)), {"error": found.error})
