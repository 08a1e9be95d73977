"""The options quantizers share, and the presets that stand for several of them: integers, and hardware formats."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, Field, field_validator, model_validator

from compress.budget import BudgetOptions
from compress.codebooks import LEVELS, BookGrid, BookScheme
from compress.floatgrid import FloatGrid
from compress.grids import AnyGrid, Grid
from compress.norms import NormOptions
from weightworks.options import Options
from weightworks.stage.budget import Budget, parse_bits
from weightworks.stage.protocols import Target
from weightworks.store.floats import FloatScheme, tensor_scale
from weightworks.store.inputs import InputScheme
from weightworks.store.packing import IntScheme

PRESETS: dict[str, dict[str, Any]] = {
    "W4A16": {"bits": 4, "group_size": 128, "sym": True},
    "W4A16_ASYM": {"bits": 4, "group_size": 128, "sym": False},
    "W8A16": {"bits": 8, "group_size": -1, "sym": True},
    "W3A16": {"bits": 3, "group_size": 64, "sym": True},
    "W2A16": {"bits": 2, "group_size": 32, "sym": True},
}
AnyScheme = IntScheme | FloatScheme | BookScheme
FP8 = FloatScheme("E4M3", -1, inputs=InputScheme("E4M3"))
MXFP8 = FloatScheme("E4M3", 32, "E8M0")
MXFP4 = FloatScheme("E2M1", 32, "E8M0")
NVFP4 = FloatScheme("E2M1", 16, "E4M3")
HARDWARE: dict[str, IntScheme | FloatScheme] = {  # llm-compressor's names; its FP8 has one scale a tensor, found before
    "W8A8": IntScheme(8, -1, True, inputs=InputScheme("INT8")),
    "FP8": FP8,
    "FP8_DYNAMIC": FP8,
    "FP8_BLOCK": FloatScheme("E4M3", 128, rows=128, inputs=InputScheme("E4M3", 128)),
    "MXFP8": replace(MXFP8, inputs=InputScheme("E4M3", 32, "E8M0")),
    "MXFP8A16": MXFP8,
    "MXFP4": replace(MXFP4, inputs=InputScheme("E2M1", 32, "E8M0")),
    "MXFP4A16": MXFP4,
    "NVFP4": replace(NVFP4, inputs=InputScheme("E2M1", 16, "E4M3")),
    "NVFP4A16": NVFP4,
}
AnyName = Literal[
    "W4A16", "W4A16_ASYM", "W8A16", "W3A16", "W2A16",
    "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP8", "MXFP8A16", "MXFP4", "MXFP4A16", "NVFP4", "NVFP4A16",
    "NF4", "FP4", "SHIFT4",
]  # fmt: skip
PRESETS |= {
    name: {"bits": scheme.bits, "group_size": scheme.group_size, "sym": True} for name, scheme in HARDWARE.items()
}
# The head and routers: a wrong token or a wrong expert costs more than the bytes they take.
ALWAYS_IGNORED = ("lm_head", "*.gate", "*.router", "*.shared_expert_gate")
IGNORE = "further layers left as they are: globs, or regular expressions after re: (lm_head and routers always are)"


def _compiled(value: list[str]) -> list[str]:
    for pattern in value:
        try:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
    return value


Patterns = Annotated[list[str], AfterValidator(_compiled)]  # of layers


class LowBitOptions(Options):
    """What all options of quantization to few bits have; ``scheme`` is a preset for some of them."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits a weight")
    group_size: int = Field(128, description="input columns that share a scale; -1: the whole row")
    sym: bool = Field(True, description="grid symmetric about zero; asymmetric stores a zero point a group")
    clip: Literal["auto", "on", "off"] = Field(
        "auto", description="search the clipping range of each group; auto: off, by measurement"
    )
    format: Literal["compressed-tensors", "gptq", "gptq_v2", "dense"] = Field(
        "compressed-tensors", description="container of the result; dense writes dequantized weights"
    )
    ignore: Patterns = Field(default=[], description=IGNORE)

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: dict[str, Any]) -> dict[str, Any]:
        scheme = values.get("scheme")
        preset = PRESETS.get(scheme, {}) if isinstance(scheme, str) else {}
        if scheme in LEVELS:  # not a set of other options but a grid of its own
            values = {"format": "dense", "group_size": 64, **values}
            preset = {"bits": 4, "sym": True}
        for key, value in preset.items():
            if values.get(key, value) != value:
                raise ValueError(
                    f"scheme {values['scheme']} means {key} = {value}, but {key} = {values[key]} was given"
                )
        return {**values, **preset}

    @field_validator("group_size")
    @classmethod
    def _group(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError("must be -1 (per channel) or at least 1")
        return value

    @property
    def ignored(self) -> list[str]:
        """Patterns of all layers left as they are."""
        return [*ALWAYS_IGNORED, *self.ignore]

    @property
    def clips(self) -> bool:
        """Whether clipping ranges are searched. Auto does not: narrower ranges cut the error of every weight and of
        every layer, yet at 2 bits they doubled the loss of perplexity on tiny-llama (README, "Measured").
        """
        return self.clip == "on"

    def int_scheme(self, *, reordered: bool = False) -> IntScheme:
        return IntScheme(self.bits, self.group_size, self.sym, reordered)


class IntegerOptions(LowBitOptions):
    """Options of weight-only integer quantization."""

    scheme: Literal["W4A16", "W4A16_ASYM", "W8A16", "W3A16", "W2A16"] | None = Field(
        None, description="preset for bits, group size and symmetry"
    )


class StepOptions(NormOptions):
    """Steps before and after a quantizer, whichever it is."""

    rotate: bool = Field(
        False,
        description="turn the residual stream and the values of heads into a random Hadamard basis first, so that no channel "
        "is far larger than others; for models with RMS norms, whose gains are folded into weights",
    )


class GridOptions(BudgetOptions, StepOptions, LowBitOptions):
    """Options of quantizers that round to hardware formats too, and may be followed by a tuning of norms."""

    scheme: AnyName | None = Field(None, description="preset for bits, group size and symmetry, or a hardware format")

    smooth: float | None = Field(
        None,
        ge=0,
        le=1,
        description="SmoothQuant before formats that round inputs: share of the size of input channels that norms hand on "
        "to weights; 0.5 is usual",
    )

    @model_validator(mode="after")
    def _useful(self) -> Self:
        if self.clip == "on" and self.scheme in HARDWARE and self.bits == 8:
            raise ValueError(f"clip = on is of no use with scheme {self.scheme}: 8 bits have room for every range")
        if self.scheme in LEVELS and self.format != "dense":
            raise ValueError(f"no container has the levels of scheme {self.scheme}: use format dense")
        if self.format.startswith("gptq") and self.scheme in HARDWARE:
            raise ValueError(f"format {self.format} cannot hold scheme {self.scheme}; use compressed-tensors or dense")
        if self.budgeted:
            self._affordable()
        return self

    def _affordable(self) -> None:
        """What does not go with a budget."""
        if self.scheme is not None or self.bits != 4:
            asked = f"scheme {self.scheme}" if self.scheme is not None else f"bits {self.bits}"
            raise ValueError(f"a budget chooses bits layer by layer, yet {asked} was given; see bit_choices")
        if self.format.startswith("gptq"):
            raise ValueError(
                f"format {self.format} holds one width for all; a budget needs compressed-tensors or dense"
            )
        if self.format == "dense" and self.budget is not None and parse_bits(self.budget) is None:
            raise ValueError("format dense is as large as the source: give the budget in bits a weight, such as 3.5bpw")

    def allowance(self) -> Budget | None:
        """What schemes are chosen by, weight by weight; None if all have one."""
        return self.chosen_by(self.group_size, symmetric=self.sym)

    def any_scheme(self, *, reordered: bool = False) -> AnyScheme:
        """How weights are quantized."""
        if self.scheme in LEVELS:
            return BookScheme(str(self.scheme), self.group_size)
        return HARDWARE.get(self.scheme or "") or self.int_scheme(reordered=reordered)

    def grid(self, scheme: AnyScheme, target: Target, top: torch.Tensor, inputs: torch.Tensor) -> AnyGrid:
        """The grid of weights whose largest magnitude is ``top`` and whose inputs' is ``inputs``, both 0-dimensional."""
        if isinstance(scheme, IntScheme):
            signed = scheme.inputs is None  # engines with integer products may take scales for positive
            return Grid(scheme, target.scale_dtype, target.min_zero, signed=signed, clip=self.clips)
        if isinstance(scheme, BookScheme):
            return BookGrid(scheme, target.scale_dtype, clip=self.clips)
        local = scheme.scales == "E4M3"
        return FloatGrid(
            scheme,
            target.scale_dtype,
            tensor_scale(top) if local else None,
            tensor_scale(inputs) if local and scheme.inputs is not None else None,
            clip=self.clips,
        )
