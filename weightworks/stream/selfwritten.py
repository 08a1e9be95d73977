"""Calibration text the model writes itself, as Norm Tweaking and LLM-QAT do: no data needed, but a model in memory.

Li et al., "Norm Tweaking" (AAAI 2024), after Liu et al., "LLM-QAT" (arXiv:2305.17888): a random first token, the next few
greedily, then sampling from the full distribution. The restriction of first tokens to the training corpus's languages
needs a ranking the papers do not give, so first tokens are drawn from the whole vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from weightworks.errors import ResourceError
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.stream.calibration import Calibration
from weightworks.stream.reload import quiet
from weightworks.stream.skeleton import build

GREEDY = 4  # tokens after the first that are taken greedily (3 to 5 in LLM-QAT)
BATCH = 16


@torch.no_grad()
def write_windows(
    checkpoint: Checkpoint, count: int, length: int, seed: int, *, free_bytes: int, trust_remote_code: bool = False
) -> Calibration:
    """``count`` windows int64 [count, length] written by the model; it is loaded whole, in float32.

    Raises :class:`ResourceError` when the model would not fit in ``free_bytes``.
    """
    needed = 4 * sum(info.nbytes // info.dtype.itemsize for info in checkpoint.tensors.values())
    if needed * 1.3 > free_bytes:
        raise ResourceError(
            f"--dataset self holds the whole model in memory: about {needed * 1.3 / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB free",
            hint="use --dataset builtin, or a text file",
        )
    model = _loaded(checkpoint, trust_remote_code)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    windows = [
        _write(model, torch.randint(vocabulary, (min(BATCH, count - start), 1), generator=generator), length, generator)
        for start in range(0, count, BATCH)
    ]
    return Calibration(torch.cat(windows), f"self (written by {checkpoint.name})", count)


def _loaded(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """The model in float32 in evaluation mode."""
    from transformers import AutoModelForCausalLM

    if not checkpoint.as_stored:
        view = DenseView(checkpoint)
        skeleton = build(view, trust_remote_code=trust_remote_code)
        skeleton.load(view, [*skeleton.pieces], torch.float32)
        skeleton.model.config.use_cache = True
        return skeleton.model
    with quiet():
        return AutoModelForCausalLM.from_pretrained(
            checkpoint.root, dtype=torch.float32, trust_remote_code=trust_remote_code
        ).eval()


def _write(model: torch.nn.Module, tokens: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    """Extend ``tokens`` [batch, 1] to [batch, length]."""
    cache, last = None, tokens
    for position in range(1, length):
        output = model(input_ids=last, past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[:, -1].float()
        if position <= GREEDY:
            last = logits.argmax(-1, keepdim=True)
        else:
            last = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, last], 1)
    return tokens
