"""Blocks of ggml, the storage types of GGUF files: weights to bytes and back.

A row of a tensor is cut into blocks of neighbouring elements; a block is a few bytes that hold its scales and codes. Layouts
are those of ggml's reference decoder, against which tests hold ours. Encoders are our own: each looks for the scale that
makes the squared error of its block smallest, and rounds codes against the scale as it is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from weightworks.store import floats
from weightworks.store.floats import FloatQuantized
from weightworks.store.ggmlk import decode_q4_k, encode_q4_k
from weightworks.store.packing import Encoded, Quantized

BLOCK = 32  # elements that share a scale
ENCODED = 1 << 17  # elements encoded at a time: what is computed on the way stays in the cache
SHRINKS = tuple(1.1 - step / 20 for step in range(8))  # scales tried for Q4_0, in parts of the usual one
LARGEST_HALF = 65504.0

Bytes = torch.Tensor  # uint8 [blocks, bytes a block]


@dataclass(frozen=True)
class BlockType:
    """A storage type: ``name`` as ggml calls it, ``width`` elements take ``nbytes`` bytes.

    ``to_blocks`` takes float32 [blocks, width] and gives bytes [blocks, nbytes]; ``from_blocks`` goes back. ``worst`` bounds the
    error of an element in parts of the largest magnitude of its block, ``least`` where that is too small for a scale;
    ``largest`` is the largest magnitude that can be stored.
    """

    name: str
    width: int
    nbytes: int
    to_blocks: Callable[[torch.Tensor], Bytes]
    from_blocks: Callable[[Bytes], torch.Tensor]
    worst: float
    least: float
    largest: float

    @property
    def bits(self) -> float:
        """Bits an element, scales included."""
        return 8 * self.nbytes / self.width

    def row_bytes(self, columns: int) -> int:
        return columns // self.width * self.nbytes

    def encode(self, rows: torch.Tensor) -> Bytes:
        """The bytes [rows, row_bytes] of float32 ``rows`` [rows, columns]; the width divides the columns."""
        blocks = rows.reshape(-1, self.width)
        parts = [self.to_blocks(part) for part in blocks.split(max(1, ENCODED // self.width))]
        return torch.cat(parts).view(len(rows), -1)

    def decode(self, stored: Bytes) -> torch.Tensor:
        """What the bytes [rows, row_bytes] mean, float32 [rows, columns]."""
        blocks = stored.reshape(-1, self.nbytes)
        parts = [self.from_blocks(part) for part in blocks.split(max(1, ENCODED // self.width))]
        return torch.cat(parts).view(len(stored), -1)


def exact(weight: Encoded, kind: BlockType) -> Bytes | None:
    """The bytes [out, row_bytes] of ``kind`` that mean exactly what a packed weight means; None where there are none.

    Integers go into Q8_0, and into Q4_0 where they lie within 8 below and 7 above their zero point, if groups are whole blocks
    and scales are numbers of half precision. MXFP4 is MXFP4.
    """
    if isinstance(weight, FloatQuantized):
        scheme = weight.scheme
        alike = (scheme.kind, scheme.scales, scheme.group_size, scheme.rows) == ("E2M1", "E8M0", BLOCK, 1)
        if kind.name != "MXFP4" or not alike:
            return None
        return torch.cat([weight.scale.reshape(-1, 1), _nibbles(weight.codes.view(-1, BLOCK))], 1).view(
            len(weight.codes), -1
        )
    if kind.name not in ("Q4_0", "Q8_0") or not isinstance(weight, Quantized) or weight.group_index is not None:
        return None
    rows, groups = weight.scale.shape
    size = weight.codes.shape[1] // groups
    scale = weight.scale.float()
    codes = weight.codes.view(rows, groups, size).short() - weight.zero.short().unsqueeze(-1)  # [out, groups, group]
    low, high = (-8, 7) if kind.name == "Q4_0" else (-128, 127)
    if size % BLOCK or not torch.equal(scale.half().float(), scale) or codes.min() < low or codes.max() > high:
        return None
    d = scale.half().repeat_interleave(size // BLOCK, 1).view(-1, 1)  # [blocks, 1]
    return _halves(d, codes.view(-1, BLOCK), kind).view(rows, -1)


def _halves(d: torch.Tensor, codes: torch.Tensor, kind: BlockType) -> Bytes:
    """Blocks of float16 scales ``d`` [blocks, 1] and signed codes [blocks, 32]."""
    body = _nibbles((codes + 8).to(torch.uint8)) if kind.name == "Q4_0" else codes.to(torch.int8).view(torch.uint8)
    return torch.cat([d.view(torch.uint8), body], 1)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [blocks, 32] two a byte: [blocks, 16], element i low, element i + 16 high."""
    return codes[:, :16] | (codes[:, 16:] << 4)


def _codes(nibbles: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_nibbles`."""
    return torch.cat([nibbles & 15, nibbles >> 4], 1)


def _divided(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """x / d, and 0 where d is."""
    return torch.where(d == 0, 0.0, x / torch.where(d == 0, 1.0, d))


def _to_q8_0(x: torch.Tensor) -> Bytes:
    d = (x.abs().amax(1, keepdim=True) / 127).half()
    codes = _divided(x, d.float()).round_().clamp_(-127, 127)
    return _halves(d, codes, Q8_0)


def _from_q8_0(stored: Bytes) -> torch.Tensor:
    return stored[:, :2].contiguous().view(torch.float16).float() * stored[:, 2:].view(torch.int8).float()


def _to_q4_0(x: torch.Tensor) -> Bytes:
    """The usual scale lays the element of largest magnitude on -8. Others near it, of either sign, are tried, and from the best
    one the scale that fits its codes by least squares."""
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True))
    usual = extreme / -8

    def rounded(d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale = d.clamp(-LARGEST_HALF, LARGEST_HALF).half().float()
        codes = _divided(x, scale).round_().clamp_(-8, 7)
        return scale, codes, (codes * scale - x).square().sum(1, keepdim=True)

    best = rounded(usual)
    for factor in (*SHRINKS, *(-shrink for shrink in SHRINKS)):
        best = _better(best, rounded(usual * factor))
    fitted = _divided((x * best[1]).sum(1, keepdim=True), best[1].square().sum(1, keepdim=True))
    scale, codes, _ = _better(best, rounded(fitted))
    return _halves(scale.half(), codes, Q4_0)


def _better(
    one: tuple[torch.Tensor, torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each block the one of smaller error (the last of three); the first where they tie."""
    take = other[2] < one[2]
    return torch.where(take, other[0], one[0]), torch.where(take, other[1], one[1]), torch.where(take, other[2], one[2])


def _from_q4_0(stored: Bytes) -> torch.Tensor:
    return stored[:, :2].contiguous().view(torch.float16).float() * (_codes(stored[:, 2:]).float() - 8)


def _to_mxfp4(x: torch.Tensor) -> Bytes:
    """Of the power of two that the specification takes and the next one, the better."""
    exponent = torch.frexp(x.abs().amax(1, keepdim=True)).exponent - 3  # floor(log2(max)) - 2

    def rounded(power: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale = (power + floats.BIAS).clamp(0, 254).to(torch.uint8)
        acting = floats.decoded_scale(scale)
        codes = floats.encode(x / acting, "E2M1")
        return scale, codes, (floats.decode(codes, "E2M1") * acting - x).square().sum(1, keepdim=True)

    scale, codes, _ = _better(rounded(exponent), rounded(exponent + 1))
    return torch.cat([scale, _nibbles(codes)], 1)


def _from_mxfp4(stored: Bytes) -> torch.Tensor:
    return floats.decoded_scale(stored[:, :1]) * floats.decode(_codes(stored[:, 1:]), "E2M1")


def _plain(dtype: torch.dtype) -> tuple[Callable[[torch.Tensor], Bytes], Callable[[Bytes], torch.Tensor]]:
    """Elements as they are, rounded to ``dtype``."""
    return (
        lambda x: x.to(dtype).contiguous().view(torch.uint8),
        lambda stored: stored.contiguous().view(dtype).float(),
    )


TINY_HALF = 2.0**-24  # the smallest scale of half precision
F32 = BlockType("F32", 1, 4, *_plain(torch.float32), 0.0, 0.0, torch.finfo(torch.float32).max)
F16 = BlockType("F16", 1, 2, *_plain(torch.float16), 2.0**-11, TINY_HALF, LARGEST_HALF)
BF16 = BlockType("BF16", 1, 2, *_plain(torch.bfloat16), 2.0**-8, 0.0, torch.finfo(torch.bfloat16).max)
Q8_0 = BlockType("Q8_0", BLOCK, 34, _to_q8_0, _from_q8_0, 1 / 200, 127 * TINY_HALF, 127 * LARGEST_HALF)
Q4_0 = BlockType("Q4_0", BLOCK, 18, _to_q4_0, _from_q4_0, 1 / 2, 8 * TINY_HALF, 8 * LARGEST_HALF)
Q4_K = BlockType("Q4_K", 256, 144, encode_q4_k, decode_q4_k, 1 / 2, 960 * TINY_HALF, 63 * LARGEST_HALF)
MXFP4 = BlockType("MXFP4", BLOCK, 17, _to_mxfp4, _from_mxfp4, 1 / 2, 2.0**-126, 6 * 2.0**125)
TYPES = {kind.name: kind for kind in (F32, F16, BF16, Q8_0, Q4_0, Q4_K, MXFP4)}
