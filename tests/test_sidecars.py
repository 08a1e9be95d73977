"""Sidecars: tokenizer, template and licence go along byte for byte; weights, indexes and our own files do not."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from weightworks.errors import OutputError
from weightworks.store.sidecars import copy_sidecars, sidecars

CARRIED = [
    "LICENSE",
    "NOTICE.rst",
    "USE_POLICY.md",
    "additional_chat_templates/tool.jinja",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "modeling_own.py",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.tiktoken",
]
LEFT = [
    ".cache/huggingface.json",
    ".gitattributes",
    "README.md",
    "additional_chat_templates/README.md",
    "config.json",
    "model-00001-of-00002.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "provenance.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "quantize_config.json",
    "recipe.yaml",
    "training_args.bin",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in [*CARRIED, *LEFT]:
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() + b"\r\n\xff\x00")
    return tmp_path / "source"


def test_what_is_carried_and_what_is_not(root: Path) -> None:
    assert [str(path.relative_to(root)) for path in sidecars(root)] == CARRIED


def test_copies_are_byte_for_byte(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    assert copy_sidecars(root, target) == CARRIED
    assert copy_sidecars(root, target) == CARRIED  # a continued run copies again
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert files == CARRIED
    assert all((target / name).read_bytes() == (root / name).read_bytes() for name in CARRIED)


def test_links_of_the_hub_s_cache_are_followed(root: Path, tmp_path: Path) -> None:
    snapshot, target = tmp_path / "snapshot", tmp_path / "target"
    snapshot.mkdir()
    target.mkdir()
    (snapshot / "tokenizer.json").symlink_to(root / "tokenizer.json")
    assert copy_sidecars(snapshot, target) == ["tokenizer.json"]
    assert not (target / "tokenizer.json").is_symlink()
    assert (target / "tokenizer.json").read_bytes() == (root / "tokenizer.json").read_bytes()


def test_embedded_model(tiny_llama: Path) -> None:
    assert {path.name for path in sidecars(tiny_llama)} == {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_full_disk_is_one_sentence(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError) as caught:
        copy_sidecars(root, tmp_path)
    assert str(caught.value) == f"{tmp_path}/LICENSE: cannot write: No space left on device"
