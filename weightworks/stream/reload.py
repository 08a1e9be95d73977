"""Loading a written folder back with stock transformers, whole or its first blocks, and what it scores."""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch

from weightworks.errors import VerificationError
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.compressed import MIXED
from weightworks.store.dense import DenseView
from weightworks.store.formats import FORMATS, packed_scheme
from weightworks.store.mixed import all_of
from weightworks.stream.memory import ran_out, release, released_at_once
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


@dataclass(frozen=True)
class Reload:
    """What stock transformers made of a folder.

    ``losses`` are per token, [n, seq - 1]; ``dequantize`` says that it had to be asked for dense weights; ``weights``
    gives the weights it ran with; ``dtype`` is the one it must be loaded in, None if any will do.
    """

    losses: torch.Tensor
    dequantize: bool
    weights: Rounded
    dtype: torch.dtype | None = None

    @property
    def rounds(self) -> bool:
        """Whether it ran with weights other than the folder's codes and scales mean in float32."""
        return any(dtype != torch.float32 for dtype in self.weights.dtypes.values())


def stock_losses(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    tokens: torch.Tensor,
    *,
    blocks: int | None = None,
    trust_remote_code: bool = False,
) -> Reload:
    """Load the folder with stock transformers and run it in float32.

    Packed folders that it does not run as they are (asymmetric ones, some models' own initialisation, scales of inputs that
    are not a token's) are loaded with ``dequantize=True``. ``blocks`` loads a model of so many leading blocks: the rest of the
    file is left unread. Raises :class:`VerificationError` when it cannot be loaded.
    """
    view = DenseView(checkpoint)
    early = [name for name in view.packed_names if (form := view.format_of(name)) is not None and form.decodes_to]
    fixed = view.decodes_to
    try:
        losses = _losses(checkpoint, tokens, blocks, trust_remote_code, dequantize=False)
        rounded = early or (_experts(skeleton) if view.format in (FORMATS["compressed-tensors"], MIXED) else ())
        return Reload(losses, False, Rounded(view, rounded, inputs=True), fixed)
    except VerificationError:
        if view.format is None or view.format.name != "compressed-tensors":
            raise
    losses = _losses(checkpoint, tokens, blocks, trust_remote_code, dequantize=True)
    return Reload(losses, True, Rounded(view, view.names))


@torch.no_grad()
def _losses(
    checkpoint: Checkpoint, tokens: torch.Tensor, blocks: int | None, trust_remote_code: bool, *, dequantize: bool
) -> torch.Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint.root, trust_remote_code=trust_remote_code)
    if blocks is not None:
        shorten(config, blocks)
    options: dict[str, Any] = {}
    if dequantize:
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)  # the rest comes from the folder
    try:
        with quiet(), released_at_once():  # a whole model, the largest thing a run holds
            model = AutoModelForCausalLM.from_pretrained(
                checkpoint.root, config=config, dtype=torch.float32, trust_remote_code=trust_remote_code, **options
            ).eval()
            for parameter in model.parameters():
                if parameter.dtype in (torch.bfloat16, torch.float16):  # experts keep theirs, whatever was asked for
                    parameter.data = parameter.data.float()
                elif parameter.dtype != torch.float32:  # a view of the mapped file: one keeps all its pages in memory
                    parameter.data = parameter.data.clone()
            if packed_scheme(checkpoint) is not None and hasattr(model, "ct_decompress_hook"):
                # What its first call would do: some formats are decoded to bfloat16, which no float32 layer takes as it is.
                model.hf_quantizer.compressor.decompress_model(model)
                for parameter in model.parameters():
                    parameter.data = parameter.data.float()
            if not dequantize:
                refuse_flat(model, checkpoint)
            model(tokens[:1, :1], use_cache=False)  # other packed weights are decoded at the first call
            release()
            return torch.cat([window_losses(model(row, use_cache=False).logits, row) for row in tokens.split(1)])
    except Exception as error:  # whatever the loader raises, the folder is not what it should be
        if ran_out(error):
            raise
        reason = (str(error).strip() or "no text").splitlines()[0]
        raise VerificationError(f"transformers cannot load the folder ({type(error).__name__}: {reason})") from error


def refuse_flat(model: Any, checkpoint: Checkpoint) -> None:
    """Let layers that round inputs a token at a time refuse inputs [tokens, in].

    compressed-tensors 0.20 takes one scale for all tokens there (``compute_dynamic_scales_and_zp``), engines do not.
    """
    view = DenseView(checkpoint)
    schemes = [] if view.scheme is None else all_of(view.scheme)
    if not any(one.inputs is not None and one.inputs.group_size == -1 for one in schemes):
        return

    def see(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if given[0].ndim == 2:
            raise VerificationError("a layer is handed [tokens, in], for which compressed-tensors takes one scale")

    for module in model.modules():
        inputs = getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
        if inputs is not None and not inputs.group_size:
            module.register_forward_pre_hook(see)


class Rounded:
    """Dense weights, the packed ones among ``names`` in the dtype that loaders unpack them to: the format's, or that of their
    scales. ``inputs`` says whether layers round their inputs, as they do unless all is unpacked at once."""

    def __init__(self, view: DenseView, names: Iterable[str], *, inputs: bool = False) -> None:
        self.view, self.is_packed = view, view.is_packed
        scales = {name: view.tensors.get(name.removesuffix("weight") + "weight_scale") for name in names}
        self.dtypes = {
            name: (form.decodes_to if (form := view.format_of(name)) else None) or scale.dtype
            for name, scale in scales.items()
            if scale is not None
        }
        self.inputs = view.inputs if inputs else _as_given

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        weight = self.view.read(name, self.dtypes.get(name))
        return weight if dtype is None else weight.to(dtype)


def _as_given(name: str) -> None:
    """Nothing is done to inputs."""


def _experts(skeleton: Skeleton) -> list[str]:
    """Names of the experts that models hold fused: transformers unpacks those in any case."""
    return [piece.tensor for pieces in skeleton.pieces.values() for piece in pieces if piece.expert is not None]


def shorten(config: Any, blocks: int) -> None:
    """Make ``config`` describe a model of its first ``blocks`` blocks."""
    text = config.get_text_config()
    total = text.num_hidden_layers
    for key, value in copy.copy(vars(text)).items():
        if isinstance(value, list) and len(value) == total:
            setattr(text, key, value[:blocks])
    text.num_hidden_layers = blocks


@contextmanager
def quiet() -> Iterator[None]:
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
