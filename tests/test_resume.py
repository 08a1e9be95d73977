"""Runs that are killed, interrupted, repeated, or started twice: the same command again ends in the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import FEW, HERE, ONE_THREAD, TINY_LLAMA, Commands, Fault, Run
from places import wait_until_stopped

from weightworks.store.journal import JOURNAL
from weightworks.store.sources import file_digest

DONE = "weightworks.store.writer:CheckpointWriter.done"
PUT = "weightworks.store.writer:CheckpointWriter.put"
TEXT = "weightworks.store.writer:CheckpointWriter.write_text"
COMMIT = "weightworks.store.writer:CheckpointWriter.commit"
CHECKPOINT = "weightworks.stream.activations:Activations.checkpoint"
WRITE = "weightworks.stream.activations:Activations.write"
FORGET = "weightworks.stream.activations:Activations.forget"
ON_DISK: Fault = ["planned", {"on_disk": True}]

GPTQ = ("quantize", TINY_LLAMA, *FEW, "--ignore", "*.mlp.*", "-o", "out")  # four linears a block: killed many times
RTN = ("quantize", TINY_LLAMA, "--method", "rtn", "-o", "out")
SHARDED = (*GPTQ, "--max-shard-size", "1MB")
ENTRIES = 8  # of a GPTQ run in its journal: the proof, six blocks, the copied tensors


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file below ``folder``."""
    return {str(path.relative_to(folder)): file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(compress: Commands, tmp_path_factory: pytest.TempPathFactory) -> dict[Sequence[object], dict[str, str]]:
    """What each command writes if nothing happens to it."""
    places = {words: tmp_path_factory.mktemp("undisturbed") for words in (GPTQ, RTN, SHARDED)}
    started = [compress.start(*words, cwd=place) for words, place in places.items()]
    for run in started:
        assert run.wait().code == 0
    return {words: contents(place / "out") for words, place in places.items()}


def kill_again_and_again(
    compress: Commands, words: Sequence[str | Path], place: Path, fault: Fault, *also: Fault
) -> tuple[int, Run]:
    """Run ``words`` with ``fault`` until a run comes through; returns how many were killed, and that run."""
    for killed in range(20):
        run = compress(*words, cwd=place, faults=[fault, *also])
        if run.code != -signal.SIGKILL:
            return killed, run
        assert not (place / "out").exists()
    raise AssertionError("killed runs make no progress")


def kill(where: str, number: int, *, after: bool = False) -> Fault:
    return ["signal_at", where, number, {"after": after}]


@pytest.mark.parametrize(
    ("fault", "at_least"),
    [
        pytest.param(kill(DONE, 1, after=True), ENTRIES, id="after each journal entry"),
        pytest.param(kill(DONE, 3), 3, id="before every third journal entry"),
        pytest.param(kill(PUT, 15), 5, id="inside each block"),  # one has 12 tensors to put
        pytest.param(kill(CHECKPOINT, 5), 3, id="between two files of activations"),  # a block has three
        pytest.param(kill(WRITE, 7), 3, id="while activations are written"),  # a block has three or two
        pytest.param(kill(FORGET, 2), 5, id="before old activations are dropped"),
    ],
)
def test_killed_again_and_again(
    compress: Commands,
    undisturbed: dict[Sequence[object], dict[str, str]],
    tmp_path: Path,
    fault: Fault,
    at_least: int,
) -> None:
    places = {tmp_path / "in memory": [], tmp_path / "on disk": [ON_DISK]}

    def repeat(place: Path) -> tuple[int, Run]:
        place.mkdir()
        return kill_again_and_again(compress, GPTQ, place, fault, *places[place])

    with ThreadPoolExecutor() as pool:
        results = dict(zip(places, pool.map(repeat, places), strict=True))
    for place, (killed, run) in results.items():
        assert run.code == 0, run.err
        assert killed >= at_least
        assert contents(place / "out") == undisturbed[GPTQ]
        assert sorted(path.name for path in place.iterdir()) == ["out", "out.run.log"]


@pytest.mark.parametrize(
    ("fault", "at_least"),
    [
        pytest.param(kill(DONE, 1, after=True), 3, id="after each journal entry"),
        pytest.param(kill(DONE, 2), 2, id="before each journal entry"),
        pytest.param(kill(PUT, 20), 6, id="inside"),
    ],
)
def test_rounding_killed_again_and_again(
    compress: Commands,
    undisturbed: dict[Sequence[object], dict[str, str]],
    tmp_path: Path,
    fault: Fault,
    at_least: int,
) -> None:
    small: Fault = ["constant", "weightworks.engine.tensorwise:JOURNAL_BYTES", 1_000_000]
    killed, run = kill_again_and_again(compress, RTN, tmp_path, fault, small)
    assert run.code == 0, run.err
    assert killed >= at_least
    assert contents(tmp_path / "out") == undisturbed[RTN]


def test_killed_at_the_end(
    compress: Commands, undisturbed: dict[Sequence[object], dict[str, str]], tmp_path: Path
) -> None:
    """Before the index, after config.json, before the provenance, before the card, before the rename."""
    for fault in (kill(TEXT, 1), kill(TEXT, 2, after=True), kill(TEXT, 3), kill(TEXT, 4), kill(COMMIT, 1)):
        assert compress(*SHARDED, cwd=tmp_path, faults=[fault]).code == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    run = compress(*SHARDED, cwd=tmp_path)
    assert run.code == 0, run.err
    assert "resuming after block 6 of 6" in run.err
    assert contents(tmp_path / "out") == undisturbed[SHARDED]


def test_killed_after_the_rename(
    compress: Commands, undisturbed: dict[Sequence[object], dict[str, str]], tmp_path: Path
) -> None:
    assert compress(*RTN, cwd=tmp_path, faults=[kill(COMMIT, 1, after=True)]).code == -signal.SIGKILL
    assert contents(tmp_path / "out") == undisturbed[RTN]
    assert "already done" in compress(*RTN, cwd=tmp_path).err


def test_killed_from_outside_in_a_process_of_its_own(
    compress: Commands, undisturbed: dict[Sequence[object], dict[str, str]], tmp_path: Path
) -> None:
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import faults\n"
    code += f"faults.signal_at({DONE!r}, 4, sent={int(signal.SIGSTOP)})\nfrom cli.compress_app import main; main()"
    words = [sys.executable, "-c", code, *map(str, GPTQ)]
    process = subprocess.Popen(words, cwd=tmp_path, env={**os.environ, **ONE_THREAD}, stderr=subprocess.DEVNULL)
    wait_until_stopped(process.pid)
    assert (tmp_path / "out.partial" / JOURNAL).read_bytes().count(b"\n") == 4  # identity, proof, two blocks
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run = compress(*GPTQ, cwd=tmp_path)
    assert run.code == 0
    assert "resuming after block 2 of 6" in run.err
    assert contents(tmp_path / "out") == undisturbed[GPTQ]


def test_resumed_with_less_memory(
    compress: Commands, undisturbed: dict[Sequence[object], dict[str, str]], tmp_path: Path
) -> None:
    """Where activations are, and how much of the result is loaded at the end, may change between the two runs."""
    assert compress(*GPTQ, cwd=tmp_path, faults=[kill(DONE, 4, after=True)]).code == -signal.SIGKILL
    run = compress(*GPTQ, cwd=tmp_path, faults=[["planned", {"on_disk": True, "reload_blocks": 2}]])
    assert run.code == 0, run.err
    assert "(2 of 6 blocks, to stay in memory)" in run.err
    made, expected = contents(tmp_path / "out"), undisturbed[GPTQ]
    differing = {name for name in made if made[name] != expected[name]}
    assert made.keys() == expected.keys()
    assert differing <= {"provenance.json"}  # it says what was checked


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(
    compress: Commands, undisturbed: dict[Sequence[object], dict[str, str]], tmp_path: Path, sent: int
) -> None:
    run = compress(*GPTQ, cwd=tmp_path, faults=[["signal_at", PUT, 15, {"sent": int(sent)}]])
    assert run.code == 130
    assert run.err.endswith("interrupted; run the same command again to go on where it stopped\n")
    assert not (tmp_path / "out").exists()
    assert "KeyboardInterrupt" in (tmp_path / "out.run.log").read_text()
    again = compress(*GPTQ, cwd=tmp_path)
    assert again.code == 0
    assert "resuming after block 1 of 6" in again.err
    assert contents(tmp_path / "out") == undisturbed[GPTQ]


def test_interrupted_from_outside(
    compress: Commands, undisturbed: dict[Sequence[object], dict[str, str]], tmp_path: Path
) -> None:
    run = compress.start(*GPTQ, cwd=tmp_path, faults=[["signal_at", DONE, 3, {"sent": int(signal.SIGSTOP)}]])
    wait_until_stopped(run.pid)
    run.send(signal.SIGINT)
    run.send(signal.SIGCONT)
    assert run.wait().code == 130
    assert compress(*GPTQ, cwd=tmp_path).code == 0
    assert contents(tmp_path / "out") == undisturbed[GPTQ]


def test_again_when_done_changes_nothing(compress: Commands, tmp_path: Path) -> None:
    def state() -> list[tuple[str, int, int]]:
        return [
            (str(path), path.stat().st_mtime_ns, path.stat().st_ino)
            for path in [tmp_path / "out", *sorted((tmp_path / "out").iterdir())]
        ]

    assert compress(*RTN, cwd=tmp_path).code == 0
    before = state()
    run = compress(*RTN, cwd=tmp_path)
    assert run.code == 0
    assert f"already done: {tmp_path}/out was made by this very command and is intact" in run.err
    assert state() == before
    assert not (tmp_path / "out.partial").exists()
    dry = compress(*RTN, "--dry-run", cwd=tmp_path)
    assert "nothing to do" in dry.err
    assert compress(*RTN, "--overwrite", cwd=tmp_path).code == 0  # asked for: made again, to the same bytes
    assert {path: inode for path, _, inode in state()} != {path: inode for path, _, inode in before}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--bits", "3"), "differs in options.bits (4 then, 3 now)"),
        (("--seed", "7"), "differs in calibration ("),
        (("--max-shard-size", "1MB"), "differs in max_shard_size (5000000000 then, 1000000 now)"),
        (("--method", "rtn"), "differs in "),
    ],
)
def test_another_command_does_not_touch_unfinished_work(
    compress: Commands, killed: Path, change: Sequence[str], said: str
) -> None:
    before = contents(killed)
    run = compress(*GPTQ, *change, cwd=killed)
    assert run.code == 1
    assert f"{killed}/out.partial: holds unfinished work of another run; " in run.err
    assert said in run.err
    assert "run the earlier command again to finish it, or pass --no-resume to discard it" in run.err
    assert contents(killed) == before


@pytest.fixture(scope="module")
def killed(compress: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place where a run was killed after two blocks."""
    place = tmp_path_factory.mktemp("killed")
    assert compress(*GPTQ, cwd=place, faults=[kill(DONE, 3, after=True)]).code == -signal.SIGKILL
    return place


def test_no_resume_starts_again(compress: Commands, tmp_path: Path) -> None:
    assert compress(*RTN, cwd=tmp_path, faults=[kill(DONE, 2, after=True)]).code == -signal.SIGKILL
    run = compress(*RTN, "--bits", "8", "--no-resume", cwd=tmp_path)
    assert run.code == 0, run.err
    assert "resuming" not in run.err
    assert "made by quantize.rtn bits 8" in compress("inspect", tmp_path / "out").err


def test_two_runs_at_once(
    compress: Commands, undisturbed: dict[Sequence[object], dict[str, str]], tmp_path: Path
) -> None:
    first = compress.start(*GPTQ, cwd=tmp_path, faults=[["signal_at", DONE, 2, {"sent": int(signal.SIGSTOP)}]])
    wait_until_stopped(first.pid)
    for extra in ([], ["--no-resume"]):
        second = compress(*GPTQ, *extra, cwd=tmp_path)
        assert second.code == 1
        assert f"{tmp_path}/out.partial: another run is writing there" in second.err
    first.send(signal.SIGCONT)
    assert first.wait().code == 0
    assert contents(tmp_path / "out") == undisturbed[GPTQ]
