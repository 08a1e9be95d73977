"""Fewer units in every block: parts found by symmetry, masked one after the other as a walk comes to them.

A part's choice is made on the inputs that the narrower model gives it: blocks and parts before it have lost theirs. Widths
are the same in all blocks, for a configuration holds one of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from weightworks.engine.blockwise import bounded
from weightworks.engine.gradients import Backward
from weightworks.engine.reducing import Layout, ReduceJob, Run
from weightworks.engine.walk import Walk
from weightworks.errors import ArchitectureError, MethodError
from weightworks.stage.protocols import by_gradients
from weightworks.stage.reducing import Choice, Kind, Part
from weightworks.store.reduced import Cut, ReducedView, Restored
from weightworks.stream.linears import Linear, read_linear, write_linear
from weightworks.stream.passes import shell
from weightworks.stream.replay import first_calls
from weightworks.stream.resizing import Configuration, resized, with_heads
from weightworks.stream.symmetry import HEAD, PROBE, Family, Segments, Shape, rows_of, search

TOLERANCE = 1e-4  # of what the part adds to the block's output: float32 leaves about 1e-6
PARTS = {"channels": "feed-forward part of that width", "heads": "attention"}
WAYS = {"channels": "leave channels alone", "heads": "remove channels only"}


class Narrow:
    """The plan of a method that removes units."""

    settled = masked = True

    def __init__(self, job: ReduceJob) -> None:
        self.job = job
        symmetry = search(job.skeleton, job.checkpoint, hint="remove whole blocks instead")
        self.families: dict[str, Family] = {}
        self.parts: dict[str, Part] = {}
        for family in symmetry.families:
            if (part := self._part(family)) is not None:
                self.families[family.name], self.parts[family.name] = family, part
        self._refuse(symmetry.unknown)
        self.config = self._configured()
        self._prove()

    def _part(self, family: Family) -> Part | None:
        """What the method is told of a family, None if it leaves the like alone."""
        (_, size), *_ = next(axis.segments for axis in family.axes if axis.axis == 1)
        kind: Kind = "channels" if size == 1 else "heads"
        shape = family.shape
        stays = self.job.method.stays(kind, shape.groups, shape.heads, size)
        if stays is None:
            return None
        return Part(family.block, family.name, kind, shape.groups, shape.heads, size, *stays)

    def _refuse(self, unknown: Mapping[str, str]) -> None:
        """Refuse widths of which nothing goes, and blocks without a part that can lose units."""
        whole = {(part.kind, part.count, part.size) for part in self.parts.values() if part.kept >= part.count}
        if whole:
            lines = "; ".join(f"{count} {kind}, {size} inputs each" for kind, count, size in sorted(whole))
            raise MethodError(
                f"{self.job.label}: rounded, nothing would go of {lines}",
                hint="raise the share, lower --round-to, or let whole groups of heads go",
            )
        found = {part.kind for part in self.parts.values()}
        if lacking := [kind for kind in self.job.method.kinds if kind not in found]:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(unknown.items())[:3])
            raise ArchitectureError(
                f"{self.job.label}: in {type(self.job.skeleton.model).__name__} no {' or '.join(lacking)} are known that can "
                f"go ({reasons})",
                hint=WAYS[lacking[0]],
            )

    def _configured(self) -> Configuration:
        """The configuration of the narrower model: one size after the other, each proven by building the model."""
        config, done = self.job.config_before, dict[str, Part]()
        kinds = {(part.kind, part.groups, part.heads, part.size): part for part in self.parts.values()}
        for key, part in kinds.items():
            done |= {
                name: one for name, one in self.parts.items() if (one.kind, one.groups, one.heads, one.size) == key
            }
            wanted = ReducedView(self.job.checkpoint, self.cuts({name: first_of(one) for name, one in done.items()}))
            try:
                if part.kind == "channels":
                    config = resized(config, part.count, part.kept, wanted)
                else:
                    config = with_heads(config, part.kept, part.kept_groups, part.size)
                    config.build(wanted)
            except ArchitectureError as error:
                raise ArchitectureError(
                    f"{self.job.label}: {type(self.job.skeleton.model).__name__} with {part.kept} of {part.count} "
                    f"{part.kind} has no configuration: {str(error).partition(': ')[2]}",
                    hint=self._way(part),
                ) from error
        return config

    def _way(self, part: Part) -> str:
        """What can be asked for instead of what no configuration says."""
        if part.kind == "channels":
            return WAYS["channels"]
        fewer = part.kept_groups < part.groups
        counts = []
        for count in range(1, part.groups if fewer else part.heads):
            groups, heads = (count, part.heads) if fewer else (part.groups, count)
            one = replace(part, kept_groups=groups, kept_heads=heads)
            wanted = ReducedView(self.job.checkpoint, self.cuts(self._alike(one)))
            try:
                with_heads(self.job.config_before, one.kept, groups, part.size).build(wanted)
            except ArchitectureError:
                continue
            counts.append(one.kept)
        able = f"its configuration can express {' or '.join(map(str, counts))} of {part.count}; else " if counts else ""
        return able + WAYS["heads"]

    def _alike(self, part: Part) -> dict[str, torch.Tensor]:
        """The first heads of every attention, as many as stay of ``part``."""
        return {name: first_of(part) for name, other in self.parts.items() if other.kind == "heads"}

    def cuts(self, heads: Mapping[str, torch.Tensor]) -> list[Cut]:
        """The tensors when of each part ``heads`` stay, in file order."""
        cuts = {name: Cut.copy(name) for name in self.job.checkpoint.tensors}
        for name, chosen in heads.items():
            family = self.families[name]
            for axis in family.axes:
                rows = rows_of(axis.segments, family.shape, chosen)
                cuts[axis.tensor] = cuts[axis.tensor].narrowed(axis.stored(self.job.checkpoint), rows)
        return list(cuts.values())

    @torch.no_grad()
    def _prove(self) -> None:
        """One block, its first units kept, gives what it gives with the others masked: the configuration means that."""
        job, index = self.job, min(part.block for part in self.parts.values())
        cuts = self.cuts({name: first_of(part) for name, part in self.parts.items()})
        view, narrow = ReducedView(job.checkpoint, cuts), self.config.build(ReducedView(job.checkpoint, cuts))
        text = job.skeleton.model.config.get_text_config()
        tokens = torch.arange(PROBE[0] * PROBE[1]).view(PROBE) * 7 % text.vocab_size
        first, names = job.skeleton.names_of(0), job.skeleton.names_of(index)
        with shell(job.skeleton, job.view, torch.device("cpu")):
            job.skeleton.load(job.view, first, torch.float32)
            calls, hidden = first_calls(job.skeleton, tokens)
            job.skeleton.unload(first)
        call, outputs = calls.blocks[index], []
        for skeleton, reader in ((job.skeleton, Restored(job.checkpoint, cuts, view)), (narrow, view)):
            skeleton.load(reader, names, torch.float32)
            outputs.append(call.run(skeleton.blocks[index][1], hidden.clone()))
            skeleton.unload(names)
        scale = max(float((outputs[0] - hidden).abs().max()), 1e-30)
        if not (difference := float((outputs[1] - outputs[0]).abs().max()) / scale) <= TOLERANCE:
            raise ArchitectureError(
                f"{job.label}: a narrower {type(job.skeleton.model).__name__} computes something else than one with units "
                f"masked: its block {index} differs by {difference:.1e} of what it adds",
                hint="something in its blocks depends on their width; nothing was changed",
            )

    def layout(self, found: Any) -> Layout:
        if found is None:
            heads = {name: first_of(part) for name, part in self.parts.items()}
        else:
            heads = {one["part"]: torch.tensor(one["heads"]) for one in found}
        return Layout(self.cuts(heads), self.config, range(len(self.job.blocks)))

    def find(self, run: Run) -> list[dict[str, Any]]:
        worth = self._worth(run) if by_gradients(self.job.method) else {}
        if not self.job.method.inputs:
            blocks = [self._parts(index) for index in range(len(self.job.blocks))]
            return [
                self._chosen(run, part, self.job.linears[tensor], None, worth)[1]
                for parts in blocks
                for tensor, part in parts.items()
            ]
        walk = Walk(
            self.job, run.writer, "narrowing", run.calibration.tokens, run.probe, run.dtype, on_disk=run.on_disk
        )
        return [one for figures in walk.run(partial(self._block, walk, run, worth)) for one in figures]

    def _worth(self, run: Run) -> dict[str, torch.Tensor]:
        """What the heads of every part are worth by gradients, float64 [groups, heads]."""
        places = {axis.tensor: (family, axis) for family in self.families.values() for axis in family.axes}

        def answer(linear: Linear, weight: torch.Tensor, traced: Any) -> dict[str, Any]:
            if linear.tensor not in places:
                return {}
            family, axis = places[linear.tensor]
            rows = self.job.method.weigh(weight, traced, axis.axis)
            return {"part": family.name, "worth": dealt(axis.segments, family.shape, rows).tolist()}

        loop = Backward(
            self.job, run.writer, run.calibration, run.probe, on_disk=run.on_disk, traced_bytes=run.statistics_bytes
        )
        found: dict[str, torch.Tensor] = {}
        for row in filter(None, loop.run(answer)):
            worth = torch.tensor(row["worth"], dtype=torch.float64)
            found[row["part"]] = found[row["part"]] + worth if row["part"] in found else worth
        return found

    def _parts(self, index: int) -> dict[str, Part]:
        """The parts of a block by the weight that each writes with."""
        return {
            next(axis.tensor for axis in self.families[name].axes if axis.axis == 1): part
            for name, part in self.parts.items()
            if part.block == index
        }

    def _block(self, walk: Walk, run: Run, worth: Mapping[str, torch.Tensor], index: int) -> list[dict[str, Any]]:
        """Choose and mask in the loaded block, in the order of its forward pass."""
        job, parts = self.job, self._parts(index)
        stages, never = walk.stages(index, [linear for linear in job.blocks[index] if linear.tensor in parts])
        found = []
        for groups in bounded(stages, run.statistics_bytes, job.held):
            statistics = walk.watched(index, groups, job.method.watch)
            for group in groups:
                seen = statistics.pop(group.leader)
                for linear in group.linears:
                    masked, row = self._chosen(run, parts[linear.tensor], linear, seen, worth)
                    write_linear(job.skeleton, index, linear, masked)
                    found.append(row)
        for linear in never:
            seen = job.method.watch(linear.shape[1], job.device)
            found.append(self._chosen(run, parts[linear.tensor], linear, seen, worth)[1])
        return found

    def _chosen(
        self, run: Run, part: Part, linear: Linear, statistics: Any, worth: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The writing weight [out, in] of one part with zeros for what went, and what stays; it is stored if repaired."""
        job = self.job
        weight = read_linear(job.view, linear).to(job.device)
        choice: Choice = job.method.choose(part, weight, statistics, worth.get(part.name))
        columns = rows_of(((HEAD, part.size),), self.families[part.name].shape, choice.heads).to(job.device)
        kept = weight[:, columns] if choice.weight is None else choice.weight
        stored = kept.to(linear.dtype).cpu()
        if choice.weight is not None:
            run.writer.put(linear.tensor, stored.T.contiguous() if linear.transposed else stored)
        masked = torch.zeros_like(weight)
        masked[:, columns] = stored.to(weight)
        row = {"tensor": linear.tensor, "part": part.name, "units": part.kind, "kept": part.kept, "of": part.count}
        told = {"fallbacks": choice.fallbacks} if choice.fallbacks else {}
        return masked, {**row, **choice.facts, **told, "heads": choice.heads.tolist()}

    def rows(self, found: Any) -> list[dict[str, Any]]:
        shapes = self.job.checkpoint.tensors
        out = []
        for one in found:
            shape = {"shape": list(shapes[one["tensor"]].shape), "method": self.job.label}
            out.append({**shape, **{key: value for key, value in one.items() if key != "heads"}})
        return out

    def told(self, found: Any) -> list[str]:
        kinds = {(part.kind, part.count, part.kept): PARTS[part.kind] for part in self.parts.values()}
        return [f"{kept:,} of {count:,} {kind} left in every {part}" for (kind, count, kept), part in kinds.items()]

    def uncovered(self) -> list[str]:
        """Blocks without a part of a kind that others have lost units of."""
        lines = []
        for kind in self.job.method.kinds:
            of = {part.block for part in self.parts.values() if part.kind == kind}
            lines += [
                f"{name}: left as it is, no {kind} are known in it"
                for index, (name, _) in enumerate(self.job.skeleton.blocks)
                if index not in of
            ]
        return lines


def dealt(segments: Segments, shape: Shape, rows: torch.Tensor) -> torch.Tensor:
    """Figures of the rows of an axis added up by head, float64 [groups, heads]; of what a group shares each has a part."""
    heads = torch.zeros(shape.groups, shape.heads, dtype=torch.float64)
    start = 0
    for kind, size in segments:
        stop = start + shape.count(kind) * size
        sums = rows[start:stop].cpu().double().view(shape.count(kind), size).sum(-1)
        heads += sums.view(shape.groups, shape.heads) if kind == HEAD else sums[:, None] / shape.heads
        start = stop
    return heads


def first_of(part: Part) -> torch.Tensor:
    """The first units of a part, as many as stay, int64 [kept_groups, kept_heads]: a choice before any is made."""
    groups = torch.arange(part.kept_groups)[:, None] * part.heads
    return groups + torch.arange(part.kept_heads)
