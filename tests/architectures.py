"""Tiny random checkpoints of many architectures, as transformers saves them, with the embedded model's tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

REPOSITORY = Path(__file__).resolve().parent.parent
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
SLIDING = 24  # shorter than the windows of the tests, so that the sliding mask matters

BASE = {"vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = {
    **BASE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
TIED = {**LLAMA, "tie_word_embeddings": True}
EXPERTS = {**LLAMA, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
MIXTRAL = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {**BASE, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
OPT = {
    **BASE,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
NEOX = {
    **BASE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


@dataclass(frozen=True)
class Architecture:
    """One model: transformers' ``model_type``, what its configuration says, and how it is saved.

    ``base`` saves the model without its head (names lose their prefix); ``shard`` is the largest shard.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    base: bool = False
    shard: str = "5GB"

    def save(self, folder: Path, *, change: Callable[[Any], None] = lambda model: None) -> Path:
        """Write the checkpoint to ``folder``; ``change`` may alter the model first."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(self.kind, **self.options)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # some models draw their vectors, too
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomise(model)
        with torch.no_grad():
            change(model)
        model.to(self.dtype)
        (model.base_model if self.base else model).save_pretrained(folder, max_shard_size=self.shard)
        add_tokenizer(folder)
        return folder


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights with which every part of the model matters: biases, norms and routers are far from neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)


def add_tokenizer(folder: Path) -> None:
    for name in TOKENIZER:
        shutil.copyfile(REPOSITORY / "examples" / "tiny-llama" / name, folder / name)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", LLAMA),
    "llama-tied-sharded": Architecture("llama", TIED, torch.bfloat16, shard="150KB"),
    "mistral": Architecture("mistral", {**LLAMA, "sliding_window": SLIDING}, torch.float16),
    "qwen2": Architecture("qwen2", TIED, torch.bfloat16),
    "qwen3": Architecture("qwen3", LLAMA, torch.bfloat16),
    "gemma2": Architecture("gemma2", {**TIED, "sliding_window": SLIDING}, torch.bfloat16),
    "gemma3": Architecture(
        "gemma3_text",
        {
            **TIED,
            "num_hidden_layers": 3,
            "sliding_window": SLIDING,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": Architecture("phi3", LLAMA, torch.bfloat16),
    "opt": Architecture("opt", OPT, torch.float16),
    "gpt2": Architecture("gpt2", GPT2),
    "gpt2-base": Architecture("gpt2", GPT2, torch.float16, base=True),
    "gpt_neox": Architecture("gpt_neox", NEOX, torch.float16),
    "falcon": Architecture("falcon", {**BASE, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "bloom": Architecture("bloom", {**BASE, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mixtral": Architecture("mixtral", MIXTRAL),
    "qwen2_moe": Architecture("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": Architecture("qwen3_moe", EXPERTS, torch.bfloat16),
    "mamba2": Architecture(
        "mamba2",
        {
            **BASE,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 16,
            "head_dim": 16,
            "num_heads": 8,
            "n_groups": 1,
        },
    ),
}
