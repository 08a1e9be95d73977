"""Windows on their way through a streamed model: embedding, batches, blocks, and the loss at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from weightworks.stream.activations import Activations
from weightworks.stream.replay import Calls, capture, embed, tail
from weightworks.stream.skeleton import DenseReader, Skeleton

BATCH_TOKENS = 1024  # tokens a forward pass works on: enough for full-speed products, little memory


def batch_windows(length: int) -> int:
    """Windows of ``length`` tokens a batch: a power of two, so that results do not depend on how many there are."""
    return max(1, 1 << int(math.log2(max(1, BATCH_TOKENS // length))))


@dataclass
class Windows:
    """Token windows int64 [n, seq] and, once captured, how the model calls its blocks for batches of them."""

    tokens: torch.Tensor
    calls: dict[int, Calls] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return batch_windows(self.tokens.shape[1])

    def slices(self) -> Iterator[tuple[int, int]]:
        """Start and stop of each batch."""
        for start in range(0, self.tokens.shape[0], self.batch):
            yield start, min(start + self.batch, self.tokens.shape[0])

    def call(self, count: int, dtype: torch.dtype) -> Calls:
        """The calls for a batch of ``count`` windows."""
        return self.calls[count].to(dtype)

    def capture(self, skeleton: Skeleton, *, returns_tuple: int, device: torch.device) -> None:
        """Capture the calls for every batch size that occurs; the parts outside the blocks must be loaded."""
        for start, stop in self.slices():
            if stop - start not in self.calls:
                tokens = self.tokens[start:stop].to(device)
                self.calls[stop - start] = capture(skeleton, tokens, returns_tuple=returns_tuple)

    def embedded(self, skeleton: Skeleton, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
        """Batches of the first block's inputs (on the CPU), with the number of their first window."""
        for start, stop in self.slices():
            yield start, embed(skeleton, self.tokens[start:stop].to(device)).cpu()


@contextmanager
def shell(skeleton: Skeleton, reader: DenseReader, device: torch.device) -> Iterator[None]:
    """The parts outside the blocks, loaded in float32 for the time of the context."""
    names = skeleton.names_of(None)
    skeleton.load(reader, names, torch.float32, device)
    try:
        yield
    finally:
        skeleton.unload(names)


@torch.no_grad()
def token_losses(
    skeleton: Skeleton, windows: Windows, states: Activations, *, returns_tuple: int, device: torch.device
) -> torch.Tensor:
    """Negative log-likelihoods (nats) float32 [n, seq - 1] from the last block's output.

    The parts outside the blocks must be loaded. One window at a time, so that logits take little memory.
    """
    losses = []
    for index in range(windows.tokens.shape[0]):
        tokens = windows.tokens[index : index + 1].to(device)
        hidden = states.read(index, index + 1).to(device)
        losses.append(window_losses(tail(skeleton, tokens, hidden, returns_tuple=returns_tuple), tokens).cpu())
    return torch.cat(losses)


def window_losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods (nats) [batch, seq - 1] of ``tokens`` [batch, seq] under ``logits`` [batch, seq, vocabulary]."""
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    return losses.view(tokens.shape[0], -1)


def perplexity(losses: torch.Tensor) -> float:
    """exp of the mean of per-token losses, summed in float64."""
    return math.exp(min(float(losses.double().mean()), 700.0))


@torch.no_grad()
def run_block(
    skeleton: Skeleton,
    index: int,
    windows: Windows,
    states: Activations,
    dtype: torch.dtype,
    device: torch.device,
    seen: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> None:
    """Send ``states`` through the loaded block, batch by batch; ``seen`` gets its inputs and outputs [n, seq, hidden]."""
    block = skeleton.blocks[index][1]
    for start, stop in windows.slices():
        call = windows.call(stop - start, dtype).blocks[index]
        output = call.run(block, states.read(start, stop).to(device, dtype))
        if seen is not None:
            seen(states.read(start, stop).to(device, dtype), output)  # read again: a block may write into its input
        states.write(start, output.cpu())
    states.advance()


@torch.no_grad()
def stream_losses(
    skeleton: Skeleton,
    reader: DenseReader,
    windows: Windows,
    states: Activations,
    *,
    returns_tuple: int,
    device: torch.device,
    blocks: int | Sequence[int] | None = None,
) -> torch.Tensor:
    """Per-token losses [n, seq - 1] of a checkpoint in float32, holding one block at a time.

    ``states`` has room for the windows; ``blocks`` cuts the model short, or names the only blocks that are run.
    """
    with shell(skeleton, reader, device):
        windows.capture(skeleton, returns_tuple=returns_tuple, device=device)
        for start, hidden in windows.embedded(skeleton, device):
            states.write(start, hidden)
        states.advance()
    if blocks is None or isinstance(blocks, int):
        blocks = range(len(skeleton.blocks) if blocks is None else blocks)
    for index in blocks:
        names = skeleton.names_of(index)
        skeleton.load(reader, names, torch.float32, device)
        run_block(skeleton, index, windows, states, torch.float32, device)
        skeleton.unload(names)
    with shell(skeleton, reader, device):
        return token_losses(skeleton, windows, states, returns_tuple=returns_tuple, device=device)
