"""The linear maps of a block, found by watching it run: which weights multiply which inputs, and in what order.

Any product whose weight is a parameter of the block is seen, be it ``nn.Linear``, GPT-2's transposed ``Conv1D``, plain
``x @ W.T`` or one expert's slice of a fused parameter. Weights that read the same input form a group and share its
statistics; groups that can be solved together form a stage. Stages come in the order of the forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from weightworks.stream.replay import BlockCall, _StopForward
from weightworks.stream.skeleton import DenseReader, Piece, Skeleton, is_transposed, place

Address = tuple[str, "int | None"]  # parameter inside the block, expert index in a fused parameter
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # no matrices, and small where language models have them
MATMULS = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)


@dataclass(frozen=True, slots=True)
class Linear:
    """One weight matrix as the checkpoint stores it.

    ``tensor`` is its name there, ``shape`` [out, in] whatever way it is stored, ``parameter`` and ``piece`` its place in
    the model, ``module`` the name of the layer that holds it, ``transposed`` whether it is stored [in, out],
    ``dtype`` that of the checkpoint.
    """

    tensor: str
    shape: tuple[int, int]
    parameter: str
    piece: Piece
    module: str
    transposed: bool
    dtype: torch.dtype

    @property
    def address(self) -> Address:
        return self.parameter, self.piece.expert

    @property
    def base(self) -> str:
        """The tensor's name without ``.weight``."""
        return self.tensor.removesuffix(".weight")

    @property
    def full(self) -> str:
        """The parameter's name in the model."""
        return f"{self.module}.{self.parameter.rpartition('.')[2]}"


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that read the same input; ``leader`` is the product at which the input is seen."""

    leader: Address
    linears: tuple[Linear, ...]

    @property
    def columns(self) -> int:
        return self.linears[0].shape[1]


@dataclass(frozen=True, slots=True)
class Stage:
    """Groups whose inputs are collected in the same pass and that are solved before the next."""

    groups: tuple[Group, ...]


def block_linears(skeleton: Skeleton, index: int, dtypes: Mapping[str, torch.dtype]) -> tuple[list[Linear], list[str]]:
    """The linears of block ``index`` by structure, and the names of its other matrices (routers, fused tensors).

    Linears are weights of ``nn.Linear`` and ``Conv1D`` layers and the experts of a fused parameter whose checkpoint has
    one tensor an expert. ``dtypes`` gives the stored dtype by checkpoint name. Nothing needs to be loaded.
    """
    prefix, block = skeleton.blocks[index]
    linears, others = [], []
    for full in skeleton.names_of(index):
        parameter = full.removeprefix(prefix + ".")
        tensor = skeleton.get(full)
        module = block.get_submodule(parameter.rpartition(".")[0])
        transposed = is_transposed(module)
        layer = tensor.ndim == 2 and parameter.endswith("weight") and (transposed or isinstance(module, nn.Linear))
        for piece in skeleton.pieces[full]:
            if layer or (tensor.ndim == 3 and piece.expert is not None):
                rows, columns = tensor.shape[:-3:-1] if transposed else tensor.shape[-2:]
                shape = (rows // piece.parts, columns)
                name = full.rpartition(".")[0]
                linears.append(Linear(piece.tensor, shape, parameter, piece, name, transposed, dtypes[piece.tensor]))
            elif tensor.ndim >= 2 and isinstance(tensor, nn.Parameter) and not isinstance(module, CONVOLUTIONS):
                others.append(piece.tensor)
    return linears, others


class Products(TorchFunctionMode):
    """Calls ``seen(address, input)`` for every product with a parameter of the block."""

    def __init__(self, block: nn.Module, seen: Callable[[Address, torch.Tensor], None]) -> None:
        super().__init__()
        self.seen = seen
        self.parameters = {p.untyped_storage().data_ptr(): (name, p) for name, p in block.named_parameters()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            self._match(args[1] if len(args) > 1 else kwargs["weight"], args[0] if args else kwargs["input"])
        elif func is torch.addmm and len(args) == 3:  # Conv1D: bias + x W with W [in, out]
            self._match(args[2], args[1])
        elif func in MATMULS and len(args) == 2:
            self._match(args[1], args[0])
        return func(*args, **kwargs)

    def _match(self, weight: torch.Tensor, inputs: torch.Tensor) -> None:
        found = self.parameters.get(weight.untyped_storage().data_ptr()) if weight.ndim == 2 else None
        if found is not None:
            name, parameter = found
            expert = weight.storage_offset() // parameter[0].numel() if parameter.ndim == 3 else None
            self.seen((name, expert), inputs)


@torch.no_grad()
def find_stages(
    skeleton: Skeleton, index: int, call: BlockCall, hidden: torch.Tensor, linears: Sequence[Linear]
) -> tuple[list[Stage], list[Linear]]:
    """The stages ``linears`` of loaded block ``index`` form, and those of them the block never multiplies with.

    ``hidden`` [batch, seq, hidden] is any input. All experts are found once one of them is called.
    """
    block = skeleton.blocks[index][1]
    order: dict[Address, int] = {}  # product -> number of its input
    numbers: dict[tuple[int, int, int], int] = {}
    alive = []  # inputs stay referenced, else an address could come back for another tensor

    def seen(address: Address, x: torch.Tensor) -> None:
        alive.append(x)
        order.setdefault(address, numbers.setdefault((x.data_ptr(), x.numel(), x._version), len(numbers)))

    with Products(block, seen):
        call.run(block, hidden)
    called: dict[str, int] = {}
    for (parameter, _), number in order.items():
        called.setdefault(parameter, number)
    members: dict[tuple[object, ...], list[Linear]] = {}
    unseen = []
    for linear in sorted(
        linears, key=lambda linear: list(called).index(linear.parameter) if linear.parameter in called else 0
    ):
        if linear.parameter not in called:
            unseen.append(linear)
            continue
        shared = (called[linear.parameter],) if linear.piece.expert is None else linear.address
        members.setdefault(shared, []).append(linear)
    stages: dict[str, list[Group]] = {}
    homes: dict[str, list[Group]] = {}
    for group in members.values():
        stage = stages.setdefault(_kind(group[0]), [])  # experts kept as separate layers are solved together
        stage.append(Group(group[0].address, tuple(group)))
        homes.update((_kind(linear), stage) for linear in group)
    for linear in unseen:  # an expert that these inputs did not reach goes with those they did: others may reach it
        if _kind(linear) in homes:
            homes[_kind(linear)].append(Group(linear.address, (linear,)))
    never = [linear for linear in unseen if _kind(linear) not in homes]
    return [Stage(tuple(groups)) for groups in stages.values()], never


def _kind(linear: Linear) -> str:
    """The parameter's name without the number of its expert."""
    return re.sub(r"\.\d+\.", ".*.", linear.parameter)


@torch.no_grad()
def watch(
    block: nn.Module, call: BlockCall, hidden: torch.Tensor, watchers: Mapping[Address, Callable[[torch.Tensor], None]]
) -> None:
    """Run ``hidden`` through ``block``, handing each watched product's input [tokens, in] to its watcher.

    The pass ends as soon as all these products are reached: what follows is not needed.
    """
    awaited = set(watchers)

    def seen(address: Address, x: torch.Tensor) -> None:
        if address in watchers:
            watchers[address](x.reshape(-1, x.shape[-1]))
            awaited.discard(address)
            if not awaited:
                raise _StopForward

    try:
        with Products(block, seen):
            call.run(block, hidden)
    except _StopForward:
        pass


def head_linear(skeleton: Skeleton, dtypes: Mapping[str, torch.dtype]) -> Linear | None:
    """The output embedding as a linear; None if the model has none of its own: it is the input embedding, or no plain layer."""
    head, embedding = skeleton.model.get_output_embeddings(), skeleton.model.get_input_embeddings()
    for name, pieces in skeleton.pieces.items():
        holders = skeleton.holders(name)
        if any(holder is head for holder in holders) and isinstance(head, nn.Linear) and name.endswith("weight"):
            if any(holder is embedding for holder in holders):
                return None
            rows, columns = head.weight.shape
            module, _, leaf = name.rpartition(".")
            return Linear(pieces[0].tensor, (rows, columns), leaf, pieces[0], module, False, dtypes[pieces[0].tensor])
    return None


def turned(weight: torch.Tensor, linear: Linear) -> torch.Tensor:
    """``weight`` as the layer holds it seen as [out, in], or the other way round."""
    return weight.T if linear.transposed else weight


def read_linear(reader: DenseReader, linear: Linear) -> torch.Tensor:
    """The weight [out, in] in float32, whatever way it is stored."""
    weight = reader.read(linear.tensor, torch.float32)
    return weight.T.contiguous() if linear.transposed else weight


def write_linear(skeleton: Skeleton, index: int, linear: Linear, weight: torch.Tensor) -> None:
    """Put ``weight`` [out, in] into the loaded block."""
    parameter = skeleton.get(f"{skeleton.blocks[index][0]}.{linear.parameter}")
    place(parameter.data, linear.piece).copy_(weight.T if linear.transposed else weight)


def held_weight(skeleton: Skeleton, index: int, linear: Linear) -> torch.Tensor:
    """The weight [out, in] as the loaded block holds it."""
    return turned(place(skeleton.get(f"{skeleton.blocks[index][0]}.{linear.parameter}").data, linear.piece), linear)
