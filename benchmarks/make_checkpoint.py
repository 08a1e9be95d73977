"""Makes a Llama checkpoint of made-up weights, for measurements of time and memory (never of quality).

    python benchmarks/make_checkpoint.py OUT --preset llama-3.2-1b --layers 2

Weights are normal with standard deviation 0.02, norm weights are 1. A few channels of what is written to the residual
stream and of the FFN's inner activations are larger than the rest, so that the Hessians of the linears that read
them are not a multiple of the identity. Each tensor depends only on the seed and its name. Tensors are written a block
of rows at a time: the model is never held. The tokenizer is that of examples/tiny-llama (2,048 tokens, all below the
vocabulary).

``--hidden`` alone scales heads, KV heads and FFN with it, at the preset's head size.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from _measure import MB, folder_bytes, parse_bytes

TINY_LLAMA = Path(__file__).resolve().parent.parent / "examples" / "tiny-llama"
POSITIONS = 4096  # long enough for every benchmark; nothing is allocated for it
BLOCK_ELEMENTS = 1 << 24  # 64 MB of float32 at a time
STD = 0.02
OUTLIER_SHARE, OUTLIER_SCALE = 1 / 256, 8.0  # about what trained 1B models show: a handful of channels, some 10 x


@dataclass(frozen=True)
class Shape:
    """The numbers that fix every tensor's shape."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    layers: int = 2


PRESETS = {
    "llama-3.2-1b": Shape(hidden=2048, ffn=8192, heads=32, kv_heads=8, head_dim=64, vocab=32000, tied=True),
    "llama-3.1-8b": Shape(hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, vocab=32000, tied=False),
    "llama-3.1-70b": Shape(hidden=8192, ffn=28672, heads=64, kv_heads=8, head_dim=128, vocab=128256, tied=False),
    "llama-3.1-405b": Shape(hidden=16384, ffn=53248, heads=128, kv_heads=8, head_dim=128, vocab=128256, tied=False),
}


def resized(preset: Shape, args: argparse.Namespace) -> Shape:
    """``preset`` with the command line's numbers in place of its own."""
    hidden = args.hidden or preset.hidden
    heads = args.heads or (hidden // preset.head_dim if args.hidden else preset.heads)
    return Shape(
        hidden=hidden,
        ffn=args.ffn or hidden * preset.ffn // preset.hidden,
        heads=heads,
        kv_heads=args.kv_heads or max(1, heads * preset.kv_heads // preset.heads),
        head_dim=preset.head_dim,
        vocab=args.vocab or preset.vocab,
        tied=preset.tied,
        layers=args.layers,
    )


def tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order of the model."""
    hidden, ffn = shape.hidden, shape.ffn
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab, hidden)
    for layer in range(shape.layers):
        block = f"model.layers.{layer}"
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{block}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{block}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{block}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
        yield f"{block}.mlp.gate_proj.weight", (ffn, hidden)
        yield f"{block}.mlp.up_proj.weight", (ffn, hidden)
        yield f"{block}.mlp.down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, hidden)


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator of its own for each name, so that no tensor depends on the others."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def outliers(seed: int, kind: str, channels: int) -> torch.Tensor:
    """The factor of each channel: 1, or more for a few.  [channels]"""
    chosen = torch.randperm(channels, generator=generator_of(seed, kind))[: max(1, round(channels * OUTLIER_SHARE))]
    factors = torch.ones(channels)
    factors[chosen] = OUTLIER_SCALE
    return factors


def row_blocks(name: str, shape: tuple[int, ...], seed: int) -> Iterator[torch.Tensor]:
    """The tensor in bfloat16, a block of rows at a time."""
    if len(shape) == 1:
        yield torch.ones(shape, dtype=torch.bfloat16)
        return
    rows, columns = shape
    generator = generator_of(seed, name)
    by_row = by_column = None
    if name.endswith("embed_tokens.weight"):
        by_column = outliers(seed, "residual", columns)
    elif name.endswith(("o_proj.weight", "down_proj.weight")):
        by_row = outliers(seed, "residual", rows)
    elif name.endswith(("up_proj.weight", "v_proj.weight")):
        by_row = outliers(seed, name, rows)
    step = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, rows, step):
        block = torch.empty(min(step, rows - start), columns).normal_(0, STD, generator=generator)
        if by_row is not None:
            block *= by_row[start : start + len(block), None]
        if by_column is not None:
            block *= by_column
        yield block.bfloat16()


def plan_shards(shape: Shape, max_shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each shard: as many as fit, at least one."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, size in tensor_shapes(shape):
        count = 2 * math.prod(size)
        if shards[-1] and filled + count > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = size
        filled += count
    return shards


def write_shard(path: Path, members: dict[str, tuple[int, ...]], seed: int | None) -> None:
    """One safetensors file: length of the header, header, tensors end to end. No seed: a hole in place of tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in members.items():
        end = offset + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if seed is None:
            file.truncate(8 + len(text) + offset)
            return
        for name, size in members.items():
            for block in row_blocks(name, size, seed):
                file.write(block.view(torch.int16).numpy().data)


def write_sidecars(out: Path, shape: Shape) -> None:
    """Configuration and tokenizer."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": POSITIONS,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = json.loads((TINY_LLAMA / "tokenizer_config.json").read_text())
    tokenizer["model_max_length"] = POSITIONS
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
    shutil.copyfile(TINY_LLAMA / "tokenizer.json", out / "tokenizer.json")


def make(out: Path, shape: Shape, *, seed: int | None, max_shard_bytes: int) -> None:
    """Write the whole checkpoint into the new folder ``out``."""
    out.mkdir(parents=True)
    shards = plan_shards(shape, max_shard_bytes)
    names = [f"model-{at:05d}-of-{len(shards):05d}.safetensors" for at in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, members in zip(names, shards, strict=True):
        write_shard(out / name, members, seed)
    if len(shards) > 1:
        total = sum(2 * math.prod(size) for members in shards for size in members.values())
        where = {tensor: name for name, members in zip(names, shards, strict=True) for tensor in members}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    write_sidecars(out, shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to make; it must not exist")
    parser.add_argument("--preset", choices=PRESETS, default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, default=2)
    for name in ("hidden", "ffn", "heads", "kv-heads", "vocab"):
        parser.add_argument(f"--{name}", type=int, help="in place of the preset's")
    parser.add_argument("--max-shard-size", type=parse_bytes, default=parse_bytes("500MB"), metavar="SIZE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--headers-only", action="store_true", help="files with holes for weights: enough for estimates"
    )
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists")
    shape = resized(PRESETS[args.preset], args)
    make(args.out, shape, seed=None if args.headers_only else args.seed, max_shard_bytes=args.max_shard_size)
    print(json.dumps({"out": str(args.out), "mb": round(folder_bytes(args.out) / MB, 1), **asdict(shape)}))


if __name__ == "__main__":
    main()
