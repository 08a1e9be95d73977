"""Loading a written folder back with stock transformers, whole or its first blocks, and what it scores."""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import nn

from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.formats import packed_scheme
from weightworks.stream.passes import window_losses
from weightworks.stream.skeleton import Skeleton

NEEDS = {
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("optimum", "gptqmodel"),
    "gptq_v2": ("optimum", "gptqmodel"),
}


def stock_loader_missing(checkpoint: Checkpoint) -> list[str]:
    """Packages stock transformers would need for this folder and this environment lacks."""
    packed = packed_scheme(checkpoint)
    needs = NEEDS[packed[0].name] if packed else ()
    return [name for name in needs if importlib.util.find_spec(name) is None]


@torch.no_grad()
def stock_losses(
    checkpoint: Checkpoint,
    tokens: torch.Tensor,
    *,
    dequantize: bool = False,
    blocks: int | None = None,
    trust_remote_code: bool = False,
) -> torch.Tensor:
    """Per-token losses [n, seq - 1] of the folder as stock transformers loads it, in float32.

    ``dequantize`` asks for dense weights at load; ``blocks`` loads a model of so many leading blocks: the rest of the
    file is left unread.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint.root, trust_remote_code=trust_remote_code)
    if blocks is not None:
        shorten(config, blocks)
    options: dict[str, Any] = {}
    if dequantize:
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)  # the rest comes from the folder
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.root, config=config, dtype=torch.float32, trust_remote_code=trust_remote_code, **options
        ).eval()
        return torch.cat([window_losses(model(row, use_cache=False).logits, row) for row in tokens.split(1)])


def needs_dequantize(checkpoint: Checkpoint, skeleton: Skeleton) -> bool:
    """Whether transformers loads this folder only with ``CompressedTensorsConfig(dequantize=True)``.

    True of asymmetric compressed-tensors, whose packed zero points the loader gives a wrong shape (transformers 5.23);
    of mixtures of experts, whose fused parameters it can fill from dense experts only; and of layers with a class of
    their own, whose initialisation may reach for a dense weight.
    """
    packed = packed_scheme(checkpoint)
    if packed is None or packed[0].name != "compressed-tensors":
        return False
    view = DenseView(checkpoint)
    return not packed[1].symmetric or any(
        view.is_packed(piece.tensor) and (piece.expert is not None or type(skeleton.holder(name)) is not nn.Linear)
        for name, pieces in skeleton.pieces.items()
        for piece in pieces
    )


def shorten(config: Any, blocks: int) -> None:
    """Make ``config`` describe a model of its first ``blocks`` blocks."""
    text = config.get_text_config()
    total = text.num_hidden_layers
    for key, value in copy.copy(vars(text)).items():
        if isinstance(value, list) and len(value) == total:
            setattr(text, key, value[:blocks])
    text.num_hidden_layers = blocks


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading fewer blocks than the file holds is meant: no warnings, no bars."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            redirect_stderr(io.StringIO()),
        ):  # compressed-tensors draws bars of its own
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
