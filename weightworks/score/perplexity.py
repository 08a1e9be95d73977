"""Perplexity of a text in non-overlapping windows, one block of the model in memory at a time.

exp of the mean negative log-likelihood of every token but the first of its window, no special tokens, float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field

from weightworks.errors import CalibrationError
from weightworks.options import Options as BaseOptions
from weightworks.store.dense import DenseView
from weightworks.stream.activations import Activations
from weightworks.stream.calibration import encode_all, load_tokenizer, read_texts
from weightworks.stream.passes import Windows, perplexity, shell, stream_losses
from weightworks.stream.replay import prove
from weightworks.stream.skeleton import build

PAPER = "Jelinek et al. 1977; windows as in the GPTQ repository (IST-DASLab/gptq)"
VERSION = 1


class Options(BaseOptions):
    """Options of the perplexity score."""

    texts: list[str] = Field(default=[], description="text files")
    seq_len: int = Field(2048, ge=2, description="tokens a window; capped by the model")
    max_tokens: int | None = Field(None, ge=2, description="score only so many tokens of each text")


@dataclass(frozen=True)
class Score:
    """Per-token losses [windows, seq - 1] (nats) of one text under one model."""

    losses: torch.Tensor

    @property
    def perplexity(self) -> float:
        return perplexity(self.losses)


def score(
    view: DenseView, options: Options, *, device: torch.device, trust_remote_code: bool = False
) -> dict[str, Score]:
    """Scores by text. Raises :class:`CalibrationError` for a missing or too short text."""
    skeleton = build(view, trust_remote_code=trust_remote_code)
    config = skeleton.model.config.get_text_config()
    length = min(options.seq_len, skeleton.context_length)
    tokenizer = load_tokenizer(view.checkpoint.root, trust_remote_code=trust_remote_code)
    windows = {}
    for text in options.texts:
        tokens = encode_all(tokenizer, read_texts(text))[: options.max_tokens]
        windows[text] = cut(tokens, length, text)
    with shell(skeleton, view, device):
        probe = torch.arange(2 * min(16, length), device=device).view(2, -1) % config.vocab_size
        returns_tuple = prove(skeleton, view, probe)
    scores = {}
    whole = torch.cat(list(windows.values()))  # all texts in one pass: every block is loaded once
    states = Activations((*whole.shape, int(config.hidden_size)), torch.float32, view.checkpoint.root, "unused")
    losses = stream_losses(skeleton, view, Windows(whole), states, returns_tuple=returns_tuple, device=device)
    start = 0
    for text, part in windows.items():
        scores[text] = Score(losses[start : start + part.shape[0]])
        start += part.shape[0]
    return scores


def cut(tokens: torch.Tensor, length: int, where: str) -> torch.Tensor:
    """Windows int64 [n, length] of a token stream from its beginning; a remainder is left out."""
    count = tokens.numel() // length
    if count == 0:
        raise CalibrationError(
            f"{where}: {tokens.numel()} tokens is shorter than one window of {length}",
            hint="give a longer text, or a smaller --seq-len",
        )
    return tokens[: count * length].view(count, length)


def paired(scores: dict[str, Score], baseline: dict[str, Score]) -> tuple[float, float]:
    """Relative change of the geometric mean perplexity against ``baseline`` on the same windows, and its standard error.

    The mean over texts of differences of mean loss; windows are taken as independent.
    """
    change, variance = 0.0, 0.0
    for text, mine in scores.items():
        difference = (mine.losses.double() - baseline[text].losses.double()).mean(1)  # [windows]
        change += float(difference.mean()) / len(scores)
        if len(difference) > 1:
            variance += float(difference.var()) / len(difference) / len(scores) ** 2
    return math.expm1(change), math.sqrt(variance) * math.exp(change)


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean, as perplexities are averaged over texts."""
    return math.exp(sum(math.log(value) for value in values) / len(values))
