"""Scores of several models side by side, each against a baseline on the very same windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from weightworks.engine.machine import pick_device
from weightworks.score.perplexity import Options, geometric_mean, paired, score
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView


def evaluate(
    models: Sequence[str],
    texts: Sequence[str],
    *,
    baseline: str | None = None,
    seq_len: int = 2048,
    max_tokens: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Perplexity of every model on every text; ``baseline`` (default: the first model) is what changes refer to."""
    options = Options.parse(
        {"texts": list(texts), "seq_len": seq_len, "max_tokens": max_tokens}, where="score.perplexity"
    )
    base = baseline or models[0]
    names = list(dict.fromkeys([base, *models]))
    views = {name: DenseView(Checkpoint.open(name, allow_pickle=allow_pickle)) for name in names}  # refuse before work
    scores, rows = {}, []
    for name in names:
        say(f"scoring {name}")
        scores[name] = score(views[name], options, device=pick_device(device), trust_remote_code=trust_remote_code)
        row: dict[str, Any] = {
            "model": name,
            "content": views[name].checkpoint.digest,
            "bytes": views[name].checkpoint.nbytes,
            "perplexity": {text: found.perplexity for text, found in scores[name].items()},
            "tokens": {text: found.losses.numel() for text, found in scores[name].items()},
        }
        row["mean"] = geometric_mean(list(row["perplexity"].values()))
        row["change"], row["error"] = paired(scores[name], scores[base])
        rows.append(row)
    return {"baseline": base, "seq_len": seq_len, "models": rows}
