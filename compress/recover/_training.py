"""What methods that train a pruned model share: what is trained of it, and how a choice becomes parameters and adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from compress.rates import SCHEDULES
from compress.schemes import ALWAYS_IGNORED, Patterns
from compress.training import Trainer, TrainingOptions

if TYPE_CHECKING:
    from weightworks.stream.linears import Linear
    from weightworks.stream.whole import Outline, Subset, Whole

PARTS = ("bias", "norm", "head", "adapters", "weights", "half", "full")
ONE_OF = ("adapters", "weights", "half", "full")  # ways to train a linear layer


class RecoveryOptions(TrainingOptions):
    """Options of methods that train any part of a pruned model."""

    train: list[str] = Field(
        default=["bias", "norm", "adapters"],
        description="what is trained, one or several of: bias, norm (gains and biases of normalisation), head (LoRA on an "
        "output layer that is not the embedding), adapters (of the linear layers), weights (all of those layers, under "
        "their masks, instead of adapters), half (those of half of the layers of each block, drawn by the seed), full (every "
        "parameter of the model, under the masks)",
    )
    adapter: Literal["mask_lora", "scale_lora", "spp", "lift", "lora"] = Field(
        "mask_lora",
        description="how a weight W is adapted: mask_lora: W + s M * (BA); scale_lora: W * (BA); spp: W + s W * (BA); lift: a "
        "share of its entries, the largest after rank reduction; lora: W + s BA, not merged: the output is an adapter for "
        "PEFT, the model may be quantized and stays as it is",
    )
    rank: int = Field(16, ge=1, description="rank of A and B; lift: that W is reduced to")
    alpha: float = Field(32.0, gt=0, description="s is alpha / rank")
    entries: float = Field(0.05, gt=0, le=1, description="lift: share of the entries of each weight that is trained")
    schedule: Literal["ft", "lrw", "slr", "clr", "llr"] = Field("llr", description=SCHEDULES)
    lr: float = Field(5e-4, gt=0, description="highest learning rate (AdamW)")
    ignore: Patterns = Field(
        default=[],
        description="layers without an adapter: globs, or regular expressions after re: (routers never have one)",
    )

    @model_validator(mode="before")
    @classmethod
    def _kept(cls, values: Any) -> Any:
        """What an adapter of PEFT holds is all that is trained, unless it is said otherwise."""
        if isinstance(values, dict) and values.get("adapter") == "lora" and "train" not in values:
            return {**values, "train": ["adapters"]}
        return values

    @model_validator(mode="after")
    def _holds(self) -> Self:
        if self.adapter == "lora" and (others := [part for part in self.train if part not in ("adapters", "head")]):
            raise ValueError(
                f"adapter lora is kept beside the model, which stays as it is: {', '.join(others)} cannot be trained"
            )
        return self

    @field_validator("train")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        parts = [part.strip() for text in value for part in text.split(",")]
        if unknown := [part for part in parts if part not in PARTS]:
            raise ValueError(f"'{unknown[0]}' is no part that can be trained; known: {', '.join(PARTS)}")
        if not parts:
            raise ValueError("something must be trained")
        if len(ways := [part for part in ONE_OF if part in parts]) > 1:
            raise ValueError(f"a layer is trained by its adapter or by its weights, not by both: {' and '.join(ways)}")
        if "full" in parts and len({*parts}) > 1:
            raise ValueError("full is every parameter: nothing can be added to it")
        return [part for part in PARTS if part in parts]

    @property
    def ignored(self) -> list[str]:
        """Patterns of all layers left as they are."""
        return [*ALWAYS_IGNORED, *self.ignore]


class WindowOptions(TrainingOptions):
    """Options of methods that train block after block to give what the original's give."""

    window: Literal["block", "attn", "mlp", "both"] = Field(
        "block",
        description="in reconstruction, what is imitated as one: the block, its attention, its MLP, or both in turn",
    )
    inputs: Literal["sparse", "dense"] = Field(
        "sparse",
        description="in reconstruction, a block's inputs: those that the pruned model makes so far, or the original's",
    )
    targets: Literal["local", "trajectory"] = Field(
        "local",
        description="in reconstruction, what the original's block gives on the same inputs (local), or in the original "
        "(trajectory)",
    )

    def no_patience(self) -> None:
        """Blocks are trained by their own errors: there is no loss of the model to wait for."""
        if self.patience is not None:
            raise ValueError(
                "patience waits for the held-out loss of the whole model, which is not known block by block"
            )


class Recovery(Trainer):
    """What modelwise methods of recovery have in common; how the loop is to run, ``regime``, each says itself."""

    masks = False  # it makes none, and keeps those there are

    @property
    def parts(self) -> Sequence[str]:
        """What is trained, of ``PARTS``."""
        found: list[str] = self.options.train
        return found

    @property
    def keeps_adapter(self) -> bool:
        """Whether the output is an adapter, and the model stays as it is."""
        return getattr(self.options, "adapter", None) == "lora"

    @property
    def by_blocks(self) -> bool:
        """Whether blocks are trained one after the other: then nothing outside them is."""
        return False

    def subset(self, outline: Outline) -> Subset:
        from weightworks.stream.whole import Subset

        wanted, fallbacks = self.parts, []
        learnable = outline.skeleton.learnable
        named = {
            "bias": outline.biases,
            "norm": outline.norms,
            "weights": outline.weights,
            "half": outline.half if "half" in wanted else [],
            "full": learnable,
        }
        names = {name for part, found in named.items() if part in wanted for name in found}
        adapters = {name: self.adapter(one) for name, one in outline.linears.items()} if "adapters" in wanted else {}
        if self.by_blocks:
            names = {name for name in names if outline.inside(name)}
        if "head" in wanted and self.by_blocks:
            fallbacks.append("head: left as it is; it is in no block")
        elif "head" in wanted and outline.head is not None:
            adapters[outline.head.tensor] = self.adapter(outline.head, "lora")
        elif "head" in wanted:
            fallbacks.append("head: left as it is; it is the embedding too, which an adapter of the head would change")
        if self.keeps_adapter:
            adapters, left = holdable(outline, adapters)
            fallbacks += left
        ordered = tuple(name for name in learnable if name in names)
        inside = [one for name, one in outline.linears.items() if name in adapters]
        added = sum(self.added(one.shape) for one in inside)
        if outline.head is not None and outline.head.tensor in adapters:
            added += self.added(outline.head.shape, "lora")
        return Subset(ordered, adapters, added, tuple(fallbacks))

    def adapter(self, linear: Linear, kind: str | None = None) -> Any:
        """What makes the adapter of ``linear``, of ``kind`` or the one asked for."""
        from compress.recover._adapters import LowRank
        from compress.recover._principal import Principal

        options, kind = self.options, kind or self.options.adapter
        if kind == "lift":
            return partial(Principal, rank=options.rank, count=self.added(linear.shape))
        return partial(LowRank, kind, rank=options.rank, alpha=options.alpha)

    def added(self, shape: tuple[int, int], kind: str | None = None) -> int:
        """Parameters of the adapter of a weight [out, in]; of a pruned one, those of ``lift`` at most."""
        if (kind or self.options.adapter) == "lift":
            return max(1, round(self.options.entries * shape[0] * shape[1]))
        rank: int = self.options.rank
        return rank * sum(shape)

    def begin(self, number: int, model: Whole) -> dict[str, Any]:
        model.mask_zeros()
        parts = {"adapters": sum(one.numel() for adapter in model.adapters.values() for one in adapter.parameters())}
        for name in (name for name in model.subset.names if name in model.values):
            part = "bias" if name.endswith("bias") else "norm" if model.values[name].ndim == 1 else "weights"
            parts[part] = parts.get(part, 0) + model.values[name].numel()
        return {"trained": {part: count for part, count in parts.items() if count}}


def holdable(outline: Outline, adapters: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Those of ``adapters`` that PEFT can hold, and why it cannot hold the others."""
    linears = {**outline.linears, **({} if outline.head is None else {outline.head.tensor: outline.head})}
    turned = any(linears[name].transposed for name in adapters)
    held, left = {}, []
    for name, adapter in adapters.items():
        linear = linears[name]
        if linear.piece.expert is not None or linear.piece.parts > 1:
            left.append(
                f"{name}: left as it is; transformers holds it fused with others, and PEFT adapts whole modules"
            )
        elif linear.transposed is not turned:
            left.append(f"{name}: left as it is; one flag of PEFT says of all modules that weights are [in, out]")
        else:
            held[name] = adapter
    return held, left
