"""Fixtures that every test file may use: the embedded model, the shared folder, tiny checkpoints made on the spot."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from commands import FEW, Commands, Run
from safetensors.torch import save_file

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def own_cache() -> Iterator[Path]:
    """What the machine was measured to do is remembered in a place of the tests' own, never in the user's."""
    with tempfile.TemporaryDirectory(prefix="weightworks-cache-") as folder:
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = folder
        yield Path(folder)
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def compress(own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """The command ``compress`` in warm processes of its own."""
    commands = Commands(tmp_path_factory.mktemp("compress"), {"XDG_CACHE_HOME": str(own_cache)})
    yield commands
    commands.stop()


@pytest.fixture(scope="session")
def merge(compress: Commands) -> Callable[..., Run]:
    """The command ``merge`` in the same way."""
    return partial(compress, program="merge")


@pytest.fixture(scope="session")
def quantized(compress: Commands, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model after ``compress quantize`` with few calibration windows; not to be changed."""
    target = tmp_path_factory.mktemp("quantized") / "tiny-w4"
    run = compress("quantize", tiny_llama, *FEW, "-o", target)
    assert run.code == 0, run.err
    return target


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks and 330,000 random weights; not to be changed."""
    from weightworks.testing.tiny import make_model

    return make_model(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="session")
def sparse(small: Path) -> Path:
    """The same with half of its weights pruned, 2 of every 4; not to be changed."""
    from compress import prune

    return prune(small, method="magnitude", pattern="2:4", device="cpu", output_dir=small.parent / "sparse").target


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests of matrices so small that a second thread would only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


class AdapterMaker(Protocol):
    """Writes a LoRA adapter with the library and returns its folder; names come without PEFT's prefix."""

    def __call__(self, tensors: Mapping[str, torch.Tensor], *, name: str = "adapter", **config: Any) -> Path: ...


@pytest.fixture
def make_adapter(tmp_path: Path) -> AdapterMaker:
    """A function that makes an adapter folder below ``tmp_path``; rank 2 and alpha 4 unless told otherwise."""

    def make(tensors: Mapping[str, torch.Tensor], *, name: str = "adapter", **config: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "checkpoint", **config}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        named = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in tensors.items()}
        save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder

    return make
