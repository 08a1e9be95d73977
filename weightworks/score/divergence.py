"""Kullback-Leibler divergence of a model from its original, and how often both put the same token first.

KL(original || model) in nats a token and the share of equal top tokens, on texts in non-overlapping windows, at every
position that predicts a token of its window. Both models are streamed, one block in memory at a time, in float32; their
logits are compared window by window in float64 and never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from weightworks.errors import MethodError, UsageError
from weightworks.score._subjects import TextOptions, device_of, figures, open_all, over_texts, row, shared_length
from weightworks.stage.protocols import Subject
from weightworks.stage.settings import Settings

if TYPE_CHECKING:
    from weightworks.score._windows import Last
    from weightworks.store.dense import DenseView

PAPER = "Kullback & Leibler 1951; as a measure of compression, Dutta et al. 2024 (arXiv:2407.09141)"
VERSION = 1
CHUNK = 1 << 22  # logits compared at once: 32 MB in float64


class Options(TextOptions):
    """Options of the divergence score."""


class Method:
    """A score: ``kl`` (nats a token, 0 for the baseline) and ``top1`` (share of tokens, 1 for the baseline)."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def files(self) -> list[Path]:
        """Local files whose content the result depends on."""
        return self.options.files()

    def score(
        self, subjects: Sequence[Subject], baseline: str, settings: Settings, say: Callable[[str], None]
    ) -> dict[str, Any]:
        """See :class:`~weightworks.stage.protocols.Scorer`; changes are absolute, so that of ``kl`` is its value.

        Raises :class:`UsageError` when there is nothing but the baseline, :class:`MethodError` when a model has another
        vocabulary or tokenizer than the baseline, :class:`CalibrationError` for a missing or too short text.
        """
        from weightworks.score._windows import join, same, split, streamed, windows_of

        if len(subjects) < 2:
            raise UsageError(
                f"divergence compares models with a baseline, and there is only '{baseline}'",
                hint="name another model, or the original with --baseline",
            )
        views = open_all(subjects, baseline, settings)
        length = shared_length(views, self.options.seq_len)
        windows = windows_of(views[baseline], self.options, length, settings)
        for name, view in views.items():
            _same_vocabulary(name, view, baseline, views[baseline])
            if not same(windows_of(view, self.options, length, settings), windows):
                raise MethodError(
                    f"{name} and its baseline {baseline} have different tokenizers: they read other tokens in the same "
                    "text, so their predictions cannot be compared token by token",
                    hint="compare them by perplexity a text or by tasks",
                )
        tokens = join(windows)
        rows = {baseline: _row(baseline, views[baseline], windows, None)}
        say(f"streaming {baseline} over {tokens.shape[0]} windows of {length} tokens, to compare others with it")
        with streamed(views[baseline], tokens, settings) as original:
            for name, view in views.items():
                if name == baseline:
                    continue
                say(f"comparing {name} with {baseline} in windows of {length} tokens")
                with streamed(view, tokens, settings) as model:
                    seen = compare(original, model, tokens, device_of(settings))
                rows[name] = _row(name, view, windows, tuple(split(part, windows) for part in seen))
        return {
            "metrics": {
                "kl": {"better": "lower", "change": "absolute"},
                "top1": {"better": "higher", "change": "absolute"},
            },
            "baseline": baseline,
            "seq_len": length,
            "models": [rows[name] for name in views],
        }


def compare(
    original: Last, model: Last, tokens: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL (nats a token) and top-1 agreement of each window of ``tokens`` int64 [n, seq]: two float64 [n]."""
    from weightworks.stream.passes import shell

    seen = torch.empty(2, len(tokens), dtype=torch.float64)
    with torch.no_grad(), shell(original.skeleton, original.view, device), shell(model.skeleton, model.view, device):
        for index in range(len(tokens)):
            window = tokens[index : index + 1].to(device)
            theirs, mine = (
                original.logits(index, window)[0, :-1],
                model.logits(index, window)[0, :-1],
            )  # [seq - 1, vocab]
            kl, equal = divergences(theirs, mine)
            seen[:, index] = torch.stack([kl.mean(), equal.double().mean()]).cpu()
    return seen[0], seen[1]


def divergences(original: torch.Tensor, model: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row of logits [rows, vocabulary]: KL(original || model) in nats, float64 [rows]; equal top tokens, bool [rows]."""
    kl, rows = [], max(1, CHUNK // original.shape[1])
    for theirs, mine in zip(original.split(rows), model.split(rows), strict=True):
        p, q = theirs.double().log_softmax(-1), mine.double().log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(kl), original.argmax(-1) == model.argmax(-1)


def _same_vocabulary(name: str, view: DenseView, baseline: str, original: DenseView) -> None:
    """Refuse a model whose logits do not stand for the baseline's tokens."""
    sizes = [
        (part.checkpoint.config.get("text_config") or part.checkpoint.config).get("vocab_size")
        for part in (view, original)
    ]
    if sizes[0] != sizes[1]:
        raise MethodError(
            f"{name} has a vocabulary of {sizes[0]} tokens and its baseline {baseline} one of {sizes[1]}, so their "
            "predictions cannot be compared token by token",
            hint="compare them by tasks",
        )


def _row(
    name: str,
    view: DenseView,
    windows: dict[str, torch.Tensor],
    seen: tuple[dict[str, torch.Tensor], ...] | None,
) -> dict[str, Any]:
    """What the result says of a model; ``seen``: KL and agreement by text, [windows]; None for the baseline itself."""
    if seen is None:
        kl = {text: torch.zeros(len(part)) for text, part in windows.items()}
        top1 = {text: torch.ones(len(part)) for text, part in windows.items()}
    else:
        kl, top1 = seen
    values = {}
    for metric, parts, ideal in (("kl", kl, 0.0), ("top1", top1, 1.0)):
        value, error = over_texts(list(parts.values()))
        error = 0.0 if seen is None else error
        values[metric] = figures(value, error, value - ideal, error)
    by_text = {
        metric: {text: over_texts([part])[0] for text, part in parts.items()}
        for metric, parts in (("kl", kl), ("top1", top1))
    }
    return row(
        name, view, values, by_text=by_text, tokens={text: part[:, 1:].numel() for text, part in windows.items()}
    )
