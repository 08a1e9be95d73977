"""Statistics of a model's weights on a text, kept in a file of their own: one safetensors file for each model and kind.

Tensors are called by what they are and the checkpoint tensor they belong to:

* kind ``gram``: ``gram.NAME`` float32 [in (in + 1) / 2], the upper triangle of X'X / n by rows, X [n, in] the inputs of the
  linear layer whose weight is NAME; and ``tokens.NAME`` int64 [], that n. Half the size of the whole matrix. Linears that
  read the same input each have their own copy.
* kind ``fisher``: ``fisher.NAME`` float32 of the shape of NAME, the mean squared gradient of the log-likelihood.

The file's metadata say of which checkpoint (by digest) and of which text, so that statistics of another model are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from weightworks.errors import CheckpointError
from weightworks.store.sources import file_digest
from weightworks.store.tensorfile import TensorInfo, read_bytes, read_header, read_metadata

KINDS = ("gram", "fisher")
ENTRY = "weightworks.statistics"  # of the metadata: what is below, as JSON


@dataclass(frozen=True)
class Statistics:
    """A file of statistics, opened by its header.

    ``facts`` are what it says of itself: ``kind``, ``model`` (digest of the checkpoint), ``source`` (its name), ``identity``
    (sha256 of all the figures depend on), ``text`` (source, digest, windows, tokens), and of Gram matrices ``transposed``,
    the weights that the checkpoint stores as [in, out].
    """

    path: Path
    facts: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: str | Path) -> Statistics:
        """Open a file by its header. Raises :class:`CheckpointError` for what is missing, damaged or no statistics."""
        file = Path(path).expanduser()
        if not file.is_file():
            raise CheckpointError(
                f"{path}: no such file of statistics", hint="compress stats MODEL --dataset TEXT -o FILE"
            )
        facts = read_facts(file)
        if facts is None:
            raise CheckpointError(
                f"{path}: holds no statistics of a model",
                hint="compress stats MODEL --dataset TEXT -o FILE writes them",
            )
        return cls(file, facts, read_header(file))

    @property
    def kind(self) -> str:
        return str(self.facts["kind"])

    @cached_property
    def digest(self) -> str:
        """sha256 of the file."""
        return file_digest(self.path)

    @cached_property
    def names(self) -> frozenset[str]:
        """The checkpoint's tensors of which it holds statistics."""
        start = self.kind + "."
        return frozenset(name.removeprefix(start) for name in self.tensors if name.startswith(start))

    def called(self, name: str) -> str:
        """What the statistics of ``name`` are: the kind, or ``gram of rows`` where the weight is stored as [in, out]."""
        return f"{self.kind} of rows" if name in self.facts.get("transposed", ()) else self.kind

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of what :meth:`read` gives of the whole tensor ``name``."""
        shape = self.tensors[f"{self.kind}.{name}"].shape
        return (side_of(shape[0]),) * 2 if self.kind == "gram" else shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The statistics of ``name``: the matrix X'X / n float32 [in, in], or rows ``start:stop`` of the Fisher information."""
        info = self.tensors[f"{self.kind}.{name}"]
        if self.kind == "gram":
            return unpacked(read_bytes(self.path, info.offset, torch.empty(info.shape)))
        shape = info.shape or (1,)
        row = info.nbytes // max(shape[0], 1)
        stop = shape[0] if stop is None else stop
        return read_bytes(self.path, info.offset + start * row, torch.empty(stop - start, *shape[1:]))


def read_facts(path: Path) -> dict[str, Any] | None:
    """What a file says of itself; None if it holds no statistics."""
    try:
        facts = json.loads(read_metadata(path).get(ENTRY, "null"))
    except ValueError:
        return None
    return facts if isinstance(facts, dict) and facts.get("kind") in KINDS else None


def packed(matrix: torch.Tensor) -> torch.Tensor:
    """The upper triangle of a symmetric matrix [n, n] by rows, [n (n + 1) / 2]."""
    n = matrix.shape[0]
    triangle = torch.empty(n * (n + 1) // 2, dtype=matrix.dtype)
    place = 0
    for row in range(n):
        triangle[place : place + n - row] = matrix[row, row:]
        place += n - row
    return triangle


def unpacked(triangle: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix [n, n] of which ``triangle`` is the upper half."""
    n = side_of(triangle.numel())
    matrix = torch.empty(n, n, dtype=triangle.dtype)
    place = 0
    for row in range(n):
        part = triangle[place : place + n - row]
        matrix[row, row:] = part
        matrix[row:, row] = part
        place += n - row
    return matrix


def side_of(count: int) -> int:
    """The n of which n (n + 1) / 2 is ``count``."""
    return (math.isqrt(8 * count + 1) - 1) // 2
