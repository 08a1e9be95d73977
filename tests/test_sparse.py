"""``compress export --sparse`` and ``compress densify``: small on disk, and back to the very bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import Commands
from conftest import CheckpointMaker
from safetensors.torch import load_file, save_file

from weightworks.errors import CheckpointError, VerificationError
from weightworks.store import sparse
from weightworks.store.masks import MASKS, pack_bits
from weightworks.store.sources import file_digest


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def pruned(compress: Commands, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with 70 % of its weights pruned, in several shards; not to be changed."""
    folder = tmp_path_factory.mktemp("pruned") / "model"
    words = ("--method", "magnitude", "--sparsity", "0.7", "--max-shard-size", "3MB", "-q", "-o", folder)
    run = compress("prune", tiny_llama, *words)
    assert run.code == 0, run.err
    return folder


def test_there_and_back(pruned: Path, compress: Commands, tmp_path: Path) -> None:
    run = compress("export", "--sparse", pruned, "--json", cwd=tmp_path)
    assert run.code == 0, run.err
    said = json.loads((pruned / "provenance.json").read_text())["size"]
    weights = sum(path.stat().st_size for path in (tmp_path / "model-sparse").glob("*.safetensors"))
    assert weights == run.json["bytes_out"]
    assert said["bitmask_bytes"] < weights < said["bitmask_bytes"] + 60_000  # headers, theirs and ours
    assert not (tmp_path / "model-sparse" / MASKS).exists()
    run = compress("densify", "model-sparse", "-o", "again", cwd=tmp_path)
    assert run.code == 0, run.err
    assert contents(tmp_path / "again") == contents(pruned)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "model-sparse"]


def test_loaders_do_not_take_it_for_a_model(pruned: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sparse.export(str(pruned), tmp_path / "small")
    with pytest.raises(OSError, match=r"(no file named|No such file)"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


@pytest.fixture
def foreign(make_checkpoint: CheckpointMaker) -> Path:
    """A checkpoint of another tool: no masks, several dtypes, a negative zero, and a file in a folder."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "half": torch.randn(16, 24, generator=generator) * (torch.rand(16, 24, generator=generator) < 0.5),
        "full": torch.randn(8, 8, generator=generator).half(),
        "mostly": torch.eye(40).bfloat16(),
        "vector": torch.zeros(7),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "cube": torch.zeros(3, 5, 9, dtype=torch.float64),
    }
    tensors["half"][0, 0] = -0.0
    folder = make_checkpoint(tensors, shards=2)
    (folder / "more").mkdir()
    (folder / "more" / "template.txt").write_text("x")
    return folder


def test_any_checkpoint_comes_back(foreign: Path, tmp_path: Path) -> None:
    sparse.export(str(foreign), tmp_path / "small")
    stored = {}
    for path in (tmp_path / "small").glob("sparse-*"):
        stored |= load_file(path)
    assert {name for name in stored if name.endswith(".bitmask")} == {
        f"{n}.bitmask" for n in ("half", "mostly", "cube")
    }
    assert torch.signbit(stored["half.values"][0])  # a negative zero is a value
    assert stored["full"].dtype == torch.float16
    sparse.densify(str(tmp_path / "small"), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(foreign)


def test_kept_zeros_stay_kept(make_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """The mask is the bitmask, so a kept weight that is zero is told from a pruned one."""
    mask = torch.tensor([[True, True, False, False]] * 2)
    folder = make_checkpoint({"a.weight": torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 2)})
    save_file({"a.weight.mask": pack_bits(mask)}, folder / MASKS)
    sparse.export(str(folder), tmp_path / "small")
    assert load_file(tmp_path / "small" / "sparse-model.safetensors")["a.weight.values"].tolist() == [1, 0, 1, 0]
    sparse.densify(str(tmp_path / "small"), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def test_what_does_not_fit_its_mask_is_refused(make_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    folder = make_checkpoint({"a.weight": torch.ones(2, 4)})
    save_file({"a.weight.mask": pack_bits(torch.zeros(2, 4, dtype=torch.bool))}, folder / MASKS)
    with pytest.raises(CheckpointError, match=r"'a\.weight' is not zero where its mask says so"):
        sparse.export(str(folder), tmp_path / "small")
    assert not list(tmp_path.glob("small*"))


def test_a_damaged_export_is_not_decoded(foreign: Path, tmp_path: Path) -> None:
    sparse.export(str(foreign), tmp_path / "small")
    path = next((tmp_path / "small").glob("sparse-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="missing, or not what was exported"):
        sparse.densify(str(tmp_path / "small"), tmp_path / "again")
    with pytest.raises(CheckpointError, match=r"no sparse\.json"):
        sparse.densify(str(foreign), tmp_path / "again")


def test_what_was_written_is_decoded_before_it_appears(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = sparse.unpack_bits
    monkeypatch.setattr(sparse, "unpack_bits", lambda packed, columns: right(packed, columns).flip(0))
    with pytest.raises(VerificationError, match="does not give the bytes"):
        sparse.export(str(foreign), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_killed_runs_continue(foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, written = tmp_path / "whole", []
    sparse.export(str(foreign), whole)
    right = sparse._write

    def dying(*args: object) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(args)
        right(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(sparse, "_write", dying)
    with pytest.raises(KeyboardInterrupt):
        sparse.export(str(foreign), tmp_path / "small")
    monkeypatch.setattr(sparse, "_write", right)
    sparse.export(str(foreign), tmp_path / "small")
    assert contents(tmp_path / "small") == contents(whole)


def test_quantized_folders_are_refused(quantized: Path, compress: Commands, tmp_path: Path) -> None:
    run = compress("export", "--sparse", quantized, cwd=tmp_path)
    assert run.code == 1
    assert "there is nothing to gain" in run.err
    assert compress("export", quantized, cwd=tmp_path).code == 2


def test_outputs_are_not_replaced_unasked(foreign: Path, tmp_path: Path, compress: Commands) -> None:
    shutil.copytree(foreign, tmp_path / "taken")
    assert "already exists" in compress("export", "--sparse", foreign, "-o", "taken", cwd=tmp_path).err
    assert compress("export", "--sparse", foreign, "-o", "taken", "--overwrite", cwd=tmp_path).code == 0
    assert compress("densify", "taken", "-o", "taken-again", cwd=tmp_path).code == 0
    assert compress("densify", "taken", "-o", "taken-again", "--overwrite", cwd=tmp_path).code == 0
    assert contents(tmp_path / "taken-again") == contents(foreign)
