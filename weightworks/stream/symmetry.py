"""Which units of a block may change places without changing what it computes: guessed by shapes, proven by running it.

A *family* is a set of heads that move together through some weights: they are rows of the linears that read the block's
stream and columns of the one that writes to it. In a feed-forward part every unit is a head of its own. In attention, query
heads move inside the group that shares a key and value head, and groups move as wholes; nothing moves inside a head,
since rotary embeddings tie its coordinates to their places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weightworks.errors import ArchitectureError
from weightworks.store.dense import DenseView
from weightworks.store.permuted import PermutedView, Rows, is_packed
from weightworks.stream.linears import Linear, block_linears, find_stages
from weightworks.stream.passes import shell
from weightworks.stream.replay import first_calls
from weightworks.stream.skeleton import Skeleton, build, place

HEAD, GROUP = "head", "group"
PROBE = (2, 24)  # windows and tokens that a block is run on
TOLERANCE = (
    1e-3  # of what the family's part adds to the block's output; float32 leaves about 1e-6, a wrong guess about 1
)


@dataclass(frozen=True)
class Shape:
    """``groups`` of ``heads`` each. An axis of a weight is made of segments, (HEAD or GROUP, rows of each) in turn."""

    groups: int
    heads: int

    def count(self, kind: str) -> int:
        return self.groups * self.heads if kind == HEAD else self.groups


Segments = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Axis:
    """Where heads lie in a tensor of the checkpoint: along its rows (``axis`` 0) or columns (1) as [out, in]."""

    tensor: str
    axis: int
    transposed: bool
    segments: Segments

    def stored(self, source: Rows) -> int:
        """The axis as ``source`` gives the tensor."""
        return 1 - self.axis if self.transposed and not is_packed(source, self.tensor) else self.axis


@dataclass(frozen=True)
class Family:
    """Heads of one part of block ``block``; ``name`` is that part's module."""

    block: int
    name: str
    shape: Shape
    axes: tuple[Axis, ...]

    def orders(self, order: torch.Tensor, source: Rows) -> dict[str, tuple[int, torch.Tensor]]:
        """What :class:`PermutedView` is told so that head ``order[k]`` of ``source`` comes to place k."""
        return {axis.tensor: (axis.stored(source), spread(axis.segments, self.shape, order)) for axis in self.axes}


def spread(segments: Segments, shape: Shape, order: torch.Tensor) -> torch.Tensor:
    """The order of heads, int64 [groups * heads], as the order of all rows of an axis."""
    return rows_of(segments, shape, order.view(-1, shape.heads))


def rows_of(segments: Segments, shape: Shape, chosen: torch.Tensor) -> torch.Tensor:
    """The rows of an axis that hold the ``chosen`` heads, int64 [groups, heads of each], in their order.

    There may be fewer groups than ``shape`` has, or fewer heads in each.
    """
    order, groups = chosen.flatten(), chosen[:, 0] // shape.heads
    found, start = [], 0
    for kind, size in segments:
        units = order if kind == HEAD else groups
        found.append((start + units[:, None] * size + torch.arange(size)).flatten())
        start += shape.count(kind) * size
    return torch.cat(found)


def random_order(shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """An order of heads that keeps groups together, int64 [groups * heads]."""
    groups = torch.randperm(shape.groups, generator=generator)
    return torch.cat([group * shape.heads + torch.randperm(shape.heads, generator=generator) for group in groups])


@dataclass(frozen=True)
class Symmetry:
    """The families of all blocks, and why parts of a block have none, by module."""

    families: tuple[Family, ...]
    unknown: Mapping[str, str]


@torch.no_grad()
def find_symmetry(view: DenseView, reader: Rows, *, trust_remote_code: bool = False) -> Symmetry:
    """The families of the model behind ``view``, read by ``reader``; one block of each structure is run.

    Raises :class:`ArchitectureError` if no block has any.
    """
    return search(build(view, trust_remote_code=trust_remote_code), reader, hint="leave out --align")


@torch.no_grad()
def search(skeleton: Skeleton, reader: Rows, *, hint: str = "") -> Symmetry:
    """:func:`find_symmetry` of a ``skeleton`` that is there; ``hint`` is what to do where nothing is found."""
    looked = _Search(skeleton, PermutedView(reader, {}))
    found = [looked.block(index) for index in range(len(skeleton.blocks))]
    if not any(found):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in looked.unknown.items())
        raise ArchitectureError(
            f"{type(skeleton.model).__name__}: no units of its blocks are known to be exchangeable ({reasons})",
            hint=hint,
        )
    return Symmetry(tuple(family for families in found for family in families), looked.unknown)


Place = tuple[
    str, int
]  # parameter inside the block, and part of it: the same in all blocks of a structure, all experts


@dataclass(frozen=True)
class _Guess:
    """A shape, and where it would lie in the linears of a part: axis and segments by place."""

    shape: Shape
    layout: Mapping[Place, tuple[int, Segments]]


class _Search:
    """Goes through the blocks; what was proven on one holds for others of the same structure."""

    def __init__(self, skeleton: Skeleton, reader: PermutedView) -> None:
        self.skeleton, self.reader = skeleton, reader
        self.dtypes = {spec.name: spec.dtype for spec in reader.specs}
        self.proven: dict[tuple[Any, ...], dict[str, _Guess]] = {}
        self.unknown: dict[str, str] = {}
        config = skeleton.model.config.get_text_config()
        tokens = torch.arange(PROBE[0] * PROBE[1]).view(PROBE) * 7 % config.vocab_size
        names = skeleton.names_of(0)
        with shell(skeleton, reader, torch.device("cpu")):
            skeleton.load(reader, names, torch.float32)
            self.calls, self.hidden = first_calls(skeleton, tokens)
            skeleton.unload(names)

    def block(self, index: int) -> list[Family]:
        """The families of one block."""
        names, prefix = self.skeleton.names_of(index), self.skeleton.blocks[index][0]
        parts = self._parts(index)
        structure = tuple((name.removeprefix(prefix), tuple(self.skeleton.get(name).shape)) for name in names)
        if structure not in self.proven:
            self.skeleton.load(self.reader, names, torch.float32)
            try:
                self.proven[structure] = self._prove(index, parts)
            finally:
                self.skeleton.unload(names)
        return [self._family(index, name, parts[name], guess) for name, guess in self.proven[structure].items()]

    def _parts(self, index: int) -> dict[str, list[Linear]]:
        """The linears of a block by the module that they work together in; each expert is a part."""
        prefix = self.skeleton.blocks[index][0]
        parts: dict[str, list[Linear]] = {}
        for linear in block_linears(self.skeleton, index, self.dtypes)[0]:
            expert = linear.piece.expert
            module = linear.module if expert is not None else linear.module.rpartition(".")[0]
            name = (module if expert is None else f"{module}.{expert}").removeprefix(prefix).lstrip(".")
            parts.setdefault(name, []).append(linear)
        return parts

    def _prove(self, index: int, parts: Mapping[str, list[Linear]]) -> dict[str, _Guess]:
        """For each part of a loaded block the first guess that the block's output does not contradict."""
        linears = [linear for part in parts.values() for linear in part]
        call, block = self.calls.blocks[index], self.skeleton.blocks[index][1]
        stages, _ = find_stages(self.skeleton, index, call, self.hidden, linears)
        turn = {
            linear.parameter: number
            for number, stage in enumerate(stages)
            for group in stage.groups
            for linear in group.linears
        }
        output = call.run(block, self.hidden)
        found: dict[str, _Guess] = {}
        alike: dict[frozenset[Place], _Guess] = {}  # the experts of a fused parameter differ in their weights alone
        reasons: dict[str, str] = {}
        for name, part in parts.items():
            guesses = list(self._guesses(part, turn))
            guess = alike.get(_kind(part)) or next(
                (one for one in guesses if self._holds(index, name, part, one, output)), None
            )
            if guess is not None:
                found[name] = guess
                alike[_kind(part)] = guess
            else:
                reason = (
                    "moving its units changes the output" if guesses else "not one part that reads and one that writes"
                )
                reasons[name] = f"{reason} ({', '.join(linear.base.rpartition('.')[2] for linear in part)})"
        for name, reason in reasons.items():
            if (guess := alike.get(_kind(parts[name]))) is not None:  # an expert that no token reached
                found[name] = guess
            else:
                self.unknown[f"{self.skeleton.blocks[index][0]}.{name}".rstrip(".")] = reason
        return found

    def _guesses(self, part: Sequence[Linear], turn: Mapping[str, int]) -> Iterator[_Guess]:
        """What the shapes allow: single units first, then heads as the configuration counts them."""
        turns = sorted({turn[linear.parameter] for linear in part if linear.parameter in turn})
        if len(turns) != 2:
            return
        ins = [linear for linear in part if turn.get(linear.parameter) == turns[0]]
        outs = [linear for linear in part if turn.get(linear.parameter) == turns[1]]
        if len(outs) != 1 or len(ins) + 1 != len(part):
            return
        width = outs[0].shape[1]
        for shape, size, layouts in self._shapes(width):
            rows = {sum(shape.count(kind) * length for kind, length in one): one for one in reversed(layouts)}
            if all(linear.shape[0] in rows for linear in ins):
                layout = {_alike(linear): (0, rows[linear.shape[0]]) for linear in ins}
                yield _Guess(shape, layout | {_alike(outs[0]): (1, ((HEAD, size),))})

    def _shapes(self, width: int) -> Iterator[tuple[Shape, int, list[Segments]]]:
        """Shapes of a part that hands ``width`` numbers on, the size of a head in them, and how rows may hold heads."""
        units = ((HEAD, 1),)
        yield Shape(width, 1), 1, [units, units * 2]  # each unit for itself; gate and up may be one tensor
        config = self.skeleton.model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None) or 0
        groups = getattr(config, "num_key_value_heads", None) or heads
        if not isinstance(heads, int) or not isinstance(groups, int) or not heads or heads % groups or width % heads:
            return
        size = width // heads
        query, key = (HEAD, size), (GROUP, size)
        yield Shape(groups, heads // groups), size, [(query,), (key,), (query, key, key)]
        if groups == heads:
            yield Shape(heads, 1), size, [((HEAD, 3 * size),)]  # query, key and value of a head side by side

    def _holds(self, index: int, name: str, part: Sequence[Linear], guess: _Guess, output: torch.Tensor) -> bool:
        """Whether a random order leaves the block's ``output`` as it was, measured by what the part adds to it."""
        if guess.shape.groups * guess.shape.heads == 1:
            return False
        family = self._family(index, name, part, guess)
        order = random_order(guess.shape, torch.Generator().manual_seed(index))
        moved = PermutedView(self.reader, family.orders(order, self.reader))
        out = next(linear for linear in part if guess.layout[_alike(linear)][0] == 1)
        prefix, block = self.skeleton.blocks[index]
        names = [
            name
            for name in self.skeleton.names_of(index)
            if any(p.tensor in moved.orders for p in self.skeleton.pieces[name])
        ]
        call = self.calls.blocks[index]
        try:
            self.skeleton.load(moved, names, torch.float32)
            change = float((call.run(block, self.hidden) - output).abs().max())
            place(self.skeleton.get(f"{prefix}.{out.parameter}").data, out.piece).zero_()
            effect = float((call.run(block, self.hidden) - output).abs().max())
        finally:
            self.skeleton.load(self.reader, names, torch.float32)
        return effect > 0 and change <= TOLERANCE * effect  # no effect: an expert that the tokens did not reach

    def _family(self, index: int, name: str, part: Sequence[Linear], guess: _Guess) -> Family:
        prefix = self.skeleton.blocks[index][0]
        axes = []
        for linear in part:
            axis, segments = guess.layout[_alike(linear)]
            axes.append(Axis(linear.tensor, axis, linear.transposed, segments))
            if axis == 0 and linear.piece.expert is None:
                pieces = self.skeleton.pieces.get(f"{linear.module}.bias", [])
                axes += [Axis(piece.tensor, 0, False, segments) for piece in pieces]
        return Family(index, f"{prefix}.{name}".rstrip("."), guess.shape, tuple(axes))


def _alike(linear: Linear) -> Place:
    return linear.parameter, linear.piece.part


def _kind(part: Sequence[Linear]) -> frozenset[Place]:
    return frozenset(map(_alike, part))
