"""Hidden states of all windows between two blocks: in memory, or in a file when they would not fit."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from weightworks.store.tensorfile import read_bytes, write_bytes
from weightworks.store.writer import writing


class Activations:
    """Hidden states [windows, seq, hidden] in one dtype.

    In memory, ``write`` replaces rows in place. On disk, reads come from the file of the current block and writes go to
    that of the next, so that a crash never leaves a half-updated file behind. ``checkpoint`` makes the state durable
    under a step's number, ``restore`` brings it back bit for bit.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, folder: Path, name: str, *, on_disk: bool = False
    ) -> None:
        self.shape, self.dtype, self.folder, self.name = shape, dtype, folder, name
        self._memory = None if on_disk else torch.empty(shape, dtype=dtype)
        self._step = -1  # the step whose outputs ``read`` gives; -1 before the first block

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_bytes

    @property
    def row_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    def read(self, start: int, stop: int) -> torch.Tensor:
        """A copy of windows ``start:stop``, [n, seq, hidden]: blocks may write into their input."""
        if self._memory is not None:
            return self._memory[start:stop].clone()
        out = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        return read_bytes(self._path(self._step), start * self.row_bytes, out)

    def write(self, start: int, states: torch.Tensor) -> None:
        """Replace the windows from ``start`` on by what the running block made of them."""
        if self._memory is not None:
            self._memory[start : start + states.shape[0]] = states
            return
        with writing(self._path(self._step + 1)):
            descriptor = os.open(self._path(self._step + 1), os.O_RDWR | os.O_CREAT, 0o644)
            try:
                write_bytes(descriptor, start * self.row_bytes, states.to(self.dtype).contiguous())
            finally:
                os.close(descriptor)

    def advance(self) -> None:
        """All windows have passed the running block: what was written is what ``read`` gives from now on."""
        self._step += 1

    def checkpoint(self) -> None:
        """Make the current states durable."""
        path = self._path(self._step)
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if self._memory is not None:
                    write_bytes(descriptor, 0, self._memory)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def forget(self) -> None:
        """Drop the file of the step before the current one; call it once the current one is journalled."""
        self._path(self._step - 1).unlink(missing_ok=True)

    def drop(self) -> None:
        """Give up the states, in memory and on disk."""
        self._memory = None
        self._path(self._step).unlink(missing_ok=True)

    def restore(self, step: int) -> None:
        """Continue from the durable states of ``step``."""
        self._step = step
        if self._memory is not None:
            read_bytes(self._path(step), 0, self._memory)

    def _path(self, step: int) -> Path:
        return self.folder / f"{self.name}-{step + 1:04d}.bin"
