"""Fixtures that every test file may use: the embedded model, the shared folder, tiny checkpoints made on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors.torch import save_file

REPOSITORY = Path(__file__).resolve().parent.parent


class CheckpointMaker(Protocol):
    """Writes a safetensors checkpoint with the library and returns its folder."""

    def __call__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        shards: int = 1,
        config: Mapping[str, Any] | None = None,
        name: str = "checkpoint",
    ) -> Path: ...


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """The trained model that the repository carries."""
    return REPOSITORY / "examples" / "tiny-llama"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden data beside the repository."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: golden data of other implementations is not part of the repository")
    return folder


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> CheckpointMaker:
    """A function that makes a checkpoint folder below ``tmp_path``; tensors are dealt to the shards in turn."""

    def make(
        tensors: Mapping[str, torch.Tensor],
        *,
        shards: int = 1,
        config: Mapping[str, Any] | None = None,
        name: str = "checkpoint",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
        if shards == 1:
            save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        weight_map: dict[str, str] = {}
        for k in range(shards):
            part = dict(list(tensors.items())[k::shards])
            file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return make
