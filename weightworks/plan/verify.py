"""The checks of "done", again, on any folder: files, values, the replay, a load by stock transformers, equal perplexity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from weightworks.engine.finish import TOLERANCE
from weightworks.engine.machine import free_memory
from weightworks.errors import WeightworksError
from weightworks.plan.texts import check_windows
from weightworks.store.checkpoint import FACTORS, MASKS, Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.factors import check_factors
from weightworks.store.gguffile import SUFFIX, decoded, read_gguf
from weightworks.store.manifest import changed_files, read_provenance, understood
from weightworks.store.masks import check_masks
from weightworks.store.sources import folders
from weightworks.store.writer import check_finite
from weightworks.stream.activations import Activations
from weightworks.stream.passes import Windows, perplexity, shell, stream_losses
from weightworks.stream.reload import stock_loader_missing, stock_losses
from weightworks.stream.replay import prove
from weightworks.stream.skeleton import DenseReader, Skeleton, build


def verify(source: str, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> list[dict[str, Any]]:
    """Every check with what was seen: ``check``, ``ok``, ``seen``. A failed check does not stop the later ones it allows.

    Raises :class:`CheckpointError` where there is no checkpoint at all. ``source`` may be a GGUF file too.
    """
    if source.endswith(SUFFIX):
        return _gguf(Path(source))
    root = folders(source, allow_pickle=allow_pickle)[0]
    try:
        checkpoint = Checkpoint.open(source, allow_pickle=allow_pickle)
        provenance, view = read_provenance(root) if checkpoint.as_stored else None, DenseView(checkpoint)
    except WeightworksError as error:
        return [_check("files", False, str(error))]
    checks = [_files(root, provenance), _values(checkpoint)]
    try:
        skeleton = build(view, trust_remote_code=trust_remote_code)
    except WeightworksError as error:
        return [*checks, _check("tensors", False, str(error))]
    with understood(root):
        checks.append(_tensors(view, provenance))
    if (root / MASKS).is_file():
        checks.append(_masks(view))
    if (root / FACTORS).is_file():
        checks.append(_factors(view))
    if all(check["ok"] for check in checks[1:]):
        try:
            checks += _scores(view, skeleton, provenance, trust_remote_code)
        except WeightworksError as error:
            checks.append(_check("model", False, str(error)))
    return checks


def _gguf(path: Path) -> list[dict[str, Any]]:
    """Whether the header is sound, and every tensor, decoded by the ``gguf`` package, finite."""
    try:
        file = read_gguf(path)
    except WeightworksError as error:
        return [_check("files", False, str(error))]
    sound = _check("files", True, f"the header fits the file: {file.architecture}, {len(file.tensors)} tensors")
    for tensor in file.tensors.values():
        for rows in decoded(file, tensor):
            if not bool(torch.isfinite(rows).all()):
                return [sound, _check("values", False, f"tensor '{tensor.name}' holds NaN or infinite values")]
    return [sound, _check("values", True, f"{len(file.tensors)} tensors decoded, no NaN, no infinity")]


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


def _tensors(view: DenseView, provenance: dict[str, Any] | None) -> dict[str, Any]:
    """Whether every packed weight has all its parts, and as many tensors are there as went in."""
    for name in view.names:
        if view.is_packed(name):
            try:
                view.read(name)
            except WeightworksError as error:
                return _check("tensors", False, f"{name}: {error}")
    if provenance is None:
        return _check("tensors", True, f"{len(view.names)}, all that the model needs")
    account = provenance["tensors"]
    if (expected := account.get("output")) is not None:
        seen = f"{len(view.names)}, {expected} were written of {account['input']} that went in"
        return _check("tensors", len(view.names) == expected, seen)
    expected = account["input"]
    return _check("tensors", len(view.names) == expected, f"{len(view.names)}, {expected} went in")


def _masks(view: DenseView) -> dict[str, Any]:
    """Whether every weight that its mask says is pruned is zero."""
    try:
        found = check_masks(view)
    except WeightworksError as error:
        return _check("masks", False, str(error))
    assert found is not None
    share = 1 - found["kept"] / found["weights"]
    return _check("masks", True, f"{share:.4%} of {found['weights']:,} weights in {found['tensors']} tensors are zero")


def _factors(view: DenseView) -> dict[str, Any]:
    """Whether every weight is the product of its factors."""
    try:
        found = check_factors(view)
    except WeightworksError as error:
        return _check("factors", False, str(error))
    assert found is not None
    share = found["kept"] / found["weights"]
    return _check("factors", True, f"{found['tensors']} tensors are their product, their cores keep {share:.4%}")


def _scores(
    view: DenseView, skeleton: Skeleton, provenance: dict[str, Any] | None, trust_remote_code: bool
) -> Iterator[dict[str, Any]]:
    checkpoint, device = view.checkpoint, torch.device("cpu")
    probe = check_windows(checkpoint, skeleton, trust_remote_code=trust_remote_code)
    with shell(skeleton, view, device):
        returns_tuple = prove(skeleton, view, probe[:2, :16])
    yield _check("replay", True, f"{len(skeleton.blocks)} blocks reproduce the model's logits")
    blocks = blocks_that_fit(skeleton)
    shape = (*probe.shape, int(skeleton.model.config.get_text_config().hidden_size))

    def score(reader: DenseReader) -> float:
        states = Activations(shape, torch.float32, checkpoint.root, "unused")
        losses = stream_losses(
            skeleton, reader, Windows(probe), states, returns_tuple=returns_tuple, device=device, blocks=blocks
        )
        return perplexity(losses)

    streamed = score(view)
    whole = blocks == len(skeleton.blocks)
    part = "" if whole else f" (first {blocks} of {len(skeleton.blocks)} blocks: more do not fit in memory)"
    if not checkpoint.as_stored:
        yield _check(
            "stock transformers", True, "not tried: adapters are added as weights are read, no file has the sum"
        )
    elif missing := stock_loader_missing(checkpoint):
        yield _check("stock transformers", True, f"not tried: {' and '.join(missing)} not installed")
    else:
        loaded = stock_losses(
            checkpoint, skeleton, probe, blocks=None if whole else blocks, trust_remote_code=trust_remote_code
        )
        stock, decoded = perplexity(loaded.losses), score(loaded.weights) if loaded.rounds else streamed
        ok = abs(stock / decoded - 1) <= TOLERANCE
        yield _check("stock transformers", ok, f"perplexity {stock:.4f}, decoded by weightworks {decoded:.4f}{part}")
    recorded = ((provenance or {}).get("quality") or {}).get("result")
    alike = (provenance or {}).get("checks", {}).get("check_text", list(probe.shape)) == list(probe.shape)
    if recorded is not None and whole and alike:
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
