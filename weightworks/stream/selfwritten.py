"""Calibration text the model writes itself, as Norm Tweaking and LLM-QAT do: no data needed, but a model in memory.

Li et al., "Norm Tweaking" (AAAI 2024), after Liu et al., "LLM-QAT" (arXiv:2305.17888): a random first token, the next few
greedily, then sampling from the full distribution. Norm Tweaking draws first tokens from the languages that the training
corpus is mostly made of, by a ranking it does not give. Here the vocabulary stands for the corpus it was learned on: first
tokens are those whose letters are of its main scripts, the fewest that make up :data:`SHARE` of the tokens with letters.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from weightworks.errors import CalibrationError, ResourceError
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.stream.calibration import Calibration, load_tokenizer, split
from weightworks.stream.reload import quiet
from weightworks.stream.skeleton import build

GREEDY = 4  # tokens after the first that are taken greedily (3 to 5 in LLM-QAT)
BATCH = 16
SHARE = 0.8  # of the tokens with letters


@torch.no_grad()
def write_windows(
    checkpoint: Checkpoint,
    count: int,
    length: int,
    seed: int,
    *,
    free_bytes: int,
    held_out: int = 0,
    trust_remote_code: bool = False,
) -> Calibration:
    """``count`` windows int64 [count, length] written by the model, and ``held_out`` more; it is loaded whole, in float32.

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
    first, told = first_tokens(checkpoint.root, model.config.get_text_config().vocab_size, trust_remote_code)
    windows, total = [], count + held_out
    for start in range(0, total, BATCH):
        drawn = torch.randint(len(first), (min(BATCH, total - start), 1), generator=generator)
        windows.append(_write(model, first[drawn], length, generator))
    return split(torch.cat(windows), f"self (written by {checkpoint.name}, first tokens {told})", count, held_out)


def first_tokens(root: Path, size: int, trust_remote_code: bool = False) -> tuple[torch.Tensor, str]:
    """The tokens int64 [n] that a text may begin with in a vocabulary of ``size``, and which these are in words.

    Without a tokenizer, or one whose tokens have letters, that is all of them.
    """
    try:
        tokenizer = load_tokenizer(root, trust_remote_code=trust_remote_code)
    except CalibrationError:
        return torch.arange(size), "from the whole vocabulary: there is no tokenizer"
    scripts = {token: script for token in range(size) if (script := script_of(tokenizer.decode([token])))}
    if not scripts:
        return torch.arange(size), "from the whole vocabulary: its tokens have no letters"
    main, covered = [], 0
    for script, number in sorted(Counter(scripts.values()).items(), key=lambda item: (-item[1], item[0])):
        main.append(script)
        covered += number
        if covered >= SHARE * len(scripts):
            break
    chosen = [token for token, script in scripts.items() if script in main]
    return torch.tensor(chosen), f"of {', '.join(script.capitalize() for script in main)} letters"


def script_of(text: str) -> str | None:
    """The script that all letters of ``text`` are of, as the first word of their Unicode names; None if there is no one."""
    found = {unicodedata.name(letter, "").split(" ")[0] for letter in text if letter.isalpha()}
    return found.pop() if len(found) == 1 and "\ufffd" not in text else None


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
    called = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"  # its name before 5.24
    cache, last = None, tokens
    for position in range(1, length):
        output = model(input_ids=last, use_cache=True, **{called: cache})
        cache, logits = (
            output.get(called, output.past_key_values) if called == "cache" else output.past_key_values,
            output.logits[:, -1].float(),
        )
        if position <= GREEDY:
            last = logits.argmax(-1, keepdim=True)
        else:
            last = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, last], 1)
    return tokens
