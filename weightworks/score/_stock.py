"""A whole checkpoint as a model of stock transformers, in one dtype; what that takes."""

from __future__ import annotations

import math
from typing import Any

import torch

from weightworks.errors import CheckpointError
from weightworks.score._subjects import device_of
from weightworks.stage.settings import Settings
from weightworks.store.dense import DenseView
from weightworks.stream.memory import ran_out, release, released_at_once
from weightworks.stream.reload import quiet, stock_loader_missing
from weightworks.stream.skeleton import build


def needed_bytes(view: DenseView, dtype: torch.dtype) -> int:
    """Bytes of all weights in ``dtype``, and of the packed ones beside them, which loaders keep while they decode."""
    dense = sum(math.prod(view.shape(name)) for name in view.names) * dtype.itemsize
    return dense + (view.checkpoint.nbytes if view.packed else 0)


@torch.no_grad()
def load(view: DenseView, dtype: torch.dtype, settings: Settings) -> tuple[Any, str]:
    """The model in evaluation mode on the device, and who loaded it.

    Packed folders that transformers does not load as they are (asymmetric ones) are loaded with ``dequantize=True``, and
    decoded by this package where the libraries a format needs are not installed. Raises :class:`CheckpointError` when
    the folder cannot be loaded at all.
    """
    device = device_of(settings)
    missing = stock_loader_missing(view.checkpoint)
    if missing or not view.checkpoint.as_stored:
        skeleton = build(view, trust_remote_code=settings.trust_remote_code)
        skeleton.load(view, [*skeleton.pieces], dtype)
        reason = f"{', '.join(missing)} not installed" if missing else "adapters added to the weights"
        model, loader = skeleton.model, f"weightworks' own reader ({reason})"
        model.config.use_cache = True
        return model.to(device), loader
    try:
        model, loader = _from_pretrained(view, dtype, settings, dequantize=False), "transformers"
    except CheckpointError:
        if view.format is None or view.format.name != "compressed-tensors":
            raise
        model, loader = _from_pretrained(view, dtype, settings, dequantize=True), "transformers, dequantize=True"
    return model.to(device), loader


def _from_pretrained(view: DenseView, dtype: torch.dtype, settings: Settings, *, dequantize: bool) -> Any:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    root, options = view.checkpoint.root, {}
    if dequantize:
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)  # the rest comes from the folder
    try:
        with quiet(), released_at_once():
            model = AutoModelForCausalLM.from_pretrained(
                root, dtype=dtype, trust_remote_code=settings.trust_remote_code, **options
            ).eval()
            if dtype == torch.float32:
                _cast(model, dtype)  # scales too, so that weights are decoded in float32
            model(torch.zeros(1, 1, dtype=torch.int64), use_cache=False)  # packed weights are decoded at the first call
            _cast(model, dtype)
            release()
            return model
    except Exception as error:  # whatever the loader raises, the folder is not what it should be
        if ran_out(error):
            raise
        reason = (str(error).strip() or "no text").splitlines()[0]
        raise CheckpointError(f"{root}: transformers cannot load it ({type(error).__name__}: {reason})") from error


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Bring every floating-point parameter to ``dtype``: some loaders keep the file's own."""
    for parameter in model.parameters():
        if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16) and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
