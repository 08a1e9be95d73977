"""Writing checkpoints: exact bytes, one rename, nothing published on failure, killed runs continued byte for byte."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, CheckpointMaker
from safetensors import safe_open
from safetensors.torch import load_file

from weightworks.errors import MethodError, OutputError, VerificationError
from weightworks.store.checkpoint import INDEX, SINGLE, Checkpoint
from weightworks.store.journal import JOURNAL, read_journal
from weightworks.store.shards import plan_shards, planned_bytes
from weightworks.store.sources import file_digest
from weightworks.store.tensorfile import TensorSpec, build_header, read_header
from weightworks.store.writer import (
    CheckpointWriter,
    check_target,
    staging_of,
)

IDENTITY = {"method": "copy", "options": {"bits": 4, "seed": 0}}
SHARD_BYTES = 150  # makes three shards of the tensors below
DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.float16, torch.float8_e4m3fn]
STEPS = 4


def forget_syncing(_: int) -> None:
    """In the place of fsync where a process dies at worst, not the machine: waiting for the disk decides nothing."""


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of waits; that syncing is asked for, and in which order, has a test of its own."""
    monkeypatch.setattr(os, "fsync", forget_syncing)
    monkeypatch.setattr(os, "fdatasync", forget_syncing)


def tensors() -> dict[str, torch.Tensor]:
    """Twelve small tensors of many dtypes and shapes, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(4, 4), (7,), (3, 5), (), (2, 3, 2), (0, 3)]
    made = {}
    for k in range(12):
        shape, dtype = shapes[k % 6], DTYPES[(k + k // 6) % 6]
        made[f"model.{k:02d}.weight"] = (torch.rand(shape, generator=generator) * 8).to(dtype)
    return made


def specs(made: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()]


def start(target: Path, **options: Any) -> CheckpointWriter:
    options = {"identity": IDENTITY, "max_shard_bytes": SHARD_BYTES, **options}
    return CheckpointWriter(target, specs(tensors()), **options)


def work(writer: CheckpointWriter) -> list[str]:
    """Put all tensors in four steps, leaving out the steps that are done; returns the steps that were left to do."""
    made, did = tensors(), []
    for k in range(STEPS):
        step = f"step {k}"
        if step in writer.steps:
            continue
        for name in list(made)[k::STEPS]:
            writer.put(name, made[name])
        writer.done(step, {"loss": k / 3})
        did.append(step)
    return did


def finish(writer: CheckpointWriter) -> None:
    writer.read_back()
    writer.write_index()
    writer.write_text("config.json", "{}\n")
    writer.commit()


def write(target: Path, **options: Any) -> list[str]:
    writer = start(target, **options)
    did = work(writer)
    finish(writer)
    return did


def contents(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.iterdir())}


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one.float(), two.float())


# What is written


@pytest.mark.parametrize(("shard_bytes", "shards"), [(10_000, 1), (SHARD_BYTES, 3), (1, 12)])
def test_the_library_reads_what_was_put(tmp_path: Path, shard_bytes: int, shards: int) -> None:
    target, made = tmp_path / "out", tensors()
    writer = start(target, max_shard_bytes=shard_bytes)
    assert work(writer) == ["step 0", "step 1", "step 2", "step 3"]
    assert not target.exists()
    digests = writer.read_back()
    writer.write_index()
    writer.commit()
    files = sorted(target.glob("*.safetensors"))
    assert len(files) == shards
    assert digests == {file.name: file_digest(file) for file in files}
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(read) == set(made) and all(same(read[name], made[name]) for name in made)
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    sidecars = {path.name for path in target.iterdir()} - {file.name for file in files}
    assert sidecars == (set() if shards == 1 else {INDEX})
    assert not staging_of(target).exists()


def test_every_tensor_starts_on_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    write(tmp_path / "out", max_shard_bytes=10_000)
    for info in read_header(tmp_path / "out" / SINGLE).values():
        assert info.offset % info.dtype.itemsize == 0, info.name
    for k in range(8):  # names of every length: the header is padded
        _, infos = build_header([TensorSpec("n" * k, (1,), torch.int64)], SINGLE)
        assert infos[0].offset % 8 == 0


def test_index_names_every_tensor(tmp_path: Path) -> None:
    write(tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    made = tensors()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in made.values())
    assert sorted(index["weight_map"]) == list(index["weight_map"]) == sorted(made)
    checkpoint = Checkpoint.open(tmp_path / "out")  # itself checks the index against the shards
    assert {name: info.shard for name, info in checkpoint.tensors.items()} == index["weight_map"]
    assert sorted(set(index["weight_map"].values())) == [f"model-{k:05d}-of-00003.safetensors" for k in (1, 2, 3)]


@pytest.mark.parametrize("shard_bytes", [1, SHARD_BYTES, 10_000])
def test_planned_bytes_are_exact(tmp_path: Path, shard_bytes: int) -> None:
    planned = planned_bytes(specs(tensors()), shard_bytes)
    writer = start(tmp_path / "out", max_shard_bytes=shard_bytes)
    assert writer.nbytes == planned
    reserved = sum(file.stat().st_size for file in writer.staging.glob("*.safetensors"))
    assert reserved == planned
    work(writer)
    writer.commit()
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) == planned


def test_shards_are_filled_in_order_and_kept_below_the_limit() -> None:
    sizes = [40, 60, 1, 500, 99, 1]
    planned = plan_shards([TensorSpec(f"t{k}", (n,), torch.uint8) for k, n in enumerate(sizes)], 100)
    assert [[spec.name for spec in shard] for shard in planned.values()] == [["t0", "t1"], ["t2"], ["t3"], ["t4", "t5"]]
    assert list(planned)[-1] == "model-00004-of-00004.safetensors"
    assert list(plan_shards([], 100)) == [SINGLE]


def test_same_work_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_order_of_putting_does_not_show(tmp_path: Path) -> None:
    write(tmp_path / "a")
    writer = start(tmp_path / "b")
    for name, tensor in reversed(tensors().items()):
        writer.put(name, tensor)
    writer.done("all")
    finish(writer)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_tensor_that_is_not_contiguous(tmp_path: Path) -> None:
    turned = torch.arange(12.0).view(3, 4).T
    writer = CheckpointWriter(tmp_path / "out", specs({"a": turned}), IDENTITY)
    writer.put("a", turned)
    assert torch.equal(writer.read("a"), turned)
    assert torch.equal(writer.read("a", torch.float64), turned.double())
    writer.done("a")
    finish(writer)
    assert torch.equal(load_file(tmp_path / "out" / SINGLE)["a"], turned)


def test_copy_in_pieces_is_byte_for_byte(
    tmp_path: Path, make_checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightworks.store.writer.COPY_BYTES", 24)
    made = tensors()
    source = Checkpoint.open(make_checkpoint(made, shards=2))
    writer = start(tmp_path / "out")
    for name in made:
        writer.copy_from(source, name)
    writer.done("copied")
    finish(writer)
    copied = Checkpoint.open(tmp_path / "out")
    assert all(same(copied.read(name), made[name]) for name in made)


def test_system_that_writes_a_little_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "straight")
    real, writer = os.pwrite, start(tmp_path / "out")
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, data[:5], offset))
    work(writer)
    finish(writer)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_data_are_on_the_disk_before_the_journal_and_the_name_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, made = tmp_path / "out", tensors()
    writer = start(target)
    events: list[str] = []

    def sync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        events.append(f"{Path(path).name} {len(read_journal(writer.staging))} {target.exists()}")

    monkeypatch.setattr(os, "fdatasync", sync)
    monkeypatch.setattr(os, "fsync", sync)
    writer.put("model.00.weight", made["model.00.weight"])
    writer.done("first")
    shards = [f"{shard} 1 False" for shard in writer.shards]  # one line: the step is not in the journal yet
    assert events == [*shards, f"{JOURNAL} 2 False"]
    events.clear()
    writer.write_text("config.json", "{}")
    writer.commit()
    assert events == ["config.json 2 False", "out.partial 0 False", f"{tmp_path.name} 0 True"]


def test_scratch_vanishes_on_commit(tmp_path: Path) -> None:
    writer = start(tmp_path / "out")
    (writer.scratch / "activations").write_bytes(b"x" * 100)
    assert writer.scratch.parent == staging_of(tmp_path / "out")
    work(writer)
    writer.commit()
    assert not (tmp_path / "out" / "scratch").exists()


# What is refused


def put_wrong(target: Path, tensor: torch.Tensor) -> None:
    writer = CheckpointWriter(target, [TensorSpec("a", (2, 3), torch.float16)], IDENTITY)
    try:
        writer.put("a", tensor)
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.ones(3, 2).half(), "tensor 'a' is torch.float16 [3, 2], planned torch.float16 [2, 3]"),
        (torch.ones(6).half(), "tensor 'a' is torch.float16 [6], planned torch.float16 [2, 3]"),
        (torch.ones(2, 3), "tensor 'a' is torch.float32 [2, 3], planned torch.float16 [2, 3]"),
        (torch.ones(2, 3).bfloat16(), "tensor 'a' is torch.bfloat16 [2, 3], planned torch.float16 [2, 3]"),
    ],
)
def test_wrong_shape_or_dtype(tmp_path: Path, tensor: torch.Tensor, text: str) -> None:
    with pytest.raises(VerificationError, match=f"^{re.escape(text)}$"):
        put_wrong(tmp_path / "out", tensor)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(tmp_path: Path, bad: float) -> None:
    tensor = torch.ones(2, 3).half()
    tensor[1, 1] = bad
    with pytest.raises(MethodError, match=r"^tensor 'a' holds 1 NaN or infinite values$"):
        put_wrong(tmp_path / "out", tensor)
    assert not (tmp_path / "out").exists()


def test_copy_of_values_that_are_not_finite(tmp_path: Path, make_checkpoint: CheckpointMaker) -> None:
    source = Checkpoint.open(make_checkpoint({"a": torch.tensor([1.0, float("nan")])}))
    writer = CheckpointWriter(tmp_path / "out", source.specs, IDENTITY)
    with pytest.raises(MethodError, match=r"^tensor 'a' holds 1 NaN or infinite values$"):
        writer.copy_from(source, "a")
    writer.close()


@pytest.mark.parametrize("tensor", [torch.ones(3, 2), torch.ones(12).half(), torch.ones(2, 3).int()], ids=str)
def test_copy_of_another_shape_or_dtype(tmp_path: Path, make_checkpoint: CheckpointMaker, tensor: torch.Tensor) -> None:
    source = Checkpoint.open(make_checkpoint({"a": tensor}))
    writer = CheckpointWriter(tmp_path / "out", [TensorSpec("a", (2, 3), torch.float32)], IDENTITY)
    with pytest.raises(VerificationError, match=r"^tensor 'a' is .*, planned torch\.float32 \[2, 3\]$"):
        writer.copy_from(source, "a")
    writer.close()


def test_existing_target(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("mine")
    with pytest.raises(OutputError) as caught:
        start(target)
    assert str(caught.value) == f"{target}: already exists"
    assert caught.value.hint == "choose another --output-dir, or pass --overwrite to replace it"
    assert contents(target).keys() == {"precious"} and not staging_of(target).exists()


def test_empty_target_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").tensors.keys() == tensors().keys()


def old_folder(target: Path) -> None:
    target.mkdir()
    (target / "old").write_text("old")


def old_file(target: Path) -> None:
    target.write_text("old")


def old_link(target: Path) -> None:
    old_folder(target.with_name("elsewhere"))
    target.symlink_to(target.with_name("elsewhere"))


def broken_link(target: Path) -> None:
    target.symlink_to(target.with_name("nowhere"))


@pytest.mark.parametrize("make", [old_folder, old_file, old_link, broken_link])
def test_overwrite_replaces_the_target_at_the_end(tmp_path: Path, make: Callable[[Path], None]) -> None:
    target = tmp_path / "out"
    make(target)
    with pytest.raises(OutputError, match="already exists"):
        start(target)
    writer = start(target, overwrite=True)
    work(writer)
    assert os.path.lexists(target) and (make is broken_link or not (target / SINGLE).exists())
    finish(writer)
    assert not target.is_symlink() and not (target / "old").exists()
    assert Checkpoint.open(target).tensors.keys() == tensors().keys()
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "elsewhere"}
    assert make is not old_link or (tmp_path / "elsewhere" / "old").read_text() == "old"


def test_target_that_appears_during_the_run(tmp_path: Path) -> None:
    writer = start(tmp_path / "out")
    work(writer)
    old_folder(tmp_path / "out")
    with pytest.raises(OutputError, match="already exists"):
        finish(writer)
    writer.close()
    assert (tmp_path / "out" / "old").read_text() == "old"
    (tmp_path / "out" / "old").unlink()
    assert write(tmp_path / "out") == []  # nothing of the finished work is lost


def test_parent_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, int]] = []

    def access(path: Path, mode: int) -> bool:
        asked.append((path, mode))
        return False

    monkeypatch.setattr(os, "access", access)  # root may write everywhere, so the answer is made up
    with pytest.raises(OutputError) as caught:
        start(tmp_path / "new" / "deep" / "out")
    assert str(caught.value) == f"{tmp_path}: cannot write there"
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_parent_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="cannot write there"):
            start(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError) as caught:
        check_target(tmp_path / "file" / "out", overwrite=False)
    assert str(caught.value) == f"{tmp_path}/file: cannot write there"


def test_the_current_folder_as_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(Path())
    assert (tmp_path / "here" / INDEX).is_file()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=r"^\.: already exists$"):
        start(Path())


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b" / "out" / INDEX).is_file()


# Leaving early, and going on


def test_leaving_without_commit_publishes_nothing(tmp_path: Path) -> None:
    writer = start(tmp_path / "out")
    work(writer)
    writer.read_back()
    writer.close()
    writer.close()  # a second time does no harm
    assert not (tmp_path / "out").exists()
    assert staging_of(tmp_path / "out").is_dir()


def test_a_second_run_does_only_what_is_left(tmp_path: Path) -> None:
    write(tmp_path / "straight")
    writer = start(tmp_path / "out")
    made = tensors()
    for name in list(made)[0::STEPS]:
        writer.put(name, made[name])
    writer.done("step 0", {"loss": 0.0})
    writer.put(list(made)[1], made[list(made)[1]])  # put, but not declared done
    writer.close()
    again = start(tmp_path / "out")
    assert again.steps == {"step 0": {"loss": 0.0}}
    assert sorted(again.digests) == sorted(list(made)[0::STEPS])
    assert work(again) == ["step 1", "step 2", "step 3"]
    finish(again)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.parametrize(
    "torn", ["", "{", '{"step": "step 2", "tensors": {', '{"step": "step 2"}', "\0\0\0\n", "half\nx"]
)
def test_torn_journal_line_is_dropped(tmp_path: Path, torn: str) -> None:
    write(tmp_path / "straight")
    writer = start(tmp_path / "out")
    work(writer)
    writer.close()
    journal = staging_of(tmp_path / "out") / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + STEPS
    journal.write_bytes(b"".join(lines[:3]) + torn.encode())
    assert len(read_journal(staging_of(tmp_path / "out"))) == 3
    assert write(tmp_path / "out") == ["step 2", "step 3"]
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_after_a_torn_line_the_journal_goes_on(tmp_path: Path) -> None:
    writer = start(tmp_path / "out")
    work(writer)
    writer.close()
    journal = staging_of(tmp_path / "out") / JOURNAL
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]) + b'{"step": "st')
    again = start(tmp_path / "out")
    assert work(again) == ["step 1", "step 2", "step 3"]
    again.close()
    assert write(tmp_path / "out") == []


def test_journal_says_which_tensors_each_step_wrote(tmp_path: Path) -> None:
    writer = start(tmp_path / "out")
    work(writer)
    writer.close()
    first, *records = read_journal(writer.staging)
    assert first["identity"] == IDENTITY
    assert [record["step"] for record in records] == [f"step {k}" for k in range(STEPS)]
    assert [list(record["tensors"]) for record in records] == [list(tensors())[k::STEPS] for k in range(STEPS)]
    assert records[1]["facts"] == {"loss": 1 / 3}


def test_torn_first_journal_line_starts_again(tmp_path: Path) -> None:
    writer = start(tmp_path / "out")
    work(writer)
    writer.close()
    journal = staging_of(tmp_path / "out") / JOURNAL
    journal.write_bytes(journal.read_bytes()[:20])
    assert len(write(tmp_path / "out")) == STEPS


def test_a_run_of_another_identity_is_refused(tmp_path: Path) -> None:
    writer = start(tmp_path / "out")
    work(writer)
    writer.close()
    other = {"method": "copy", "options": {"bits": 3, "seed": 0}, "input": "sha"}
    with pytest.raises(OutputError) as caught:
        start(tmp_path / "out", identity=other)
    text = f"{staging_of(tmp_path / 'out')}: holds unfinished work of another run; "
    assert str(caught.value) == text + "differs in input (None then, sha now), options.bits (4 then, 3 now)"
    assert caught.value.hint == "run the earlier command again to finish it, or pass --no-resume to discard it"
    assert write(tmp_path / "out") == []  # the refused run has harmed nothing, and holds no lock


def test_a_run_of_another_layout_is_refused(tmp_path: Path) -> None:
    writer = start(tmp_path / "out")
    work(writer)
    writer.close()
    with pytest.raises(OutputError) as caught:
        start(tmp_path / "out", max_shard_bytes=1000)
    text = f"{staging_of(tmp_path / 'out')}: holds unfinished work of another run; "
    assert str(caught.value) == text + "differs in the planned tensors or the shard size"
    assert write(tmp_path / "out") == []


def test_no_resume_discards(tmp_path: Path) -> None:
    writer = start(tmp_path / "out")
    work(writer)
    (writer.scratch / "old").write_text("x")
    writer.close()
    (writer.staging / "model-00001-of-00009.safetensors").write_text("left over")
    again = start(tmp_path / "out", identity={"other": 1}, resume=False)
    assert again.steps == {} and again.digests == {}
    assert len(work(again)) == STEPS
    finish(again)
    write(tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_shards_that_no_journal_speaks_for_are_not_published(tmp_path: Path) -> None:
    write(tmp_path / "straight")
    staging = staging_of(tmp_path / "out")
    staging.mkdir()
    for name in (SINGLE, "model-00009-of-00009.safetensors", "model-00001-of-00003.safetensors"):
        (staging / name).write_bytes(b"x" * 10_000)
    write(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.parametrize("resume", [True, False])
def test_two_writers_at_once(tmp_path: Path, resume: bool) -> None:
    first = start(tmp_path / "out")
    with pytest.raises(OutputError) as caught:
        start(tmp_path / "out", resume=resume)
    assert str(caught.value) == f"{staging_of(tmp_path / 'out')}: another run is writing there"
    work(first)
    finish(first)
    write(tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_two_writers_in_two_processes(tmp_path: Path) -> None:
    lines = [
        "import fcntl, os, sys",
        "descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)",
        "fcntl.flock(descriptor, fcntl.LOCK_EX)",
        "print('locked', flush=True)",
        "sys.stdin.read()",
    ]
    staging_of(tmp_path / "out").mkdir()
    command = [sys.executable, "-c", "\n".join(lines), str(staging_of(tmp_path / "out") / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(OutputError, match="another run is writing there"):
            start(tmp_path / "out")
        other.communicate("")
    assert len(write(tmp_path / "out")) == STEPS


# Reading back


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.00.weight", "model.04.weight", "model.10.weight"])
@pytest.mark.parametrize("end", ["first", "last"])
def test_flipped_byte_names_the_tensor(tmp_path: Path, name: str, end: str) -> None:
    writer = start(tmp_path / "out")
    work(writer)
    info = writer.tensors[name]
    path = writer.staging / info.shard
    flip(path, info.offset if end == "first" else info.offset + info.nbytes - 1)
    with pytest.raises(VerificationError) as caught:
        writer.read_back()
    assert str(caught.value) == f"{path}: tensor '{name}' read back differs from what was written"
    assert caught.value.exit_code == 4
    writer.close()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("offset", [0, 8, 30])
def test_flipped_byte_in_the_header(tmp_path: Path, offset: int) -> None:
    writer = start(tmp_path / "out")
    work(writer)
    path = writer.staging / writer.tensors["model.00.weight"].shard
    flip(path, offset)
    with pytest.raises(VerificationError) as caught:
        writer.read_back()
    assert str(caught.value) == f"{path}: its header read back differs from what was written"
    writer.close()


@pytest.mark.parametrize("change", [-1, 1])
def test_shard_of_another_length(tmp_path: Path, change: int) -> None:
    writer = start(tmp_path / "out", max_shard_bytes=10_000)
    work(writer)
    path = writer.staging / SINGLE
    os.truncate(path, path.stat().st_size + change)
    last = max(writer.tensors.values(), key=lambda info: info.offset + info.nbytes).name
    text = f"ends inside tensor '{last}'" if change < 0 else "is longer than planned"
    with pytest.raises(VerificationError, match=f"^{re.escape(str(path))}: {text}$"):
        writer.read_back()
    writer.close()


def test_forgotten_tensors_are_named(tmp_path: Path) -> None:
    writer = start(tmp_path / "out")
    made = tensors()
    for name in list(made)[2:]:
        writer.put(name, made[name])
    writer.done("most")
    with pytest.raises(VerificationError) as caught:
        writer.read_back()
    assert str(caught.value) == "2 planned tensors were never written: model.00.weight, model.01.weight"
    writer.close()


# Full disks


def full(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FREE_SOME = "free some disk space and run the same command again; finished work is kept"


def test_disk_full_when_space_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OutputError) as caught:
            start(tmp_path / "out")
    assert str(caught.value) == f"{staging_of(tmp_path / 'out')}: cannot write: No space left on device"
    assert caught.value.hint == FREE_SOME
    assert list(tmp_path.iterdir()) == []  # nothing is done yet, so nothing may fill the disk
    assert len(write(tmp_path / "out")) == STEPS


@pytest.mark.parametrize("copied", [False, True])
def test_disk_full_in_mid_shard(
    tmp_path: Path, make_checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    write(tmp_path / "straight")
    source = Checkpoint.open(make_checkpoint(tensors()))
    writer, made = start(tmp_path / "out"), tensors()
    for name in list(made)[0::STEPS]:
        writer.put(name, made[name])
    writer.done("step 0", {"loss": 0.0})
    name = list(made)[1]
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OutputError) as caught:
            writer.copy_from(source, name) if copied else writer.put(name, made[name])
    shard = writer.staging / writer.tensors[name].shard
    assert str(caught.value) == f"{shard}: cannot write: No space left on device"
    assert caught.value.hint == FREE_SOME
    writer.close()
    assert not (tmp_path / "out").exists()
    assert write(tmp_path / "out") == ["step 1", "step 2", "step 3"]
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_system_that_cannot_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    write(tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").tensors.keys() == tensors().keys()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_refusal_of_the_system_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "somewhere"))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OutputError) as caught:
        start(tmp_path / "out")
    assert str(caught.value) == f"{tmp_path}/somewhere: cannot write: {os.strerror(number)}"
    assert caught.value.hint == "choose a writable place with --output-dir"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() != 0 or mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_real_disk_that_is_too_small(small_disk: Path) -> None:
    large = [TensorSpec(f"t{k}", (1 << 18,), torch.float32) for k in range(3)]
    with pytest.raises(OutputError, match="No space left on device") as caught:
        CheckpointWriter(small_disk / "out", large, IDENTITY, max_shard_bytes=1 << 19)
    assert caught.value.hint == FREE_SOME
    assert list(small_disk.iterdir()) == []


def test_a_real_disk_that_fills_up_during_the_run(small_disk: Path, tmp_path: Path) -> None:
    write(tmp_path / "straight")
    target, made = small_disk / "out", tensors()
    writer, name = start(target), min(made)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(b"x" * (1 << 21))
    with pytest.raises(OutputError, match="No space left on device") as caught:
        for k in range(1000):  # the shards are reserved; the journal fills what its last page leaves
            writer.put(name, made[name])
            writer.done(f"again {k}")
    assert caught.value.hint == FREE_SOME
    writer.close()
    assert not target.exists()
    filler.unlink()
    again = start(target)
    assert f"again {k}" not in again.steps and f"again {k - 1}" in again.steps
    work(again)
    finish(again)
    assert contents(target) == contents(tmp_path / "straight")


# Killed


CALLS = ["pwrite", "posix_fallocate", "fdatasync", "fsync", "open", "mkdir", "rename", "unlink", "rmdir", "write"]


def die_at(point: int) -> Callable[[], int]:
    """From now on count the calls that change a disk; the one numbered ``point`` does half its work and is the last."""
    count = 0

    def watch(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == point:
                if name == "pwrite":
                    real(args[0], memoryview(args[1])[: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **named)

        return call

    for name in ("fsync", "fdatasync"):
        setattr(os, name, forget_syncing)
    for name in CALLS:
        setattr(os, name, watch(name, getattr(os, name)))
    return lambda: count


def torn_append(writer: Any, lines: int) -> None:
    """Die when the journal gets line number ``lines``, after half of it."""
    real, seen = writer._append, 0

    def append(record: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == lines:
            with (writer.staging / JOURNAL).open("ab", buffering=0) as file:
                file.write(json.dumps(record).encode()[:25])
            os.kill(os.getpid(), signal.SIGKILL)
        real(record)

    writer._append = append


def in_child(task: Callable[[], None]) -> int:
    """Run ``task`` in a forked process; returns the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        task()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_everywhere(place: Path) -> None:
    """The script: for every point of a run, a folder in which a run was killed at that point by signal 9.

    It runs in an interpreter of its own, where forking is safe: no thread has been started yet.
    """
    torch.set_num_threads(1)

    def killed(folder: Path, point: int) -> None:
        if point < 0:
            writer = start(folder / "out")
            torn_append(writer, -point)
            work(writer)
            return
        counted = die_at(point)
        write(folder / "out")
        if point == 0:
            (folder / "count").write_text(str(counted()))

    def run(point: int) -> int:
        folder = place / str(point)
        folder.mkdir()
        return in_child(lambda: killed(folder, point))

    results = {0: run(0)}
    total = int((place / "0" / "count").read_text())
    results |= {point: run(point) for point in [*range(1, total + 1), *range(-STEPS, 0)]}
    (place / "results.json").write_text(json.dumps({"total": total, "results": results}))


def test_killed_anywhere_and_continued(tmp_path: Path) -> None:
    write(tmp_path / "straight")
    expected = contents(tmp_path / "straight")
    place = tmp_path / "killed"
    place.mkdir()
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, __file__, str(place)], check=True, env={**os.environ, "PYTHONPATH": path})
    outcome = json.loads((place / "results.json").read_text())
    results = {int(point): code for point, code in outcome["results"].items()}
    assert outcome["total"] > 40  # twelve tensors, three shards, five journal lines, one rename
    assert results.pop(0) == 0 and set(results.values()) == {-signal.SIGKILL}
    assert contents(place / "0" / "out") == expected
    left = set()
    for point in results:
        target = place / str(point) / "out"
        if target.exists():  # killed after the rename: complete, or it must not be there
            assert contents(target) == expected, point
            continue
        left.add(len(write(target)))
        assert contents(target) == expected, point
        assert [path.name for path in target.parent.iterdir()] == ["out"], point
    assert left == {0, 1, 2, 3, 4}  # some continued from every step


def test_killed_while_replacing_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two renames the old folder has another name and the new one is complete: nothing is lost."""
    target = tmp_path / "out"
    old_folder(target)
    writer = start(target, overwrite=True)
    work(writer)
    writer.read_back()
    real: Callable[[Path, Path], Path] = Path.rename
    renamed: list[str] = []

    def rename(self: Path, new: Path) -> Path:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(new.name)
        return real(self, new)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        finish(writer)
    assert (tmp_path / renamed[0] / "old").read_text() == "old"
    made: Sequence[str] = [path.name for path in sorted(writer.staging.iterdir())]
    assert INDEX in made and "config.json" in made


if __name__ == "__main__":
    die_everywhere(Path(sys.argv[1]))
