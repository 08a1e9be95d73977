"""A causal LM of transformers with no weights: its structure on the meta device, filled and emptied module by module.

Nothing here knows an architecture by name. Blocks are the list of modules that holds most parameters; the way from
checkpoint names to parameters is the one transformers itself uses to load.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from weightworks.errors import ArchitectureError
from weightworks.store.dense import DenseView
from weightworks.store.documents import read_json
from weightworks.stream.memory import release, released_at_once

CONTEXT_KEYS = ("max_position_embeddings", "max_seq_len", "n_positions")  # what configurations call the longest input
COUNTED = re.compile(r"layer|block|expert|n_head|num_.*head")  # keys of what modules are built by
MOST_MODULES = 10_000
UNLIMITED = 1 << 20  # tokens, where a configuration names no limit


@dataclass(frozen=True, slots=True)
class Piece:
    """What one checkpoint tensor is to a parameter: all of it, or rows ``part`` of ``parts`` of expert ``expert``."""

    tensor: str
    expert: int | None = None
    part: int = 0
    parts: int = 1


class DenseReader(Protocol):
    """Gives dense tensors by the checkpoint's names; one that ``is_packed`` comes as [out, in], whatever its layer.

    One of quantized weights may have ``inputs(name)``: what is done to inputs before the weight multiplies them, or None.
    """

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor: ...

    def is_packed(self, name: str) -> bool: ...


@dataclass
class Skeleton:
    """The model on the meta device.

    ``blocks`` are the decoder blocks with their names; ``pieces`` maps a parameter to the checkpoint tensors that make
    it; ``unused`` are checkpoint tensors the model has no place for (they are copied through).
    """

    model: Any  # a PreTrainedModel
    blocks: list[tuple[str, nn.Module]]
    pieces: dict[str, list[Piece]]
    unused: list[str]
    _holders: dict[str, list[tuple[nn.Module, str]]] = field(repr=False, default_factory=dict)
    _rounding: dict[str, RemovableHandle] = field(repr=False, default_factory=dict)

    @property
    def context_length(self) -> int:
        """Tokens the model can take, by its configuration."""
        config: Any = self.model.config
        found = (getattr(config.get_text_config(), key, None) for key in CONTEXT_KEYS)
        return next((length for length in found if isinstance(length, int) and length > 0), UNLIMITED)

    def names_of(self, block: int | None) -> list[str]:
        """Parameters and stored buffers of one block, or (None) of everything outside the blocks."""
        if block is not None:
            return [name for name in self._holders if name.startswith(self.blocks[block][0] + ".")]
        prefixes = tuple(name + "." for name, _ in self.blocks)
        return [name for name in self._holders if not name.startswith(prefixes)]

    def load(
        self, reader: DenseReader, names: list[str], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        """Fill the named parameters with dense weights in ``dtype``."""
        rounds = getattr(reader, "inputs", None)
        for name in names:
            self.assign(name, self.assemble(reader, name, dtype).to(device))
            self._round_inputs(name, None if rounds is None else rounds(self.pieces[name][0].tensor))

    def _round_inputs(self, name: str, rounded: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        """Let the linear layer of weight ``name`` round its inputs first, or no more. Fused experts do not, as in
        transformers."""
        if (earlier := self._rounding.pop(name, None)) is not None:
            earlier.remove()
        module = self.holder(name)
        if rounded is not None and isinstance(module, nn.Linear):
            self._rounding[name] = module.register_forward_pre_hook(
                lambda _, given: (straight_through(rounded, given[0]), *given[1:])
            )

    def assemble(self, reader: DenseReader, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One parameter from its pieces."""
        module, leaf = self._holders[name][0]
        like = getattr(module, leaf)
        pieces = self.pieces[name]
        if len(pieces) == 1 and pieces[0].expert is None:
            tensor = reader.read(pieces[0].tensor, dtype if like.dtype.is_floating_point else like.dtype)
            return tensor.T.contiguous() if is_transposed(module) and reader.is_packed(pieces[0].tensor) else tensor
        whole = torch.empty(like.shape, dtype=dtype)
        for piece in pieces:
            place(whole, piece).copy_(reader.read(piece.tensor, dtype))
        return whole

    def assign(self, name: str, tensor: torch.Tensor) -> None:
        """Put ``tensor`` where parameter ``name`` is, and wherever it is tied to."""
        module, leaf = self._holders[name][0]
        is_parameter = leaf in module._parameters
        value = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        for holder, leaf in self._holders[name]:
            slots: dict[str, Any] = holder._parameters if is_parameter else holder._buffers
            slots[leaf] = value

    def get(self, name: str) -> torch.Tensor:
        module, leaf = self._holders[name][0]
        return getattr(module, leaf)

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter ``name`` itself."""
        found = self.get(name)
        assert isinstance(found, nn.Parameter)
        return found

    @property
    def learnable(self) -> list[str]:
        """Parameters that have gradients, tied ones once."""
        found = ((name, self.get(name)) for name in self.pieces)
        return [name for name, tensor in found if isinstance(tensor, nn.Parameter) and tensor.is_floating_point()]

    def holder(self, name: str) -> nn.Module:
        """The module that parameter ``name`` belongs to."""
        return self._holders[name][0][0]

    def holders(self, name: str) -> list[nn.Module]:
        """All modules that share parameter ``name``."""
        return [module for module, _ in self._holders[name]]

    def mismatches(self, view: Stored) -> list[str]:
        """Tensors whose shape is not that of their place in the model, each with both shapes."""
        found = []
        for name, pieces in self.pieces.items():
            module, whole = self.holder(name), self.get(name)
            for piece in pieces:
                wanted = tuple(whole.shape if len(pieces) == 1 else place(whole, piece).shape)
                if is_transposed(module) and view.is_packed(piece.tensor):
                    wanted = wanted[::-1]
                if (seen := view.shape(piece.tensor)) != wanted:
                    found.append(f"{piece.tensor} is {list(seen)}, the model has {list(wanted)}")
        return found

    def unload(self, names: list[str]) -> None:
        """Give the memory of the named parameters back."""
        for name in names:
            self.assign(name, self.get(name).data.to("meta"))
        release()

    def cast(self, names: list[str], dtype: torch.dtype) -> None:
        """Cast loaded parameters one by one."""
        for name in names:
            tensor = self.get(name)
            if tensor.dtype.is_floating_point and tensor.dtype != dtype:
                self.assign(name, tensor.data.to(dtype))


class _StraightThrough(torch.autograd.Function):
    """A rounding whose gradient is that of leaving its input as it is: its own is zero almost everywhere."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return rounded(x)

    @staticmethod
    def backward(_: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None


def straight_through(rounded: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``rounded(x)``, which gradients pass as if it were ``x``."""
    return _StraightThrough.apply(x, rounded) if x.requires_grad else rounded(x)


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer holds its weight as [in, out]: transformers' ``Conv1D``."""
    return type(module).__name__ == "Conv1D"


def place(whole: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The view of parameter ``whole`` that ``piece`` fills."""
    view = whole if piece.expert is None else whole[piece.expert]
    rows = view.shape[0] // piece.parts
    return view[piece.part * rows : (piece.part + 1) * rows]


class Stored(Protocol):
    """What a skeleton must know of stored tensors: a :class:`DenseView`, or a checkpoint that is yet to be written."""

    @property
    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def is_packed(self, name: str) -> bool: ...


def build(view: DenseView, *, trust_remote_code: bool = False) -> Skeleton:
    """The skeleton of the checkpoint behind ``view``; errors are those of :func:`build_for`."""
    root = view.checkpoint.root
    config = read_config(root, trust_remote_code)
    if view.checkpoint.untied:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return build_for(config, view, str(root), trust_remote_code=trust_remote_code)


def build_for(config: Any, view: Stored, where: str, *, trust_remote_code: bool = False) -> Skeleton:
    """The skeleton of the tensors ``view`` under transformers' configuration object ``config``.

    Raises :class:`ArchitectureError` when transformers has no such causal LM, no list of blocks is found, or tensors
    the model needs are missing or of another shape (all of them named).
    """
    model = _meta_model(config, where, trust_remote_code)
    pieces, unused = _map_names(model, view.names)
    holders = _holders(model)
    skeleton = Skeleton(model, _find_blocks(model), {}, unused, {})
    missing = []
    for aliases in holders:
        source = next((name for name in aliases if name in pieces), None)
        if source is None:
            missing.append(min(aliases, key=len))
            continue
        skeleton.pieces[source] = pieces[source]
        skeleton._holders[source] = [_locate(model, name) for name in aliases]
    if missing:
        shown = ", ".join(missing[:5])
        raise ArchitectureError(
            f"{where}: {len(missing)} tensors that {type(model).__name__} needs are missing: {shown}",
            hint="the checkpoint is incomplete, or config.json belongs to another model",
        )
    if wrong := skeleton.mismatches(view):
        raise ArchitectureError(
            f"{where}: {len(wrong)} tensors do not fit {type(model).__name__}: {'; '.join(wrong[:5])}",
            hint="config.json belongs to another model",
        )
    return skeleton


@contextmanager
def _buildable(where: str) -> Iterator[None]:
    """Whatever transformers has against a configuration, in one sentence."""
    try:
        yield
    except Exception as error:  # its kinds of errors are many, and the remedy is one
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArchitectureError(
            f"{where}: transformers cannot build a causal LM from config.json: {reason}",
            hint="check model_type; custom code needs --trust-remote-code",
        ) from error


def read_config(root: Path, trust_remote_code: bool) -> Any:
    """The configuration in ``root`` as transformers understands it."""
    from transformers import AutoConfig

    _refuse_endless(read_json(root / "config.json"), root)
    with _buildable(str(root)):
        return AutoConfig.from_pretrained(root, trust_remote_code=trust_remote_code)


def _refuse_endless(config: Mapping[str, Any], root: Path) -> None:
    """Refuse counts of layers that would take transformers hours to build, and then all memory."""
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_endless(value, root)
        elif isinstance(value, int | float) and COUNTED.search(key) and not value <= MOST_MODULES:
            raise ArchitectureError(
                f"{root}: config.json has {key} {value}, more than {MOST_MODULES:,}",
                hint="config.json is damaged, or not to be trusted",
            )


def _meta_model(config: Any, where: str, trust_remote_code: bool) -> nn.Module:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(
            f"{where}: {config.model_type} is an encoder-decoder model; only causal LMs can be streamed"
        )
    with _buildable(where):
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        config.use_cache = False
        # Each parameter is there for a moment before it is moved to meta; in the heap that would leave holes.
        with released_at_once(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, dtype=torch.float32, experts_implementation="eager"
            )
        model.tie_weights()
    return model.eval()


def _find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost ModuleList with most parameters: the decoder blocks."""
    found: list[tuple[int, str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(outer + ".") for _, outer, _ in found):
            found.append((sum(p.numel() for p in module.parameters()), name, module))
    if not found or max(found)[0] == 0:
        raise ArchitectureError(f"{type(model).__name__}: no list of decoder blocks found in the module tree")
    _, name, blocks = max(found, key=lambda item: item[0])
    return [(f"{name}.{index}", block) for index, block in enumerate(blocks)]


def _stored(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers, every alias of a tied one included."""
    yield from model.named_parameters(remove_duplicate=False)
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                yield (f"{path}.{leaf}" if path else leaf), buffer


def _holders(model: nn.Module) -> list[list[str]]:
    """Names grouped by the tensor they share."""
    groups: dict[int, list[str]] = {}
    for name, tensor in _stored(model):
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _locate(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _map_names(model: Any, names: list[str]) -> tuple[dict[str, list[Piece]], list[str]]:
    """Parameter -> pieces, by the renamings and conversions transformers applies when it loads this model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    state = dict(_stored(model))
    pieces: dict[str, list[Piece]] = {}
    unused = []
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state:
            unused.append(name)
        elif pattern is None:
            pieces[target] = [Piece(name)]
        else:
            converter = next(c for c in converters if pattern in c.source_patterns)
            pieces.setdefault(target, []).append(_converted(name, pattern, converter))
    return pieces, unused


def _converted(name: str, pattern: str, converter: Any) -> Piece:
    """The place of a per-expert tensor inside transformers' fused expert parameter."""
    operations = [type(op).__name__ for op in converter.operations]
    if operations not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) or converter.operations[0].dim != 0:
        raise ArchitectureError(
            f"tensor '{name}': transformers converts it by {' + '.join(operations)} while loading, which is not supported",
            hint="convert the checkpoint once with transformers' save_pretrained, or report the architecture",
        )
    parts = len(converter.source_patterns) if "Concatenate" in operations else 1
    found = re.search(pattern.replace(".", r"\.").replace(r"\.*\.", r"\.(\d+)\."), name) or re.search(
        r"\.(\d+)\.[^\d]*$", name
    )
    assert found is not None
    return Piece(name, int(found.group(1)), list(converter.source_patterns).index(pattern), parts)
