"""Q4_K of ggml: 256 weights in 8 sub-blocks of 32 that have a scale and a minimum of 6 bits each.

    w = d * scale[j] * code - dmin * minimum[j]        code in 0 .. 15, scale and minimum in 0 .. 63, d and dmin float16

The encoder alternates between least squares and rounding: first each sub-block on its own, with real-valued scale and
minimum, from several ranges; then the 6-bit numbers and their two factors together.
"""

from __future__ import annotations

import torch

WIDTH, SUB = 256, 32
TOP, STEPS = 15.0, 63.0  # largest code, largest scale and minimum
RANGES = (14.0, 15.0, 16.0, 17.0)  # codes that the whole range of a sub-block is first laid on
ROUNDS = 1  # of fitting the factors and the 6-bit numbers again; three rounds and eight ranges gain 1 % at a third of the speed


def encode_q4_k(x: torch.Tensor) -> torch.Tensor:
    """Bytes uint8 [blocks, 144] of float32 ``x`` [blocks, 256]."""
    x = x.view(-1, WIDTH // SUB, SUB)  # [blocks, 8, 32]
    scale, minimum = _sub_blocks(x)
    d, dmin = (_half(value.amax(1) / STEPS) for value in (scale, minimum))  # [blocks]
    best = _rounded(x, d, dmin, _steps(scale, d), _steps(minimum, dmin))
    for _ in range(ROUNDS):
        best = _keep(best, _rounded(x, *best[:2], *_neighbours(x, *best[:4])))
        best = _keep(best, _rounded(x, *_factors(x, *best[2:5]), *best[2:4]))
    return _pack(*best[:5])


def decode_q4_k(stored: torch.Tensor) -> torch.Tensor:
    """What bytes [blocks, 144] mean, float32 [blocks, 256]."""
    factors = stored[:, :4].contiguous().view(torch.float16).float()  # [blocks, 2]
    low, middle, high = stored[:, 4:16].view(-1, 3, 4).unbind(1)  # [blocks, 4] each
    scale = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], 1).float()  # [blocks, 8]
    minimum = torch.cat([middle & 63, (high >> 4) | ((middle >> 6) << 4)], 1).float()
    nibbles = stored[:, 16:].view(-1, 4, 1, SUB)
    codes = torch.cat([nibbles & 15, nibbles >> 4], 2).view(-1, 8, SUB).float()
    acting = factors[:, :1] * scale, factors[:, 1:] * minimum
    return (acting[0].unsqueeze(-1) * codes - acting[1].unsqueeze(-1)).view(-1, WIDTH)


def _half(x: torch.Tensor) -> torch.Tensor:
    """As stored in half precision."""
    return x.clamp(max=65504).half().float()


def _safe(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x == 0, 1.0, x)


def _codes(x: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """Nearest codes; 0 where the scale is 0."""
    scale, minimum = scale.unsqueeze(-1), minimum.unsqueeze(-1)
    return torch.where(scale == 0, 0.0, ((x + minimum) / _safe(scale)).round_().clamp_(0, TOP))


def _error(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """Squared error of every sub-block [blocks, 8]."""
    return (codes * scale.unsqueeze(-1) - minimum.unsqueeze(-1) - x).square().sum(-1)


def _sub_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Real-valued scale and minimum, both [blocks, 8] and not negative, that suit each sub-block best."""
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    scale, minimum = (high - low) / TOP, -low
    best = _error(x, _codes(x, scale, minimum), scale, minimum)
    for count in RANGES:
        tried = (high - low) / count, -low
        for _ in range(2):
            tried = _line(x, _codes(x, *tried))
            error = _error(x, _codes(x, *tried), *tried)
            take = error < best
            best = torch.where(take, error, best)
            scale, minimum = torch.where(take, tried[0], scale), torch.where(take, tried[1], minimum)
    return scale, minimum


def _line(x: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum that fit ``codes`` by least squares, the minimum not below 0."""
    mean_code, mean = codes.mean(-1, keepdim=True), x.mean(-1, keepdim=True)
    spread = (codes - mean_code).square().sum(-1)
    slope = ((codes - mean_code) * (x - mean)).sum(-1) / _safe(spread)
    minimum = slope * mean_code.squeeze(-1) - mean.squeeze(-1)
    through = (codes * x).sum(-1) / _safe(codes.square().sum(-1))  # of a line through 0
    held = minimum < 0
    return torch.where(held, through, slope).clamp(min=0), torch.where(held, 0.0, minimum)


def _steps(value: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The 6-bit numbers nearest to ``value`` [blocks, 8] in units of ``factor`` [blocks]."""
    unit = factor.unsqueeze(-1)
    return torch.where(unit == 0, 0.0, (value / _safe(unit)).round().clamp(0, STEPS))


Rounded = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _rounded(x: torch.Tensor, d: torch.Tensor, dmin: torch.Tensor, sc: torch.Tensor, m: torch.Tensor) -> Rounded:
    """d, dmin [blocks], the 6-bit numbers [blocks, 8], codes [blocks, 8, 32] and the squared error [blocks]."""
    scale, minimum = d.unsqueeze(-1) * sc, dmin.unsqueeze(-1) * m
    codes = _codes(x, scale, minimum)
    return d, dmin, sc, m, codes, _error(x, codes, scale, minimum).sum(-1)


def _keep(one: Rounded, other: Rounded) -> Rounded:
    """For each block the one of smaller error; the first where they tie."""
    take = other[-1] < one[-1]
    chosen = [torch.where(take.view(-1, *[1] * (a.ndim - 1)), b, a) for a, b in zip(one, other, strict=True)]
    return chosen[0], chosen[1], chosen[2], chosen[3], chosen[4], chosen[5]


def _neighbours(
    x: torch.Tensor, d: torch.Tensor, dmin: torch.Tensor, sc: torch.Tensor, m: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The 6-bit numbers within one step of the given ones that suit each sub-block best."""
    best = torch.full(sc.shape, torch.inf)
    found = sc, m
    for ds in (0, -1, 1):
        for dm in (0, -1, 1):
            near = (sc + ds).clamp(0, STEPS), (m + dm).clamp(0, STEPS)
            scale, minimum = d.unsqueeze(-1) * near[0], dmin.unsqueeze(-1) * near[1]
            error = _error(x, _codes(x, scale, minimum), scale, minimum)
            take = error < best
            best = torch.where(take, error, best)
            found = torch.where(take, near[0], found[0]), torch.where(take, near[1], found[1])
    return found


def _factors(
    x: torch.Tensor, sc: torch.Tensor, m: torch.Tensor, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """d and dmin, as stored, that fit the rest by least squares: w = d a - dmin b with a = scale * code, b = minimum."""
    a = (sc.unsqueeze(-1) * codes).flatten(1)
    b = m.unsqueeze(-1).expand_as(codes).flatten(1)
    w = x.flatten(1)
    aa, bb, ab = (a * a).sum(1), (b * b).sum(1), (a * b).sum(1)
    aw, bw = (a * w).sum(1), (b * w).sum(1)
    determinant = aa * bb - ab * ab
    sound = determinant > 1e-6 * aa * bb
    d = torch.where(sound, (aw * bb - ab * bw) / _safe(determinant), aw / _safe(aa))
    dmin = torch.where(sound, (aw * ab - aa * bw) / _safe(determinant), 0.0)
    return _half(d.clamp(min=0)), _half(dmin.clamp(min=0))


def _pack(d: torch.Tensor, dmin: torch.Tensor, sc: torch.Tensor, m: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    factors = torch.stack([d, dmin], 1).half().view(torch.uint8)  # [blocks, 4]
    scale, minimum, codes = sc.to(torch.uint8), m.to(torch.uint8), codes.to(torch.uint8)
    low = scale[:, :4] | ((scale[:, 4:] >> 4) << 6)
    middle = minimum[:, :4] | ((minimum[:, 4:] >> 4) << 6)
    high = (scale[:, 4:] & 15) | ((minimum[:, 4:] & 15) << 4)
    nibbles = codes[:, 0::2] | (codes[:, 1::2] << 4)  # [blocks, 4, 32]
    return torch.cat([factors, low, middle, high, nibbles.flatten(1)], 1)
