"""A checkpoint with factors beside its weights, loaded as a model that multiplies by the factors.

    from compress.factored import load_factored

    model = load_factored("tiny-llama-armor")
    model.generate(...)

Every linear layer that has factors becomes a :class:`FactoredLinear`, which holds them in place of the weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightworks.errors import CheckpointError
from weightworks.store.checkpoint import FACTORS, Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.factors import FactorFile, Factors
from weightworks.stream.skeleton import build


class FactoredLinear(nn.Module):
    """y = A (S (B x)) + bias, for inputs [..., in]; ``core`` is dense in memory, zero outside its 2:4 pattern."""

    def __init__(self, factors: Factors, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        factors = factors.to(dtype)
        self.out_features, self.in_features = factors.core.shape
        self.left = nn.Parameter(factors.left, requires_grad=False)
        self.core = nn.Parameter(factors.core, requires_grad=False)
        self.right = nn.Parameter(factors.right, requires_grad=False)
        self.bias = bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = _by_blocks(inputs, self.right)
        y = _by_blocks(nn.functional.linear(x, self.core), self.left)
        return y if self.bias is None else y + self.bias


def _by_blocks(inputs: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """A block-diagonal matrix of ``blocks`` [n, b, b] times ``inputs`` [..., n b]."""
    cut = inputs.unflatten(-1, (-1, blocks.shape[-1])).unsqueeze(-1)  # [..., n, b, 1]
    return (blocks @ cut).flatten(-3)


def load_factored(folder: str | Path, **keywords: Any) -> Any:
    """The model in ``folder``, loaded by ``AutoModelForCausalLM.from_pretrained`` with ``keywords``, its layers factored.

    Weights whose factors fit no plain linear layer (experts in one fused parameter) stay the dense products they are.
    Raises :class:`CheckpointError` for a folder without factors.
    """
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint.open(str(folder))
    found = FactorFile.of(checkpoint.root)
    if found is None:
        raise CheckpointError(
            f"{folder}: has no {FACTORS}",
            hint="it is written by compress prune --method armor; others load as they are",
        )
    skeleton = build(DenseView(checkpoint), trust_remote_code=bool(keywords.get("trust_remote_code")))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.root, **keywords)
    names = set(found.names)
    for parameter, pieces in skeleton.pieces.items():
        path, _, kind = parameter.rpartition(".")
        if kind == "weight" and len(pieces) == 1 and pieces[0].tensor in names:
            layer = model.get_submodule(path)
            factored = FactoredLinear(found.read(pieces[0].tensor), layer.bias, layer.weight.dtype)
            model.set_submodule(path, factored.to(layer.weight.device))
    return model
