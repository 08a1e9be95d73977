"""SmoothQuant: input channels made alike in size before inputs are rounded, what they lose moved into the weights.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (arXiv:2211.10438),
equation 4: channel j of the input is divided by s_j = max|X_j|^a / max|W_j|^(1 - a), and column j of every weight that reads
it multiplied. Dividing is the work of the norm that makes the input. It is rounded to the norm's dtype first, and the weights
take exactly what was divided by, so the function of the model does not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from weightworks.engine.job import Job
from weightworks.engine.walk import Walk
from weightworks.store.smoothed import SmoothedView
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.calibration import Calibration
from weightworks.stream.linears import Group, read_linear
from weightworks.stream.norms import Feed, feeds, scaled

SMALLEST = 1e-5  # of a scale, as in the released code


class ChannelTop:
    """The largest magnitude of every input channel, float32 [in]."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.top = torch.zeros(columns, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """Take in a batch of inputs [tokens, in]; one that is not finite is passed over."""
        top = inputs.abs().amax(0).float()
        if torch.isfinite(top).all():
            torch.maximum(self.top, top, out=self.top)


@torch.no_grad()
def smooth(
    job: Job,
    writer: CheckpointWriter,
    calibration: Calibration | None,
    probe: torch.Tensor,
    dtype: torch.dtype,
    *,
    on_disk: bool,
) -> dict[str, Any]:
    """If the method's options ask for it, let the job read the smoothed model in place of its checkpoint.

    A pass over the unchanged model, journalled block by block. Returns ``smoothing``, what was done, for the provenance.
    """
    if (strength := getattr(job.options, "smooth", None)) is None:
        return {}
    assert calibration is not None
    walk = Walk(job, writer, "smoothing", calibration.tokens, probe, dtype, on_disk=on_disk)
    found = walk.run(lambda index: _look(job, walk, index, strength))
    replaced: dict[str, torch.Tensor] = {}
    columns: dict[str, torch.Tensor] = {}
    for site in (site for block in found for site in block["sites"]):
        _apply(job, site, replaced, columns)
    job.view = SmoothedView(job.checkpoint, replaced, columns)
    left = [name for block in found for name in block["left"]]
    norms = sum(len(block["sites"]) for block in found)
    return {"smoothing": {"strength": strength, "norms": norms, "weights": len(columns), "left": left}}


def _look(job: Job, walk: Walk, index: int, strength: float) -> dict[str, Any]:
    """Every norm of a loaded block that can hand on its scale, with the scale; and the weights that no norm feeds."""
    skeleton, names = job.skeleton, job.skeleton.names_of(index)
    stages, never = walk.stages(index, job.blocks[index])
    groups = [group for stage in stages for group in stage.groups]
    statistics = walk.watched(index, groups, ChannelTop)
    skeleton.load(job.view, names, torch.float32, job.device)  # the proof is exact in float32
    call = walk.windows.call(min(walk.windows.batch, len(walk.windows.tokens)), torch.float32).blocks[index]
    hidden = walk.states.read(0, min(walk.windows.batch, len(walk.windows.tokens))).to(job.device, torch.float32)
    fed, others = feeds(skeleton.blocks[index][1], call, hidden, groups)
    skeleton.cast(names, walk.dtype)
    sites = [_site(job, index, feed, statistics[_leader(groups, feed)].top, strength) for feed in fed]
    return {"sites": sites, "left": [linear.tensor for linear in (*others, *never)]}


def _leader(groups: list[Group], feed: Feed) -> Any:
    return next(group.leader for group in groups if group.linears == feed.linears)


def _site(job: Job, index: int, feed: Feed, top: torch.Tensor, strength: float) -> dict[str, Any]:
    """What is done at one norm, as it is journalled."""
    weight = torch.stack([read_linear(job.view, linear).abs().amax(0) for linear in feed.linears]).amax(0)
    top = top.cpu()
    scale = (top.pow(strength) / weight.clamp(min=SMALLEST).pow(1 - strength)).clamp(min=SMALLEST)
    scale = torch.where((top > 0) & (weight > 0), scale, 1.0)
    return {
        "norm": f"{job.skeleton.blocks[index][0]}.{feed.module}",
        "form": feed.form,
        "weights": [linear.tensor for linear in feed.linears],
        "scale": scale.tolist(),
    }


def _apply(
    job: Job, site: Mapping[str, Any], replaced: dict[str, torch.Tensor], columns: dict[str, torch.Tensor]
) -> None:
    """The norm's new tensors, as they will be stored, and what its weights are multiplied by."""
    pieces = job.skeleton.pieces
    name = pieces[f"{site['norm']}.weight"][0].tensor
    stored = job.checkpoint.info(name).dtype
    before = job.checkpoint.read(name, torch.float32)
    replaced[name] = scaled(before, torch.tensor(site["scale"]), site["form"]).to(stored)
    offset = 0.0 if site["form"] == "plain" else 1.0
    after = replaced[name].float() + offset
    usable = after != 0  # a channel that the norm silences is silent in both
    exact = torch.where(usable, (before + offset) / torch.where(usable, after, 1.0), 1.0)
    if (bias := pieces.get(f"{site['norm']}.bias")) is not None:
        replaced[bias[0].tensor] = (job.checkpoint.read(bias[0].tensor, torch.float32) / exact).to(stored)
    columns.update(dict.fromkeys(site["weights"], exact))
