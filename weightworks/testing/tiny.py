"""A small model made on the spot: Llama blocks of random weights, and a tokenizer trained on the built-in text."""

from __future__ import annotations

from pathlib import Path

import torch

from weightworks.stream.builtin import HERE

CALIBRATION_TEXT = HERE / "calibration.txt"
VOCABULARY = 512  # more tokens than the widest layer has inputs, so that calibration inputs span them
CALM = 0.01  # what blocks of a deep model add is small beside what passes them, as in trained ones
WIDTH = 128  # divisible by the usual group sizes


def make_model(folder: Path, *, blocks: int = 2, experts: int = 0, width: int = WIDTH) -> Path:
    """Write the model to ``folder`` in the layout of transformers, the same bytes every time; returns the folder.

    With ``experts`` it is a Mixtral, whose feed-forward parts are mixtures of so many.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mixtral" if experts else "llama",
        **({"num_local_experts": experts, "sliding_window": None} if experts else {}),
        architectures=["MixtralForCausalLM" if experts else "LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if blocks > 2 and name.endswith(("o_proj.weight", "down_proj.weight")):
            noise *= CALM
        tensor = 1 + 0.1 * noise if noise.ndim == 1 else noise * shape[-1] ** -0.5  # norms: near one, none like another
        tensors[name] = tensor.bfloat16()
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _make_tokenizer(folder)
    return folder


def _make_tokenizer(folder: Path) -> None:
    """Byte pairs, so that no text is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CALIBRATION_TEXT.read_text(encoding="utf-8")], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
