"""The options every integer quantizer shares, and the presets that stand for several of them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from weightworks.options import Options
from weightworks.store.packing import IntScheme

PRESETS: dict[str, dict[str, Any]] = {
    "W4A16": {"bits": 4, "group_size": 128, "sym": True},
    "W4A16_ASYM": {"bits": 4, "group_size": 128, "sym": False},
    "W8A16": {"bits": 8, "group_size": -1, "sym": True},
    "W3A16": {"bits": 3, "group_size": 64, "sym": True},
    "W2A16": {"bits": 2, "group_size": 32, "sym": True},
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


class IntegerOptions(Options):
    """Options of weight-only integer quantization."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits a weight")
    group_size: int = Field(128, description="input columns that share a scale; -1: the whole row")
    sym: bool = Field(True, description="grid symmetric about zero; asymmetric stores a zero point a group")
    clip: Literal["auto", "on", "off"] = Field(
        "auto", description="search the clipping range of each group; auto: off, by measurement"
    )
    scheme: Literal["W4A16", "W4A16_ASYM", "W8A16", "W3A16", "W2A16"] | None = Field(
        None, description="preset for bits, group size and symmetry"
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
