"""What an output depends on, and the sha256 of it; where its inputs come from."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import version
from typing import Any, Protocol

import torch

import weightworks
from weightworks.errors import CheckpointError
from weightworks.stage.settings import Settings
from weightworks.store.adapters import Adapter
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.manifest import made_by, read_provenance
from weightworks.store.rotated import RotatedCheckpoint

NUMERIC = ("torch", "numpy", "scipy", "transformers", "safetensors")  # versions that may change a bit of the output


class Identified(Protocol):
    """What a run on one checkpoint depends on."""

    label: str
    version: int
    settings: Settings
    checkpoint: Checkpoint
    device: torch.device

    @property
    def teacher(self) -> Checkpoint | None: ...

    @property
    def options(self) -> Any: ...


def identity_of(job: Identified, **facts: Any) -> dict[str, Any]:
    """What the output of ``job`` depends on, ``facts`` among it."""
    return {
        "method": job.label,
        "method_version": job.version,
        "weightworks": weightworks.__version__,
        "options": job.options.resolved(),
        "input": job.checkpoint.digest,
        **({} if job.teacher is None else {"teacher": job.teacher.digest}),
        "max_shard_size": job.settings.shard_bytes,
        "seed": job.settings.seed,
        "environment": environment(job.device),
        **facts,
    }


def origin(source: Checkpoint | Adapter) -> dict[str, Any]:
    """An input as provenance names it: by its name, its files' digests, and the stage that made it if there is one."""
    if isinstance(source, RotatedCheckpoint) and source.base is not None:
        return origin(source.base)
    remarks = source.remarks if isinstance(source, Checkpoint) else []
    try:
        whole = isinstance(source, Adapter) or source.as_stored  # no stage made a sum
        parent = read_provenance(source.root) if whole else None
    except CheckpointError:  # a file of another tool
        parent = None
    told = {"remarks": remarks} if remarks else {}
    return {"name": source.source, "files": source.files, "made_by": parent and made_by(parent), **told}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware that may change a bit of the output."""
    return {
        **{name: version(name) for name in NUMERIC},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }


def digest_of(identity: dict[str, Any]) -> str:
    """sha256 of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
