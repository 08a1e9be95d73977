"""A LoRA adapter as PEFT writes it: its configuration understood or refused, every tensor of it accounted for.

What is read here and how it acts follows PEFT's file format: ``adapter_config.json`` beside ``adapter_model.safetensors``,
whose names are those of the model's modules after ``base_model.model.``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from weightworks.errors import CheckpointError
from weightworks.store.checkpoint import Checkpoint, read_pickle
from weightworks.store.documents import read_json
from weightworks.store.sources import ADAPTER, Digests, cache_folder, is_folder, resolve
from weightworks.store.tensorfile import TensorInfo, read_header

CONFIG, WEIGHTS, PICKLE = ADAPTER, "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.(?P<leaf>weight|bias))?"
)
WRAPPED = re.compile(
    r"\.(base_layer|modules_to_save(\.default)?)(?=\.)"
)  # what PEFT may leave in the name of a whole tensor
# What these say is acted on below, or is only about training, or shows in which tensors there are.
UNDERSTOOD = """
peft_type r lora_alpha use_rslora rank_pattern alpha_pattern fan_in_fan_out use_dora lora_bias bias modules_to_save
target_modules exclude_modules layers_to_transform layers_pattern init_lora_weights ensure_weight_tying
base_model_name_or_path revision task_type auto_mapping peft_version inference_mode lora_dropout runtime_config
loftq_config eva_config corda_config lora_ga_config megatron_core qalora_group_size
""".split()  # noqa: SIM905 (a list of thirty strings is harder to read)
# Ways to start training that change the base's own weights: the adapter alone does not say how.
LONGEST_PATTERN, OPEN_REPETITIONS, LONGEST_MODULE = (
    2000,
    2,
    300,
)  # of rank_pattern and alpha_pattern, and what they match
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class LoRA:
    """The update of one module's weight, ``scaling * B A``: A is [rank, columns], B is [rows, rank].

    ``a``, ``b`` are names in the adapter's file, so are ``magnitude`` (DoRA, [rows]) and ``bias`` (an update of the module's
    bias, before scaling), both None as a rule. ``transposed`` says that the module holds its weight as [columns, rows].
    """

    module: str
    a: str
    b: str
    rank: int
    rows: int
    columns: int
    scaling: float
    transposed: bool = False
    embedding: bool = False
    magnitude: str | None = None
    bias: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the module's weight."""
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter opened by its header.

    ``pairs`` are its low-rank updates by module; ``whole`` maps parameters of the model to tensors that replace them
    (``modules_to_save``, biases).
    """

    root: Path
    source: str
    config: Mapping[str, Any]
    pairs: Mapping[str, LoRA]
    whole: Mapping[str, str]
    store: Checkpoint = field(repr=False)

    @classmethod
    def open(cls, source: str | Path, *, allow_pickle: bool = False) -> Adapter:
        """Open the adapter in a local folder or of a hub id; only headers are read.

        Raises :class:`CheckpointError` with all that is wrong: no adapter, one of another kind than LoRA, settings that
        change what its tensors mean and are not supported (by name), tensors that do not belong together.
        """
        root = resolve(str(source), allow_pickle=allow_pickle)
        if not (root / CONFIG).is_file():
            raise CheckpointError(
                f"{root}: no {CONFIG}; an adapter folder holds it and {WEIGHTS}",
                hint="after '+' comes a folder that PEFT's save_pretrained wrote",
            )
        config = read_json(root / CONFIG)
        if problems := list(_unsupported(config)):
            raise CheckpointError(f"{root / CONFIG}: {'; '.join(problems)}")
        store = _tensors(root, str(source), config, allow_pickle)
        pairs, whole = _sorted_out(store)
        return cls(root, str(source), config, pairs, whole, store)

    @property
    def name(self) -> str:
        """What people call it: the hub id, or the folder's name."""
        return self.root.resolve().name if is_folder(self.source) else self.source

    @cached_property
    def files(self) -> dict[str, str]:
        """sha256 of configuration and weights, by file name."""
        digests = Digests(cache_folder() / "digests.json")
        names = sorted({info.shard for info in self.store.tensors.values()})
        found = {name: digests.file(self.root / name) for name in [CONFIG, *names]}
        digests.save()
        return found

    @cached_property
    def digest(self) -> str:
        """sha256 over the names and contents of ``files``."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()

    @property
    def base(self) -> str | None:
        """The model it says it was trained on."""
        return self.config.get("base_model_name_or_path") or None

    def factors(self, module: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, columns] and B [rows, rank] of a module, scaling not in them."""
        pair = self.pairs[module]
        return self.store.read(pair.a, dtype), self.store.read(pair.b, dtype)


def _unsupported(config: Mapping[str, Any]) -> Iterator[str]:
    """What the configuration says that we cannot act on."""
    kind = config.get("peft_type")
    if kind != "LORA":
        yield f"peft_type is {kind}; only LORA can be added to weights here"
        return
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        yield (
            f"init_lora_weights is '{start}', which changes the base's weights before training; "
            "save it with path_initial_model_for_weight_conversion"
        )
    yield from (
        f"{key} is set, which is not supported" for key in sorted(config) if config[key] and key not in UNDERSTOOD
    )
    kinds: dict[str, tuple[type, ...]] = {"r": (int,), "lora_alpha": (int, float)}
    for key, allowed in kinds.items():
        if not _is_positive(config.get(key), allowed):
            yield f"{key} is {config.get(key)!r}, not a positive number"
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            yield f"{key} is not a mapping"
            continue
        for pattern, value in (config.get(key) or {}).items():
            if not _is_positive(value, kinds["r" if key == "rank_pattern" else "lora_alpha"]):
                yield f"{key}: '{pattern}' is {value!r}, not a positive number"
            if not is_simple(pattern):
                yield f"{key}: '{pattern[:80]}' is no expression that is certain to be matched quickly"


def _is_positive(value: Any, kinds: tuple[type, ...]) -> bool:
    return type(value) in kinds and bool(0 < value < math.inf)


def is_simple(pattern: str) -> bool:
    """Whether ``pattern`` is a regular expression that is matched in little time, whatever the name.

    It comes with the adapter, and a hostile one would be tried for years: at most two open repetitions, none of a group.
    """
    if len(pattern) > LONGEST_PATTERN:
        return False
    bare = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "x", pattern)  # escapes and classes stand for one character
    repeated = re.search(r"\)[*+{?]|\(\?(?!:)", bare)
    if repeated or len(re.findall(r"[*+{]", bare)) > OPEN_REPETITIONS:
        return False
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _tensors(root: Path, source: str, config: Mapping[str, Any], allow_pickle: bool) -> Checkpoint:
    """The adapter's weight file, as something that reads tensors."""
    if (root / WEIGHTS).is_file():
        return Checkpoint(root, source, config, read_header(root / WEIGHTS))
    if not (root / PICKLE).is_file():
        raise CheckpointError(f"{root}: no weights: {WEIGHTS} is missing", hint="download the weights too")
    if not allow_pickle:
        raise CheckpointError(
            f"{root}: weights are pickled ({PICKLE}), and a pickle can run code",
            hint="save the adapter as safetensors, or pass --allow-pickle if you trust the source",
        )
    state = read_pickle(root / PICKLE)
    infos = {
        name: TensorInfo(name, tuple(tensor.shape), tensor.dtype, tensor.nbytes, PICKLE, 0)
        for name, tensor in state.items()
    }
    return Checkpoint(root, source, config, infos, {PICKLE: state})


def _sorted_out(store: Checkpoint) -> tuple[dict[str, LoRA], dict[str, str]]:
    """The low-rank updates by module, and the whole tensors by parameter; what fits neither is refused, all at once."""
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    problems: list[str] = []
    for name in store.tensors:
        inner = name.removeprefix(PREFIX)
        if inner == name:
            problems.append(f"{name}: does not begin with {PREFIX}")
        elif len(inner) > LONGEST_MODULE:
            problems.append(f"{name[:80]}...: longer than {LONGEST_MODULE} characters")
        elif found := PART.fullmatch(inner):
            part = found["part"] + (".bias" if found["leaf"] == "bias" else "")
            parts.setdefault(found["module"], {})[part] = name
        elif "lora_" in inner or "token_adapter" in inner:
            problems.append(f"{name}: not a part of LoRA known here")
        else:
            whole[WRAPPED.sub("", inner)] = name
    pairs = {}
    for module, named in parts.items():
        try:
            pairs[module] = _pair(store, module, named)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(
            f"{store.root}: {len(problems)} of its modules and tensors cannot be used: {'; '.join(problems)}"
        )
    if not store.tensors:
        raise CheckpointError(f"{store.root}: the adapter holds no tensors")
    return pairs, whole


def _pair(store: Checkpoint, module: str, named: Mapping[str, str]) -> LoRA:
    """One module's update; raises :class:`CheckpointError` with what is wrong with it."""
    config, embedding = store.config, "lora_embedding_A" in named
    keys = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if missing := [key for key in keys if key not in named]:
        raise CheckpointError(f"{module}: has {', '.join(named)} but no {', '.join(missing)}")
    if extra := sorted(set(named) - {*keys, "lora_magnitude_vector", "lora_B.bias"}):
        raise CheckpointError(f"{module}: {', '.join(extra)} cannot be used")
    a, b = (store.tensors[named[key]] for key in keys)
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise CheckpointError(f"{module}: A is {list(a.shape)}, B is {list(b.shape)}; only matrices can be added")
    rank = pattern(config.get("rank_pattern"), module, config["r"])
    if not a.shape[0] == b.shape[1] == rank:
        raise CheckpointError(f"{module}: A is {list(a.shape)}, B is {list(b.shape)}, {CONFIG} says rank {rank}")
    alpha = pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    magnitude, transposed = named.get("lora_magnitude_vector"), bool(config.get("fan_in_fan_out")) or embedding
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise CheckpointError(f"{module}: use_dora is {bool(config.get('use_dora'))}, its magnitudes say otherwise")
    if magnitude is not None and (transposed or store.tensors[magnitude].shape != (b.shape[0],)):
        raise CheckpointError(
            f"{module}: DoRA is supported on linear layers only, with a magnitude a row"
            f" (here {list(store.tensors[magnitude].shape)} for {b.shape[0]} rows)"
        )
    return LoRA(
        module,
        a.name,
        b.name,
        rank,
        b.shape[0],
        a.shape[1],
        alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        transposed,
        embedding,
        magnitude,
        named.get("lora_B.bias"),
    )


def pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first of PEFT's ``patterns`` that means ``module``: a regular expression for the end of its name."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
