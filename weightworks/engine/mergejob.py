"""A merge about to run: its inputs, what every tensor of the output is made of, and the exact layout of the output.

Everything that can be refused is refused here, from headers alone, all offending tensors at once. No model is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import weightworks
from weightworks.engine.earlier import STATE_FILE, STATE_PREFIX, Earlier, open_earlier
from weightworks.engine.identity import environment, origin
from weightworks.engine.job import dense_config, refuse_filled
from weightworks.engine.merge_masks import Carried, carried_masks
from weightworks.engine.mergeplan import Layout, OneMethod, Part, Planner
from weightworks.engine.side import Side, open_statistics
from weightworks.errors import MethodError, NotFiniteError, WeightworksError
from weightworks.report.card import merge_card
from weightworks.report.progress import Progress
from weightworks.stage.merging import is_whole
from weightworks.stage.settings import Settings
from weightworks.store import tokenizerfile
from weightworks.store.checkpoint import MASKS, Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.layout import Format
from weightworks.store.shards import planned_bytes
from weightworks.store.statistics import Statistics
from weightworks.store.tensorfile import TensorSpec
from weightworks.store.tokenizerfile import SLOW, extended, extended_config
from weightworks.store.vocabulary import Alignment, Reader
from weightworks.store.writer import count_not_finite

COSMETIC = {  # entries of a configuration that say nothing of what the weights mean
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "vocab_size", "tie_word_embeddings", "quantization_config", "max_position_embeddings",
}  # fmt: skip


@dataclass(frozen=True)
class Input:
    """A model that goes into a merge: the checkpoint, and the reader that gives its dense tensors."""

    checkpoint: Checkpoint
    reader: Reader

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Input:
        """``checkpoint`` as an input; a packed one is decoded when read."""
        view = DenseView(checkpoint)
        return cls(checkpoint, checkpoint if view.format is None else view)

    @property
    def name(self) -> str:
        return self.checkpoint.source

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.reader.specs}


@dataclass
class MergeJob:
    """A merge planned but not run. ``label`` is ``merge.ties``; ``earlier`` is a finished merge that is to be continued."""

    label: str
    version: int
    method: Any
    settings: Settings
    models: Sequence[Input]
    base: Input | None
    target: Path
    progress: Progress
    device: torch.device
    earlier: Checkpoint | None = None
    vocabulary: Alignment | None = None  # how rows were matched, where vocabularies differ
    tied: bool | None = None  # whether the result shares embedding and head; None: as the reference does
    copies: Mapping[str, str] = field(default_factory=dict)  # tensors of inputs that are others of theirs, and why
    remarks: Sequence[str] = ()  # what a user should know of the inputs together
    planner: Planner | None = None  # what decides about parts; None: all by the one method
    replaced: Mapping[str, str] = field(default_factory=dict)  # small files of the reference with another content
    members: tuple[int, ...] = field(init=False)  # those of the models that are merged
    layout: Layout = field(init=False)
    alignment: dict[str, Any] | None = field(init=False, default=None)  # what was moved before
    selection: dict[str, Any] | None = field(init=False, default=None)  # how the members were chosen
    continued: Earlier | None = field(init=False, default=None)  # what it left
    statistics: tuple[Statistics, ...] = field(init=False, default=())  # of each model, where the method wants them
    masks: dict[str, Carried] = field(init=False)  # of the output, by tensor
    keys: dict[tuple[int, str], str] = field(init=False, default_factory=dict)  # of contents, as far as they are known
    skeleton: Any = field(init=False, default=None)  # of the written output, once it is there
    returns_tuple: int = field(init=False, default=0)

    @property
    def watched(self) -> list[Checkpoint]:
        """What is read, and must not change meanwhile."""
        return [one.checkpoint for one in (*self.models, *([self.base] if self.base else []))]

    def __post_init__(self) -> None:
        self._check_architectures()
        self.planner = self.planner or OneMethod(self.method)
        self.members = tuple(range(len(self.models)))
        self.layout = self.planner.layout(self)
        self.continued = open_earlier(self)
        self.statistics = open_statistics(self)
        self.masks = carried_masks(self)

    def choose(self, members: Sequence[int]) -> None:
        """Merge ``members`` alone, numbers among the models. The output's tensors stay the same."""
        assert self.planner is not None
        self.members = tuple(members)
        self.layout = self.planner.layout(self)

    @property
    def options(self) -> Any:
        return self.method.options

    @property
    def reference(self) -> Input:
        """The input whose names, shapes, dtypes and small files the output has: the base, or else the first model."""
        return self.base or self.models[0]

    @property
    def compared(self) -> Input:
        """The input that the result is compared with: the base, or the first that is merged."""
        return self.base or self.models[self.members[0]]

    @property
    def checkpoint(self) -> Checkpoint:
        return self.reference.checkpoint

    @property
    def inputs(self) -> list[Input]:
        """All inputs, the base first."""
        return [*([self.base] if self.base else []), *self.models]

    def _check_architectures(self) -> None:
        """All inputs are of one architecture."""
        kinds = {item.name: item.checkpoint.config.get("model_type") for item in self.inputs}
        if len(set(kinds.values())) > 1:
            raise MethodError(
                "models of different architectures cannot be merged: "
                + ", ".join(f"{name} is {kind}" for name, kind in kinds.items()),
                hint="merge fine-tunes of one base, or at least models of one architecture and shape",
            )

    @cached_property
    def config_differences(self) -> list[str]:
        """Entries of ``config.json`` in which an input differs from the reference although weights depend on them."""
        known, name = self.reference.checkpoint.config, self.reference.name
        return [
            f"{item.name}: {key} is {item.checkpoint.config.get(key)!r}, in {name} {known.get(key)!r}"
            for item in self.inputs
            for key in sorted({*known, *item.checkpoint.config} - COSMETIC - {*self.layout.config})
            if known.get(key) != item.checkpoint.config.get(key)
        ]

    @property
    def parts(self) -> Sequence[Part]:
        """The tensors of the output, in order of names."""
        return self.layout.parts

    @property
    def specs(self) -> list[TensorSpec]:
        """Every tensor of the output, in order of names."""
        return [part.spec for part in self.parts]

    @property
    def merged(self) -> list[Part]:
        """The parts that a method makes."""
        return [part for part in self.parts if part.method is not None]

    @property
    def side(self) -> dict[str, list[TensorSpec]]:
        """Files beside the weights: what a method keeps of every tensor so that the merge can be continued; masks."""
        found = {MASKS: [one.spec(name) for name, one in self.masks.items()]} if self.masks else {}
        if not getattr(self.method, "STATE", False):
            return found
        return {
            **found,
            STATE_FILE: [
                TensorSpec(STATE_PREFIX + part.spec.name, part.spec.shape, torch.float32) for part in self.merged
            ],
        }

    @property
    def output_bytes(self) -> int:
        """Bytes of the weight files and of the state: exact."""
        side = sum(planned_bytes(members, 1 << 62) for members in self.side.values())
        return planned_bytes(self.specs, self.settings.shard_bytes) + side

    def read(self, item: Input, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of an input's tensor in float32 [rows, ...], checked for NaN and infinity."""
        plain = item.reader is item.checkpoint and item.checkpoint.as_stored
        dtype = (
            None if plain else torch.float32
        )  # a view computes its rows; others are checked as they are, half as long
        if item.tensors[name].shape:
            rows = item.reader.read_rows(name, start, stop, dtype)
        else:
            rows = item.reader.read(name, dtype).reshape(1)
        if bad := count_not_finite(rows):
            raise NotFiniteError(
                f"tensor '{name}' of {item.name} holds {bad} NaN or infinite values",
                hint="repair or leave out this model",
            )
        return rows.to(self.device, torch.float32)

    def whole(self, asking: Any, part: Part) -> bool:
        """Whether a survey or the method wants a tensor in one slab; one that reads statistics, only those that have them."""
        known = not self.statistics or any(self.side_of(part, 0, 0))
        return known and is_whole(asking, part.spec.name, part.spec.shape or (1,))

    def side_of(self, part: Part, start: int, stop: int) -> tuple[Side, ...]:
        """The statistics of rows of each model that a tensor is made of."""
        if not self.statistics:
            return ()
        return tuple(Side(self.statistics[number], name, start, stop, self.device) for number, name in part.models)

    # What the end of a stage asks.

    format: Format | None = None

    @property
    def expected(self) -> set[str]:
        """Names of all tensors of the output."""
        return {part.spec.name for part in self.parts}

    def quantization_config(self) -> dict[str, Any]:
        raise NotImplementedError("a merge writes dense weights")

    def config(self) -> dict[str, Any]:
        """The reference's configuration, with the dtype of the result."""
        config = dense_config(self.checkpoint.config) | dict(self.layout.config)
        if self.options.out_dtype != "same":
            key = "torch_dtype" if "torch_dtype" in config else "dtype"
            config[key] = self.options.out_dtype
        if self.tied is not None:
            config["tie_word_embeddings"] = self.tied
            if "tie_word_embeddings" in config.get("text_config", {}):
                config["text_config"] = {**config["text_config"], "tie_word_embeddings": self.tied}
        if self.vocabulary is not None and self.grown:
            holder = "text_config" if "vocab_size" in config.get("text_config", {}) else None
            size = {"vocab_size": self.vocabulary.rows}
            config = {**config, **(size if holder is None else {holder: {**config[holder], **size}})}
        return config

    @property
    def grown(self) -> bool:
        """Whether the output has tokens that the reference lacks."""
        return self.vocabulary is not None and bool(self.vocabulary.new)

    def texts(self) -> dict[str, str]:
        """Small files of the reference that the output has otherwise: its tokenizer, where tokens were added."""
        if self.vocabulary is None or not self.grown:
            return dict(self.replaced)
        new, sources, root = self.vocabulary.new, self.vocabulary.sources, self.checkpoint.root
        found = {tokenizerfile.FILE: extended(self.vocabulary.members[0].vocabulary, new, sources)}
        if (path := root / tokenizerfile.CONFIG).is_file():
            text = self.replaced.get(tokenizerfile.CONFIG) or path.read_text(encoding="utf-8")
            found[tokenizerfile.CONFIG] = extended_config(text, new, sources)
        return {**self.replaced, **found}

    @property
    def untrue(self) -> frozenset[str]:
        """Small files of the reference that would contradict the output."""
        return SLOW if self.grown else frozenset()

    def origin(self) -> dict[str, Any]:
        """The inputs, each as it was made."""
        return {
            "models": [origin(item.checkpoint) for item in self.models],
            "base": None if self.base is None else origin(self.base.checkpoint),
            **({} if self.earlier is None else {"earlier": origin(self.earlier)}),
        }

    def account(self) -> dict[str, Any]:
        """What became of the tensors of all inputs."""
        return {
            "input": len(self.reference.tensors),
            "inputs": {item.name: len(item.tensors) for item in self.inputs},
            "transformed": len(self.merged),
            "copied": len(self.parts) - len(self.merged),
            "dropped": len(self.layout.left_out) + len(self.layout.unused) + len(self.copies),
            "left_out": {**self.layout.left_out, **self.layout.unused, **self.copies},
        }

    def uncovered(self) -> list[str]:
        """Tensors that not all models have, and configurations that differ: a merge all the same, but not as it seems."""
        lines = [f"{name}: left out, {reason}" for name, reason in self.layout.left_out.items()]
        rejected = self.selection["rejected"] if self.selection else []
        lines += [f"{name}: no candidate, its weights or its perplexity are not finite" for name in rejected]
        lines += [*self.remarks, *self.layout.notes]
        lines += [text for item in self.inputs for text in item.checkpoint.remarks]
        if self.vocabulary is not None and self.vocabulary.mode == "base":
            lines += self.vocabulary.lines
        return lines + [f"configurations differ: {text}" for text in self.config_differences]

    def card(self, provenance: dict[str, Any]) -> str:
        """The model card of the output."""
        base = None if self.base is None else self.base.checkpoint
        return merge_card([item.checkpoint for item in self.models], base, self.target.name, provenance)

    def identity(self, **facts: Any) -> dict[str, Any]:
        """What the output's bytes depend on; two runs of equal identity make equal bytes."""
        return {
            "method": self.label,
            "method_version": self.version,
            "weightworks": weightworks.__version__,
            "options": {
                name: value for name, value in self.options.resolved().items() if name not in ("check", "statistics")
            },
            "input": {
                "models": [item.checkpoint.digest for item in self.models],
                "base": None if self.base is None else self.base.checkpoint.digest,
                **({} if self.earlier is None else {"earlier": self.earlier.digest}),
                **({"statistics": [one.digest for one in self.statistics]} if self.statistics else {}),
            },
            "max_shard_size": self.settings.shard_bytes,
            "seed": self.settings.seed,
            "environment": environment(self.device),
            **(
                {}
                if self.vocabulary is None
                else {"vocabularies": [one.vocabulary.digest for one in self.vocabulary.members]}
            ),
            **facts,
        }


def open_inputs(names: Sequence[str], *, allow_pickle: bool) -> list[Input]:
    """The checkpoints ``names``, opened by headers; all that cannot be opened are told of at once."""
    found, problems = [], []
    for name in names:
        try:
            checkpoint = Checkpoint.open(name, allow_pickle=allow_pickle)
            refuse_filled(checkpoint)
            found.append(Input.of(checkpoint))
        except WeightworksError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise type(problems[0])("; ".join(str(error) for error in problems), hint=problems[0].hint)
    return found
