"""One stage about to run: checkpoint, method, the weights it will change, and the exact layout of its output.

Everything that can be refused is refused here, from headers and structure alone, all offending tensors at once.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from weightworks.engine.identity import identity_of, origin
from weightworks.errors import MethodError
from weightworks.report.card import model_card
from weightworks.report.progress import Progress
from weightworks.stage.budget import Budget, budget_of
from weightworks.stage.protocols import Solution, Target
from weightworks.stage.settings import Settings
from weightworks.stage.tweaking import Tweak, tweak_of
from weightworks.store.adapted import AdaptedCheckpoint
from weightworks.store.checkpoint import FACTORS, MASKS, Checkpoint
from weightworks.store.compressed import MIXED
from weightworks.store.dense import DenseView
from weightworks.store.factors import factor_specs
from weightworks.store.formats import find_format
from weightworks.store.layout import Format
from weightworks.store.masks import SUFFIX, Masks, mask_spec, pack_bits
from weightworks.store.mixed import MixedScheme, elements
from weightworks.store.packing import Scheme
from weightworks.store.rotated import RotatedCheckpoint
from weightworks.store.shards import planned_bytes
from weightworks.store.smoothed import SmoothedView
from weightworks.store.tensorfile import TensorSpec
from weightworks.stream.linears import Linear, block_linears, head_linear
from weightworks.stream.skeleton import Skeleton, build
from weightworks.stream.whole import Outline, Subset

EXPERTS = r"re:.*\.experts(\..*)?$"  # the target by which transformers finds the scheme of all experts


@dataclass
class Job:
    """A method applied to a checkpoint, planned but not run. ``label`` is ``quantize.gptq``; ``target`` the output; ``teacher``
    the model that a recovery is measured by."""

    label: str
    version: int
    method: Any
    settings: Settings
    checkpoint: Checkpoint
    target: Path
    progress: Progress
    device: torch.device
    teacher: Checkpoint | None = None
    chosen: Mapping[str, Any] | None = None  # the stage that chose the data set, and what that is called
    skeleton: Skeleton = field(init=False)
    blocks: list[list[Linear]] = field(init=False)
    kept: dict[str, str] = field(init=False, default_factory=dict)  # matrices inside blocks left as they are, and why
    returns_tuple: int = field(init=False, default=0)  # length of the tuple blocks return, once that is proven
    found: Mapping[str, Any] = field(init=False, default_factory=dict)  # what surveys found, by tensor
    tuned: set[str] = field(init=False, default_factory=set)  # norms that came out changed, by tensor
    allotted: Mapping[str, Scheme] | None = field(init=False, default=None)  # schemes of weights that have not all one

    @property
    def watched(self) -> list[Checkpoint]:
        """What is read, and must not change meanwhile."""
        return [self.checkpoint, *([self.teacher] if self.teacher else [])]

    def __post_init__(self) -> None:
        self.view: DenseView = DenseView(self.checkpoint)
        self._admit()
        self.skeleton = build(self.view, trust_remote_code=self.settings.trust_remote_code)
        dtypes = {spec.name: spec.dtype for spec in self.view.specs}
        self.blocks = []
        for index in range(len(self.skeleton.blocks)):
            linears, others = block_linears(self.skeleton, index, dtypes)
            for name in others:
                skipped = self._ignored(name.removesuffix(".weight"))
                self.kept[name] = "ignored" if skipped else "not a plain linear layer"
            ignored = [linear for linear in linears if self._ignored(linear.base, linear.module)]
            self.kept.update((linear.tensor, "ignored") for linear in ignored)
            self.blocks.append([linear for linear in linears if linear not in ignored])
        if self.budget is not None:
            self.allot(self._largest())
        self._check()

    @property
    def options(self) -> Any:
        return self.method.options

    def _admit(self) -> None:
        """Refuse a checkpoint that no method of this shape takes."""
        refuse_packed(self.view)

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """All weights to be changed, by checkpoint name."""
        return {linear.tensor: linear for block in self.blocks for linear in block}

    @cached_property
    def masks(self) -> Masks | None:
        """The masks of what was pruned before."""
        return Masks.of(self.checkpoint.root)

    @cached_property
    def outline(self) -> Outline:
        """What there is to train."""
        dtypes = {spec.name: spec.dtype for spec in self.view.specs}
        return Outline(self.skeleton, self.linears, head_linear(self.skeleton, dtypes), self.settings.seed)

    @cached_property
    def subset(self) -> Subset:
        """What a method that trains trains; nothing for another."""
        found: Subset = self.method.subset(self.outline) if hasattr(self.method, "subset") else Subset(())
        return found

    @cached_property
    def tweak(self) -> Tweak | None:
        """How norms are tuned once weights are rounded; None if they are not."""
        return tweak_of(self.method)

    @cached_property
    def norms(self) -> list[list[str]]:
        """Parameters of norms that are tuned, by block."""
        if self.tweak is None:
            return [[] for _ in self.skeleton.blocks]
        names = [name for name in self.outline.norms if len(self.skeleton.pieces[name]) == 1]
        return [[name for name in names if name.startswith(prefix + ".")] for prefix, _ in self.skeleton.blocks]

    @cached_property
    def changed(self) -> set[str]:
        """All tensors that are not copied; norms that are to be tuned too, whether or not that will be kept."""
        if hasattr(self.method, "subset"):
            return self.subset.tensors(self.skeleton)
        norms = (self.skeleton.pieces[name][0].tensor for block in self.norms for name in block)
        return set(self.linears) | set(norms)

    @property
    def blockwise(self) -> bool:
        """Whether the blocks are done one after the other: weights by inputs, or norms after them."""
        return hasattr(self.method, "solve") or self.tweak is not None

    @property
    def replaced(self) -> set[str]:
        """Tensors that a smoothing changes though the method does not."""
        return set(self.view.replaced) if isinstance(self.view, SmoothedView) else set()

    def held(self, columns: int) -> int:
        """Bytes of the statistics of an input of so many columns."""
        if self.second_moments:
            return 4 * columns**2 * (1 + self.paired)
        return int(self.method.held(columns)) if hasattr(self.method, "held") else 0

    def working(self, columns: int) -> int:
        """Bytes needed beside them while weights are solved."""
        return int(self.method.working(columns)) if hasattr(self.method, "working") else 0

    @property
    def paired(self) -> bool:
        """Whether the method wants inputs in pairs with those of the unchanged model."""
        return bool(getattr(self.method, "paired", False))

    @property
    def together(self) -> bool:
        """Whether the method wants the inputs of a whole block as the unchanged block makes them."""
        return bool(getattr(self.method, "together", False))

    @property
    def second_moments(self) -> bool:
        """Whether the method gathers the second moments of inputs, factors them and sweeps with the factor."""
        return hasattr(self.method, "solve") and not hasattr(self.method, "held")

    @property
    def scheme(self) -> Scheme | MixedScheme | None:
        """How weights are quantized: all alike, or each as allotted; None if they are not."""
        if self.allotted is None:
            found: Scheme | None = self.method.scheme()
            return found
        names: dict[tuple[str, ...], Scheme] = {
            (EXPERTS, one.base) if one.piece.expert is not None else (one.module, one.base): self.allotted[name]
            for name, one in self.linears.items()
        }
        return MixedScheme.of_weights(names)

    def scheme_of(self, linear: Linear) -> Scheme | None:
        """How one weight is quantized."""
        return self.method.scheme() if self.allotted is None else self.allotted[linear.tensor]

    @cached_property
    def budget(self) -> Budget | None:
        """What the schemes of weights are chosen by; None if they have all one."""
        return budget_of(self.method)

    @cached_property
    def choices(self) -> dict[str, list[int]]:
        """By weight, the numbers of the budget's choices that fit it."""
        assert self.budget is not None
        schemes = list(enumerate(self.budget.choices))
        packing = None if self.options.format == "dense" else MIXED
        return {
            name: [number for number, scheme in schemes if self._misfit(linear, scheme, packing) is None]
            for name, linear in self.linears.items()
        }

    def _largest(self) -> dict[str, Scheme]:
        """The schemes with which weights take most: the bound on what a budget can come to."""
        assert self.budget is not None
        schemes, linears = self.budget.choices, self.linears
        return {
            name: max((schemes[number] for number in fitting), key=lambda one: packed_bytes(linears[name], one))
            if fitting
            else schemes[0]
            for name, fitting in self.choices.items()
        }

    def allot(self, schemes: Mapping[str, Scheme]) -> None:
        """Give every weight a scheme of its own; the layout of the output follows."""
        self.allotted = dict(schemes)
        for known in ("format", "specs", "weight_bytes"):
            self.__dict__.pop(known, None)

    @cached_property
    def format(self) -> Format | None:
        """The container of quantized weights; None when dense weights are written."""
        name = getattr(self.options, "format", "dense")
        if self.scheme is None or name == "dense":
            return None
        return MIXED if isinstance(self.scheme, MixedScheme) else find_format(name, self.scheme)

    def _ignored(self, *names: str) -> bool:
        return any(matches(pattern, name) for pattern in getattr(self.options, "ignored", ()) for name in names)

    def _check(self) -> None:
        """Every weight must fit the scheme and the container; all that do not are named."""
        if not self.linears:
            raise MethodError(
                f"{self.checkpoint.root}: nothing to do: no linear layer is left after --ignore",
                hint=f"ignored: {', '.join(getattr(self.options, 'ignored', ()))}",
            )
        if self.tweak is not None and not any(self.norms):
            raise MethodError(
                f"{self.checkpoint.root}: norm_tweak is asked for, but no norm inside the blocks has gains",
                hint="leave it out",
            )
        if getattr(self.options, "smooth", None) is not None and not any(
            one is not None and one.inputs is not None for one in map(self.scheme_of, self.linears.values())
        ):
            raise MethodError(
                f"{self.label}: smooth helps where inputs are rounded, and these are not",
                hint="use it with --scheme W8A8, FP8, MXFP8 or the like",
            )
        problems = self._misfits()
        if problems:
            lines = "\n".join(f"  {name}: {reason}" for name, reason in problems.items())
            widths = sorted({linear.shape[1] for linear in self.linears.values()})
            way = f"widths here: {widths}; choose {{}} that divides them{{}}, or --ignore them"
            pruning = hasattr(self.method, "refusal")
            hint = "change what is named there, or --ignore these tensors"
            named = getattr(self.options, "scheme", None)
            if any("not divisible" in reason for reason in problems.values()):
                hint = way.format("a --scheme" if named else "a --group-size", "" if named else ", -1 for per channel")
            if any("not a multiple" in reason for reason in problems.values()):
                hint = way.format("a --pattern N:M with an M", "")
            raise MethodError(
                f"{self.label} cannot {'prune' if pruning else 'quantize'} {len(problems)} of {len(self.linears)} "
                f"tensors as asked:\n{lines}",
                hint=hint,
            )

    def _misfits(self) -> dict[str, str]:
        """Weights that do not fit method, scheme or container, each with the reason."""
        found = {
            name: self._misfit(linear, self.scheme_of(linear), self.format) for name, linear in self.linears.items()
        }
        return {name: reason for name, reason in found.items() if reason is not None}

    def _misfit(self, linear: Linear, scheme: Scheme | None, format_: Format | None) -> str | None:
        """Why a weight does not fit method, scheme or container; None if it does."""
        if hasattr(self.method, "refusal") and (reason := self.method.refusal(linear.shape)):
            return str(reason)
        if scheme is None:
            return None
        if scheme.group_size != -1 and linear.shape[1] % scheme.group_size:
            return f"width {linear.shape[1]} is not divisible by the group size {scheme.group_size}"
        expert = linear.piece.expert is not None
        if format_ is None:
            return None
        return format_.refusal(scheme, linear.shape, transposed=linear.transposed, expert=expert)

    @cached_property
    def specs(self) -> list[TensorSpec]:
        """Every tensor of the output, in the order of the input."""
        specs: list[TensorSpec] = []
        for spec in self.checkpoint.specs:
            linear = self.linears.get(spec.name)
            specs += [spec] if linear is None or self.format is None else self.specs_of(linear)
        return specs

    @cached_property
    def side(self) -> dict[str, list[TensorSpec]]:
        """Files of tensors beside the weights: the masks of a method that prunes, or those a training has held; the factors of
        one that factors."""
        if hasattr(self.method, "factored"):
            sizes = {name: self.method.factored(linear.shape) for name, linear in self.linears.items()}
            of = self.linears.items()
            return {
                FACTORS: [spec for name, one in of for spec in factor_specs(name, one.shape, sizes[name], one.dtype)]
            }
        if not getattr(self.method, "masks", False):
            if self.masks is None or not hasattr(self.method, "subset"):
                return {}
            return {
                MASKS: [TensorSpec(name + SUFFIX, info.shape, info.dtype) for name, info in self.masks.infos.items()]
            }
        return {MASKS: [mask_spec(linear.tensor, self._stored_shape(linear)) for linear in self.linears.values()]}

    @cached_property
    def adaptable(self) -> dict[str, Linear]:
        """All weights that may have an adapter, by checkpoint name."""
        head = self.outline.head
        return {**self.linears, **({} if head is None else {head.tensor: head})}

    def _stored_shape(self, linear: Linear) -> tuple[int, int]:
        """The shape of the dense tensor that the output stands for: a packed weight decodes to [out, in]."""
        rows, columns = linear.shape
        return (columns, rows) if linear.transposed and self.format is None else (rows, columns)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the weight files to be written, masks included: exact."""
        return planned_bytes(self.specs, self.settings.shard_bytes, self.side)

    @cached_property
    def block_of(self) -> dict[str, int]:
        """The number of the block that each weight is in."""
        return {linear.tensor: index for index, block in enumerate(self.blocks) for linear in block}

    def target_of(self, linear: Linear) -> Target:
        """What the method must know of a weight's destination."""
        scale_dtype = torch.float32 if self.format is None else self.format.scale_dtype(linear.dtype)
        first_version = (
            self.format is not None and self.format.name == "gptq"
        )  # it stores zero - 1, so 0 cannot be held
        place, found = self.block_of[linear.tensor], self.found.get(linear.tensor)
        keep = found if isinstance(found, int) else None
        scheme = None if self.allotted is None else self.allotted[linear.tensor]
        return Target(linear.tensor, scale_dtype, int(first_version), place, keep, linear.dtype, found, scheme)

    def stored(self, linear: Linear, solution: Solution) -> dict[str, torch.Tensor]:
        """The tensors that will stand for a solved weight, and for its mask."""
        tensors, mask = {}, solution.mask
        if self.format is not None:
            assert not isinstance(solution.weight, torch.Tensor)
            tensors = self.format.tensors(linear.base, solution.weight)
        else:
            dense = solution.dense().to(linear.dtype)
            if mask is not None:
                dense = dense.masked_fill(~mask & (dense == 0), 0)  # a zero times a negative scale has a sign
            tensors[linear.tensor] = dense.T.contiguous() if linear.transposed else dense
        if solution.factors is not None:
            tensors |= solution.factors.tensors(linear.tensor)
        if mask is not None:
            turned = linear.transposed and self.format is None
            tensors[linear.tensor + SUFFIX] = pack_bits((mask.T if turned else mask).cpu())
        return tensors

    def row(self, linear: Linear, solution: Solution) -> dict[str, Any]:
        """The report's line on one weight."""
        row: dict[str, Any] = {"tensor": linear.tensor, "shape": list(linear.shape), "method": self.label}
        if not isinstance(solution.weight, torch.Tensor):
            row["bits"] = solution.weight.scheme.bits
            if self.allotted is not None:
                row["group_size"] = solution.weight.scheme.group_size
        if solution.mask is not None:
            row["kept"] = int(solution.mask.sum())
            row["sparsity"] = 1 - row["kept"] / solution.mask.numel()
        if solution.factors is not None:
            row["kept_in_core"] = int(solution.factors.mask.sum())
        names = self.specs_of(linear)
        row["bytes_in"] = linear.shape[0] * linear.shape[1] * linear.dtype.itemsize
        row["bytes_out"] = sum(spec.nbytes for spec in names)
        row.update(solution.facts)
        if solution.fallbacks:
            row["fallbacks"] = list(solution.fallbacks)
        return row

    def specs_of(self, linear: Linear) -> list[TensorSpec]:
        """The tensors that will stand for a weight."""
        if self.format is None:
            return [TensorSpec(linear.tensor, linear.shape, linear.dtype)]
        return self.format.specs(linear.base, linear.shape, self.scheme_of(linear), linear.dtype)

    def uncovered(self) -> list[str]:
        """One line a matrix that is as large as those changed, yet of a kind (fused experts) that is left as it is."""
        smallest = min(linear.shape[0] * linear.shape[1] for linear in self.linears.values())
        sizes = {name: math.prod(self.checkpoint.tensors[name].shape) for name in self.kept}
        left = [
            f"{name}: left as it is, {reason}"
            for name, reason in self.kept.items()
            if reason != "ignored" and sizes[name] >= smallest
        ]
        return [*left, *self.subset.fallbacks]

    def ignored_modules(self) -> list[str]:
        """Names of linear layers that stay as they are, as loaders must be told (model's and checkpoint's spelling)."""
        changed = {linear.module for linear in self.linears.values()}
        names = {
            name
            for name, module in self.skeleton.model.named_modules()
            if isinstance(module, torch.nn.Linear) and name not in changed
        }
        names.update(name.removesuffix(".weight") for name in self.kept)
        return sorted(names)

    @property
    def expected(self) -> set[str]:
        """Names of all dense tensors the output must stand for."""
        return set(self.checkpoint.tensors)

    def account(self) -> dict[str, Any]:
        """What became of every input tensor: transformed or copied, with the reason a matrix was left as it is."""
        done = self.changed if self.tweak is None else {*self.linears, *self.tuned}
        rescaled = self.replaced - done
        turned = set()
        if isinstance(self.checkpoint, RotatedCheckpoint):
            turned = set(self.checkpoint.turns or ()) - done - rescaled
        copied = [name for name in self.checkpoint.tensors if name not in done | rescaled | turned]
        left = {
            name: self.kept.get(name, "unused by the model")
            for name in copied
            if name in self.kept or name in self.skeleton.unused
        }
        return {
            "input": len(self.checkpoint.tensors),
            "transformed": len(done) - len(self.tuned),
            **({} if self.tweak is None else {"tuned": len(self.tuned)}),
            "copied": len(copied),
            **({"rescaled": len(rescaled)} if rescaled else {}),
            **({"rotated": len(turned)} if turned else {}),
            "dropped": 0,
            "left_as_they_are": left,
        }

    def quantization_config(self) -> dict[str, Any]:
        """The ``quantization_config`` of the job's format."""
        assert self.format is not None
        assert self.scheme is not None
        facts = {
            "damp_percent": getattr(self.options, "damp_percent", None) or 0.01,
            "static_groups": getattr(self.options, "act_order", "none") == "static",
            "quantizer": f"weightworks:{self.label}",
        }
        return self.format.config(self.scheme, self.ignored_modules(), facts)

    def config(self) -> dict[str, Any]:
        """The source's configuration, with ``quantization_config`` exactly where weights are packed."""
        config = dense_config(self.checkpoint.config)
        if self.format is not None:
            config["quantization_config"] = self.quantization_config()
        return config

    def origin(self) -> dict[str, Any]:
        """What the output was made from, for its provenance."""
        taught = {} if self.teacher is None else {"teacher": origin(self.teacher)}
        return {**origin(self.checkpoint), **taught, **({} if self.chosen is None else {"data": dict(self.chosen)})}

    def card(self, provenance: dict[str, Any]) -> str:
        """The model card of the output."""
        return model_card(self.checkpoint, self.target.name, provenance, provenance["checks"]["dequantize"])

    def identity(self, **facts: Any) -> dict[str, Any]:
        """What the output's bytes depend on; two runs of equal identity make equal bytes."""
        return identity_of(self, **facts)


def packed_bytes(linear: Linear, scheme: Scheme) -> int:
    """Bytes of all that is stored for a weight of a scheme in compressed-tensors' layouts."""
    return sum(spec.nbytes for spec in MIXED.specs(linear.base, linear.shape, scheme, linear.dtype))


def refuse_packed(view: DenseView) -> None:
    """Raise :class:`MethodError` for a checkpoint that is quantized."""
    if view.format is not None and view.scheme is not None:
        raise MethodError(
            f"{view.checkpoint.root}: is already quantized ({view.format.name}, {elements(view.scheme)})",
            hint="start from the dense checkpoint it was made from",
        )


def refuse_filled(checkpoint: Checkpoint) -> None:
    """Raise :class:`MethodError` for a pruned model with adapters added to weights that its masks say are pruned."""
    masks = Masks.of(checkpoint.root) if isinstance(checkpoint, AdaptedCheckpoint) else None
    if masks is None or not isinstance(checkpoint, AdaptedCheckpoint):
        return
    if filled := [name for name in checkpoint.updates or {} if name in masks.infos]:
        raise MethodError(
            f"{checkpoint.source}: the zeros of {len(filled)} pruned weights would be filled in: {', '.join(filled[:3])}"
            f"{', ...' if len(filled) > 3 else ''}; W + BA has none where W has, so the sum is dense",
            hint="leave the adapter beside the model (PEFT loads both), train one that can be merged "
            "(compress recover --adapter mask_lora), or prune the sum again (compress prune MODEL+ADAPTER)",
        )


def dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what only packed or sparse weights need."""
    return {key: value for key, value in config.items() if key not in ("quantization_config", "sparsity_config")}


def matches(pattern: str, name: str) -> bool:
    """Whether an ``--ignore`` pattern (a glob, or a regular expression after ``re:``) means ``name`` or an ancestor."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern + ".*")


def fallbacks(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line a tensor on which the method could not be applied as asked."""
    return [f"{row.get('tensor') or row['part']}: {text}" for row in rows for text in row.get("fallbacks", ())]
