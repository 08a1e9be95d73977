"""What every training shares: options (how long, how fast, on how much at a time), and what a method need not say again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from compress.rates import SCHEDULES, Schedule, rates, read_history
from weightworks.options import Options
from weightworks.stage.training import Regime

if TYPE_CHECKING:
    import torch

    from weightworks.stream.whole import Whole


class TrainingOptions(Options):
    """Options of methods that train. Text and windows are those of the run: dataset, num_samples, seq_len."""

    steps: int = Field(100, ge=1, description="optimizer steps, in each round if there are several")
    batch_size: int = Field(8, ge=1, description="windows of text a step")
    accumulate: int = Field(
        1,
        ge=1,
        description="parts in which a step's windows pass the model, gradients added up: less memory, more time",
    )
    lr: float = Field(1e-4, gt=0, description="highest learning rate (AdamW)")
    schedule: Schedule = Field("llr", description=SCHEDULES)
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises; none in ft and lrw")
    lr_history: str | None = Field(
        None, description="trainer_state.json of the original training, or a JSON list of its learning rates"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay, of matrices only")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are scaled down to this norm; 0: never")
    held_out: int = Field(16, ge=1, description="windows set aside to measure the loss on, at most a quarter of all")
    patience: int | None = Field(
        None,
        ge=1,
        description="stop once so many looks at the held-out loss in turn were no better than the best, and keep the values of "
        "the best; default: all steps are taken, and the last values kept",
    )
    look_every: int = Field(10, ge=1, description="patience: steps between looks")
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="run blocks again in the backward pass to save memory; auto: where memory is short. Same result",
    )

    @model_validator(mode="after")
    def _parts(self) -> Any:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size = {self.batch_size} cannot be taken in accumulate = {self.accumulate} parts")
        if self.schedule in ("lrw", "slr") and self.lr_history is None:
            raise ValueError(f"schedule {self.schedule} follows the original schedule: lr_history is needed")
        return self

    @field_validator("lr_history")
    @classmethod
    def _named(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("must be the name of a file")
        return value

    def files(self) -> list[Path]:
        """Files that the result depends on."""
        return [] if self.lr_history is None else [Path(self.lr_history).expanduser()]

    def rates(self, top: Callable[[int], float] | None = None) -> list[float]:
        """The learning rate of each step of a round; ``top`` makes the highest of the length of the original schedule."""
        history = read_history(self.lr_history) if self.lr_history is not None else []
        highest = self.lr if top is None else top(len(history))
        return rates(self.schedule, self.steps, top=highest, warmup=self.warmup, history=history)

    def regime(self, *, rounds: int = 1, remember: int | None = None, **others: Any) -> Regime:
        """These options as the loop takes them, and ``others`` that it may be told."""
        return Regime(
            rounds=rounds,
            steps=self.steps,
            batch=self.batch_size,
            parts=self.accumulate,
            decay=self.weight_decay,
            clip=self.max_grad_norm,
            held_out=self.held_out,
            remember=remember,
            patience=self.patience,
            look=self.look_every,
            **others,
            recompute={"auto": None, "on": True, "off": False}[self.gradient_checkpointing],
        )


class Trainer:
    """A modelwise method whose learning rates are those of its options, and that has nothing to tell but what the loop does."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def scheme(self) -> None:
        return None

    def files(self) -> list[Path]:
        found: list[Path] = self.options.files()
        return found

    def regime(self) -> Regime:
        found: Regime = self.options.regime()
        return found

    def begin(self, number: int, model: Whole) -> dict[str, Any]:
        return {}

    def rates(self, number: int, begun: Mapping[str, Any]) -> Sequence[float]:
        found: list[float] = self.options.rates()
        return found

    def end(self, number: int, model: Whole) -> dict[str, Any]:
        return {}

    def told(self, weight: torch.Tensor, original: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        return {}
