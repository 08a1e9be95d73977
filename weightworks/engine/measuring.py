"""Rows of a data set measured by two models: how far apart their predictions of the answers are, and where prompts lie.

Rows are taken in parts of so many tokens, and sorted by length within a part. A part passes the blocks of the original, then
those of the model, one block in memory at a time; then the heads of both, batch by batch, and no logits are kept. A finished part
is journalled, so memory and what a killed run loses do not grow with the data set.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from weightworks.engine.machine import one_thread
from weightworks.errors import MethodError, UsageError
from weightworks.report.progress import Progress
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.snapshot import Snapshot, write_snapshot
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.activations import Activations
from weightworks.stream.examples import Examples
from weightworks.stream.lessons import IGNORED, Batch
from weightworks.stream.memory import release
from weightworks.stream.passes import Windows, run_block, shell
from weightworks.stream.replay import Calls, prove, tail_and_states
from weightworks.stream.skeleton import Skeleton, build

PART_TOKENS = 1 << 17  # of a part, filling included: reading a model for each costs little beside its arithmetic
SHORTEST = 16  # tokens that a row is filled up to at least: each length is captured by itself
STEPS = 4  # lengths between one power of two and the next: at most a fifth of a batch is filling
LOGITS = 1 << 24  # compared at once: 64 MB in float32 for each of some tensors
PROBE = 16  # tokens of each window the replay is proved on

Embed = Callable[[Sequence[str]], torch.Tensor]  # texts to rows [n, width], float32


@dataclass
class Through:
    """A model that rows pass through. ``calls`` are how it calls its blocks, by length and batch."""

    name: str  # of its files
    view: DenseView
    skeleton: Skeleton
    device: torch.device
    returns_tuple: int = 0
    calls: dict[int, dict[int, Calls]] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, checkpoint: Checkpoint, device: torch.device, *, trust_remote_code: bool) -> Through:
        view = DenseView(checkpoint)
        return cls(name, view, build(view, trust_remote_code=trust_remote_code), device)

    @property
    def width(self) -> int:
        return int(self.skeleton.model.config.get_text_config().hidden_size)

    @property
    def vocabulary(self) -> int:
        return int(self.skeleton.model.config.get_text_config().vocab_size)

    def prove(self) -> None:
        """Prove the replay; every weight is read, and NaN refused, on the way."""
        with shell(self.skeleton, self.view, self.device):
            probe = torch.arange(2 * PROBE, device=self.device).view(2, -1) % self.vocabulary
            self.returns_tuple = prove(self.skeleton, self.view, probe)

    def last(self, batches: Sequence[Batch], dtype: torch.dtype, folder: Path, *, on_disk: bool) -> list[Activations]:
        """The outputs of the last block for rows of several lengths, a batch of any size each."""
        windows = [Windows(batch.tokens, self.calls.setdefault(batch.tokens.shape[1], {})) for batch in batches]
        states = [
            Activations((*batch.tokens.shape, self.width), dtype, folder, f"{self.name}-{place}", on_disk=on_disk)
            for place, batch in enumerate(batches)
        ]
        with shell(self.skeleton, self.view, self.device):
            for one, held in zip(windows, states, strict=True):
                one.capture(self.skeleton, returns_tuple=self.returns_tuple, device=self.device)
                for start, hidden in one.embedded(self.skeleton, self.device):
                    held.write(start, hidden.to(dtype))
                held.advance()
        for index in range(len(self.skeleton.blocks)):
            names = self.skeleton.names_of(index)
            self.skeleton.load(self.view, names, dtype, self.device)
            for one, held in zip(windows, states, strict=True):
                run_block(self.skeleton, index, one, held, dtype, self.device)
                held.forget()
            self.skeleton.unload(names)
        return states

    def tail(self, tokens: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [n, seq, vocabulary] and what the head is given [n, seq, width], from the last block's output."""
        hidden = hidden.to(self.device, torch.float32)
        return tail_and_states(self.skeleton, tokens, hidden, returns_tuple=self.returns_tuple)


class Parts:
    """Rows cut into parts; ``bounds`` are their first rows and the end."""

    def __init__(self, lengths: Sequence[int], longest: int, tokens: int = PART_TOKENS) -> None:
        self.lengths = [filled(length, longest) for length in lengths]
        self.bounds, held = [0], 0
        for row, length in enumerate(self.lengths):
            if held and held + length > tokens:
                self.bounds.append(row)
                held = 0
            held += length
        self.bounds.append(len(self.lengths))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def tokens(self) -> int:
        """Of all rows, filling included."""
        return sum(self.lengths)

    @property
    def largest(self) -> int:
        """Tokens of the largest part, filling included."""
        return max(sum(self.lengths[start:stop]) for start, stop in self)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return pairwise(self.bounds)

    def groups(self, start: int, stop: int) -> Iterator[tuple[int, list[int]]]:
        """Each length of a part, and its rows."""
        found: dict[int, list[int]] = {}
        for row in range(start, stop):
            found.setdefault(self.lengths[row], []).append(row)
        yield from sorted(found.items())


def filled(length: int, longest: int) -> int:
    """The length that a row of ``length`` tokens is filled up to, at most ``longest``."""
    step = max(SHORTEST, (1 << max(0, length - 1).bit_length()) // (2 * STEPS))
    return min(longest, math.ceil(length / step) * step)


@dataclass(frozen=True)
class Measures:
    """What was found: ``degradation`` float64 [n], nats a token, and ``embeddings`` [n, d] in the files of the parts."""

    degradation: torch.Tensor
    embeddings: Embeddings


class Embeddings:
    """Rows of all parts, read from their files."""

    def __init__(self, files: Sequence[Snapshot], bounds: Sequence[int]) -> None:
        self.files, self.bounds = files, bounds
        self.shape = (bounds[-1], int(files[0].infos["embeddings"].shape[1]))
        self._held: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start:stop``, float32 [n, d]."""
        pieces, number = [], bisect_right(self.bounds, start) - 1
        while number < len(self.files) and self.bounds[number] < stop:
            first = self.bounds[number]
            pieces.append(self._part(number)[max(0, start - first) : stop - first])
            number += 1
        return torch.cat(pieces)

    def _part(self, number: int) -> torch.Tensor:
        if self._held[0] != number:
            self._held = number, self.files[number].read("embeddings")
        return self._held[1]


@dataclass
class Measuring:
    """Two models about to measure ``examples``, part by part; blocks run in ``dtype``.

    Prompts are embedded by ``embed``, or (None) by the original itself: the mean over their tokens of what its head is given.
    """

    original: Through
    model: Through
    examples: Examples
    parts: Parts
    writer: CheckpointWriter
    progress: Progress
    dtype: torch.dtype
    on_disk: bool
    embed: Embed | None = None

    @torch.no_grad()
    def run(self) -> Measures:
        """Measure what no earlier run has, and read all of it."""
        files = [self.writer.scratch / f"part-{number}.safetensors" for number in range(len(self.parts))]
        done = [f"part {number}" in self.writer.steps and path.is_file() for number, path in enumerate(files)]
        if not all(done):
            self.original.prove()
            self.model.prove()
        if any(done):
            self.progress.say(f"resuming: {sum(done)} of {len(files)} parts are measured")
        self.progress.begin("part", len(files), sum(done))
        for number, (start, stop) in enumerate(self.parts):
            if done[number]:
                continue
            found = self._part(start, stop)
            if not all(tensor.isfinite().all() for tensor in found.values()):
                raise MethodError(
                    f"rows {start} to {stop - 1}: what the models make of them in {self.dtype} is not finite",
                    hint="measure with --dtype float32 or bfloat16",
                )
            write_snapshot(files[number], found)
            self.writer.done(f"part {number}")
            mean = float(found["degradation"].mean())
            self.progress.step(f"rows {start} to {stop - 1}, divergence {mean:.4f} nats a token")
            release()
        self.progress.end()
        snapshots = [Snapshot(path) for path in files]
        degradation = torch.cat([snapshot.read("degradation") for snapshot in snapshots])
        return Measures(degradation, Embeddings(snapshots, self.parts.bounds))

    def _part(self, first: int, stop: int) -> dict[str, torch.Tensor]:
        """Degradation float64 [n] and embeddings float32 [n, d] of rows ``first:stop``."""
        groups = list(self.parts.groups(first, stop))
        batches = [self.examples.rows.batch(rows).padded(length) for length, rows in groups]
        through = (self.original, self.model)
        states = [one.last(batches, self.dtype, self.writer.scratch, on_disk=self.on_disk) for one in through]
        degradation = torch.empty(stop - first, dtype=torch.float64)
        embeddings = torch.empty(stop - first, self.original.width)
        device = self.original.device
        with ExitStack() as shells:
            for one in through:
                shells.enter_context(shell(one.skeleton, one.view, device))
            for batch, (_, rows), *pair in zip(batches, groups, *states, strict=True):
                for start, end in Windows(batch.tokens).slices():
                    tokens, labels = batch.tokens[start:end].to(device), batch.labels[start:end].to(device)
                    (theirs, hidden), (mine, _) = (
                        one.tail(tokens, held.read(start, end)) for one, held in zip(through, pair, strict=True)
                    )
                    places = torch.tensor(rows[start:end]) - first
                    degradation[places] = answer_divergence(theirs, mine, labels).cpu()
                    if self.embed is None:
                        given = self.examples.given[rows[start:end]].to(device)
                        embeddings[places] = mean_of_first(hidden.float(), given).cpu()
        for held in (*states[0], *states[1]):
            held.drop()
        if self.embed is not None:
            embeddings = self.embed(self.examples.prompts[first:stop])
        return {"degradation": degradation, "embeddings": embeddings}


def answer_divergence(original: torch.Tensor, model: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over a row's answer of :func:`jensen_shannon`, float64 [n], from logits [n, seq, vocabulary] of both.

    ``labels`` int64 [n, seq] are the tokens that answers are made of, and IGNORED elsewhere: position t predicts t + 1.
    """
    answers = labels[:, 1:] != IGNORED  # [n, seq - 1]
    divergence = torch.zeros(answers.shape, dtype=torch.float64, device=labels.device)
    divergence[answers] = jensen_shannon(original[:, :-1][answers], model[:, :-1][answers]).double()
    return divergence.sum(1) / answers.sum(1).clamp(min=1)


def jensen_shannon(original: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence, nats, of each row of two sets of logits [rows, vocabulary]: in [0, ln 2], symmetric.

    JSD(p, q) = KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2; in the log domain, so that no probability is lost to
    underflow; in float32, or float64 where the logits are.
    """
    found, rows = [], max(1, LOGITS // original.shape[1])
    for theirs, mine in zip(original.split(rows), model.split(rows), strict=True):
        wide = torch.promote_types(theirs.dtype, torch.float32)
        p, q = theirs.to(wide).log_softmax(-1), mine.to(wide).log_softmax(-1)
        mean = torch.logaddexp(p, q) - math.log(2)
        found.append(((_excess(p, mean) + _excess(q, mean)) / 2).clamp(0.0, math.log(2)))
    return torch.cat(found) if found else original.new_zeros(0)


def _excess(p: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """KL of log-probabilities ``p`` from ``mean`` [rows, vocabulary]; a token that cannot come (-inf) adds nothing."""
    return torch.where(p > -math.inf, p.exp() * (p - mean), 0.0).sum(-1)


def mean_of_first(states: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The mean of the first ``counts[i]`` of row i of ``states`` [n, seq, width]: [n, width]."""
    inside = torch.arange(states.shape[1], device=states.device) < counts[:, None]  # [n, seq]
    return (states * inside[:, :, None]).sum(1) / counts[:, None].clamp(min=1)


def sentence_embedder(name: str, device: torch.device) -> Embed:
    """What embeds texts by the sentence-transformers model ``name``."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UsageError(
            f"--embedding {name}: needs the package sentence-transformers, which is not installed",
            hint="pip install sentence-transformers, or leave --embedding at 'model'",
        ) from None
    model = SentenceTransformer(name, device=str(device))

    def embed(texts: Sequence[str]) -> torch.Tensor:
        with one_thread():
            return torch.as_tensor(model.encode(list(texts), convert_to_numpy=True, show_progress_bar=False)).float()

    return embed
