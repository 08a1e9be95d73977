"""A finished merge that is taken up again: what it kept of every tensor, what it concluded, and whether it goes with this one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from weightworks.errors import MethodError
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.manifest import read_provenance
from weightworks.store.tensorfile import TensorInfo, read_bytes, read_header

if TYPE_CHECKING:
    from weightworks.engine.mergejob import MergeJob

STATE_FILE = "merge_state.safetensors"
STATE_PREFIX = "state."
OWN = ("on_missing", "vocabulary", "out_dtype", "align", "check", "weights")  # options that may differ from run to run


@dataclass(frozen=True)
class Earlier:
    """``found`` is what its surveys concluded, ``tensors`` the state by the names of its file."""

    checkpoint: Checkpoint
    found: Any
    tensors: Mapping[str, TensorInfo]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """What was kept of rows of a tensor, float32; None if nothing was."""
        if (info := self.tensors.get(STATE_PREFIX + name)) is None:
            return None
        shape = info.shape or (1,)
        row = info.nbytes // max(shape[0], 1)
        empty = torch.empty((stop - start, *shape[1:]), dtype=info.dtype)
        return read_bytes(self.checkpoint.root / info.shard, info.offset + start * row, empty)


def open_earlier(job: MergeJob) -> Earlier | None:
    """What the merge that ``job`` continues left, held against the job; all that does not go together is told at once."""
    if job.earlier is None:
        return None
    root, provenance = job.earlier.root, read_provenance(job.earlier.root)
    path = root / STATE_FILE
    if provenance is None or not path.is_file():
        lacking = STATE_FILE if provenance is not None else "provenance.json"
        raise MethodError(
            f"{root}: no {lacking}: this is no merge that can be continued",
            hint="give the output folder of merge opcm, with all its files",
        )
    found = Earlier(job.earlier, provenance.get("merge", {}).get("found"), read_header(path))
    if problems := list(_differences(job, provenance, found)):
        lines = "\n".join(f"  {text}" for text in problems)
        raise MethodError(
            f"{root}: {job.label} cannot continue this merge:\n{lines}",
            hint="continue it with the base and the options it was made with",
        )
    return found


def _differences(job: MergeJob, provenance: Mapping[str, Any], found: Earlier) -> Iterator[str]:
    """What makes it another merge than ``job`` would have begun with: method, base, options, tensors."""
    identity = provenance["identity"]
    if identity["method"] != job.label:
        yield f"it was made by {identity['method']}"
        return
    base = None if job.base is None else job.base.checkpoint.digest
    if identity["input"].get("base") != base:
        yield "its base is another one"
    before, now = identity["options"], job.options.resolved()
    for name in sorted({*before, *now} - {*OWN}):
        if before.get(name) != now.get(name):
            yield f"{name.replace('_', '-')} is {before.get(name)!r} there, {now.get(name)!r} here"
    shapes = {STATE_PREFIX + part.spec.name: part.spec.shape for part in job.merged}
    kept = {name: info.shape for name, info in found.tensors.items()}
    for name in sorted(name for name in {*shapes, *kept} if shapes.get(name) != kept.get(name))[:5]:
        yield f"{name.removeprefix(STATE_PREFIX)}: {kept.get(name, 'not there')} there, {shapes.get(name, 'not here')} here"
