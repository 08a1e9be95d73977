"""What `compress run` promises: finished work is found, only what changed runs again, a killed run goes on, one failure
stops nothing else, and none of it changes a byte."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from commands import FEW, Commands, Fault, Run
from conftest import REPOSITORY

from weightworks.store.sources import file_digest

TEXT = REPOSITORY / "weightworks" / "stream" / "builtin" / "verification.txt"
FEW_AS_YAML = f"dataset: {FEW[1]}, num_samples: {FEW[3]}, seq_len: {FEW[5]}"
RECIPE = f"""
version: 1
sources: {{base: {REPOSITORY}/examples/tiny-llama}}
stages:
  fine: {{use: quantize.rtn, from: base, with: {{bits: 8, format: dense}}}}
  small: {{use: quantize.gptq, from: fine, with: {{{FEW_AS_YAML}}}, matrix: {{bits: [3, 4]}}}}
  other: {{use: quantize.rtn, from: base, with: {{bits: 4}}}}
  scores:
    use: score.perplexity
    from: [base, small, other]
    with: {{texts: [{TEXT}], seq_len: 64, max_tokens: 256}}
report: [scores]
"""
CHECKPOINTS = ("fine", "small-bits-3", "small-bits-4", "other")
DONE = "weightworks.store.writer:CheckpointWriter.done"
KEEP = "weightworks.plan.workspace:Workspace.keep"


def run_recipe(compress: Commands, place: Path, *words: str | Path, faults: list[Fault] | None = None) -> Run:
    if not (place / "r.yaml").exists():
        (place / "r.yaml").write_text(RECIPE)
    return compress("run", "r.yaml", *words, "--json", cwd=place, faults=faults or [])


def states(run: Run) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in run.json["stages"]}


def contents(place: Path, workspace: str = "runs") -> dict[str, dict[str, str]]:
    """Digests by file of every checkpoint, and of the scores."""
    view = place / workspace / "r"
    found = {name: {path.name: file_digest(path) for path in (view / name).iterdir()} for name in CHECKPOINTS}
    return {**found, "scores": {"score.json": file_digest(view / "scores" / "score.json")}}


@pytest.fixture(scope="module")
def undisturbed(compress: Commands, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that nobody disturbed: its folder, and the digests of all it made."""
    place = tmp_path_factory.mktemp("undisturbed")
    run = run_recipe(compress, place)
    assert run.code == 0, run.err
    assert set(states(run).values()) == {"source", "ran"}
    return place, contents(place)


def test_a_second_run_does_nothing(compress: Commands, undisturbed: tuple[Path, dict[str, Any]]) -> None:
    place, made = undisturbed
    page = place / "runs" / "r" / "report.html"
    before = page.stat().st_mtime_ns
    run = run_recipe(compress, place, faults=[["count_calls", "weightworks.plan.task:perform", str(place / "calls")]])
    assert run.code == 0
    assert set(states(run).values()) == {"source", "cached"}
    assert (place / "calls").read_text() == "0"
    assert page.stat().st_mtime_ns == before
    assert contents(place) == made


def test_only_what_depends_on_a_change_runs_again(compress: Commands, undisturbed: tuple[Path, dict[str, Any]]) -> None:
    place, _ = undisturbed
    change = ("--set", "other.bits=3")
    told = compress("explain", "r.yaml", *change, "--json", cwd=place)
    reasons = {stage["stage"]: stage["reason"] for stage in told.json["stages"] if stage["state"] == "to run"}
    assert reasons.keys() == {"other", "scores"}
    assert "bits: 4 -> 3" in reasons["other"]
    assert "'other' runs again" in reasons["scores"]
    run = run_recipe(compress, place, *change)
    ran = {name for name, state in states(run).items() if state == "ran"}
    assert ran == {"other", "scores"}
    back = run_recipe(compress, place)  # what was made before is still there
    assert set(states(back).values()) == {"source", "cached"}


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize(
    "fault",
    [
        ["signal_at", DONE, 5],  # in the midst of the second stage
        ["signal_at", KEEP, 2],  # a finished folder that is not entered yet
        ["signal_at", KEEP, 3, {"after": True}],  # between two stages
    ],
    ids=["in a stage", "before the record", "between stages"],
)
def test_a_killed_run_goes_on(
    compress: Commands, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, fault: Fault, jobs: str
) -> None:
    """The kill hits a run of one job; the run that goes on has one or two, and gives the same bytes."""
    killed = run_recipe(compress, tmp_path, faults=[fault])
    assert killed.code == -signal.SIGKILL
    run = run_recipe(compress, tmp_path, "--jobs", jobs)
    assert run.code == 0, run.err
    assert "cached" in states(run).values()
    assert contents(tmp_path) == undisturbed[1]


def test_two_jobs_make_the_same_bytes(
    compress: Commands, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run = run_recipe(compress, tmp_path, "--jobs", "2")
    assert run.code == 0, run.err
    assert contents(tmp_path) == undisturbed[1]


def test_damaged_outputs_are_made_again(
    compress: Commands, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    assert run_recipe(compress, tmp_path, "--only", "other").code == 0
    made = tmp_path / "runs" / "r" / "other"
    first = {path.name: file_digest(path) for path in made.iterdir()}
    assert first == undisturbed[1]["other"]
    weights = (made / "model.safetensors").read_bytes()
    for name, content in (
        ("model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1])),
        ("config.json", None),
        ("provenance.json", (made / "provenance.json").read_bytes()[:100]),
    ):
        (made / name).unlink() if content is None else (made / name).write_bytes(content)
        run = run_recipe(compress, tmp_path, "--only", "other")
        assert run.code == 0, run.err
        assert states(run)["other"] == "ran"
        assert "its output is gone or damaged" in run.err
        assert {path.name: file_digest(path) for path in made.iterdir()} == first


def test_a_failure_stops_what_depends_on_it_alone(compress: Commands, tmp_path: Path) -> None:
    broken = RECIPE.replace("with: {bits: 8, format: dense}", "with: {bits: 8, format: dense, group_size: 100}")
    (tmp_path / "r.yaml").write_text(broken)
    for _ in range(2):  # a failure is never cached
        run = run_recipe(compress, tmp_path)
        assert run.code == 1
        assert "width 256 is not divisible by the group size 100" in run.err
        assert states(run) | {"other": ""} == {
            "base": "source", "fine": "failed", "small[bits=3]": "skipped", "small[bits=4]": "skipped",
            "other": "", "scores": "skipped",
        }  # fmt: skip
    assert states(run)["other"] == "cached"
    assert "'fine' is missing" in run.err
    assert (tmp_path / "runs" / "r" / "report.html").is_file()
    (tmp_path / "r.yaml").write_text(RECIPE)
    mended = run_recipe(compress, tmp_path)
    assert mended.code == 0, mended.err
    assert states(mended)["other"] == "cached"


def test_two_runs_at_once_make_each_output_once(
    compress: Commands, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    both = [compress.start("run", "r.yaml", "--json", cwd=tmp_path) for _ in range(2)]
    runs = [started.wait() for started in both]
    assert [run.code for run in runs] == [0, 0], [run.err for run in runs]
    for name in ("fine", "small[bits=3]", "small[bits=4]", "other", "scores"):
        assert [states(run)[name] for run in runs].count("ran") <= 1
    assert contents(tmp_path) == undisturbed[1]
