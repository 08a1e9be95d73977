"""The checks of "done", again, on any folder: files, values, the replay, a load by stock transformers, equal perplexity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from weightworks.engine.finish import TOLERANCE
from weightworks.engine.machine import free_memory
from weightworks.errors import WeightworksError
from weightworks.plan.stage import check_windows
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.manifest import changed_files, read_provenance
from weightworks.store.writer import check_finite
from weightworks.stream.activations import Activations
from weightworks.stream.passes import Windows, perplexity, shell, stream_losses
from weightworks.stream.reload import stock_loader_missing, stock_losses
from weightworks.stream.replay import prove
from weightworks.stream.skeleton import Skeleton, build


def verify(source: str, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> list[dict[str, Any]]:
    """Every check with what was seen: ``check``, ``ok``, ``seen``. A failed check does not stop the later ones it allows."""
    checkpoint = Checkpoint.open(source, allow_pickle=allow_pickle)
    provenance = read_provenance(checkpoint.root)
    checks = [_files(checkpoint.root, provenance), _values(checkpoint)]
    view = DenseView(checkpoint)
    if provenance is not None:
        expected = provenance["tensors"]["input"]
        checks.append(_check("tensors", len(view.names) == expected, f"{len(view.names)}, {expected} went in"))
    if all(check["ok"] for check in checks):
        try:
            checks += _scores(checkpoint, view, provenance, trust_remote_code)
        except WeightworksError as error:
            checks.append(_check("model", False, str(error)))
    return checks


def _check(name: str, ok: bool, seen: str) -> dict[str, Any]:
    return {"check": name, "ok": ok, "seen": seen}


def _files(root: Path, provenance: dict[str, Any] | None) -> dict[str, Any]:
    if provenance is None:
        return _check("files", True, "no provenance.json: headers are sound, contents cannot be compared")
    problems = changed_files(root, provenance)
    return _check("files", not problems, "; ".join(problems) or f"{len(provenance['files'])} match provenance.json")


def _values(checkpoint: Checkpoint) -> dict[str, Any]:
    for name in checkpoint.tensors:
        try:
            check_finite(name, checkpoint.read(name))
        except WeightworksError as error:
            return _check("values", False, str(error))
    return _check("values", True, f"{len(checkpoint.tensors)} tensors, no NaN, no infinity")


def _scores(
    checkpoint: Checkpoint, view: DenseView, provenance: dict[str, Any] | None, trust_remote_code: bool
) -> Iterator[dict[str, Any]]:
    device = torch.device("cpu")
    skeleton = build(checkpoint, view.names, trust_remote_code=trust_remote_code)
    probe = check_windows(checkpoint, skeleton, trust_remote_code=trust_remote_code)
    with shell(skeleton, view, device):
        returns_tuple = prove(skeleton, view, probe[:2, :16])
    yield _check("replay", True, f"{len(skeleton.blocks)} blocks reproduce the model's logits")
    blocks = blocks_that_fit(skeleton)
    shape = (*probe.shape, int(skeleton.model.config.get_text_config().hidden_size))
    streamed = perplexity(
        stream_losses(
            skeleton,
            view,
            Windows(probe),
            Activations(shape, torch.float32, checkpoint.root, "unused"),
            returns_tuple=returns_tuple,
            device=device,
            blocks=blocks,
        )
    )
    whole = blocks == len(skeleton.blocks)
    part = "" if whole else f" (first {blocks} of {len(skeleton.blocks)} blocks: more do not fit in memory)"
    if missing := stock_loader_missing(checkpoint):
        yield _check("stock transformers", True, f"not tried: {' and '.join(missing)} not installed")
    else:
        stock = perplexity(
            stock_losses(checkpoint, probe, blocks=None if whole else blocks, trust_remote_code=trust_remote_code)
        )
        ok = abs(stock / streamed - 1) <= TOLERANCE
        yield _check("stock transformers", ok, f"perplexity {stock:.4f}, decoded by weightworks {streamed:.4f}{part}")
    if provenance is not None and whole:
        recorded = provenance["quality"]["result"]
        ok = abs(streamed / recorded - 1) <= TOLERANCE
        yield _check("perplexity", ok, f"{streamed:.4f}, {recorded:.4f} when it was made")


def blocks_that_fit(skeleton: Skeleton) -> int:
    """Leading blocks that fit twice in free memory in float32 (a packed model is decoded while loading)."""
    sizes = [sum(skeleton.get(name).numel() for name in skeleton.names_of(i)) * 8 for i in range(len(skeleton.blocks))]
    room = free_memory() - 8 * sum(skeleton.get(name).numel() for name in skeleton.names_of(None))
    count = 0
    for size in sizes:
        room -= size
        if room < 0:
            break
        count += 1
    return max(1, count)
