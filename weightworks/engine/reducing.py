"""A model about to be made smaller: what goes is decided in passes over its blocks, then the rest is written.

How that is decided is a :class:`Plan` of one of three shapes: units (``narrowing.py``), blocks (``depth.py``) or experts
(``mixtures.py``). Tensors, configuration, account and proof are the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from weightworks.engine.finish import publish, seal, stream_perplexity, verification, verify
from weightworks.engine.identity import identity_of, origin
from weightworks.engine.job import refuse_packed
from weightworks.engine.tensorwise import JOURNAL_BYTES
from weightworks.report.card import model_card
from weightworks.report.progress import Progress
from weightworks.stage.settings import Settings
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.layout import Format
from weightworks.store.reduced import Cut, ReducedView, Restored
from weightworks.store.shards import planned_bytes
from weightworks.store.tensorfile import TensorSpec
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.calibration import Calibration
from weightworks.stream.linears import CONVOLUTIONS, Linear, block_linears
from weightworks.stream.resizing import Configuration
from weightworks.stream.skeleton import Skeleton, read_config

FOUND = "decided"  # the step that says what goes
COSMETIC = ("_name_or_path", "dtype", "transformers_version")


@dataclass(frozen=True)
class Layout:
    """The smaller checkpoint: its tensors, its configuration, and the block of the source in the place of each of its own."""

    cuts: Sequence[Cut]
    config: Configuration
    blocks: Sequence[int]


@dataclass(frozen=True)
class Run:
    """What passes over the blocks need."""

    writer: CheckpointWriter
    calibration: Calibration
    probe: torch.Tensor
    dtype: torch.dtype
    on_disk: bool
    statistics_bytes: int


class Plan(Protocol):
    """A shape of making smaller. Whatever can be refused is refused when it is made.

    ``settled`` says that ``layout(None)``, made before anything is known, has the final layout's names and shapes; it
    has at most as many bytes in any case. ``same_names`` says that the model with what goes masked can be run as the
    source's own structure.
    """

    settled: bool
    masked: bool

    def layout(self, found: Any) -> Layout:
        """The smaller checkpoint by what the passes ``found``."""

    def find(self, run: Run) -> Any:
        """Decide what goes; JSON-compatible. What is repaired may be written on the way, if the layout is settled."""

    def rows(self, found: Any) -> list[dict[str, Any]]:
        """Lines of the report."""

    def told(self, found: Any) -> list[str]:
        """What was done, in words."""

    def uncovered(self) -> list[str]:
        """What was asked for and is not done, a line each."""


@dataclass
class ReduceJob:
    """A reduction planned but not run; fields as of :class:`weightworks.engine.job.Job`, without a teacher."""

    teacher: ClassVar[None] = None
    together: ClassVar[bool] = False
    paired: ClassVar[bool] = False
    tweak: ClassVar[None] = None
    blockwise: ClassVar[bool] = False

    label: str
    version: int
    method: Any
    settings: Settings
    checkpoint: Checkpoint
    target: Path
    progress: Progress
    device: torch.device
    skeleton: Skeleton = field(init=False)
    blocks: list[list[Linear]] = field(init=False)
    plan: Plan = field(init=False)
    found: Any = field(init=False, default=None)
    returns_tuple: int = field(init=False, default=0)

    @property
    def watched(self) -> list[Checkpoint]:
        """What is read, and must not change meanwhile."""
        return [self.checkpoint]

    def __post_init__(self) -> None:
        self.view = DenseView(self.checkpoint)
        refuse_packed(self.view)
        known = read_config(self.checkpoint.root, self.settings.trust_remote_code)
        self.config_before = Configuration(
            self.checkpoint.config, known, str(self.checkpoint.root), self.settings.trust_remote_code
        )
        self.skeleton = self.config_before.build(self.view)
        dtypes = {name: info.dtype for name, info in self.checkpoint.tensors.items()}
        count = len(self.skeleton.blocks)
        self.blocks = [block_linears(self.skeleton, index, dtypes)[0] for index in range(count)]

    @property
    def options(self) -> Any:
        return self.method.options

    @cached_property
    def layout(self) -> Layout:
        """The layout as far as it is known; :meth:`settle` says when more is."""
        return self.plan.layout(self.found)

    def settle(self, found: Any) -> None:
        """The passes are made."""
        self.found = found
        for name in ("layout", "specs", "weight_bytes", "reduced"):
            self.__dict__.pop(name, None)

    @cached_property
    def reduced(self) -> ReducedView:
        """The smaller checkpoint, computed from the source as it is read."""
        return ReducedView(self.checkpoint, self.layout.cuts)

    @cached_property
    def specs(self) -> list[TensorSpec]:
        return self.reduced.specs

    # What the estimate asks.

    format: Format | None = None
    scheme: None = None
    second_moments = False

    @cached_property
    def linears(self) -> dict[str, Linear]:
        return {linear.tensor: linear for block in self.blocks for linear in block}

    def held(self, columns: int) -> int:
        """Bytes of the statistics of an input of so many columns."""
        return int(self.method.held(columns)) if hasattr(self.method, "held") else 0

    def working(self, columns: int) -> int:
        """Bytes needed beside them while the method decides."""
        return int(self.method.working(columns)) if hasattr(self.method, "working") else 0

    def specs_of(self, linear: Linear) -> list[TensorSpec]:
        return [TensorSpec(linear.tensor, linear.shape, linear.dtype)]

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the weight files to be written: exact where the plan is settled, else at most."""
        return planned_bytes(self.specs, self.settings.shard_bytes)

    # What the end of a stage asks.

    def config(self) -> dict[str, Any]:
        """The smaller model's configuration."""
        return dict(self.layout.config.raw)

    def quantization_config(self) -> dict[str, Any]:
        raise NotImplementedError("a smaller model has dense weights")

    def origin(self) -> dict[str, Any]:
        return origin(self.checkpoint)

    def account(self) -> dict[str, Any]:
        """What became of every tensor of the source."""
        cuts = self.layout.cuts
        used = {source for cut in cuts for source, _ in cut.sources}
        copied = sum(cut.plain for cut in cuts)
        return {
            "input": len(self.checkpoint.tensors),
            "output": len(cuts),
            "transformed": len(cuts) - copied,
            "copied": copied,
            "renamed": sum(cut.name != cut.base for cut in cuts),
            "dropped": len(self.checkpoint.tensors) - len(used),
            "left_as_they_are": {name: "unused by the model" for name in self.skeleton.unused if name in used},
        }

    def uncovered(self) -> list[str]:
        return self.plan.uncovered()

    def card(self, provenance: dict[str, Any]) -> str:
        return model_card(self.checkpoint, self.target.name, provenance, dequantize=False)

    def identity(self, **facts: Any) -> dict[str, Any]:
        """What the output's bytes depend on; two runs of equal identity make equal bytes."""
        return identity_of(self, **facts)

    def facts(self, smaller: Skeleton) -> dict[str, Any]:
        """Sizes before and after; ``smaller`` is the structure of the result."""
        before = {name: info.shape for name, info in self.checkpoint.tensors.items()}
        after = {name: self.reduced.shape(name) for name in self.reduced.names}
        entries = self.layout.config.entries
        return {
            "parameters_in": sum(map(math.prod, before.values())),
            "parameters_out": sum(map(math.prod, after.values())),
            "multiply_adds_in": multiply_adds(self.skeleton),
            "multiply_adds_out": multiply_adds(smaller),
            "done": self.plan.told(self.found),
            "config": {
                key: value
                for key, value in entries.items()
                if value != self.config_before.entries.get(key) and key not in COSMETIC
            },
        }


@dataclass
class Smaller:
    """The smaller model as something that can be run and loaded."""

    skeleton: Skeleton
    device: torch.device
    target: Path
    settings: Settings
    progress: Progress
    expected: set[str]
    returns_tuple: int = 0


@torch.no_grad()
def reduce(job: ReduceJob, run: Run, identity: dict[str, Any], facts: Mapping[str, Any], blocks: int) -> dict[str, Any]:
    """Decide, write, verify with stock transformers (of at most ``blocks`` blocks), publish; returns the provenance."""
    writer = run.writer
    if FOUND not in writer.steps:
        writer.done(FOUND, {"found": job.plan.find(run), "returns_tuple": job.returns_tuple})
    job.returns_tuple = int(writer.steps[FOUND]["returns_tuple"])
    job.settle(writer.steps[FOUND]["found"])
    if not job.plan.settled:
        writer.lay_out(job.specs, job.settings.shard_bytes)
    write(job, writer)
    smaller = as_model(job, run.probe)
    probe, count = run.probe, min(blocks, len(job.layout.blocks))
    quality = {"dense": stream_perplexity(job, job.view, probe), "result": in_memory(job, smaller, writer, probe)}
    whole = count == len(job.layout.blocks)
    partial = quality["result"] if whole else in_memory(job, smaller, writer, probe, count)
    files = seal(job, writer)
    with verification(writer):
        staged = Checkpoint.open(writer.staging)
        checks = verify(smaller, staged, probe, {"partial": partial}, count)
    size = {
        "bytes_in": job.checkpoint.nbytes,
        "bytes_out": sum(spec.nbytes for spec in job.specs),
        "ratio": job.checkpoint.nbytes / sum(spec.nbytes for spec in job.specs),
    }
    more = {**facts, "size": size, "quality": quality, "reduction": job.facts(smaller.skeleton), "checks": checks}
    return publish(job, writer, identity, job.plan.rows(job.found), more, files)


def multiply_adds(skeleton: Skeleton) -> int:
    """Products with weights that a token takes: of matrices in blocks, of the head, and of the experts it is given to.

    What attention does with keys and values is left out: it depends on the text's length.
    """
    text = skeleton.model.config.get_text_config()
    head = skeleton.model.get_output_embeddings()
    total = 0 if head is None else head.weight.numel()
    for name in (name for index in range(len(skeleton.blocks)) for name in skeleton.names_of(index)):
        tensor = skeleton.get(name)
        if tensor.ndim == 3 and not isinstance(skeleton.holder(name), CONVOLUTIONS):
            total += tensor.numel() // len(tensor) * min(routed_to(text), len(tensor))
        elif tensor.ndim == 2:
            total += tensor.numel()
    return total


ROUTED = ("num_experts_per_tok", "moe_topk", "top_k_experts")  # what configurations call the experts of a token


def routed_to(text: Any) -> int:
    """How many experts a token is given to, by a configuration; 1 if it does not say."""
    found = (getattr(text, name, None) for name in ROUTED)
    return next((value for value in found if isinstance(value, int)), 1)


def write(job: ReduceJob, writer: CheckpointWriter) -> None:
    """Every tensor that is not there yet, in file order."""
    cuts = [cut for cut in job.layout.cuts if not writer.holds(cut.name)]
    if not cuts:
        return
    job.progress.begin("tensor", len(job.layout.cuts), len(job.layout.cuts) - len(cuts), every=5.0)
    held = 0
    for cut in cuts:
        if cut.plain:
            writer.copy_from(job.checkpoint, cut.base, called=cut.name)
        else:
            writer.put(cut.name, job.reduced.read(cut.name).contiguous())
        held += job.checkpoint.info(cut.base).nbytes
        if held > JOURNAL_BYTES:
            writer.done(f"tensors to {cut.name}")
            held = 0
        job.progress.step(cut.name)
    writer.done("last tensors")
    job.progress.end()


def as_model(job: ReduceJob, probe: torch.Tensor) -> Smaller:
    """The structure of the smaller model; nothing is loaded."""
    skeleton = job.layout.config.build(job.reduced)
    settings, expected = job.settings, set(job.reduced.names)
    return Smaller(skeleton, job.device, job.target, settings, job.progress, expected, job.returns_tuple)


def in_memory(
    job: ReduceJob, smaller: Smaller, writer: CheckpointWriter, probe: torch.Tensor, count: int | None = None
) -> float:
    """Perplexity of what was written: of the source's own structure with all masked that went, so that loading the
    smaller one proves both the same; of the smaller structure where masks cannot say it."""
    if not job.plan.masked:
        return stream_perplexity(smaller, Staged(writer), probe, count)
    reader = Restored(job.checkpoint, job.layout.cuts, writer)
    return stream_perplexity(job, reader, probe, list(job.layout.blocks)[:count])


class Staged:
    """Tensors of a staging folder, none packed."""

    def __init__(self, writer: CheckpointWriter) -> None:
        self.read = writer.read

    def is_packed(self, name: str) -> bool:
        return False
