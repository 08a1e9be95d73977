"""What every run can be told, whatever its method: data, seed, device, limits, output."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from weightworks.errors import UsageError, nearest
from weightworks.options import Options

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


class Settings(Options):
    """Settings common to all stages. Those that change the output's bytes are part of a stage's identity."""

    dataset: str = Field(
        "builtin", description="calibration text: builtin, self, FILE.txt|.jsonl|.parquet, or a hub data set"
    )
    num_samples: int | None = Field(
        None,
        ge=1,
        description="windows of text; default: 128 to calibrate, to train as many as the steps take, to select all rows",
    )
    seq_len: int = Field(2048, ge=2, description="tokens a window; capped by the model")
    seed: int = Field(0, ge=0, description="seed of every random choice")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of calibration passes; auto measures the machine once"
    )
    max_memory: str | None = Field(None, description="memory the run may take, such as 8GB; default: what is free")
    max_shard_size: str = Field("5GB", description="largest weight file written")
    overwrite: bool = Field(False, description="replace an existing output folder")
    resume: bool = Field(True, description="continue unfinished work of the same run")
    strict: bool = Field(False, description="exit 3 if any fallback was used")
    trust_remote_code: bool = Field(False, description="run model code that comes with the checkpoint")
    allow_pickle: bool = Field(False, description="read .bin weights")

    @field_validator("max_memory", "max_shard_size")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        if value is not None and parse_size(value) is None:
            raise ValueError("must be a size such as 800MB, 8GB or 16GiB")
        return value

    @property
    def memory_limit(self) -> int | None:
        return None if self.max_memory is None else parse_size(self.max_memory)

    @property
    def shard_bytes(self) -> int:
        size = parse_size(self.max_shard_size)
        assert size is not None
        return size


def divide(values: Mapping[str, Any], own: type[Options], label: str) -> tuple[dict[str, Any], Settings]:
    """``values`` as those of the method ``label`` with options ``own`` (checked, defaults left out), and the settings.

    Raises one :class:`UsageError` for all unknown names, near ones suggested, and all wrong values.
    """
    known = {*own.model_fields, *Settings.model_fields}
    options = {name: value for name, value in values.items() if name in own.model_fields}
    common = {name: value for name, value in values.items() if name in Settings.model_fields}
    problems = [f"{label} has no option '{name}' ({nearest(name, known)})" for name in values if name not in known]
    problems += own.problems(options, where=label) + Settings.problems(common, where=label)
    if problems:
        kind, _, name = label.partition(".")
        raise UsageError("; ".join(problems), hint=f"see: compress methods {name}, compress {kind} --help")
    return options, Settings(**common)


def parse_size(text: str) -> int | None:
    """Bytes of ``8GB``, ``800 MB``, ``16GiB``, ``123456``; None if it is not a positive size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found.group(2).upper() not in UNITS:
        return None
    size = int(float(found.group(1)) * UNITS[found.group(2).upper()])
    return size if size > 0 else None
