"""Which norm feeds which linear layers, proven by scaling it and them: the block's output must stay what it is.

Nothing knows a norm by name: it is a module with a vector as long as the layers' input is wide, whose output is that input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from weightworks.stream.linears import Group, Linear, Products
from weightworks.stream.replay import BlockCall

PROOF = 1e-5  # of the largest output; scales are powers of two, so 0 is usual
Form = Literal["plain", "offset"]  # whether the norm multiplies by its weight, or by one more than that (Gemma)


@dataclass(frozen=True)
class Feed:
    """``module``, by its name in the block, makes the input of ``linears`` and of nothing else."""

    module: str
    form: Form
    linears: tuple[Linear, ...]


@torch.no_grad()
def feeds(
    block: nn.Module, call: BlockCall, hidden: torch.Tensor, groups: Sequence[Group]
) -> tuple[list[Feed], list[Linear]]:
    """The feeds of a block loaded in float32, and the linears that no norm feeds alone. Weights are left as they were."""
    fed = makers(block, call, hidden, groups)
    expected = call.run(block, hidden.clone())
    found: list[Feed] = []
    others: list[Linear] = []
    for group in groups:
        name = fed.get(group.leader)
        feed = None if name is None else Feed(name, form_of(block.get_submodule(name)), group.linears)
        if feed is not None and _feeds_alone(block, feed, call, hidden, expected):
            found.append(feed)
        else:
            others += group.linears
    return found, others


def scaled(weight: torch.Tensor, scale: torch.Tensor, form: Form) -> torch.Tensor:
    """The weight of a norm whose output is divided by ``scale``."""
    return weight / scale if form == "plain" else (1 + weight) / scale - 1


def makers(block: nn.Module, call: BlockCall, hidden: torch.Tensor, groups: Sequence[Group]) -> dict[Any, str]:
    """By leader of a group the module whose output it reads."""
    made: dict[tuple[int, int], str] = {}
    alive: list[torch.Tensor] = []
    found: dict[Any, str] = {}
    leaders = {group.leader: group.columns for group in groups}

    def hook(name: str) -> Any:
        def see(_: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                alive.append(output)  # else its address could come back for another tensor
                made[output.data_ptr(), output.numel()] = name

        return see

    def seen(address: Any, x: torch.Tensor) -> None:
        name = made.get((x.data_ptr(), x.numel()))
        if address in leaders and name is not None:
            found.setdefault(address, name)

    norms = [
        (name, module)
        for name, module in block.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim == 1
    ]
    handles = [module.register_forward_hook(hook(name)) for name, module in norms]
    try:
        with Products(block, seen):
            call.run(block, hidden.clone())
    finally:
        for handle in handles:
            handle.remove()
    widths = {name: module.weight.shape[0] for name, module in norms}
    return {leader: name for leader, name in found.items() if widths[name] == leaders[leader]}


@torch.no_grad()
def form_of(norm: nn.Module) -> Form:
    """How a norm uses its weight: one that multiplies by one more still puts something out when weight and bias are zero."""
    values = dict(norm.named_parameters(recurse=False))
    kept = {name: value.data.clone() for name, value in values.items()}
    for value in values.values():
        value.data.zero_()
    gains = values["weight"]
    probe = torch.arange(1.0, len(gains) + 1, device=gains.device)[None]
    form: Form = "offset" if norm(probe).any() else "plain"
    for name, value in values.items():
        value.data.copy_(kept[name])
    return form


def _feeds_alone(block: nn.Module, feed: Feed, call: BlockCall, hidden: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the block's output stays when the norm and the linears are scaled against each other."""
    if any(linear.piece.expert is not None or linear.transposed for linear in feed.linears):
        return False
    norm: Any = block.get_submodule(feed.module)
    scale = torch.ones(feed.linears[0].shape[1], device=hidden.device)
    scale[::2], scale[1::3] = 2.0, 0.5
    weights = [block.get_parameter(linear.parameter) for linear in feed.linears]
    kept = [tensor.data for tensor in (norm.weight, *weights)]
    bias = getattr(norm, "bias", None)
    try:
        norm.weight.data = scaled(kept[0], scale, feed.form)
        if bias is not None:
            bias.data = bias.data / scale
        for weight, before in zip(weights, kept[1:], strict=True):
            weight.data = before * scale
        got = call.run(block, hidden.clone())
    finally:
        for tensor, before in zip((norm.weight, *weights), kept, strict=True):
            tensor.data = before
        if bias is not None:
            bias.data = bias.data * scale
    return float((got - expected).abs().max()) <= PROOF * float(expected.abs().max())
