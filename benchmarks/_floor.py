"""How much arithmetic GPTQ needs for a model's shape, and how fast this machine does arithmetic.

The floor counts, for each block: two forward passes over all tokens (one to gather inputs, one with the new weights for
the next block), one Hessian for each distinct input of a linear (its upper half only), one Cholesky factor and one
triangular inverse of each, and the sweep over the columns. It leaves out norms, softmax, rotary embedding, reading and
writing. Run as a script it prints this machine's rates as JSON: GFLOP for each CPU second, by dtype.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _measure import last_json, run


@dataclass(frozen=True)
class Floor:
    """FLOP (a multiply-add is two) of GPTQ over a whole model."""

    forwards: float
    hessians: float
    factors: float
    sweeps: float

    @property
    def total(self) -> float:
        return self.forwards + self.hessians + self.factors + self.sweeps

    def parts(self) -> dict[str, float]:
        """FLOP by name of the part."""
        return asdict(self)

    def cpu_seconds(self, rates: dict[str, float], *, forward_dtype: str = "float32") -> float:
        """CPU seconds at ``rates`` (GFLOP a CPU second); all but the forwards are float32."""
        forwards = self.forwards / rates[forward_dtype]
        return (forwards + (self.total - self.forwards) / rates["float32"]) / 1e9


def gptq_floor(model: Path, *, windows: int, seq_len: int) -> Floor:
    """The floor of the Llama-like checkpoint ``model`` for ``windows`` of ``seq_len`` tokens."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    hidden, ffn, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, config["num_key_value_heads"] * head_dim
    # (outputs of all linears that read this input, width of the input)
    inputs = [(queries + 2 * keys, hidden), (hidden, queries), (2 * ffn, hidden), (hidden, ffn)]
    layers, tokens = config["num_hidden_layers"], windows * seq_len
    attention = 2 * tokens * seq_len * queries  # scores and mixture, the causal half of each
    one_pass = sum(2 * tokens * rows * width for rows, width in inputs) + attention
    return Floor(
        forwards=layers * 2 * one_pass,
        hessians=layers * sum(tokens * width**2 for _, width in inputs),
        factors=layers * sum(2 / 3 * width**3 for _, width in inputs),
        sweeps=layers * sum(rows * width**2 for rows, width in inputs),
    )


def machine_rates() -> dict[str, float]:
    """GFLOP a CPU second of a large matrix product through torch, by dtype; measured now, in another process."""
    return last_json(run([sys.executable, __file__]).stdout)


def measure() -> dict[str, float]:
    """Time [2048, 2048] @ [2048, 8192] in float32 and bfloat16: a linear of a 1B model."""
    import torch

    rates = {}
    for dtype, repeats in ((torch.float32, 5), (torch.bfloat16, 2)):
        left, right = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 8192).to(dtype)
        left @ right  # the first call sets up threads and kernels
        before = os.times()
        for _ in range(repeats):
            left @ right
        after = os.times()
        seconds = (after.user + after.system) - (before.user + before.system)
        rates[str(dtype).removeprefix("torch.")] = round(repeats * 2 * 2048 * 2048 * 8192 / seconds / 1e9, 1)
    return rates


if __name__ == "__main__":
    print(json.dumps(measure()))
