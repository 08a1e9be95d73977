"""Perplexity of a text in non-overlapping windows, one block of the model in memory at a time.

exp of the mean negative log-likelihood of every token but the first of its window, no special tokens, float32; over
several texts the geometric mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightworks.score._subjects import TextOptions, device_of, figures, open_all, over_texts, row, shared_length
from weightworks.stage.protocols import Subject
from weightworks.stage.settings import Settings

if TYPE_CHECKING:
    from weightworks.store.dense import DenseView

PAPER = "Jelinek et al. 1977; windows as in the GPTQ repository (IST-DASLab/gptq)"
VERSION = 1
LARGEST = 700.0  # nats; exp of more is infinite


class Options(TextOptions):
    """Options of the perplexity score."""


class Method:
    """A score: ``perplexity``, the geometric mean over texts; its change is relative. ``by_text`` has each text's own."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def files(self) -> list[Path]:
        """Local files whose content the result depends on."""
        return self.options.files()

    def score(
        self, subjects: Sequence[Subject], baseline: str, settings: Settings, say: Callable[[str], None]
    ) -> dict[str, Any]:
        """See :class:`~weightworks.stage.protocols.Scorer`. A model that reads other tokens than the baseline has no change.

        Raises :class:`CalibrationError` for a missing or too short text.
        """
        from weightworks.score._windows import same, windows_of

        views = open_all(subjects, baseline, settings)
        length = shared_length(views, self.options.seq_len)
        windows = {name: windows_of(view, self.options, length, settings) for name, view in views.items()}
        losses: dict[str, dict[str, torch.Tensor]] = {}
        for name, view in views.items():
            say(f"scoring {name} in windows of {length} tokens")
            losses[name] = text_losses(view, windows[name], settings)
        rows = []
        for name, view in views.items():
            change: tuple[float | None, float | None] = (None, None)
            if name == baseline:
                change = 0.0, 0.0
            elif same(windows[name], windows[baseline]):
                change = paired(losses[name], losses[baseline])
            rows.append(_row(name, view, losses[name], *change))
        return {
            "metrics": {"perplexity": {"better": "lower", "change": "relative"}},
            "baseline": baseline,
            "seq_len": length,
            "models": rows,
        }


def text_losses(view: DenseView, windows: dict[str, torch.Tensor], settings: Settings) -> dict[str, torch.Tensor]:
    """Per text, negative log-likelihoods (nats) float32 [windows, seq - 1] of ``windows`` int64 [windows, seq]."""
    from weightworks.score._windows import join, split, streamed
    from weightworks.stream.passes import Windows, shell, token_losses

    tokens, device = join(windows), device_of(settings)
    with streamed(view, tokens, settings) as last, shell(last.skeleton, view, device):
        losses = token_losses(
            last.skeleton, Windows(tokens), last.states, returns_tuple=last.returns_tuple, device=device
        )
    return split(losses, windows)


def _row(
    name: str, view: DenseView, mine: dict[str, torch.Tensor], change: float | None, change_error: float | None
) -> dict[str, Any]:
    """What the result says of the model with the losses ``mine``."""
    by_text = {text: geometric([part])[0] for text, part in mine.items()}
    tokens = {text: part.numel() for text, part in mine.items()}
    metric = figures(*geometric(list(mine.values())), change, change_error)
    return row(name, view, {"perplexity": metric}, by_text={"perplexity": by_text}, tokens=tokens)


def geometric(losses: Sequence[torch.Tensor]) -> tuple[float, float | None]:
    """The geometric mean over texts of their perplexities, from losses [windows, seq - 1] of each, and its standard error."""
    mean, error = over_texts([part.double().mean(1) for part in losses])
    value = math.exp(min(mean, LARGEST))
    return value, None if error is None else value * error


def paired(losses: dict[str, torch.Tensor], baseline: dict[str, torch.Tensor]) -> tuple[float, float | None]:
    """Relative change of the geometric mean perplexity against ``baseline`` on the same windows, and its standard error.

    The mean over texts of differences of mean loss; windows are taken as independent.
    """
    differences = [(mine.double() - baseline[text].double()).mean(1) for text, mine in losses.items()]  # [windows]
    mean, error = over_texts(differences)
    mean = min(mean, LARGEST)
    return math.expm1(mean), None if error is None else error * math.exp(mean)
