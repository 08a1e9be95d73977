"""The model taken apart: embedding and call arguments captured, blocks called one by one, the tail run on the result.

Architectures are supported by proof, not by a list: :func:`prove` compares the logits of the model's own forward pass
with those of this replay, before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from weightworks.errors import ArchitectureError, WeightworksError
from weightworks.store.writer import check_finite
from weightworks.stream.memory import ran_out
from weightworks.stream.skeleton import DenseReader, Skeleton, place

PROOF_TOLERANCE = 1e-4  # relative to the largest logit; the two passes run the same kernels, so 0 is usual


class _StopForward(Exception):
    """Raised inside a forward pass once everything needed has been seen."""


@dataclass
class BlockCall:
    """How the model calls one block: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_keyword: bool

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output hidden states [batch, seq, hidden]."""
        if self.by_keyword:
            output = block(*self.args, **{**self.kwargs, "hidden_states": hidden})
        else:
            output = block(hidden, *self.args, **self.kwargs)
        return output if isinstance(output, torch.Tensor) else output[0]


@dataclass
class Calls:
    """How the model calls all of its blocks for windows of one shape, in one dtype."""

    blocks: list[BlockCall]
    _dtype: torch.dtype = torch.float32
    _cast: dict[torch.dtype, Calls] = field(default_factory=dict)

    def run(self, index: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return self.blocks[index].run(block, hidden)

    def to(self, dtype: torch.dtype) -> Calls:
        """The same calls with floating-point arguments (masks, rotary tables) in ``dtype``."""
        if dtype == self._dtype:
            return self
        if dtype not in self._cast:
            seen: dict[int, torch.Tensor] = {}

            def cast(tensor: torch.Tensor) -> torch.Tensor:
                if id(tensor) not in seen:
                    seen[id(tensor)] = tensor.to(dtype) if tensor.is_floating_point() else tensor
                return seen[id(tensor)]

            calls = [
                BlockCall(
                    tree_map_only(torch.Tensor, cast, c.args), tree_map_only(torch.Tensor, cast, c.kwargs), c.by_keyword
                )
                for c in self.blocks
            ]
            self._cast[dtype] = Calls(calls, dtype)
        return self._cast[dtype]


@contextmanager
def _forwards(skeleton: Skeleton, make: Callable[[int, nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Replace every block's forward; a block stays the same object, so models that ask it for attributes still can."""
    try:
        for index, (_, block) in enumerate(skeleton.blocks):
            block.forward = make(index, block)
        yield
    finally:
        for _, block in skeleton.blocks:
            block.__dict__.pop("forward", None)


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3:
        raise ArchitectureError(
            "blocks do not take hidden states [batch, seq, hidden] as their first argument, so they cannot be streamed"
        )
    return hidden


def _in_turn(index: int, due: int) -> None:
    if index != due:
        raise ArchitectureError(f"the model calls block {index} of its list where block {due} is due")


@torch.no_grad()
def embed(skeleton: Skeleton, tokens: torch.Tensor) -> torch.Tensor:
    """The first block's input [batch, seq, hidden] for ``tokens`` [batch, seq]; the parts outside the blocks are loaded."""
    seen: list[torch.Tensor] = []

    def make(index: int, block: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            _in_turn(index, 0)
            seen.append(_hidden_of(args, kwargs))
            raise _StopForward

        return forward

    with _forwards(skeleton, make):
        try:
            skeleton.model(input_ids=tokens, use_cache=False)
        except _StopForward:
            pass
    if not seen:
        raise ArchitectureError(f"{type(skeleton.model).__name__} never calls the blocks of its list")
    if seen[0].shape[:2] != tokens.shape:
        raise ArchitectureError(
            f"blocks take hidden states {list(seen[0].shape)} for tokens {list(tokens.shape)}; "
            "[batch, seq, hidden] is expected"
        )
    return seen[0]


@torch.no_grad()
def capture(skeleton: Skeleton, tokens: torch.Tensor, *, returns_tuple: int) -> Calls:
    """All arguments of all blocks for windows of the shape of ``tokens``; hidden states pass through untouched."""
    calls: list[BlockCall] = []

    def make(index: int, block: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = _hidden_of(args, kwargs)
            _in_turn(index, len(calls))
            rest = {key: value for key, value in kwargs.items() if args or key != "hidden_states"}
            calls.append(BlockCall(tuple(args[1:]), rest, by_keyword=not args))
            if index == len(skeleton.blocks) - 1:
                raise _StopForward
            return _output(hidden, returns_tuple)

        return forward

    with _forwards(skeleton, make):
        try:
            skeleton.model(input_ids=tokens, use_cache=False)
        except _StopForward:
            pass
    if len(calls) != len(skeleton.blocks):
        raise ArchitectureError(f"the model called {len(calls)} blocks, its list holds {len(skeleton.blocks)}")
    return Calls(calls)


class Passed(NamedTuple):
    """How a module was called, what it was given and what it gave, both [batch, seq, hidden]."""

    call: BlockCall
    given: torch.Tensor
    made: torch.Tensor


@torch.no_grad()
def passing(block: nn.Module, module: nn.Module, call: BlockCall, hidden: torch.Tensor) -> Passed:
    """What happens at a ``module`` of a loaded block as ``hidden`` passes the block."""
    seen: list[Passed] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = _hidden_of(args, kwargs)
        rest = {key: value for key, value in kwargs.items() if args or key != "hidden_states"}
        made = output if isinstance(output, torch.Tensor) else output[0]
        seen.append(Passed(BlockCall(tuple(args[1:]), rest, by_keyword=not args), given, made))
        raise _StopForward

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        call.run(block, hidden)
    except _StopForward:
        pass
    finally:
        handle.remove()
    if not seen:
        raise ArchitectureError(f"{type(module).__name__}: the block never calls it, so it cannot be taken by itself")
    return seen[0]


@torch.no_grad()
def first_calls(skeleton: Skeleton, tokens: torch.Tensor) -> tuple[Calls, torch.Tensor]:
    """How the blocks are called for ``tokens`` [batch, seq], and what the first is handed [batch, seq, hidden].

    The first block and the parts outside the blocks must be loaded. That replaying them gives the model is not proven.
    """
    output = _first_output(skeleton, tokens)
    returns_tuple = 0 if isinstance(output, torch.Tensor) else len(output)
    return capture(skeleton, tokens, returns_tuple=returns_tuple), embed(skeleton, tokens)


def _output(hidden: torch.Tensor, returns_tuple: int) -> Any:
    """What a block returns in the place of its own output: the proof shows that nothing but ``hidden`` is needed."""
    return (hidden, *[None] * (returns_tuple - 1)) if returns_tuple else hidden


@torch.no_grad()
def tail(skeleton: Skeleton, tokens: torch.Tensor, hidden: torch.Tensor, *, returns_tuple: int) -> torch.Tensor:
    """Logits [batch, seq, vocabulary] from the last block's output, by the model's own final layers."""
    return head(skeleton, tokens, hidden, returns_tuple=returns_tuple)


def head(skeleton: Skeleton, tokens: torch.Tensor, hidden: torch.Tensor, *, returns_tuple: int) -> torch.Tensor:
    """:func:`tail` with gradients where they are on."""

    def make(index: int, block: nn.Module) -> Callable[..., Any]:
        return lambda *args, **kwargs: _output(hidden, returns_tuple)

    with _forwards(skeleton, make):
        return skeleton.model(input_ids=tokens, use_cache=False).logits


@torch.no_grad()
def final_states(skeleton: Skeleton, tokens: torch.Tensor, hidden: torch.Tensor, *, returns_tuple: int) -> torch.Tensor:
    """What the model's head is given [batch, seq, width], from the last block's output: final norms are done."""
    return tail_and_states(skeleton, tokens, hidden, returns_tuple=returns_tuple)[1]


@torch.no_grad()
def tail_and_states(
    skeleton: Skeleton, tokens: torch.Tensor, hidden: torch.Tensor, *, returns_tuple: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`tail` and :func:`final_states` by one pass."""
    seen: list[torch.Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])

    head = skeleton.model.get_output_embeddings()
    if head is None:
        raise ArchitectureError(f"{type(skeleton.model).__name__}: has no head, so final hidden states are not known")
    handle = head.register_forward_pre_hook(look)
    try:
        logits = tail(skeleton, tokens, hidden, returns_tuple=returns_tuple)
    finally:
        handle.remove()
    return logits, seen[0]


@torch.no_grad()
def prove(skeleton: Skeleton, reader: DenseReader, tokens: torch.Tensor) -> int:
    """Check, block by block as weights stream through, that the replay reproduces the model.

    Returns ``returns_tuple``: the length of the tuple that blocks return, 0 if they return a tensor.

    ``tokens`` [2, seq]: arguments are captured on the first window, hidden states and logits compared on the second, so
    arguments that depend on the tokens are found out. Weights are scanned for NaN on the way. The parts outside the
    blocks must be loaded. Raises :class:`ArchitectureError` with the measured difference, :class:`MethodError` on NaN.
    """
    name = type(skeleton.model).__name__
    try:
        returns_tuple, difference = _compare(skeleton, reader, tokens)
    except WeightworksError:
        raise
    except Exception as error:  # whatever the model's own code raises, it does not stand being taken apart
        if ran_out(error):
            raise
        reason = (str(error).strip() or "no text").splitlines()[0]
        raise ArchitectureError(
            f"{name}: its forward pass fails once its blocks are called one by one ({type(error).__name__}: {reason}), "
            "so it cannot be streamed",
            hint="nothing was changed; please report the architecture",
        ) from error
    if not difference <= PROOF_TOLERANCE:
        raise ArchitectureError(
            f"{name}: replaying its blocks one by one gives logits that differ by {difference:.2e} of their range "
            f"(at most {PROOF_TOLERANCE:.0e} is accepted), so it cannot be streamed",
            hint="its blocks depend on the tokens or on earlier blocks beyond their hidden states; nothing was changed",
        )
    return returns_tuple


def _compare(skeleton: Skeleton, reader: DenseReader, tokens: torch.Tensor) -> tuple[int, float]:
    """The length of the tuple blocks return (0: a tensor), and the largest error of the replayed logits, relative."""
    first, second = tokens[:1], tokens[1:2]
    state: dict[str, Any] = {"tuple": 0, "calls": None}

    def load(index: int) -> None:
        names = skeleton.names_of(index)
        skeleton.load(reader, names, torch.float32, tokens.device)
        for name in names:
            pieces, whole = skeleton.pieces[name], skeleton.get(name)
            for piece in pieces:
                check_finite(piece.tensor, place(whole, piece) if len(pieces) > 1 else whole)

    def make(index: int, block: nn.Module) -> Callable[..., Any]:
        own = type(block).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if index > 0:
                load(index)
            output = own(block, *args, **kwargs)
            block.__dict__.pop("forward")
            state["replayed"] = state["calls"].run(index, block, state["replayed"])
            skeleton.unload(skeleton.names_of(index))
            return output

        return forward

    load(0)
    hidden = embed(skeleton, second)
    probe = _first_output(skeleton, first)
    state["tuple"] = 0 if isinstance(probe, torch.Tensor) else len(probe)
    state["calls"] = capture(skeleton, first, returns_tuple=state["tuple"])
    state["replayed"] = hidden
    with _forwards(skeleton, make):
        expected = skeleton.model(input_ids=second, use_cache=False).logits
    replayed = tail(skeleton, second, state["replayed"], returns_tuple=state["tuple"])
    return int(state["tuple"]), float((expected - replayed).abs().max()) / max(float(expected.abs().max()), 1e-30)


def _first_output(skeleton: Skeleton, tokens: torch.Tensor) -> Any:
    """What the first block returns, as it is: a tensor or a tuple."""
    seen: list[Any] = []
    block = skeleton.blocks[0][1]

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(type(block).forward(block, *args, **kwargs))
        raise _StopForward

    block.forward = forward
    try:
        skeleton.model(input_ids=tokens, use_cache=False)
    except _StopForward:
        pass
    finally:
        block.__dict__.pop("forward", None)
    return seen[0]
