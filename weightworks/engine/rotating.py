"""A model in another basis: its residual stream and the values of heads rotated, so that no channel is far larger than others.

Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (arXiv:2404.00456), what can be absorbed of it: R1 on
the residual stream, R2 on every value head. RMS norms commute with a rotation once their gains are folded into the weights
they feed. Which weight reads or writes the stream is told by what the block does with it, on a few tokens; that the model
still gives the same logits is proven at the end, and a model whose logits change is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from weightworks.errors import MethodError
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.masks import Masks
from weightworks.store.rotated import RotatedCheckpoint, Turn
from weightworks.store.rotations import Rotation
from weightworks.stream.linears import Linear, block_linears, find_stages
from weightworks.stream.norms import PROOF as EXACT
from weightworks.stream.norms import form_of, makers
from weightworks.stream.passes import shell
from weightworks.stream.replay import BlockCall, capture, embed, prove, tail
from weightworks.stream.skeleton import Skeleton, build

TOKENS = 16
PROOF = 1e-4  # of the largest logit; in float32 about 1e-6 is usual
HINT = "leave --rotate out; nothing was changed"


@dataclass
class Roles:
    """What the parameters of a block, by their names in it, are to its rotation.

    ``readers`` are matrices that read the stream, each with the norm before it; ``writers`` add to it; ``values`` are those whose
    last rows, so many, are the value heads, which ``outputs`` read.
    """

    readers: dict[str, str] = field(default_factory=dict)
    writers: list[str] = field(default_factory=list)
    norms: dict[str, float] = field(default_factory=dict)  # by module: what is added to its gain
    values: dict[str, int] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)


@torch.no_grad()
def rotated(checkpoint: Checkpoint, *, seed: int, trust_remote_code: bool = False) -> RotatedCheckpoint:
    """``checkpoint`` in a random basis drawn from ``seed``. Raises :class:`MethodError` for a model that cannot be."""
    if Masks.of(checkpoint.root) is not None:
        raise MethodError(f"{checkpoint.root}: is pruned, and a rotation fills its zeros", hint=HINT)
    view = DenseView(checkpoint)
    if view.format is not None:
        raise MethodError(f"{checkpoint.root}: is already quantized, so it cannot be rotated", hint=HINT)
    skeleton = build(view, trust_remote_code=trust_remote_code)
    tokens = torch.arange(2 * TOKENS).view(2, TOKENS) % skeleton.model.config.get_text_config().vocab_size
    with shell(skeleton, view, torch.device("cpu")):
        returns_tuple = prove(skeleton, view, tokens)
        calls = capture(skeleton, tokens, returns_tuple=returns_tuple)
        hidden = embed(skeleton, tokens)
        turns, heads = _outside(skeleton, seed)
    known: dict[tuple[Any, ...], Roles] = {}
    for index, (prefix, _) in enumerate(skeleton.blocks):
        names = skeleton.names_of(index)
        kind = tuple((name.removeprefix(prefix), skeleton.get(name).shape) for name in names)
        if kind not in known:
            skeleton.load(view, names, torch.float32)
            known[kind] = _roles(skeleton, index, calls.blocks[index], hidden)
            skeleton.unload(names)
        turns |= _turns(skeleton, index, known[kind], seed)
    result = RotatedCheckpoint.of(checkpoint, turns, heads)
    _prove(skeleton, view, result, tokens, returns_tuple, trust_remote_code)
    return result


def _outside(skeleton: Skeleton, seed: int) -> tuple[dict[str, Turn], dict[str, str]]:
    """What becomes of the loaded tensors outside the blocks, and the head's tensor if it is the embedding's."""
    model, width = skeleton.model, _width(skeleton)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    basis, turns, heads = Rotation(width, seed), dict[str, Turn](), dict[str, str]()
    norms: list[str] = []
    others: list[str] = []
    for name in skeleton.names_of(None):
        holders = skeleton.holders(name)
        if any(one is embedding or one is head for one in holders):
            continue
        (norms if skeleton.get(name).shape == (width,) and name.endswith("weight") else others).append(name)
    others = [name for name in others if skeleton.get(name).ndim > 0 and width in skeleton.get(name).shape]
    offsets = [_offset(skeleton.holder(name), name) for name in norms]
    if head is None or others or len(norms) != 1:
        raise MethodError(
            f"{type(model).__name__}: outside its blocks a model that is rotated has an embedding, a norm and a head, "
            f"this one {', '.join([*norms, *others]) or 'no norm'}",
            hint=HINT,
        )
    offset, gain = offsets[0], skeleton.pieces[norms[0]][0].tensor
    turns[gain] = Turn(filled=1.0 - offset)
    by_module = {
        id(holder): name for name in skeleton.pieces for holder in skeleton.holders(name) if "bias" not in name
    }
    first, last = by_module[id(embedding)], by_module[id(head)]
    source = skeleton.pieces[first][0].tensor
    turns[source] = Turn(right=basis)
    called = skeleton.pieces[last][0].tensor
    if first == last:
        modules = {id(module): name for name, module in model.named_modules()}
        called = f"{modules[id(head)]}.weight"
        heads[called] = source
    turns[called] = Turn(gain=gain, offset=offset, right=basis)
    return turns, heads


def _roles(skeleton: Skeleton, index: int, call: BlockCall, hidden: torch.Tensor) -> Roles:
    """The roles of the loaded block ``index``, whose input may be ``hidden``."""
    prefix, block = skeleton.blocks[index]
    width, roles = _width(skeleton), Roles()
    linears = _matrices(skeleton, index)
    stages, never = find_stages(skeleton, index, call, hidden, linears)
    groups = [group for stage in stages for group in stage.groups]
    fed = makers(block, call, hidden, groups)
    part_of: dict[str, str] = {}  # the norm that feeds a part of the block
    for group in groups:
        norm = fed.get(group.leader)
        if norm is not None and group.columns == width:
            roles.norms.setdefault(norm, 0.0)
            for linear in group.linears:
                roles.readers[linear.parameter] = norm
                part_of.setdefault(linear.parameter.split(".")[0], norm)
    for linear in [*(one for group in groups for one in group.linears), *never]:
        part = linear.parameter.split(".")[0]
        if linear.parameter in roles.readers:
            continue
        if linear.shape[1] == width and linear.shape[0] != width and part in part_of:  # experts, which get picked rows
            roles.readers[linear.parameter] = part_of[part]
        elif linear.shape[0] == width and linear.parameter not in roles.writers:
            roles.writers.append(linear.parameter)
    for norm in roles.norms:
        roles.norms[norm] = _offset(block.get_submodule(norm), f"{prefix}.{norm}")
    loose = [
        name
        for name, module in block.named_modules()
        if name not in roles.norms and getattr(getattr(module, "weight", None), "shape", None) == (width,)
    ]
    if loose or not roles.readers or not roles.writers:
        at = f"{prefix}.{loose[0]}" if loose else prefix
        what = "scales channels of what is added to the residual stream" if loose else "does not read it through norms"
        raise MethodError(f"{type(skeleton.model).__name__} cannot be rotated: {at} {what}", hint=HINT)
    _find_values(skeleton, index, roles, call, hidden)
    return roles


def _matrices(skeleton: Skeleton, index: int) -> list[Linear]:
    """All matrices of a block, routers too."""
    prefix = skeleton.blocks[index][0]
    linears, others = block_linears(skeleton, index, _Float32())
    for full in skeleton.names_of(index):
        pieces, tensor = skeleton.pieces[full], skeleton.get(full)
        if pieces[0].tensor not in others:
            continue
        if tensor.ndim != 2 or len(pieces) > 1:
            raise MethodError(
                f"{type(skeleton.model).__name__} cannot be rotated: {full} {list(tensor.shape)} is no plain matrix",
                hint=HINT,
            )
        name, _, _ = full.rpartition(".")
        shape = (tensor.shape[0], tensor.shape[1])
        linears.append(
            Linear(pieces[0].tensor, shape, full.removeprefix(prefix + "."), pieces[0], name, False, torch.float32)
        )
    if any(linear.transposed for linear in linears):
        raise MethodError(f"{type(skeleton.model).__name__} cannot be rotated: it stores weights transposed", hint=HINT)
    return linears


class _Float32(dict[str, torch.dtype]):
    def __missing__(self, name: str) -> torch.dtype:
        return torch.float32


def _offset(norm: torch.nn.Module, name: str) -> float:
    """What is added to the loaded norm's gain. One that centres its input does not commute with rotations and is refused."""
    form = form_of(norm)
    parameters = dict(norm.named_parameters(recurse=False))
    constant = torch.ones(1, len(parameters["weight"]))
    kept = {key: value.data for key, value in parameters.items()}
    for key, value in parameters.items():
        value.data = torch.full_like(value.data, float(key == "weight"))
    flat = float(norm(constant).abs().max())
    for key, value in parameters.items():
        value.data = kept[key]
    if flat < 0.5 or len(parameters) > 1:
        raise MethodError(
            f"{name}: is a LayerNorm, which takes the mean of all channels, and that is another one after a rotation",
            hint=f"--rotate is for models with RMS norms; {HINT}",
        )
    return 0.0 if form == "plain" else 1.0


def _find_values(skeleton: Skeleton, index: int, roles: Roles, call: BlockCall, hidden: torch.Tensor) -> None:
    """The value heads: rows and columns that can be turned against each other while the block's output stays."""
    config, (prefix, block) = skeleton.model.config.get_text_config(), skeleton.blocks[index]
    count = getattr(config, "num_attention_heads", None)
    if not isinstance(count, int):
        return
    size = int(getattr(config, "head_dim", None) or _width(skeleton) // count)
    rows = size * int(getattr(config, "num_key_value_heads", None) or count)
    expected = call.run(block, hidden.clone())
    turn = Rotation(size, 0)

    def get(name: str) -> torch.nn.Parameter:
        return skeleton.parameter(f"{prefix}.{name}")

    outputs = [name for name in roles.writers if get(name).ndim == 2 and get(name).shape[1] == size * count]
    values = [name for name in roles.readers if get(name).ndim == 2 and len(get(name)) >= rows]
    for output in outputs:
        for value in values:
            bias = f"{value.removesuffix('weight')}bias"
            changed = [value, output, *([bias] if bias in dict(block.named_parameters()) else [])]
            kept = {name: get(name).data for name in changed}
            for name in changed:
                made = Turn(right=turn) if name == output else Turn(heads=turn, tail=rows)
                get(name).data = made.apply(kept[name], _NOTHING).float()
            got = call.run(block, hidden.clone())
            for name in changed:
                get(name).data = kept[name]
            if float((got - expected).abs().max()) <= EXACT * float(expected.abs().max()):
                roles.values[value] = rows
                roles.outputs.append(output)
                return


_NOTHING: Any = None  # a turn without gain reads nothing


def _turns(skeleton: Skeleton, index: int, roles: Roles, seed: int) -> dict[str, Turn]:
    """What becomes of the tensors of block ``index``."""
    prefix, config = skeleton.blocks[index][0], skeleton.model.config.get_text_config()
    basis, turns = Rotation(_width(skeleton), seed), dict[str, Turn]()
    heads = None
    if roles.values:
        size = int(getattr(config, "head_dim", None) or _width(skeleton) // config.num_attention_heads)
        heads = Rotation(size, seed + 1 + index)
    for full in skeleton.names_of(index):
        name, tensors = full.removeprefix(prefix + "."), [piece.tensor for piece in skeleton.pieces[full]]
        module, _, leaf = name.rpartition(".")
        weight = f"{module}.weight"
        turn: Turn | None = None
        if module in roles.norms:
            turn = Turn(filled=1.0 - roles.norms[module])
        elif name in roles.readers:
            norm = roles.readers[name]
            gain = skeleton.pieces[f"{prefix}.{norm}.weight"][0].tensor
            turn = Turn(gain, roles.norms[norm], basis)
            if name in roles.values:
                turn = Turn(gain, roles.norms[norm], basis, heads=heads, tail=roles.values[name])
        elif name in roles.writers:
            turn = Turn(left=basis, right=heads if name in roles.outputs else None)
        elif leaf == "bias" and weight in roles.writers:
            turn = Turn(left=basis)
        elif leaf == "bias" and weight in roles.values:
            turn = Turn(heads=heads, tail=roles.values[weight])
        if turn is not None:
            turns |= dict.fromkeys(tensors, turn)
    return turns


def _prove(
    skeleton: Skeleton,
    view: DenseView,
    result: RotatedCheckpoint,
    tokens: torch.Tensor,
    returns_tuple: int,
    trust_remote_code: bool,
) -> None:
    """Refuse a rotation under which logits change."""
    before = _logits(skeleton, view, tokens, returns_tuple)
    other = DenseView(result)
    after = _logits(build(other, trust_remote_code=trust_remote_code), other, tokens, returns_tuple)
    difference = float((after - before).abs().max() / before.abs().max())
    if not difference <= PROOF:
        raise MethodError(
            f"{type(skeleton.model).__name__} cannot be rotated: its logits would change by {difference:.1e} of the largest "
            f"(at most {PROOF:.0e} is accepted)",
            hint=HINT,
        )


def _logits(skeleton: Skeleton, view: DenseView, tokens: torch.Tensor, returns_tuple: int) -> torch.Tensor:
    """Logits in float32, one block in memory at a time."""
    cpu = torch.device("cpu")
    with shell(skeleton, view, cpu):
        calls, hidden = capture(skeleton, tokens, returns_tuple=returns_tuple), embed(skeleton, tokens)
    for index, (_, block) in enumerate(skeleton.blocks):
        names = skeleton.names_of(index)
        skeleton.load(view, names, torch.float32)
        hidden = calls.run(index, block, hidden)
        skeleton.unload(names)
    with shell(skeleton, view, cpu):
        return tail(skeleton, tokens, hidden, returns_tuple=returns_tuple)


def _width(skeleton: Skeleton) -> int:
    """Channels of the residual stream."""
    return int(skeleton.model.config.get_text_config().hidden_size)


def facts(checkpoint: RotatedCheckpoint) -> Mapping[str, Any]:
    """What was done, for the provenance."""
    turns = checkpoint.turns or {}
    return {
        "tensors": len(turns),
        "value_heads": sum(turn.heads is not None for turn in turns.values()),
        "head_untied": checkpoint.untied,
    }
