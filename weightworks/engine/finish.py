"""The end of every stage: configuration, sidecars, verification, provenance, model card, one rename."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from weightworks.engine.identity import digest_of
from weightworks.engine.job import Job, fallbacks
from weightworks.errors import VerificationError, WeightworksError
from weightworks.report.progress import Progress
from weightworks.stage.settings import Settings
from weightworks.store.checkpoint import INDEX, Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.factors import check_factors
from weightworks.store.layout import Format
from weightworks.store.manifest import PROVENANCE
from weightworks.store.masks import check_masks
from weightworks.store.sidecars import copy_sidecars
from weightworks.store.sources import file_digest
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.activations import Activations
from weightworks.stream.passes import Windows, perplexity, shell, stream_losses
from weightworks.stream.reload import stock_loader_missing, stock_losses
from weightworks.stream.replay import prove
from weightworks.stream.skeleton import DenseReader, Skeleton

PROOF_TOKENS = 16  # a window long enough for masks and positions to matter
TOLERANCE = 1e-3  # relative difference of perplexity between the saved folder and memory; float32 gives about 1e-6


class Runnable(Protocol):
    """What sending tokens through a model takes; ``skeleton`` is its structure."""

    skeleton: Skeleton
    returns_tuple: int
    device: torch.device
    target: Path


class Loadable(Runnable, Protocol):
    """What loading and scoring a written checkpoint takes."""

    settings: Settings
    progress: Progress

    @property
    def expected(self) -> set[str]: ...


class Finished(Protocol):
    """What the end of a stage must know of it, be it a job on one checkpoint or a merge of several.

    ``checkpoint`` is the one whose tokenizer and other small files are carried over.
    """

    progress: Progress

    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def format(self) -> Format | None: ...

    def config(self) -> dict[str, Any]:
        """The output's ``config.json``."""

    def quantization_config(self) -> dict[str, Any]:
        """Its ``quantization_config``; asked for with a ``format`` only."""

    def origin(self) -> dict[str, Any]:
        """What it was made from."""

    def account(self) -> dict[str, Any]:
        """What became of every input tensor."""

    def uncovered(self) -> list[str]:
        """What was asked for and is not done, a line each."""

    def card(self, provenance: dict[str, Any]) -> str:
        """The model card."""


def copy_rest(job: Job, writer: CheckpointWriter) -> None:
    """Every tensor the method does not change goes over byte for byte."""
    if "copied" in writer.steps:
        return
    for name in job.checkpoint.tensors:
        if name in job.changed:
            continue
        if name in job.replaced:
            writer.put(name, job.view.read(name))
        else:
            writer.copy_from(job.checkpoint, name)
    writer.done("copied")


def finish(
    job: Job,
    writer: CheckpointWriter,
    identity: dict[str, Any],
    rows: list[dict[str, Any]],
    facts: dict[str, Any],
    *,
    probe: torch.Tensor,
    in_memory: dict[str, Any],
    reload_blocks: int,
) -> dict[str, Any]:
    """Verify what was written and publish it; returns the provenance.

    ``in_memory`` holds the perplexities of the run's own weights on ``probe``: ``result`` over all blocks (None if never
    computed), ``partial`` over the first ``reload_blocks``. Raises :class:`VerificationError` with the staging folder's
    name; the folder is left.
    """
    files = seal(job, writer)
    with verification(writer):
        staged = Checkpoint.open(writer.staging)
        checks = verify(job, staged, probe, in_memory, reload_blocks)
    return publish(job, writer, identity, rows, {**facts, "checks": checks}, files)


def seal(
    job: Finished,
    writer: CheckpointWriter,
    texts: Mapping[str, str] | None = None,
    untrue: frozenset[str] = frozenset(),
) -> dict[str, str]:
    """Write what belongs beside the weights and read everything back; returns sha256 by file name.

    Of the small files that are carried over ``texts`` replaces some, and ``untrue`` are left out.
    """
    writer.write_index()
    writer.write_text("config.json", json.dumps(job.config(), indent=2) + "\n")
    if job.format is not None and job.format.name.startswith("gptq"):
        writer.write_text("quantize_config.json", json.dumps(job.quantization_config(), indent=2) + "\n")
    copied = copy_sidecars(job.checkpoint.root, writer.staging, without=untrue | {*(texts or {})})
    for name, text in (texts or {}).items():
        writer.write_text(name, text)
        copied.append(name)
    job.progress.say("verifying: reading everything back", detail=True)
    files = writer.read_back()
    small = {"config.json", "quantize_config.json", INDEX, *copied}
    return files | {
        name: file_digest(writer.staging / name) for name in sorted(small) if (writer.staging / name).is_file()
    }


@contextmanager
def verification(writer: CheckpointWriter) -> Iterator[None]:
    """What fails in here is a failed verification: the staging folder is left and named."""
    try:
        yield
    except VerificationError as error:
        error.hint = f"the output is left in {writer.staging} for inspection; nothing was published"
        raise
    except WeightworksError as error:
        raise VerificationError(
            f"the staged output cannot be opened again: {error}", hint=str(writer.staging)
        ) from error


def publish(
    job: Finished,
    writer: CheckpointWriter,
    identity: dict[str, Any],
    rows: list[dict[str, Any]],
    facts: dict[str, Any],
    files: dict[str, str],
) -> dict[str, Any]:
    """Write provenance and model card, and let the folder appear under its name; returns the provenance."""
    provenance = {
        "stage": digest_of(identity),
        "identity": identity,
        "source": job.origin(),
        "files": files,
        "tensors": job.account(),
        **facts,
        "fallbacks": fallbacks(rows) + job.uncovered(),
        "report": rows,
    }
    writer.write_text(PROVENANCE, json.dumps(provenance, indent=1, ensure_ascii=False) + "\n")
    writer.write_text("README.md", job.card(provenance))
    writer.commit()
    return provenance


def verify(
    job: Loadable, staged: Checkpoint, probe: torch.Tensor, in_memory: dict[str, Any], reload_blocks: int
) -> dict[str, Any]:
    """Account for all tensors, load the folder with stock transformers, compare perplexities; returns what was seen."""
    view, expected = DenseView(staged), job.expected
    if set(view.names) != expected:
        lost, extra = sorted(expected - set(view.names)), sorted(set(view.names) - expected)
        raise VerificationError(f"tensors do not add up: missing {lost[:5]}, unexpected {extra[:5]}")
    masks, factors = check_masks(view), check_factors(view)
    count = len(job.skeleton.blocks)
    memory = in_memory.get("partial")
    if memory is None:
        memory = stream_perplexity(job, view, probe, reload_blocks)
    checks: dict[str, Any] = {"perplexity_in_memory": memory, "blocks_loaded": reload_blocks, "blocks": count}
    if masks is not None:
        checks["masks"] = masks
    if factors is not None:
        checks["factors"] = factors
    missing, reference = stock_loader_missing(staged), memory
    checks["dequantize"] = False
    if missing:
        checks["loader"] = (
            f"weightworks' own decoder (transformers would need {' and '.join(missing)}, not installed here)"
        )
        checks["perplexity_reloaded"] = stream_perplexity(job, view, probe, reload_blocks)
    else:
        job.progress.say("verifying: loading the folder with stock transformers", detail=True)
        loaded = stock_losses(
            staged,
            job.skeleton,
            probe,
            blocks=None if reload_blocks == count else reload_blocks,
            trust_remote_code=job.settings.trust_remote_code,
        )
        checks["dequantize"] = loaded.dequantize
        if loaded.dtype is not None:
            checks["dtype"] = str(loaded.dtype).removeprefix("torch.")
        checks["loader"] = "stock transformers" + (", dequantize=True" if loaded.dequantize else "")
        checks["perplexity_reloaded"] = perplexity(loaded.losses)
        if loaded.rounds:
            reference = stream_perplexity(job, loaded.weights, probe, reload_blocks)
            checks |= {"perplexity_in_memory": reference, "perplexity_before_rounding": memory}
    difference = abs(checks["perplexity_reloaded"] / reference - 1)
    if not difference <= TOLERANCE:
        raise VerificationError(
            f"the saved folder has perplexity {checks['perplexity_reloaded']:.4f}, the run's own weights {reference:.4f} "
            f"(they may differ by {TOLERANCE:.1%}, differ by {difference:.1%})"
        )
    return checks


def prove_written(job: Runnable, view: DenseView, probe: torch.Tensor) -> int:
    """The replay proven on a written checkpoint, which also finds out how its blocks return; see :func:`prove`."""
    with shell(job.skeleton, view, job.device):
        return prove(job.skeleton, view, probe[:2, :PROOF_TOKENS].to(job.device))


def stream_perplexity(
    job: Runnable, view: DenseReader, probe: torch.Tensor, blocks: int | Sequence[int] | None = None
) -> float:
    """Perplexity of ``probe`` [n, seq] in float32, one block in memory at a time; ``blocks`` as in :func:`stream_losses`."""
    hidden = int(job.skeleton.model.config.get_text_config().hidden_size)
    states = Activations((*probe.shape, hidden), torch.float32, job.target, "unused")
    losses = stream_losses(
        job.skeleton, view, Windows(probe), states, returns_tuple=job.returns_tuple, device=job.device, blocks=blocks
    )
    return perplexity(losses)
