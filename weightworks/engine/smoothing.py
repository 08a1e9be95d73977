"""Input channels scaled before anything is rounded, and what makes them scaled against it: SmoothQuant, and what a method asks.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (arXiv:2211.10438),
equation 4: channel j of the input is divided by s_j = max|X_j|^a / max|W_j|^(1 - a), and column j of every weight that reads
it multiplied. Dividing is the work of the norm that makes the input. It is rounded to the norm's dtype first, and the weights
take exactly what was divided by, so the function of the model does not change. Of inputs that no norm makes, such as those of a
layer behind a gate, rows of the linear that makes them may be divided instead; that the block's output stays is proven too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from weightworks.engine.job import Job
from weightworks.engine.walk import Walk
from weightworks.stage.protocols import Target
from weightworks.stage.smoothing import Smoother
from weightworks.store.smoothed import SmoothedView
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.calibration import Calibration
from weightworks.stream.linears import Group, Linear, read_linear
from weightworks.stream.norms import PROOF, Feed, feeds, scaled
from weightworks.stream.replay import BlockCall

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
    strength = getattr(job.options, "smooth", None)
    if hasattr(job.method, "smoother"):
        smoother = job.method.smoother()
    elif strength is not None:
        smoother = Smoother(ChannelTop, partial(smoothquant, strength=strength))
    else:
        return {}
    assert calibration is not None
    walk = Walk(job, writer, "smoothing", calibration.tokens, probe, dtype, on_disk=on_disk)
    found = walk.run(lambda index: _look(job, walk, index, smoother))
    replaced: dict[str, torch.Tensor] = {}
    columns: dict[str, torch.Tensor] = {}
    rows: dict[str, torch.Tensor] = {}
    sites = [site for block in found for site in block["sites"]]
    for site in sites:
        if "norm" in site:
            _apply(job, site, replaced, columns)
        else:
            scale = torch.tensor(site["scale"])
            rows[site["rows"]] = 1 / scale
            columns.update(dict.fromkeys(site["weights"], scale))
    job.view = SmoothedView(job.checkpoint, replaced, columns, rows)
    left = [name for block in found for name in block["left"]]
    told = {"norms": len(sites) - len(rows), **({"rows": len(rows)} if smoother.rows else {}), "weights": len(columns)}
    return {
        "smoothing": {
            **({} if strength is None else {"strength": strength}),
            **told,
            "left": left,
            "rescaled": sorted(replaced),
        }
    }


def _look(job: Job, walk: Walk, index: int, smoother: Smoother) -> dict[str, Any]:
    """Every place of a loaded block where scale can be handed on, with the scale; and the weights that have none."""
    skeleton, names = job.skeleton, job.skeleton.names_of(index)
    stages, never = walk.stages(index, job.blocks[index])
    groups = [group for stage in stages for group in stage.groups]
    skeleton.load(job.view, names, torch.float32, job.device)  # the proof is exact in float32
    call = walk.windows.call(min(walk.windows.batch, len(walk.windows.tokens)), torch.float32).blocks[index]
    hidden = walk.states.read(0, min(walk.windows.batch, len(walk.windows.tokens))).to(job.device, torch.float32)
    block = skeleton.blocks[index][1]
    fed, others = feeds(block, call, hidden, groups)
    made = _makers_of_rows(block, groups, others, call, hidden) if smoother.rows else {}
    skeleton.cast(names, walk.dtype)
    places: dict[Any, dict[str, Any]] = {
        _leader(groups, feed): {"norm": f"{skeleton.blocks[index][0]}.{feed.module}", "form": feed.form} for feed in fed
    }
    places |= {leader: {"rows": linear.tensor} for leader, linear in made.items()}
    wanted = [group for group in groups if group.leader in places]
    sites = []
    for part in [[group] for group in wanted] if smoother.wide else [wanted]:
        statistics = walk.watched(index, part, smoother.watch) if part else {}
        sites += [
            places[group.leader] | _scaled(job, group.linears, statistics.pop(group.leader), smoother) for group in part
        ]
    done = {name for site in sites for name in site["weights"]}
    return {"sites": sites, "left": [one.tensor for one in (*others, *never) if one.tensor not in done]}


def _leader(groups: Sequence[Group], feed: Feed) -> Any:
    return next(group.leader for group in groups if group.linears == feed.linears)


def _scaled(job: Job, linears: Sequence[Linear], statistics: Any, smoother: Smoother) -> dict[str, Any]:
    """What is done to ``linears``, as it is journalled."""
    weights = [read_linear(job.view, linear) for linear in linears]
    scale = smoother.scale(weights, statistics, [job.target_of(linear) for linear in linears]).cpu()
    return {"weights": [linear.tensor for linear in linears], "scale": scale.tolist()}


def smoothquant(
    weights: Sequence[torch.Tensor], statistics: ChannelTop, targets: Sequence[Target], *, strength: float
) -> torch.Tensor:
    """SmoothQuant's scale float32 [in] of inputs that ``weights`` [out, in] read."""
    weight = torch.stack([one.abs().amax(0) for one in weights]).amax(0)
    top = statistics.top.cpu()
    scale = (top.pow(strength) / weight.clamp(min=SMALLEST).pow(1 - strength)).clamp(min=SMALLEST)
    return torch.where((top > 0) & (weight > 0), scale, 1.0)


def _makers_of_rows(
    block: torch.nn.Module, groups: Sequence[Group], others: Sequence[Linear], call: BlockCall, hidden: torch.Tensor
) -> dict[Any, Linear]:
    """By leader of a group that no norm feeds the linear without bias whose rows are its inputs, one each, up to a factor."""
    parameters, expected, found = dict(block.named_parameters()), call.run(block, hidden.clone()), dict[Any, Linear]()
    for group in groups:
        if any(
            linear not in others or linear.transposed or linear.piece.expert is not None for linear in group.linears
        ):
            continue
        scale = torch.ones(group.columns, device=hidden.device)
        scale[::2], scale[1::3] = 2.0, 0.5
        for maker in (linear for other in groups for linear in other.linears):
            bias = f"{maker.parameter.removesuffix('weight')}bias"
            fits = maker.shape[0] == group.columns and maker.piece.expert is None and not maker.transposed
            if not fits or bias in parameters or maker in group.linears or maker in found.values():
                continue
            changed = [maker, *group.linears]
            kept = [parameters[linear.parameter].data for linear in changed]
            parameters[maker.parameter].data = kept[0] / scale[:, None]
            for linear, before in zip(group.linears, kept[1:], strict=True):
                parameters[linear.parameter].data = before * scale
            got = call.run(block, hidden.clone())
            for linear, before in zip(changed, kept, strict=True):
                parameters[linear.parameter].data = before
            if float((got - expected).abs().max()) <= PROOF * float(expected.abs().max()):
                found[group.leader] = maker
                break
    return found


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
