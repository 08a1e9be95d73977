"""Perplexity of a saved folder, through stock transformers in float32 and nothing of this project.

    python benchmarks/_perplexity.py MODEL TEXT...

Needs an environment with transformers and, for packed folders, compressed-tensors; ours has both.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DOMAINS = ("prose", "scripture", "drama", "math", "code")
WINDOW = 256
TOKENS = 20_000
BATCH = 8


def windows_of(text: Path, model: Path, tokens: int = TOKENS) -> torch.Tensor:
    """The first ``tokens`` tokens in windows that do not overlap, no special tokens.  int64 [windows, WINDOW]"""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    count = len(ids) // WINDOW
    if count == 0:
        raise SystemExit(f"{text}: {len(ids)} tokens is less than one window of {WINDOW}")
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window."""
    total = 0.0
    for batch in torch.split(windows, BATCH):
        logits = model(batch).logits[:, :-1].float()  # [batch, WINDOW - 1, vocabulary]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        total += losses.item()
    return math.exp(total / windows[:, 1:].numel())


def loaded(folder: Path) -> torch.nn.Module:
    """The model in ``folder`` as it computes in float32. What is decoded to bfloat16 whatever is asked for is loaded so."""
    quantized = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    if not quantized.get("format", "").startswith(("mxfp", "nvfp")):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # comes in evaluation mode
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model(torch.zeros(1, 1, dtype=torch.long))
    return torch.nn.Module.float(model)


def perplexities(folder: Path, texts: Iterable[torch.Tensor]) -> list[float]:
    """The perplexity of the model in ``folder`` on each text's windows."""
    model = loaded(folder)
    return [perplexity(model, windows) for windows in texts]


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


@dataclass(frozen=True)
class Texts:
    """The test texts of ``DOMAINS`` in windows, and the ``original`` model's perplexity on each."""

    windows: list[torch.Tensor]
    original: list[float]

    @classmethod
    def read(cls, parser: argparse.ArgumentParser, data: Path, model: Path, tokens: int) -> Texts:
        """Those in the folder ``data``, which must have calibration.txt too; ``model`` is the original, and its tokenizer cuts
        them."""
        texts = [data / f"{domain}.test.txt" for domain in DOMAINS]
        if missing := [str(path) for path in (data / "calibration.txt", *texts) if not path.is_file()]:
            parser.error(f"--data: not found: {', '.join(missing)}")
        windows = [windows_of(text, model, tokens) for text in texts]
        return cls(windows, perplexities(model, windows))

    def ratios(self, found: Iterable[float]) -> list[float]:
        """Perplexities over the original's, text by text."""
        return [value / base for value, base in zip(found, self.original, strict=True)]

    def of(self, folder: Path) -> list[float]:
        """Those of the model in ``folder``."""
        return self.ratios(perplexities(folder, self.windows))


def spread(found: Sequence[float]) -> str:
    """A mean, and the range where there are several."""
    if not found:
        return ""
    ends = f" ({min(found):.4f} to {max(found):.4f})" if len(found) > 1 else ""
    return f"{sum(found) / len(found):.4f}{ends}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    args = parser.parse_args()
    found = perplexities(args.model, [windows_of(text, args.model) for text in args.texts])
    for text, value in zip(args.texts, found, strict=True):
        print(f"{value:10.4f}  {text}")
    print(f"{geometric_mean(found):10.4f}  geometric mean")


if __name__ == "__main__":
    main()
