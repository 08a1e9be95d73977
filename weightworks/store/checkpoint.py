"""A checkpoint on disk, opened by headers alone; tensors are read when asked for, whole or by rows."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from weightworks.errors import CheckpointError, SourceChangedError, nearest
from weightworks.store.documents import is_plain, read_json
from weightworks.store.sources import Digests, cache_folder, file_digest, is_folder, parts, resolve, stamp
from weightworks.store.tensorfile import TensorInfo, TensorSpec, read_bytes, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"
READ = (".safetensors", ".bin")  # files whose change in the middle of a run would be read
MASKS = "masks.safetensors"  # which weights a pruning kept; see masks.py
FACTORS = "factors.safetensors"  # what weights are the product of; see factors.py


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint folder: its configuration and the place of every tensor.

    ``source`` is what the user typed; ``root`` the folder it resolved to.
    """

    root: Path
    source: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    _pickles: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, source: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
        """Open a local folder, or a hub id ``org/name[@revision]``, either with ``+ADAPTER``; only headers are read.

        Raises :class:`CheckpointError` naming the file at fault: missing or empty folder, no ``config.json``, missing,
        truncated or corrupt shard, or pickled weights without ``allow_pickle``.
        """
        if len(models := parts(str(source))) > 1:
            from weightworks.store.adapted import open_adapted  # it is a checkpoint itself, so it stands above

            return open_adapted(str(source), models, allow_pickle=allow_pickle)
        root = resolve(str(source), allow_pickle=allow_pickle)
        config = read_json(root / "config.json") if (root / "config.json").is_file() else None
        if config is None:
            raise CheckpointError(
                f"{root}: no config.json; a checkpoint folder holds config.json and *.safetensors",
                hint="give the folder that `save_pretrained` wrote",
            )
        shards = _shards(root)
        if shards:
            tensors: dict[str, TensorInfo] = {}
            for shard in shards:
                for name, info in read_header(root / shard).items():
                    if name in tensors:
                        raise CheckpointError(f"{root}: tensor '{name}' is in both {tensors[name].shard} and {shard}")
                    tensors[name] = info
            _check_index(root, tensors)
            return cls(root, str(source), config, tensors)
        return cls._open_pickles(root, str(source), config, allow_pickle)

    @classmethod
    def _open_pickles(cls, root: Path, source: str, config: Mapping[str, Any], allow: bool) -> Checkpoint:
        files = sorted(path.name for path in root.glob("*.bin") if path.name.startswith("pytorch_model"))
        if not files:
            raise CheckpointError(f"{root}: no weights: neither {SINGLE} nor {INDEX}", hint="download the weights too")
        if not allow:
            raise CheckpointError(
                f"{root}: weights are pickled ({files[0]}), and a pickle can run code",
                hint="convert them to safetensors, or pass --allow-pickle if you trust the source",
            )
        if (root / PICKLE_INDEX).is_file():
            files = _indexed(root, PICKLE_INDEX)
        tensors, loaded = {}, {}
        for file in files:
            loaded[file] = state = read_pickle(root / file)
            for name, tensor in state.items():
                nbytes = tensor.numel() * tensor.element_size()
                tensors[name] = TensorInfo(name, tuple(tensor.shape), tensor.dtype, nbytes, file, 0)
        return cls(root, source, config, tensors, loaded)

    @property
    def name(self) -> str:
        """What people call it: the hub id, or the folder's name."""
        return self.root.resolve().name if is_folder(self.source) else self.source

    @property
    def roots(self) -> list[Path]:
        """The folders it is read from; nothing may be written over them."""
        return [self.root]

    @property
    def as_stored(self) -> bool:
        """Whether ``read`` gives what the files in ``root`` hold, so that other libraries load the same from there."""
        return True

    @property
    def untied(self) -> bool:
        """Whether the output head is seen as one of its own though the files' configuration shares it with the embedding."""
        return False

    @property
    def remarks(self) -> list[str]:
        """What a user should be told about this input, a sentence each."""
        return []

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def specs(self) -> list[TensorSpec]:
        """All tensors as they would be written again, in file order."""
        return [TensorSpec(info.name, info.shape, info.dtype) for info in self.tensors.values()]

    def info(self, name: str) -> TensorInfo:
        """Place of tensor ``name``; an unknown name is an error that suggests the nearest."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.root}: no tensor '{name}' ({nearest(name, self.tensors)})") from None

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole tensor in its own dtype, or cast to ``dtype``."""
        info = self.info(name)
        return self._read(info, info.shape, 0, dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows ``start:stop`` of the first axis."""
        info = self.info(name)
        if not 0 <= start <= stop <= info.shape[0]:  # the bytes beyond are another tensor's
            raise IndexError(f"tensor '{name}' has {info.shape[0]} rows, asked for {start}:{stop}")
        row_bytes = info.nbytes // max(info.shape[0], 1)
        return self._read(info, (stop - start, *info.shape[1:]), start * row_bytes, dtype)

    def _read(self, info: TensorInfo, shape: tuple[int, ...], skip: int, dtype: torch.dtype | None) -> torch.Tensor:
        if info.shard in self._pickles:
            flat = self._pickles[info.shard][info.name].reshape(-1)
            start = skip // info.dtype.itemsize
            tensor = flat[start : start + math.prod(shape)].reshape(shape).clone()
        else:
            empty = torch.empty(shape, dtype=info.dtype)
            tensor = read_bytes(
                f"{self.root}/{info.shard}", info.offset + skip, empty
            )  # a Path takes longer than the read
        return tensor if dtype is None else tensor.to(dtype)

    @cached_property
    def files(self) -> dict[str, str]:
        """sha256 of config, weight and mask files, by file name: what "the same input" means."""
        names = ["config.json", *sorted({info.shard for info in self.tensors.values()})]
        names += [name for name in (INDEX, MASKS, FACTORS) if (self.root / name).is_file()]
        digests = Digests(cache_folder() / "digests.json")
        found = {name: digests.file(self.root / name) for name in names}
        digests.save()
        return found

    @cached_property
    def stamps(self) -> dict[Path, tuple[int, int, int] | None]:
        """What tells of a change of the files that are read, as they were when this was first asked for."""
        paths = [path for root in self.roots for path in sorted(root.iterdir()) if path.suffix in READ]
        return {path: stamp(path) for path in paths}

    def watch(self) -> None:
        """From now on a change of a file is one."""
        _ = self.stamps

    def known(self, path: Path) -> str | None:
        """The sha256 that one of the files had."""
        return self.files.get(path.name)

    def refuse_changed(self) -> None:
        """Raise :class:`SourceChangedError` if a file has another content than when ``stamps`` were taken."""
        for path, before in self.stamps.items():
            if (now := stamp(path)) == before:
                continue
            if now is None or file_digest(path) != self.known(path):
                what = "is gone" if now is None else "was changed"
                raise SourceChangedError(
                    f"{path}: {what} while it was read; what was made of it is discarded",
                    hint="run the same command again once nothing writes there",
                )
            self.stamps[path] = now  # touched, or written again to the same bytes

    @cached_property
    def digest(self) -> str:
        """sha256 over the names and contents of ``files``."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()


def _shards(root: Path) -> list[str]:
    """Weight files in reading order: those of the index, the single file, or every safetensors file there is."""
    if (root / INDEX).is_file():
        return _indexed(root, INDEX)
    return [SINGLE] if (root / SINGLE).is_file() else []


def _indexed(root: Path, index: str) -> list[str]:
    """The files that an index names; every one must be there."""
    mapped = read_json(root / index).get("weight_map")
    if not isinstance(mapped, dict) or not all(isinstance(file, str) for file in mapped.values()):
        raise CheckpointError(f"{root / index}: no weight_map", hint="fetch the index again")
    shards = sorted(set(mapped.values()))
    if strange := [shard for shard in shards if not is_plain(shard)]:
        raise CheckpointError(
            f"{root / index}: {strange[0][:80]!r} is not the name of a file in this folder",
            hint="shards lie beside their index; do not trust this checkpoint",
        )
    missing = [shard for shard in shards if not (root / shard).is_file()]
    if missing:
        raise CheckpointError(f"{root}: missing shard{'s' * (len(missing) > 1)} {', '.join(missing)} named in {index}")
    return shards


def _check_index(root: Path, tensors: Mapping[str, TensorInfo]) -> None:
    if not (root / INDEX).is_file():
        return
    mapped = read_json(root / INDEX)["weight_map"]
    lost = sorted(name for name, shard in mapped.items() if name not in tensors or tensors[name].shard != shard)
    if lost:
        raise CheckpointError(
            f"{root}: {INDEX} names {len(lost)} tensors that its shards do not hold: {', '.join(lost[:5])}",
            hint="fetch the checkpoint again",
        )


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle by name, mapped from the file where its age allows; nothing in it is run."""
    try:
        mappable = zipfile.is_zipfile(path)  # files older than torch 1.6 are not
        state = torch.load(path, map_location="cpu", mmap=mappable, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: not a pickle of tensors ({reason})", hint="fetch the file again") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a pickle of tensors (it holds one {type(state).__name__})")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: not a pickle of tensors ('{name}' is {type(value).__name__})")
    return state
