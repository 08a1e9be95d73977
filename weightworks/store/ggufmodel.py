"""A checkpoint in the terms of GGUF: which tensor is called what, in which order of rows, and what the engine must be told.

llama.cpp computes an architecture by its name, so only those are here whose every setting has a place in the file. Names of
tensors come from the ``gguf`` package. Everything that cannot be said in the file is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from weightworks.errors import ArchitectureError, CheckpointError
from weightworks.store.dense import DenseView
from weightworks.store.gguffile import Value

Config = Mapping[str, Any]
SKIPPED = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)$")  # buffers that old checkpoints carry
EMBEDDINGS = ("token_embd.weight", "output.weight")
POSITIONS = "position_embd.weight"


@dataclass(frozen=True)
class Part:
    """A tensor of the file.

    ``source`` is its name in the checkpoint; ``shape`` [rows, columns] that in the file. ``heads``: rows are to be put in the
    order of interleaved rotary pairs, head by head. ``transposed``: the checkpoint has it as [columns, rows]. ``values``: the
    tensor itself, where it is none of the checkpoint's.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    heads: int = 0
    transposed: bool = False
    values: torch.Tensor | None = None

    def order(self) -> torch.Tensor | None:
        """Which row of the checkpoint's tensor each row of the file is; None: as they are.

        transformers turns element i of a head with element i + d/2, ggml's Llama element 2i with 2i + 1.
        """
        if not self.heads:
            return None
        return torch.arange(self.shape[0]).view(self.heads, 2, -1).transpose(1, 2).flatten()


@dataclass(frozen=True)
class Model:
    """A model as a GGUF file has it: ``architecture``, ``metadata`` (without the vocabulary), ``parts``; ``remarks`` say what the
    file cannot."""

    architecture: str
    metadata: dict[str, Value]
    parts: list[Part]
    remarks: list[str] = field(default_factory=list)


def model_of(view: DenseView) -> Model:
    """The model that ``view`` is. Raises :class:`ArchitectureError` for what a file cannot say, naming it."""
    config = view.checkpoint.config
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ArchitectureError(
            f"{view.checkpoint.root}: model_type is '{kind}', and GGUF files are written of {', '.join(sorted(FAMILIES))}",
            hint="convert it with the tools of llama.cpp, from a dense folder",
        )
    try:
        model = FAMILIES[kind](config)
    except KeyError as error:
        raise CheckpointError(f"{view.checkpoint.root}: config.json has no {error}", hint="fetch it again") from None
    model.parts.extend(_parts(view, model, config))
    return model


def _parts(view: DenseView, model: Model, config: Config) -> list[Part]:
    from gguf import MODEL_ARCH, get_tensor_name_map

    blocks = model.metadata[f"{model.architecture}.block_count"]
    assert isinstance(blocks, int)
    names = get_tensor_name_map(MODEL_ARCH[model.architecture.upper()], blocks)
    parts, strange = [], []
    for source in view.names:
        if SKIPPED.search(source):
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            strange.append(source)
        else:
            parts.append(_part(name, source, view.shape(source), config))
    if strange:
        raise ArchitectureError(
            f"{view.checkpoint.root}: {len(strange)} tensors have no name in GGUF files of {model.architecture}: "
            f"{', '.join(strange[:5])}"
        )
    _complete(view, parts, blocks)
    return parts


def _part(name: str, source: str, shape: tuple[int, ...], config: Config) -> Part:
    transposed = config["model_type"] == "gpt2" and bool(re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", source))
    heads = 0
    if config["model_type"] in ("llama", "mistral") and (rotated := re.search(r"\.attn_([qk])\.", name)):
        heads = config["num_attention_heads"] if rotated[1] == "q" else _key_heads(config)
    return Part(name, source, shape[::-1] if transposed else shape, heads, transposed)


def _complete(view: DenseView, parts: list[Part], blocks: int) -> None:
    """Whether every block is there and has what the others have, and embedding and last norm are."""
    found: dict[int, set[str]] = {block: set() for block in range(blocks)}
    for part in parts:
        if inner := re.fullmatch(r"blk\.(\d+)\.(.*)", part.name):
            found[int(inner[1])].add(inner[2])
    lost = {f"blk.{block}.{name}" for block in found for name in set().union(*found.values()) - found[block]}
    lost |= {"token_embd.weight", "output_norm.weight"} - {part.name for part in parts}
    if lost or not all(found.values()):
        raise CheckpointError(
            f"{view.checkpoint.root}: tensors are missing, in the names of GGUF: {', '.join(sorted(lost)[:5]) or 'all'}",
            hint="fetch the checkpoint again",
        )


def _key_heads(config: Config) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _decoder(architecture: str, config: Config) -> Model:
    """Models of the shape of Llama: rotary positions, RMS norms, a gated feed-forward part."""
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ArchitectureError(f"hidden_act is '{activation}'; engines of GGUF files compute {architecture} with silu")
    heads = int(config["num_attention_heads"])
    head_size = int(config.get("head_dim") or config["hidden_size"] // heads)
    keys: dict[str, Value] = {
        "vocab_size": int(config["vocab_size"]),
        "context_length": int(config["max_position_embeddings"]),
        "embedding_length": int(config["hidden_size"]),
        "block_count": int(config["num_hidden_layers"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": heads,
        "attention.head_count_kv": _key_heads(config),
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "rope.dimension_count": head_size,
    }
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    keys["rope.freq_base"] = base
    model = Model(architecture, {f"{architecture}.{key}": value for key, value in keys.items()}, [])
    _stretch(model, rope, base, head_size)
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True) and window < keys["context_length"]:
        model.remarks.append(
            f"attention reaches back {window} tokens, which the file cannot say: longer texts are read otherwise"
        )
    return model


def _stretch(model: Model, rope: Mapping[str, Any], base: float, head_size: int) -> None:
    """What stretches rotary positions to longer texts, in ``model``'s metadata or as its tensor of factors."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    prefix = f"{model.architecture}.rope.scaling"
    if kind == "linear":
        model.metadata.update({f"{prefix}.type": "linear", f"{prefix}.factor": float(rope["factor"])})
    elif kind == "yarn":
        model.metadata.update({f"{prefix}.type": "yarn", f"{prefix}.factor": float(rope["factor"])})
        model.metadata[f"{prefix}.original_context_length"] = int(rope["original_max_position_embeddings"])
    elif kind == "llama3":
        factors = _llama3(rope, base, head_size)
        model.parts.append(Part("rope_freqs.weight", "", tuple(factors.shape), values=factors))
        model.remarks.append("rotary factors of Llama 3 are in rope_freqs.weight, which transformers does not read")
    elif kind != "default":
        raise ArchitectureError(f"rotary positions are scaled by '{kind}'; known: default, linear, yarn, llama3")


def _llama3(rope: Mapping[str, Any], base: float, head_size: int) -> torch.Tensor:
    """What each rotary frequency is divided by, float32 [head_size / 2] (Llama 3.1): long waves by the whole factor, short ones
    by 1, those between by a mean of the two."""
    wave = 2 * math.pi * base ** (torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    length, factor = rope["original_max_position_embeddings"], float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    smooth = ((length / wave - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _gpt2(config: Config) -> Model:
    if (activation := config.get("activation_function", "gelu_new")) not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ArchitectureError(
            f"activation_function is '{activation}'; engines of GGUF files compute gpt2 with gelu_new"
        )
    for key, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if config.get(key, usual) != usual:
            raise ArchitectureError(f"{key} is {config[key]}, which a GGUF file of gpt2 cannot say")
    width = int(config["n_embd"])
    keys: dict[str, Value] = {
        "vocab_size": int(config["vocab_size"]),
        "context_length": int(config["n_positions"]),
        "embedding_length": width,
        "block_count": int(config["n_layer"]),
        "feed_forward_length": int(config.get("n_inner") or 4 * width),
        "attention.head_count": int(config["n_head"]),
        "attention.layer_norm_epsilon": float(config.get("layer_norm_epsilon", 1e-5)),
    }
    return Model("gpt2", {f"gpt2.{key}": value for key, value in keys.items()}, [])


FAMILIES: dict[str, Callable[[Config], Model]] = {
    "llama": lambda config: _decoder("llama", config),
    "mistral": lambda config: _decoder("llama", config),
    "qwen2": lambda config: _decoder("qwen2", config),
    "qwen3": lambda config: _decoder("qwen3", config),
    "gpt2": _gpt2,
}
