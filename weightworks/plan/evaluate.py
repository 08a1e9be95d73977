"""Scores of several models side by side, each against a baseline on the very same windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from weightworks.engine.machine import pick_device
from weightworks.score.perplexity import Options, geometric_mean, paired, score
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.stream.skeleton import CONTEXT_KEYS, UNLIMITED


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
    """Perplexity of every model on every text; ``baseline`` (default: the first model) is what changes refer to.

    Windows are as long as ``seq_len``, or as the shortest context of the models, so that all see the same. Returns
    ``baseline``, ``seq_len`` as used, and ``models``: per model its ``perplexity`` and ``tokens`` by text, their geometric
    ``mean``, and the relative ``change`` with its standard ``error`` (None where the baseline reads other tokens).
    """
    options = Options.parse(
        {"texts": list(texts), "seq_len": seq_len, "max_tokens": max_tokens}, where="score.perplexity"
    )
    base = baseline or models[0]
    names = list(dict.fromkeys([base, *models]))
    views = {name: DenseView(Checkpoint.open(name, allow_pickle=allow_pickle)) for name in names}  # refuse before work
    length = min(options.seq_len, *(context_length(view.checkpoint) for view in views.values()))
    options = options.model_copy(update={"seq_len": length})
    scores, rows = {}, []
    for name in names:
        say(f"scoring {name} in windows of {length} tokens")
        scores[name] = score(views[name], options, device=pick_device(device), trust_remote_code=trust_remote_code)
        row: dict[str, Any] = {
            "model": name,
            "content": views[name].checkpoint.digest,
            "bytes": views[name].checkpoint.nbytes,
            "perplexity": {text: found.perplexity for text, found in scores[name].items()},
            "tokens": {text: found.losses.numel() for text, found in scores[name].items()},
        }
        row["mean"] = geometric_mean(list(row["perplexity"].values()))
        comparable = all(found.losses.shape == scores[base][text].losses.shape for text, found in scores[name].items())
        row["change"], row["error"] = paired(scores[name], scores[base]) if comparable else (None, None)
        rows.append(row)
    return {"baseline": base, "seq_len": length, "models": rows}


def context_length(checkpoint: Checkpoint) -> int:
    """Tokens a model can take, by its configuration."""
    config = checkpoint.config.get("text_config") or checkpoint.config
    return int(next((config[key] for key in CONTEXT_KEYS if config.get(key)), UNLIMITED))
