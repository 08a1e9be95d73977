"""The layout of a checkpoint's files, which follows from the tensors alone: which shard holds what, and bytes to the last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from weightworks.store.checkpoint import SINGLE
from weightworks.store.tensorfile import TensorSpec, build_header


def plan_shards(specs: Iterable[TensorSpec], max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """Fill shards in the given order, none above ``max_shard_bytes`` unless one tensor is."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{k:05d}-of-{len(shards):05d}.safetensors": shard for k, shard in enumerate(shards, 1)}


def planned_bytes(
    specs: Iterable[TensorSpec], max_shard_bytes: int, side: Mapping[str, Sequence[TensorSpec]] | None = None
) -> int:
    """Bytes of the files a writer would make of ``specs`` and of those beside, headers included."""
    files = {**plan_shards(specs, max_shard_bytes), **(side or {})}
    return sum(file_bytes(members, shard) for shard, members in files.items())


def file_bytes(members: Sequence[TensorSpec], shard: str, metadata: Mapping[str, str] | None = None) -> int:
    """Bytes of one file, its header included."""
    return len(build_header(members, shard, metadata)[0]) + sum(spec.nbytes for spec in members)
