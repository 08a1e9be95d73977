"""Fewer blocks: some are dropped, or several added up into one; the others are renumbered.

The method asks the unchanged model: for what goes into each block and comes out, in one pass, or for trials of shorter
models on a few windows. A trial starts at the first block that it changes, from states that a first pass leaves on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from weightworks.engine.blockwise import hidden_size, prove_once
from weightworks.engine.reducing import Layout, ReduceJob, Run
from weightworks.engine.walk import Walk
from weightworks.errors import ArchitectureError
from weightworks.stage.reducing import Mixture, Passing, Shortened
from weightworks.store.reduced import Cut, ReducedView, Restored
from weightworks.stream.activations import Activations
from weightworks.stream.passes import Windows, run_block, shell
from weightworks.stream.replay import final_states
from weightworks.stream.resizing import Configuration, fingerprint, with_blocks


class Shorten:
    """The plan of a method that removes blocks."""

    masked = True

    def __init__(self, job: ReduceJob) -> None:
        self.job = job
        skeleton = job.skeleton
        self.count = len(skeleton.blocks)
        self.kinds = [fingerprint(skeleton, index) for index in range(self.count)]
        self.prefixes = [self._prefix(index) for index in range(self.count)]
        self.most, exact = job.method.leaves(self.count)
        self.settled = exact and all(self._shapes(index) == self._shapes(0) for index in range(self.count))
        able = [index for index in range(self.count) if self.removable(index)]
        if len(able) < self.count - self.most:
            raise ArchitectureError(
                f"{job.label}: {self.count - self.most} of {self.count} blocks cannot go: the configuration of "
                f"{type(skeleton.model).__name__} can express a model without only {len(able)} of them"
            )
        gone = set(able[len(able) - (self.count - self.most) :])
        self.provisional = [[(index, 1.0)] for index in range(self.count) if index not in gone]

    def _prefix(self, index: int) -> str:
        """What the names of a block's tensors begin with in the checkpoint: all that they share, to the block's number."""
        skeleton = self.job.skeleton
        names = [piece.tensor.split(".") for name in skeleton.names_of(index) for piece in skeleton.pieces[name]]
        shared = [words[0] for words in zip(*names, strict=False) if len(set(words)) == 1]
        if str(index) not in shared:
            raise ArchitectureError(f"{self.job.label}: block {index} has no number in the names of its tensors")
        return ".".join(shared[: len(shared) - shared[::-1].index(str(index))])

    def _shapes(self, index: int) -> dict[str, Any]:
        return {name: value for name, value in self.kinds[index].items() if not name.endswith("()")}

    def alike(self, one: int, other: int) -> bool:
        return self._shapes(one) == self._shapes(other)

    @cached_property
    def _follows(self) -> bool:
        """Whether what differs between blocks is in lists of the configuration: with these turned round, so are blocks."""
        if all(kind == self.kinds[0] for kind in self.kinds):
            return True
        return self._expressed(list(reversed(range(self.count)))) is not None

    def removable(self, block: int) -> bool:
        return self._follows or self._expressed([one for one in range(self.count) if one != block]) is not None

    def _expressed(self, kept: Sequence[int]) -> Configuration | None:
        """The configuration of a model whose blocks are those ``kept``, in this order; None if there is none."""
        wanted = ReducedView(self.job.checkpoint, self.cuts([[(index, 1.0)] for index in kept]))
        for every in (False, True):
            try:
                config = with_blocks(self.job.config_before, kept, every=every)
                skeleton = config.build(wanted)
            except ArchitectureError:
                continue
            if all(fingerprint(skeleton, place) == self.kinds[index] for place, index in enumerate(kept)):
                return config
        return None

    def cuts(self, mixtures: Sequence[Mixture]) -> list[Cut]:
        """The tensors of a model whose blocks are ``mixtures``, in file order of what they replace."""
        owner = {
            name: index
            for name in self.job.checkpoint.tensors
            for index in range(self.count)
            if name.startswith(self.prefixes[index] + ".")
        }
        places = {mixture[0][0]: (place, mixture) for place, mixture in enumerate(mixtures)}
        cuts = []
        for name in self.job.checkpoint.tensors:
            if (block := owner.get(name)) is None:
                cuts.append(Cut.copy(name, self._beyond(name, self.count - len(mixtures))))
            elif block in places:
                cuts.append(self._of_block(name, *places[block]))
        return cuts

    def _of_block(self, name: str, place: int, mixture: Mixture) -> Cut:
        """One tensor of a block; all parameters of a mixture are added up, whole numbers stay those of its base."""
        (base, _), *others = mixture
        rest = name.removeprefix(self.prefixes[base])
        called = self.prefixes[place] + rest
        if not others or not self.job.checkpoint.info(name).dtype.is_floating_point:
            return Cut.copy(name, called)
        return Cut(called, tuple((self.prefixes[block] + rest, weight) for block, weight in mixture))

    def _beyond(self, name: str, removed: int) -> str:
        """The name of a tensor outside the blocks; one numbered as a block beyond the last moves down with the end."""
        head = self.prefixes[0].rpartition(".")[0] + "."
        number, dot, rest = name.removeprefix(head).partition(".")
        if not name.startswith(head) or not number.isdigit() or int(number) < self.count:
            return name
        return f"{head}{int(number) - removed}{dot}{rest}"

    def layout(self, found: Any) -> Layout:
        mixtures = self.provisional if found is None else found["mixtures"]
        kept = [mixture[0][0] for mixture in mixtures]
        if (config := self._expressed(kept)) is None:
            raise ArchitectureError(
                f"{self.job.label}: no configuration of {type(self.job.skeleton.model).__name__} has just the blocks "
                f"{', '.join(map(str, kept))}"
            )
        return Layout(self.cuts(mixtures), config, kept)

    def find(self, run: Run) -> dict[str, Any]:
        shortened: Shortened = self.job.method.shorten(Asked(self, run))
        return {"mixtures": [list(map(list, mixture)) for mixture in shortened.mixtures], "rows": shortened.rows}

    def rows(self, found: Any) -> list[dict[str, Any]]:
        return [{"part": self.job.skeleton.blocks[row["block"]][0], **row} for row in found["rows"]]

    def uncovered(self) -> list[str]:
        return []

    def told(self, found: Any) -> list[str]:
        merged = [[block for block, _ in mixture] for mixture in found["mixtures"] if len(mixture) > 1]
        lines = [f"{len(found['mixtures'])} of {self.count} blocks left"]
        used = {block for mixture in found["mixtures"] for block, _ in mixture}
        if gone := [str(index) for index in range(self.count) if index not in used]:
            lines.append(f"dropped: {', '.join(gone)}")
        return lines + [f"blocks {', '.join(map(str, group))} added up" for group in merged]


class Asked:
    """The unchanged model as :class:`weightworks.stage.reducing.Depth`; answers are journalled."""

    def __init__(self, plan: Shorten, run: Run) -> None:
        self.plan, self.job, self.run = plan, plan.job, run
        self.trials = 0
        self.states: Activations | None = None

    @property
    def blocks(self) -> int:
        return self.plan.count

    def removable(self, block: int) -> bool:
        return self.plan.removable(block)

    def alike(self, one: int, other: int) -> bool:
        return self.plan.alike(one, other)

    def figures(self, make: Callable[[], Passing]) -> list[Any]:
        run = self.run
        walk = Walk(self.job, run.writer, "blocks", run.calibration.tokens, run.probe, run.dtype, on_disk=run.on_disk)
        return walk.run(lambda index: None, lambda index: make())

    @torch.no_grad()
    def trial(
        self,
        mixtures: Sequence[Mixture],
        compare: Callable[[torch.Tensor, torch.Tensor], float],
        rows: int,
        length: int,
    ) -> float:
        step = f"trial {self.trials}"
        self.trials += 1
        if step not in self.run.writer.steps:
            if self.states is None:
                self._prepare(self.run.calibration.tokens[:rows, :length])
            value = self._value(mixtures, compare)
            self.run.writer.done(step, {"value": value})
            self.job.progress.say(f"{step}: {len(mixtures)} of {self.blocks} blocks, {value:.4f}")
        return float(self.run.writer.steps[step]["value"])

    def _prepare(self, tokens: torch.Tensor) -> None:
        """The inputs of all blocks on disk, and the final states of the unchanged model."""
        job, skeleton = self.job, self.job.skeleton
        self.windows = Windows(tokens)
        shape = (*tokens.shape, hidden_size(job))
        self.states = states = Activations(shape, torch.float32, self.run.writer.scratch, "trials", on_disk=True)
        with shell(skeleton, job.view, job.device):
            job.returns_tuple = prove_once(job, self.run.writer, self.run.probe)
            self.windows.capture(skeleton, returns_tuple=job.returns_tuple, device=job.device)
            for start, hidden in self.windows.embedded(skeleton, job.device):
                states.write(start, hidden)
            states.advance()
        for index in range(self.plan.count):
            self._through(states, index, job.view)
        self.final = self._final(states)

    def _through(self, states: Activations, index: int, reader: Any) -> None:
        skeleton, names = self.job.skeleton, self.job.skeleton.names_of(index)
        skeleton.load(reader, names, torch.float32, self.job.device)
        run_block(skeleton, index, self.windows, states, torch.float32, self.job.device)
        skeleton.unload(names)

    def _value(self, mixtures: Sequence[Mixture], compare: Callable[[torch.Tensor, torch.Tensor], float]) -> float:
        assert self.states is not None
        start = next(place for place, mixture in enumerate(mixtures) if len(mixture) > 1 or mixture[0][0] != place)
        self.states.restore(start)
        tried = Activations(self.states.shape, torch.float32, self.run.writer.scratch, "tried")
        tried.write(0, self.states.read(0, self.states.shape[0]))
        tried.advance()
        cuts = self.plan.cuts(mixtures)
        reader = Restored(self.job.checkpoint, cuts, ReducedView(self.job.checkpoint, cuts))
        for mixture in mixtures[start:]:
            self._through(tried, mixture[0][0], reader)
        values = [compare(*pair) for pair in zip(self.final, self._final(tried), strict=True)]
        return math.fsum(values) / len(values)

    def _final(self, states: Activations) -> list[torch.Tensor]:
        """What the head of the model is given for each window, [seq, hidden]."""
        job, tokens = self.job, self.windows.tokens
        found = []
        with shell(job.skeleton, job.view, job.device):
            for number in range(len(tokens)):
                hidden = states.read(number, number + 1).to(job.device)
                row = tokens[number : number + 1].to(job.device)
                found.append(final_states(job.skeleton, row, hidden, returns_tuple=job.returns_tuple)[0].cpu())
        return found
