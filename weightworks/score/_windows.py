"""Texts in windows, and a model streamed over them to its last hidden states, one block in memory at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from weightworks.errors import CalibrationError
from weightworks.score._subjects import TextOptions, device_of, memory_of
from weightworks.stage.settings import Settings
from weightworks.store.dense import DenseView
from weightworks.stream.activations import Activations
from weightworks.stream.calibration import encode_all, load_tokenizer, read_texts
from weightworks.stream.passes import Windows, run_block, shell
from weightworks.stream.replay import prove, tail
from weightworks.stream.skeleton import Skeleton, build

STATES_SHARE = 4  # hidden states may take this part of memory; beyond it they go to a file
PROBE = 16  # tokens of each window the replay is proved on


@dataclass(frozen=True)
class Last:
    """A model without its weights, and the output of its last block for every window."""

    view: DenseView
    skeleton: Skeleton
    states: Activations
    returns_tuple: int

    def logits(self, index: int, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [1, seq, vocabulary] of window ``index``; the parts outside the blocks must be loaded (:func:`shell`)."""
        hidden = self.states.read(index, index + 1).to(tokens.device)
        return tail(self.skeleton, tokens, hidden, returns_tuple=self.returns_tuple)


def windows_of(view: DenseView, options: TextOptions, length: int, settings: Settings) -> dict[str, torch.Tensor]:
    """Per text its windows, int64 [windows, length], by the model's own tokenizer.

    Raises :class:`CalibrationError` for a missing, unreadable or too short text.
    """
    tokenizer = load_tokenizer(view.checkpoint.root, trust_remote_code=settings.trust_remote_code)
    return {
        text: cut(encode_all(tokenizer, read_texts(text))[: options.max_tokens], length, text) for text in options.texts
    }


def cut(tokens: torch.Tensor, length: int, where: str) -> torch.Tensor:
    """Windows int64 [n, length] of a token stream from its beginning; a remainder is left out."""
    count = tokens.numel() // length
    if count == 0:
        raise CalibrationError(
            f"{where}: {tokens.numel()} tokens is shorter than one window of {length}",
            hint="give a longer text, or a smaller --seq-len",
        )
    return tokens[: count * length].view(count, length)


def join(windows: dict[str, torch.Tensor]) -> torch.Tensor:
    """The windows of all texts in one batch, [all windows, length], so that every block is loaded once."""
    return torch.cat(list(windows.values()))


def split(values: torch.Tensor, windows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows of ``values`` [all windows, ...] by text again."""
    parts = values.split([part.shape[0] for part in windows.values()])
    return dict(zip(windows, parts, strict=True))


@contextmanager
def streamed(view: DenseView, tokens: torch.Tensor, settings: Settings) -> Iterator[Last]:
    """Send ``tokens`` int64 [n, seq] through all blocks in float32, holding one block at a time.

    The hidden states [n, seq, hidden] live as long as the context: in memory, or in a file when they would take more
    than their share of it. Raises :class:`ArchitectureError` for a model that cannot be streamed, :class:`MethodError`
    on NaN in its weights.
    """
    device = device_of(settings)
    skeleton = build(view, trust_remote_code=settings.trust_remote_code)
    config = skeleton.model.config.get_text_config()
    shape = (*tokens.shape, int(config.hidden_size))
    on_disk = 4 * shape[0] * shape[1] * shape[2] > memory_of(settings) // STATES_SHARE
    windows, length = Windows(tokens), int(tokens.shape[1])
    with tempfile.TemporaryDirectory(prefix="weightworks-") as folder:
        states = Activations(shape, torch.float32, Path(folder), "states", on_disk=on_disk)
        with shell(skeleton, view, device):
            probe = torch.arange(2 * min(PROBE, length), device=device).view(2, -1) % config.vocab_size
            returns_tuple = prove(skeleton, view, probe)
            windows.capture(skeleton, returns_tuple=returns_tuple, device=device)
            for start, hidden in windows.embedded(skeleton, device):
                states.write(start, hidden)
            states.advance()
        for index in range(len(skeleton.blocks)):
            names = skeleton.names_of(index)
            skeleton.load(view, names, torch.float32, device)
            run_block(skeleton, index, windows, states, torch.float32, device)
            skeleton.unload(names)
            states.forget()
        yield Last(view, skeleton, states, returns_tuple)


def same(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> bool:
    """Whether two models read the same tokens in all texts."""
    return all(torch.equal(part, those[text]) for text, part in these.items())
