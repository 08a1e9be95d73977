"""The one way a checkpoint gets written: planned, staged, journalled, read back, published by one rename.

The layout of every shard follows from the tensor specs alone, so headers are written first, disk space is reserved at
once, and each finished tensor goes to its place. A killed run leaves a staging folder whose journal says what is
complete; the same run continues there. The target exists only after :meth:`CheckpointWriter.commit`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash

from weightworks.errors import MethodError, OutputError, VerificationError
from weightworks.store.checkpoint import INDEX, SINGLE, Checkpoint
from weightworks.store.journal import JOURNAL, difference, read_journal
from weightworks.store.shards import plan_shards
from weightworks.store.tensorfile import TensorInfo, TensorSpec, build_header, read_bytes, write_bytes

READ_BYTES = 1 << 20  # read back at a time: both digests find them in the processor's cache
LAID_OUT = "laid out"  # the step after which files that were planned on the way are there
COPY_BYTES = 16 << 20  # rows copied at a time: large enough for the disk, small beside a block


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into one sentence."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        hint = {
            errno.ENOSPC: "free some disk space and run the same command again; finished work is kept",
            errno.EDQUOT: "free some of your quota and run the same command again; finished work is kept",
            errno.EROFS: "choose a writable place with --output-dir",
            errno.EACCES: "choose a writable place with --output-dir",
        }.get(error.errno or 0, "")
        raise OutputError(f"{error.filename or path}: cannot write: {reason}", hint=hint) from error


class Watched(Protocol):
    """An input of a run."""

    def refuse_changed(self) -> None: ...


class CheckpointWriter:
    """Writes the tensors ``specs`` into ``target`` by way of the staging folder ``<target>.partial``.

    ``identity`` says what is being made. A staging folder of the same identity is continued (unless ``resume`` is off),
    one of another identity is refused. ``steps`` holds the facts of every step the journal already has. ``side`` are files
    of tensors that are no weights of the model, by file name; the index does not name them. Without ``specs`` there are
    no others. ``metadata`` is what every file says of itself. ``openings`` are the bytes before the first tensor of side files
    in another layout than safetensors; their tensors follow in the order given.
    """

    def __init__(
        self,
        target: Path,
        specs: Iterable[TensorSpec],
        identity: Mapping[str, Any],
        *,
        max_shard_bytes: int = 5_000_000_000,
        overwrite: bool = False,
        resume: bool = True,
        side: Mapping[str, Sequence[TensorSpec]] | None = None,
        metadata: Mapping[str, str] | None = None,
        openings: Mapping[str, bytes] | None = None,
    ) -> None:
        check_target(target, overwrite=overwrite)
        self.target = target if target.name not in ("", "..") else target.resolve()
        self.staging, self.overwrite = staging_of(self.target), overwrite
        planned = list(specs)
        self.shards = plan_shards(planned, max_shard_bytes) if planned else {}  # an adapter has side files only
        self.side = {file: list(members) for file, members in (side or {}).items()}
        self.metadata, self.openings = dict(metadata or {}), dict(openings or {})
        self.tensors: dict[str, TensorInfo] = {}
        headers: dict[str, bytes] = {}
        for shard, members in self.files.items():
            headers[shard], infos = self._header(members, shard)
            self.tensors.update((info.name, info) for info in infos)
        self.watched: Sequence[Watched] = ()  # what is read; a step is only done if it did not change meanwhile
        self.digests: dict[str, str] = {}
        self.steps: dict[str, dict[str, Any]] = {}
        self._fresh: dict[str, str] = {}
        self._files: dict[str, int] = {}
        with writing(self.staging):
            self._open(json.loads(json.dumps(identity)), headers, resume)

    def _open(self, identity: dict[str, Any], headers: Mapping[str, bytes], resume: bool) -> None:
        self.staging.mkdir(parents=True, exist_ok=True)
        refuse_links(self.staging)
        self._lock = os.open(self.staging / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise OutputError(f"{self.staging}: another run is writing there", hint="wait for it, or use -o") from None
        try:
            self._begin(identity, headers, resume)
        except BaseException:
            for descriptor in (*self._files.values(), self._lock):
                os.close(descriptor)
            raise

    def _begin(self, identity: dict[str, Any], headers: Mapping[str, bytes], resume: bool) -> None:
        first = {"identity": identity, "layout": hashlib.sha256(b"".join(headers.values())).hexdigest()}
        records = read_journal(self.staging) if resume else []
        if records and records[0] != first:
            changed = difference(records[0].get("identity", {}), identity) or "the planned tensors or the shard size"
            raise OutputError(
                f"{self.staging}: holds unfinished work of another run; differs in {changed}",
                hint="run the earlier command again to finish it, or pass --no-resume to discard it",
            )
        for record in records[1:]:
            self.steps[record["step"]] = record["facts"]
            self.digests.update(record["tensors"])
        if records:
            self._files = {shard: os.open(self.staging / shard, os.O_RDWR) for shard in self.files}
        else:
            self._discard(everything=not resume)
            try:
                for shard, header in headers.items():
                    self._reserve(shard, header)
            except OSError:
                shutil.rmtree(self.staging, ignore_errors=True)  # nothing is done yet, so nothing may fill the disk
                raise
        # Unbuffered: after a full disk, closing must not try to write again.
        self._journal = (self.staging / JOURNAL).open("ab" if records else "wb", buffering=0)
        if not records:
            self._append(first)

    def _header(self, specs: Sequence[TensorSpec], file: str) -> tuple[bytes, list[TensorInfo]]:
        """The bytes before the first tensor of ``file``, and the places of its tensors."""
        if file not in self.openings:
            return build_header(specs, file, self.metadata)
        infos, place = [], len(self.openings[file])
        for spec in specs:
            infos.append(TensorInfo(spec.name, spec.shape, spec.dtype, spec.nbytes, file, place))
            place += spec.nbytes
        return self.openings[file], infos

    def _discard(self, *, everything: bool) -> None:
        """Empty the staging folder: of shards that no journal speaks for, or of everything but the lock."""
        for path in self.staging.iterdir():
            if (
                path.suffix in (".safetensors", ".gguf")
                or path.name in (INDEX, "scratch")
                or (everything and path.name != "lock")
            ):
                remove(path)

    def _reserve(self, shard: str, header: bytes) -> None:
        self._files[shard] = descriptor = os.open(self.staging / shard, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        size = len(header) + sum(spec.nbytes for spec in self.files[shard])
        os.pwrite(descriptor, header, 0)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(descriptor, size)

    def lay_out(self, specs: Iterable[TensorSpec], max_shard_bytes: int) -> None:
        """Plan and reserve the weight files of a writer that was made without ``specs``, once work has found them out.

        What specs they are must follow from the journal: a run that continues finds its files as it left them.
        """
        again = LAID_OUT in self.steps
        self.shards = plan_shards(list(specs), max_shard_bytes)
        for shard, members in self.shards.items():
            header, infos = self._header(members, shard)
            self.tensors.update((info.name, info) for info in infos)
            if again:
                self._files[shard] = os.open(self.staging / shard, os.O_RDWR)
                continue
            with writing(self.staging / shard):
                self._reserve(shard, header)
        if not again:
            self.done(LAID_OUT)

    def add(self, file: str, specs: Sequence[TensorSpec]) -> None:
        """Plan and reserve one more side file, of tensors whose shapes the work itself has found out."""
        self.side[file] = list(specs)
        header, infos = self._header(specs, file)
        self.tensors.update((info.name, info) for info in infos)
        with writing(self.staging / file):
            self._reserve(file, header)

    @property
    def files(self) -> dict[str, list[TensorSpec]]:
        """The tensors of every file to be written."""
        return {**self.shards, **self.side}

    @property
    def scratch(self) -> Path:
        """A folder for the run's own files (activations); it vanishes on commit."""
        path = self.staging / "scratch"
        path.mkdir(exist_ok=True)
        return path

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files, headers included: exact, known before any work."""
        return sum(
            len(self._header(members, shard)[0]) + sum(spec.nbytes for spec in members)
            for shard, members in self.files.items()
        )

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor. Its shape and dtype must be the planned ones, its values finite."""
        info = self._planned(name, tuple(tensor.shape), tensor.dtype)
        check_finite(name, tensor)
        with writing(self.staging / info.shard):
            data = write_bytes(self._files[info.shard], info.offset, tensor.contiguous())
        self._fresh[name] = xxhash.xxh3_128(data).hexdigest()

    def _planned(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> TensorInfo:
        info = self.tensors[name]
        if shape != info.shape or dtype != info.dtype:
            text = f"tensor '{name}' is {dtype} {list(shape)}, planned {info.dtype} {list(info.shape)}"
            raise VerificationError(text)
        return info

    @contextmanager
    def filling(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Iterator[Callable[[torch.Tensor], None]]:
        """Write one tensor a few rows at a time: the context is a function that takes the next rows.

        As in :meth:`put`, it must be as planned, whole when the context ends, and finite.
        """
        info = self._planned(name, shape, dtype)
        digest, written = xxhash.xxh3_128(), 0

        def append(rows: torch.Tensor) -> None:
            nonlocal written
            check_finite(name, rows)
            with writing(self.staging / info.shard):
                data = write_bytes(self._files[info.shard], info.offset + written, rows)
            digest.update(data)
            written += data.nbytes

        yield append
        if written != info.nbytes:
            raise VerificationError(f"tensor '{name}': {written} of {info.nbytes} bytes were written")
        self._fresh[name] = digest.hexdigest()

    def copy_from(self, source: Checkpoint, name: str, *, called: str | None = None) -> None:
        """Copy one tensor byte for byte, a few rows at a time, under its own name or as ``called``."""
        origin = source.info(name)
        rows = origin.shape[0] if origin.shape else 1
        step = max(1, COPY_BYTES * rows // max(origin.nbytes, 1))
        with self.filling(called or name, origin.shape, origin.dtype) as append:
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                append(source.read_rows(name, start, stop) if origin.shape else source.read(name))

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read a tensor back from the staging folder."""
        info = self.tensors[name]
        tensor = read_bytes(self.staging / info.shard, info.offset, torch.empty(info.shape, dtype=info.dtype))
        return tensor if dtype is None else tensor.to(dtype)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start:stop`` of a tensor that was written."""
        info = self.tensors[name]
        shape = info.shape or (1,)
        row = info.nbytes // max(shape[0], 1)
        empty = torch.empty((stop - start, *shape[1:]), dtype=info.dtype)
        return read_bytes(self.staging / info.shard, info.offset + start * row, empty)

    def holds(self, name: str) -> bool:
        """Whether a tensor was written, by this run or the one it continues."""
        return name in self._fresh or name in self.digests

    def done(self, step: str, facts: Mapping[str, Any] | None = None) -> None:
        """Make everything put since the last call durable, and say so in the journal under the name ``step``."""
        self.refuse_changed()
        with writing(self.staging):
            for descriptor in self._files.values():
                os.fdatasync(descriptor)
            self._append({"step": step, "tensors": self._fresh, "facts": dict(facts or {})})
        self.digests.update(self._fresh)
        self.steps[step] = dict(facts or {})
        self._fresh = {}

    def refuse_changed(self) -> None:
        """Raise :class:`SourceChangedError` if an input is no more what it was when the run began."""
        for source in self.watched:
            source.refuse_changed()

    def _append(self, record: Mapping[str, Any]) -> None:
        line = (json.dumps(record) + "\n").encode()
        if self._journal.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._journal.fileno())

    def read_back(self) -> dict[str, str]:
        """Read every shard from disk, compare each tensor with what was put; returns sha256 by file name."""
        missing = [name for name in self.tensors if name not in self.digests]
        if missing:
            raise VerificationError(f"{len(missing)} planned tensors were never written: {', '.join(missing[:5])}")
        digests = {}
        for shard in self.files:
            infos = sorted(
                (info for info in self.tensors.values() if info.shard == shard), key=lambda info: info.offset
            )
            digests[shard] = self._read_shard(shard, infos)
        return digests

    def _read_shard(self, shard: str, infos: list[TensorInfo]) -> str:
        path, header = self.staging / shard, self._header(self.files[shard], shard)[0]
        whole, hint = (
            hashlib.sha256(header),
            "the disk or its cache is faulty; the staging folder is left for inspection",
        )
        buffer = memoryview(bytearray(READ_BYTES))
        with path.open("rb", buffering=0) as file:
            if file.read(len(header)) != header:
                raise VerificationError(f"{path}: its header read back differs from what was written", hint=hint)
            for info in infos:
                one, left = xxhash.xxh3_128(), info.nbytes
                while left:
                    piece = buffer[: file.readinto(buffer[: min(left, READ_BYTES)])]
                    if not piece:
                        raise VerificationError(f"{path}: ends inside tensor '{info.name}'", hint=hint)
                    one.update(piece)
                    whole.update(piece)
                    left -= len(piece)
                if one.hexdigest() != self.digests[info.name]:
                    text = f"{path}: tensor '{info.name}' read back differs from what was written"
                    raise VerificationError(text, hint=hint)
            if file.read(1):
                raise VerificationError(f"{path}: is longer than planned", hint=hint)
        return whole.hexdigest()

    def write_text(self, name: str, text: str) -> None:
        """Write a small file into the staging folder, durably."""
        with writing(self.staging / name), (self.staging / name).open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def write_index(self) -> None:
        """The index of a sharded checkpoint; a single file needs none."""
        if list(self.shards) in ([], [SINGLE]):
            return
        weights = {name: info for name, info in sorted(self.tensors.items()) if info.shard in self.shards}
        total = sum(info.nbytes for info in weights.values())
        weight_map = {name: info.shard for name, info in weights.items()}
        self.write_text(
            INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
        )

    def commit(self, only: str | None = None) -> None:
        """Publish: drop journal and scratch, rename the staging folder to the target; or its file ``only``, all else dropped."""
        self.refuse_changed()
        check_target(self.target, overwrite=self.overwrite)  # again: it may have appeared during the run
        self.close()
        with writing(self.target):
            shutil.rmtree(self.staging / "scratch", ignore_errors=True)
            for name in (JOURNAL, "lock"):
                (self.staging / name).unlink(missing_ok=True)
            _sync_folder(self.staging)
            made = self.staging if only is None else self.staging / only
            if os.path.lexists(self.target):
                old = self.target.with_name(self.target.name + ".replaced")
                remove(old)
                self.target.rename(old)
                made.rename(self.target)
                remove(old)
            else:
                made.rename(self.target)
            if only is not None:
                remove(self.staging)
            _sync_folder(self.target.parent)

    def close(self) -> None:
        """Close files and lock; the staging folder stays, to be continued."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}
        if not self._journal.closed:
            self._journal.close()
            os.close(self._lock)

    def discard(self) -> None:
        """Give the work up: nothing is left of it."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.close()


def staging_of(target: Path) -> Path:
    """Where unfinished work for ``target`` lies."""
    return target.with_name(target.name + ".partial")


def refuse_links(staging: Path) -> None:
    """Refuse a staging folder that leads elsewhere, or in which something does: writing there would change other files."""
    for path in (staging, *staging.rglob("*")):
        if path.is_symlink():
            raise OutputError(
                f"{path}: is a link, which no run makes there", hint="remove it, or choose another place with -o"
            )


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse an existing target without ``overwrite``, and a place that cannot be written."""
    empty = target.is_dir() and not any(target.iterdir())
    if os.path.lexists(target) and not overwrite and not empty:
        raise OutputError(
            f"{target}: already exists", hint="choose another --output-dir, or pass --overwrite to replace it"
        )
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent}: cannot write there", hint="choose a writable place with --output-dir")


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse NaN and infinity; a float8 tensor is read as float32 first."""
    if bad := count_not_finite(tensor):
        raise MethodError(f"tensor '{name}' holds {bad} NaN or infinite values", hint="repair the source checkpoint")


def count_not_finite(tensor: torch.Tensor) -> int:
    """How many values are NaN or infinite; a float8 tensor is read as float32 first."""
    if not tensor.dtype.is_floating_point:
        return 0
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    if math.isfinite(values.sum().item()):  # quick, and takes no memory; a sum that overflows decides nothing
        return 0
    return int((~torch.isfinite(values)).sum())


def remove(path: Path) -> None:
    """Remove a folder with all it holds, a file, or a link (never what it points to)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
