"""An adapter trained and kept beside the model, which stays as it is and may be quantized: written as PEFT reads it.

Its scaling is in B, so that ``lora_alpha`` is the rank: W + s (BA) is W + (sB)A.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from weightworks.engine.adapting import configuration
from weightworks.engine.finish import TOLERANCE, publish, stream_perplexity, verification
from weightworks.engine.job import Job
from weightworks.engine.modelwise import Training
from weightworks.errors import VerificationError
from weightworks.report.card import trained_adapter_card
from weightworks.store.adapted import AdaptedCheckpoint
from weightworks.store.adapters import CONFIG, PREFIX, WEIGHTS, Adapter
from weightworks.store.sources import file_digest
from weightworks.store.tensorfile import TensorSpec
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.skeleton import DenseReader
from weightworks.stream.whole import Whole

Factors = Callable[[str], tuple[torch.Tensor, torch.Tensor]]  # B [out, rank] and A [rank, in] of a module, scaling in B


class AdapterJob(Job):
    """A job whose output is an adapter, a side file; its model stays as it is."""

    def _admit(self) -> None:
        """A quantized one is decoded as it is read."""

    @cached_property
    def specs(self) -> list[TensorSpec]:
        return []

    @cached_property
    def side(self) -> dict[str, list[TensorSpec]]:
        """A and B of every adapted module under PEFT's names, in float32."""
        specs = []
        for linear in (self.adaptable[name] for name in self.subset.adapters):
            rows, columns, rank = *linear.shape, int(self.options.rank)
            name = f"{PREFIX}{linear.module}.lora"
            specs.append(TensorSpec(f"{name}_A.weight", (rank, columns), torch.float32))
            specs.append(TensorSpec(f"{name}_B.weight", (rows, rank), torch.float32))
        return {WEIGHTS: sorted(specs, key=lambda spec: spec.name)}

    def account(self) -> dict[str, Any]:
        return {"input": len(self.checkpoint.tensors), "transformed": 0, "copied": 0, "dropped": 0}

    def card(self, provenance: dict[str, Any]) -> str:
        return trained_adapter_card(self.checkpoint, self.target.name, provenance)


class Beside(Training):
    """The training of an adapter that is not merged."""

    def _write(self, model: Whole) -> list[dict[str, Any]]:
        rows = []
        for tensor in model.subset.adapters:
            linear, adapter = self.job.adaptable[tensor], model.adapters[tensor]
            a, b = (adapter.get_parameter(name).detach().cpu() for name in "AB")
            b = b * (self.job.options.alpha / self.job.options.rank)
            for end, factor in (("A", a), ("B", b)):
                self.writer.put(f"{PREFIX}{linear.module}.lora_{end}.weight", factor.contiguous())
            row = {"tensor": tensor, "shape": list(linear.shape), "method": self.job.label, "rank": a.shape[0]}
            norm = math.sqrt(float(model.original(tensor).square().sum()))
            rows.append({**row, "relative_change": (float((b @ a).norm()) / max(norm, 1e-30)) ** 2})
        return rows

    def _written(self) -> DenseReader:
        def factors(module: str) -> tuple[torch.Tensor, torch.Tensor]:
            b, a = (self.writer.read(f"{PREFIX}{module}.lora_{end}.weight") for end in "BA")
            return b, a

        return Summed(self.job, factors)


class Summed:
    """The job's model, decoded where it is packed, with W + BA in place of every weight W that is adapted; float32 sums."""

    def __init__(self, job: Job, factors: Factors) -> None:
        self.job, self.factors = job, factors

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name not in self.job.subset.adapters:
            return self.job.view.read(name, dtype)
        linear = self.job.adaptable[name]
        b, a = self.factors(linear.module)
        update = b @ a  # [out, in]
        turn = linear.transposed and not self.is_packed(name)
        total = self.job.view.read(name, torch.float32) + (update.T if turn else update)
        return total if dtype is None else total.to(dtype)

    def is_packed(self, name: str) -> bool:
        return self.job.view.is_packed(name)


def finish_adapter(
    job: Job, writer: CheckpointWriter, identity: dict[str, Any], results: dict[str, Any], facts: dict[str, Any],
    *, probe: torch.Tensor,
) -> dict[str, Any]:  # fmt: skip
    """Write the adapter's configuration, verify it and publish it; returns the provenance.

    It is opened again, added to the model and scored. Raises :class:`VerificationError` where that is another model than
    the one that was trained; the staging folder is left.
    """
    (specs,) = job.side.values()
    packed = job.view.format is not None
    traits = {
        "base_model_name_or_path": job.checkpoint.name,
        "fan_in_fan_out": any(job.adaptable[name].transposed for name in job.subset.adapters),
    }
    config = configuration(specs, None if packed else job.checkpoint, traits)
    writer.write_text(CONFIG, json.dumps(config, indent=2) + "\n")
    job.progress.say("verifying: reading everything back", detail=True)
    files = writer.read_back() | {CONFIG: file_digest(writer.staging / CONFIG)}
    with verification(writer):
        adapter = Adapter.open(writer.staging)
        if not (packed and traits["fan_in_fan_out"]):
            AdaptedCheckpoint.join(job.checkpoint, f"{job.checkpoint.source}+{writer.target}", [adapter])  # it fits

        def factors(module: str) -> tuple[torch.Tensor, torch.Tensor]:
            a, b = adapter.factors(module)
            return b * adapter.pairs[module].scaling, a

        found = stream_perplexity(job, Summed(job, factors), probe)
        if not abs(found / results["result"] - 1) <= TOLERANCE:
            raise VerificationError(
                f"model and saved adapter have perplexity {found:.4f}, the run's own {results['result']:.4f}"
            )
    count = len(job.skeleton.blocks)
    checks = {
        "loader": "weightworks' own reader, added to the model and run",
        "perplexity_in_memory": results["result"],
        "perplexity_reloaded": found,
        "blocks": count,
        "blocks_loaded": count,
    }
    size = {"bytes_in": job.checkpoint.nbytes, "bytes_out": sum(info.nbytes for info in writer.tensors.values())}
    told = {key: config[key] for key in ("base_model_name_or_path", "r", "rank_pattern")}
    facts = {**facts, "size": size, "config": told, "checks": checks}
    return publish(job, writer, identity, results["rows"], facts, files)
