"""The loop of everything that makes an adapter: module by module, each journalled, then one file, read back and checked.

How large a module's update will be is often known only once it is made, so updates wait in the staging folder and the file
is laid out when all are there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save

from weightworks.engine.finish import Finished, verification
from weightworks.engine.machine import one_thread
from weightworks.errors import VerificationError
from weightworks.stage.adapting import Factors
from weightworks.store.adapted import AdaptedCheckpoint
from weightworks.store.adapters import CONFIG, PREFIX, WEIGHTS, Adapter
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.sources import file_digest
from weightworks.store.tensorfile import TensorInfo, TensorSpec, read_bytes, read_header
from weightworks.store.writer import CheckpointWriter, check_finite, writing


@dataclass(frozen=True)
class Solved:
    """What became of one unit: tensors by the names they will have in the adapter, and the report's row."""

    tensors: Mapping[str, torch.Tensor]
    row: Mapping[str, Any]


class AdapterJob(Finished, Protocol):
    """Work whose result is an adapter. ``units`` are names of modules or tensors, each made by itself."""

    @property
    def units(self) -> Sequence[str]: ...

    def solve(self, unit: str) -> Solved: ...

    @property
    def base(self) -> Checkpoint | None:
        """The checkpoint the adapter is for, where it is known."""

    @property
    def small(self) -> bool:
        """Whether units are too small to be divided among threads."""

    def traits(self) -> dict[str, Any]:
        """Entries of ``adapter_config.json`` that the tensors do not tell."""


def run_units(job: AdapterJob, writer: CheckpointWriter) -> list[dict[str, Any]]:
    """Make every unit that the journal does not have yet; returns the report's rows."""
    units = job.units
    finished = [unit for unit in units if unit in writer.steps]
    if finished:
        job.progress.say(f"resuming after {len(finished)} of {len(units)} modules")
    job.progress.begin("module", len(units), len(finished), every=5.0)
    for number, unit in enumerate(units):
        if unit in writer.steps:
            continue
        with one_thread() if job.small else nullcontext():
            solved = job.solve(unit)
        for name, tensor in solved.tensors.items():
            check_finite(name, tensor)
        data = save({name: tensor.contiguous() for name, tensor in solved.tensors.items()})
        _keep(writer.scratch / f"{number}.safetensors", data)
        writer.done(unit, {"rows": [dict(solved.row)], "sha256": hashlib.sha256(data).hexdigest()})
        job.progress.step(unit)
    job.progress.end()
    return [row for unit in units for row in writer.steps[unit]["rows"]]


def _keep(path: Path, data: bytes) -> None:
    with writing(path), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def gather(job: AdapterJob, writer: CheckpointWriter) -> dict[str, str]:
    """Lay all updates out in one file, with the configuration beside it; returns sha256 by file name, read back."""
    found: dict[str, tuple[Path, TensorInfo]] = {}
    for number, unit in enumerate(job.units):
        path = writer.scratch / f"{number}.safetensors"
        if not path.is_file() or file_digest(path) != writer.steps[unit]["sha256"]:
            raise VerificationError(f"{unit}: what was kept of it has changed", hint="pass --no-resume to begin again")
        found |= {name: (path, info) for name, info in read_header(path).items()}
    specs = [TensorSpec(name, info.shape, info.dtype) for name, (_, info) in sorted(found.items())]
    writer.add(WEIGHTS, specs)
    for spec in specs:
        path, info = found[spec.name]
        writer.put(spec.name, read_bytes(path, info.offset, torch.empty(spec.shape, dtype=spec.dtype)))
    writer.done("adapter")
    config = configuration(specs, job.base, job.traits())
    writer.write_text(CONFIG, json.dumps(config, indent=2) + "\n")
    return writer.read_back() | {CONFIG: file_digest(writer.staging / CONFIG)}


def configuration(specs: Sequence[TensorSpec], base: Checkpoint | None, traits: Mapping[str, Any]) -> dict[str, Any]:
    """``adapter_config.json`` for tensors as ``specs`` says, scaling 1 everywhere: alpha is the rank of every module."""
    ranks = {}
    whole = set()
    for spec in specs:
        module = spec.name.removeprefix(PREFIX)
        for ending in (".lora_A.weight", ".lora_embedding_A"):
            if module.endswith(ending):
                ranks[module.removesuffix(ending)] = spec.shape[0]
        if "lora_" not in module:
            whole.add(module.rpartition(".")[0])
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    others = {module: rank for module, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": short(list(ranks), base),
        "modules_to_save": sorted(whole - set(ranks)) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        **traits,
    }


def short(modules: list[str], base: Checkpoint | None) -> list[str]:
    """Last words of the names of ``modules`` where these mean just them in the base, else whole names."""
    last = sorted({module.rsplit(".", maxsplit=1)[-1] for module in modules})
    if base is None:
        return sorted(modules)
    endings = tuple(f".{word}.weight" for word in last)
    meant = [name for name in base.tensors if f".{name}".endswith(endings) and len(base.tensors[name].shape) == 2]
    return last if len(meant) == len(modules) else sorted(modules)


def reopened(job: AdapterJob, writer: CheckpointWriter) -> AdaptedCheckpoint | None:
    """The staged adapter opened by our reader and put on the base; None where the base is not known.

    Raises :class:`VerificationError` if it does not hold exactly what was made, or does not fit the base.
    """
    with verification(writer):
        adapter = Adapter.open(writer.staging)
        seen = {name: (info.shape, info.dtype) for name, info in adapter.store.tensors.items()}
        made = {name: (info.shape, info.dtype) for name, info in writer.tensors.items()}
        if seen != made:
            raise VerificationError(f"the adapter holds {len(seen)} tensors, {len(made)} were made")
        if any(abs(pair.scaling - 1) > 1e-12 for pair in adapter.pairs.values()):
            raise VerificationError(f"{CONFIG} gives a scaling other than 1")
        if job.base is None:
            return None
        return AdaptedCheckpoint.join(job.base, f"{job.base.source}+{writer.target}", [adapter])


def named(module: str, factors: Factors, dtype: torch.dtype, *, embedding: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of an update under PEFT's names."""
    ends = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    pair = (factors.a.to(dtype), factors.b.to(dtype))
    return {f"{PREFIX}{module}.{end}": tensor for end, tensor in zip(ends, pair, strict=True)}


def stored(factors: Factors, dtype: torch.dtype) -> Factors:
    """The update as ``dtype`` will hold it."""
    return Factors(factors.b.to(dtype).double(), factors.a.to(dtype).double())
