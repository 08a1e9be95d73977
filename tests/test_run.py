"""``compress run``: what is there is found, what is not is made, and however a run is cut, beset or spread out, its
bytes are those of an undisturbed one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from commands import ONE_THREAD, SHORT_TEXT, Commands, Fault, Run
from places import (
    LATER,
    RECIPE,
    STAGES,
    Place,
    folder_of,
    new_place,
    on_one_thread,
    outputs,
    ran,
    states,
    two_blocks,
    wait_for,
    wait_until_stopped,
)

from cli.recipes import make_plan
from weightworks.engine.executor import Processes, WorkerError, attempt, portable
from weightworks.engine.ray_executor import OnRay
from weightworks.errors import CheckpointError, OutputError, ResourceError, UsageError, WeightworksError
from weightworks.plan import keys, task
from weightworks.plan.keys import environment
from weightworks.plan.run import Runner
from weightworks.plan.task import Production, Task, produce
from weightworks.plan.workspace import Workspace, write_json
from weightworks.report.progress import Progress
from weightworks.store.sources import Digests, file_digest

DUMP = "weightworks.plan.workspace:json.dump"  # records, and what is known of the stages
FINISH = "weightworks.plan.run:Runner._finish"
KEEP = "weightworks.plan.workspace:Workspace.keep"
RENAME = "pathlib:Path.rename"  # of a finished folder


@pytest.fixture(scope="module", autouse=True)
def alike(one_thread: None) -> Iterator[None]:
    with on_one_thread():
        yield


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_blocks(tiny_llama, tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def place(compress: Commands, model: Path, tmp_path: Path) -> Place:
    """A place where nothing has run."""
    return new_place(tmp_path / "place", compress, model)


@pytest.fixture(scope="module")
def cold(compress: Commands, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Run]:
    """A place where the recipe ran undisturbed; not to be changed."""
    place = new_place(tmp_path_factory.mktemp("cold") / "place", compress, model)
    return place, place.run()


@pytest.fixture
def done(cold: tuple[Place, Run], tmp_path: Path) -> Place:
    """A copy of that place."""
    shutil.copytree(cold[0].folder, tmp_path / "place", symlinks=True)
    return Place(tmp_path / "place", cold[0].compress)


@pytest.fixture(scope="module")
def undisturbed(cold: tuple[Place, Run]) -> dict[str, str]:
    """What an undisturbed run makes."""
    return outputs(cold[0].runs)


def marks(runs: Path) -> dict[str, tuple[int, int]]:
    """When each file of each output was written, and its inode."""
    paths = [path for path in runs.glob("cache/*/*/*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}


# Cold and warm ----------------------------------------------------------------------------------------------------


def test_a_cold_run_makes_everything(cold: tuple[Place, Run], undisturbed: dict[str, str]) -> None:
    place, run = cold
    assert run.code == 0, run.err
    assert states(run) == dict.fromkeys(STAGES, "ran")
    assert "[1/4] dense: quantize.rtn: never run here\n" in run.err
    assert sorted(path.name for path in (place.runs / "r").iterdir()) == [
        *("dense", "other", "report.html", "report.json", "scores", "small", "stages.json")
    ]
    assert (place.runs / "r" / "small" / "config.json").is_file()
    report = json.loads((place.runs / "r" / "report.json").read_text())
    assert report == run.json
    assert [stage["name"] for stage in report["stages"]] == ["base", *STAGES]
    page = (place.runs / "r" / "report.html").read_text()
    assert all(name in page for name in STAGES)
    models = report["scores"][0]["models"]
    assert [row["model"] for row in models] == ["base", "dense", "small", "other"]
    assert len({name.split("/")[1] for name in undisturbed}) == 4


def test_a_warm_run_makes_nothing(done: Place, undisturbed: dict[str, str]) -> None:
    before = marks(done.runs)
    run = done.run()
    assert run.code == 0
    assert states(run) == dict.fromkeys(STAGES, "cached")
    assert marks(done.runs) == before
    assert outputs(done.runs) == undisturbed
    assert states(done.run("--jobs", "2")) == dict.fromkeys(STAGES, "cached")


def test_a_warm_run_loads_no_heavy_library(done: Place) -> None:
    code = "import sys; from cli.compress_app import main\ntry: main()\nexcept SystemExit as leave: code = leave.code\n"
    code += "print(code, [name for name in ('torch._C', 'transformers', 'scipy.linalg', 'ray') if name in sys.modules])"
    for words in (["run", "r.yaml"], ["run", "r.yaml", "--executor", "ray"], ["explain", "r.yaml"]):
        command = [sys.executable, "-c", code, *words]
        run = subprocess.run(
            command, cwd=done.folder, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True, check=False
        )
        assert run.stdout == "0 []\n", run.stderr


def test_planning_is_quick_and_linear(tmp_path: Path, model: Path) -> None:
    """In CPU seconds, so that a busy machine changes nothing."""

    def seconds(stages: int) -> float:
        recipe = tmp_path / f"{stages}.yaml"
        values = f"bits: [2, 3, 4, 8], seed: {list(range(stages // 8))}"
        chained = "  b: {use: quantize.rtn, from: a, with: {format: dense}}\n"
        first = f"  a: {{use: quantize.rtn, from: base, matrix: {{{values}}}}}\n"
        recipe.write_text(f"version: 1\nsources: {{base: {model}}}\nstages:\n{first}{chained}")
        before = time.process_time()
        plan = make_plan(recipe, str(tmp_path / "runs"), [], None)
        spent = time.process_time() - before
        assert len(plan.to_run) == stages
        return spent

    seconds(8)  # what is imported on the way
    few, many = seconds(1_000), seconds(10_000)
    assert few < 2
    assert many < 20 * few + 1


# What changed -----------------------------------------------------------------------------------------------------


def test_one_option_reruns_what_is_downstream(done: Place) -> None:
    before = marks(done.runs)
    plan = done.walk("small.bits=3")
    assert ran(plan) == {"small", "scores"}
    assert marks(done.runs).items() >= before.items()  # what was there is there still
    assert done.walk().to_run == []  # and the recipe as it was finds all of it


def test_reasons_in_words(done: Place, model: Path) -> None:
    def reasons(*sets: str) -> dict[str, str]:
        return {name: step.reason for name, step in done.plan(*sets).steps.items() if step.state == "to run"}

    assert reasons("small.bits=3") == {"small": "bits: 4 -> 3", "scores": "'small' runs again"}
    assert reasons("dense.clip=off", "small.seed=7") == {
        "dense": "clip: auto -> off",
        "small": "seed: 0 -> 7; 'dense' runs again",
        "scores": "'dense' runs again; 'small' runs again",
    }
    shutil.copytree(model, done.folder / "model")
    changed = f"vars.model={done.folder / 'model'}"
    assert reasons(changed) == {}  # where a model lies is nothing to its key
    flip(done.folder / "model" / "tokenizer.json")
    assert reasons(changed) == {
        "dense": "tokenizer.json of 'base' changed",
        "small": "'dense' runs again",
        "other": "tokenizer.json of 'base' changed",
        "scores": "tokenizer.json of 'base' changed; 'dense' runs again; 'small' runs again; 'other' runs again",
    }
    recipe = (done.folder / "r.yaml").read_text()
    renamed = recipe.replace("  other:", "  another:").replace("small, other]", "small, another]")
    (done.folder / "r.yaml").write_text(renamed)
    assert reasons() == {"scores": "input 'models' changed"}  # its result calls the models by their names
    (done.folder / "r.yaml").write_text(recipe.replace("from: dense", "from: base"))
    assert reasons()["small"] == "input 'model' changed"
    done.runs.joinpath("r", "stages.json").write_text('{"small": 3, "other"')
    assert reasons("other.bits=8")["other"] == "never run here"


def test_a_changed_text_is_a_reason(done: Place) -> None:
    text = done.folder / "text.txt"
    shutil.copy(SHORT_TEXT, text)
    assert ran(done.walk(f"vars.text={text}")) == {"small", "scores"}
    flip(text)
    told = done.compress("explain", "r.yaml", "--set", f"vars.text={text}", cwd=done.folder)
    assert told.code == 0
    assert re.search(r"small +quantize.gptq +run +calibration text changed +\S+ s? +\S+ MB", told.err)
    assert re.search(r"dense +quantize.rtn +cached +nothing it depends on has changed", told.err)
    assert "2 of 4 stages to run" in told.err
    words = ("run", "r.yaml", "--dry-run", "--set", f"vars.text={text}")
    dry = done.compress(*words, cwd=done.folder).err
    figures = re.compile(r" *\d+(\.\d+)? (s|MB)")  # time and memory may differ in their last digit
    assert figures.sub("", dry) == figures.sub("", told.err)


def test_only_and_set(place: Place) -> None:
    run = place.run("--only", "other", "--set", "other.bits=3")
    assert (run.code, states(run)) == (0, {"other": "ran"})
    run = place.run("--only", "others")
    assert run.code == 2
    assert "--only others: no such stage (did you mean 'other'?)" in run.err


# Damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("stage", "name", "damage"),
    [
        pytest.param("other", "model.safetensors", flip, id="a byte flipped"),
        pytest.param("other", "config.json", Path.unlink, id="a file deleted"),
        pytest.param("other", "provenance.json", cut, id="provenance cut off"),
        pytest.param("other", "../record.json", Path.unlink, id="no record"),
        pytest.param("other", "../record.json", cut, id="record cut off"),
        pytest.param("scores", "score.json", flip, id="a score changed"),
        pytest.param("dense", ".", shutil.rmtree, id="the folder deleted"),
    ],
)
def test_damaged_outputs_are_made_again(
    done: Place, undisturbed: dict[str, str], stage: str, name: str, damage: Callable[[Path], None]
) -> None:
    before = done.plan()
    damage(folder_of(before, stage) / name)
    plan = done.plan()
    assert {step.stage.name: step.reason for step in plan.to_run} == {stage: "its output is gone or damaged"}
    assert ran(done.walk()) == {stage}
    assert outputs(done.runs) == undisturbed


# Failure ----------------------------------------------------------------------------------------------------------

BROKEN = RECIPE.replace("bits: 8, group_size: 64", "bits: 8, group_size: 100")  # the model is 256 wide


def test_a_failing_stage_fails_alone(compress: Commands, model: Path, tmp_path: Path) -> None:
    place = new_place(tmp_path / "place", compress, model, BROKEN)
    run = place.run("-q")
    assert run.code == 1
    assert (
        run.err.startswith("[1/4] dense: failed: quantize.rtn: 12 tensors do not fit: ") or "dense: failed: " in run.err
    )
    assert states(run) == {"dense": "failed", "small": "skipped", "other": "ran", "scores": "skipped"}
    stages = {stage["name"]: stage for stage in run.json["stages"]}
    assert stages["small"]["reason"] == "'dense' is missing: it failed"
    assert stages["scores"]["reason"] == "'dense' is missing: it failed"
    assert "group size 100" in stages["dense"]["error"]
    assert (place.runs / "r" / "report.html").is_file()
    assert [entry["state"] for entry in compress("cache", "ls", "--json", cwd=place.folder).json["entries"]].count(
        "unfinished"
    ) == 1
    assert place.plan().steps["dense"].reason == "never run here"  # a failure is never cached
    (place.folder / "r.yaml").write_text(
        BROKEN.replace("group_size: 100", "group_size: 64").replace("../model", str(model))
    )
    assert ran(place.walk()) == {"dense", "small", "scores"}


def test_a_fault_of_the_program_is_one_failure(place: Place) -> None:
    """An error that nobody raised on purpose stops its own stage only, and is told in one sentence."""
    fault = ["constant", "compress.quantize.gptq:Method", None]
    run = place.run(faults=[fault])
    assert run.code == 1
    assert states(run) == {"dense": "ran", "small": "failed", "other": "ran", "scores": "skipped"}
    assert "small: failed: TypeError: 'NoneType' object is not callable (" in run.err
    assert "hint: this is a fault of the program; please report it" in run.err
    assert "Traceback" not in run.err


def test_strict(place: Place) -> None:
    words, fault = ("--only", "small"), ["forced_fallback"]
    run = place.run(*words, "--strict", faults=[fault])
    assert run.code == 3
    assert "error: done, but some stages needed fallbacks; they are in the report" in run.err
    assert any(stage.get("fallbacks") for stage in run.json["stages"])
    assert place.run(*words).code == 0
    assert place.run(*words, "--strict").code == 3  # found, not made: it is what it is


def test_refusals(place: Place) -> None:
    run = place.run("--executor", "rai")
    assert (run.code, run.json["error"]) == (2, "--executor rai: unknown executor (did you mean 'ray'?)")
    (place.folder / "file").write_text("")
    for workspace, reason in (("file", "Not a directory"), ("/proc/runs", "No such file or directory")):
        run = place.run("--workspace", workspace)
        assert run.code == 1
        assert re.fullmatch(
            rf"error: \S*{workspace}\S*: cannot write there \({reason}\)\n  hint: choose another place with --workspace\n",
            run.err,
        )


def test_no_ray_and_no_cluster(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        with pytest.raises(UsageError, match=r"^--executor ray: the package ray is not installed$"):
            OnRay()
    pytest.importorskip("ray", reason="the extra ray is not installed")
    run = place.run("--executor", "ray", "--ray-address", "127.0.0.1:1")
    assert run.code == 1
    assert run.json["error"].startswith("--ray-address 127.0.0.1:1: no cluster answers (")


# Cut --------------------------------------------------------------------------------------------------------------

KILLS: dict[str, tuple[Fault, set[str]]] = {  # and what is left to do
    "in a stage": (["signal_at", LATER, 1], {"small", "scores"}),
    "between two stages": (["signal_at", FINISH, 2], {"small", "scores"}),
    "before a record": (["signal_at", KEEP, 2], {"other", "small", "scores"}),
    "in a record": (["signal_at", DUMP, 4], {"other", "small", "scores"}),
    "before a score is published": (["signal_at", RENAME, 4], {"scores"}),
    "interrupted": (["signal_at", LATER, 1, {"sent": int(signal.SIGINT)}], {"small", "scores"}),
}


@pytest.fixture(scope="module")
def killed(compress: Commands, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Place, Run]]:
    """Places where runs were killed, each at another point."""

    def kill(name: str) -> tuple[Place, Run]:
        place = new_place(tmp_path_factory.mktemp("killed") / "place", compress, model)
        return place, place.run(faults=[KILLS[name][0]])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(KILLS, pool.map(kill, KILLS), strict=True))


@pytest.mark.parametrize("point", KILLS)
def test_a_killed_run_goes_on(killed: dict[str, tuple[Place, Run]], undisturbed: dict[str, str], point: str) -> None:
    place, run = killed[point]
    assert run.code == (130 if point == "interrupted" else -signal.SIGKILL)
    assert not (place.runs / "r" / "report.html").exists()
    plan = place.walk()
    assert ran(plan) == KILLS[point][1]
    assert outputs(place.runs) == undisturbed
    assert ("resuming after block 1 of 2" in place.logs("small")) == (point in ("in a stage", "interrupted"))
    assert not [path for path in place.runs.rglob("*") if path.name.startswith(".") or path.suffix == ".partial"]


def journal(place: Place, stage: str) -> int:
    """Lines of the journal of a stage that is being made."""
    return sum(path.read_bytes().count(b"\n") for path in place.runs.glob(f"cache/*/{stage}.partial/journal.jsonl"))


# Side by side -----------------------------------------------------------------------------------------------------


def test_runs_at_once_make_each_stage_once(done: Place, model: Path, undisturbed: dict[str, str]) -> None:
    """Two runs of a recipe and one of another that shares stages; meanwhile, nothing they need is removed."""
    place, compress = done, done.compress
    old = place.plan()
    for stage in ("small", "scores"):
        shutil.rmtree(place.runs / "cache" / old.keys[stage].digest)
    place.runs.joinpath("r", "stages.json").unlink()  # nothing is current but by the runs that need it
    another = place.folder / "another.yaml"
    another.write_text(RECIPE.replace("../model", str(model)).replace("{bits: 4, group_size: 64}}", "{bits: 2}}"))
    last = make_plan(another, str(place.runs), [], None).keys["other"].digest
    first = place.start(faults=[["signal_at", LATER, 1, {"sent": int(signal.SIGSTOP)}]])
    wait_until_stopped(first.pid)
    others = [place.start(), place.start(recipe="another.yaml")]
    wait_for((place.runs / "cache" / last / "record.json").exists)
    try:
        for stage in ("dense", "small", "other"):
            key = old.keys[stage].digest[:12]
            run = compress("cache", "rm", key, cwd=place.folder)
            assert (run.code, run.err.partition("\n")[0]) == (1, f"error: {key}: a run is working on it")
        assert compress("cache", "gc", "--json", cwd=place.folder).json == {"removed": []}
        listed = compress("cache", "ls", "--json", cwd=place.folder).json["entries"]
        assert {entry["state"] for entry in listed} == {"in use"}
    finally:
        first.send(signal.SIGCONT)
        runs = [first.wait(), *(run.wait() for run in others)]
    assert [run.code for run in runs] == [0, 0, 0], [run.err for run in runs]
    assert "small: quantize.gptq: never run here; waiting for another run that is making it\n" in runs[1].err
    assert "small: another run has made it\n" in runs[1].err
    assert [states(run)["small"] for run in runs].count("ran") == 1
    assert [states(run)["scores"] for run in runs[:2]].count("ran") == 1
    assert outputs(place.runs).items() >= undisturbed.items()
    assert compress("cache", "gc", "--json", cwd=place.folder).json == {"removed": []}


def test_cache_commands(done: Place) -> None:
    def cache(*words: str, code: int = 0) -> Run:
        run = done.compress("cache", *words, "--json", cwd=done.folder)
        assert run.code == code, run.err
        return run

    old = done.plan().keys
    done.walk("other.bits=3")
    listed = {(entry["stage"], entry["state"]) for entry in cache("ls").json["entries"]}
    assert listed == {(stage, "current") for stage in STAGES} | {("other", "old"), ("scores", "old")}
    for words, text in (
        (("rm",), "cache rm: which? give keys, or beginnings of them"),
        (("rm", "zz"), "cache rm: no entry zz"),
        (("g",), "cache g: unknown action (did you mean 'gc'?)"),
    ):
        assert cache(*words, code=2).json["error"] == text
    assert cache("gc", "--older-than", "1").json == {"removed": []}
    assert "would remove" in cache("gc", "--dry-run").err
    assert {entry["key"] for entry in cache("gc").json["removed"]} == {old["other"].digest, old["scores"].digest}
    assert done.plan("other.bits=3").to_run == []
    cache("rm", old["small"].digest[:8])
    assert not (done.runs / "r" / "small").is_symlink()
    assert [step.reason for step in done.plan("other.bits=3").to_run] == ["its output is gone or damaged"]


class Pretend:
    """An executor that does nothing but answers in a while, in threads, and notes how much memory is taken at once."""

    parts = None

    def __init__(self, slots: int, peaks: Mapping[str, int]) -> None:
        self.slots: int | None = slots
        self.peaks, self.pool, self.lock = peaks, ThreadPoolExecutor(slots), threading.Lock()
        self.busy: list[str] = []
        self.seen: list[tuple[str, ...]] = []

    def submit(self, function: Callable[[Any], Any], task: Any, *, peak_bytes: int | None = None) -> Future[Any]:
        if isinstance(task, Task):
            return self.pool.submit(lambda: {"peak_bytes": self.peaks[task.stage]} if task.stage in self.peaks else {})
        assert peak_bytes == self.peaks.get(task.task.stage)
        with self.lock:
            self.busy.append(task.task.stage)
            self.seen.append(tuple(self.busy))
        return self.pool.submit(self.do, task)

    def do(self, order: Production) -> dict[str, Any]:
        time.sleep(0.003 * (1 + int(order.key[0], 16) % 3))
        with self.lock:
            self.busy.remove(order.task.stage)
        write_json(order.task.target / "provenance.json", {"files": {}})
        Workspace(order.workspace, Digests(order.memo)).keep(order.key, order.task.target, {"seconds": 0.0})
        return {"seconds": 0.0, "cached": False}

    def close(self) -> None:
        self.pool.shutdown()


PEAKS = {"a": 30, "b": 50, "c": 60, "d": 20, "e": 150, "f": 40, "g": 10}


@pytest.mark.parametrize(("slots", "limit"), [(2, 100), (4, 100), (4, 1000)])
def test_never_more_than_the_memory_there_is(place: Place, slots: int, limit: int) -> None:
    """``h`` cannot be estimated and counts as a slot's share; ``e`` alone is more than allowed, and runs alone."""
    stages = "".join(
        f"  {name}: {{use: quantize.rtn, from: {'a' if name == 'g' else 'base'}, with: {{seed: {k}, format: dense}}}}\n"
        for k, name in enumerate([*PEAKS, "h"])
    )
    recipe = (place.folder / "r.yaml").read_text()
    (place.folder / "r.yaml").write_text(recipe.partition("stages:")[0] + "stages:\n" + stages)
    plan, pretend = place.plan(), Pretend(slots, PEAKS)
    assert Runner(plan, pretend, Progress(quiet=True), run={}, limit=limit).run() == 0
    assert ran(plan) == {*PEAKS, "h"}
    taken = {**PEAKS, "h": limit // slots}
    assert all(len(busy) == 1 or sum(taken[name] for name in busy) <= limit for busy in pretend.seen)
    assert max(len(busy) for busy in pretend.seen) > 1
    assert [name for busy in pretend.seen for name in busy[-1:]].index("a") < [
        name for busy in pretend.seen for name in busy[-1:]
    ].index("g")


# Workers ----------------------------------------------------------------------------------------------------------


@dataclass
class Odd:
    """What a task of others may come to."""

    value: Any = field(default_factory=threading.Lock)  # which cannot be pickled


class OddError(WeightworksError):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}", hint="add them")


def test_what_workers_answer() -> None:
    workers = Processes(2, preload=())
    try:
        good = workers.submit(file_digest, SHORT_TEXT)
        killed = workers.submit(signal.raise_signal, signal.SIGKILL)
        left = workers.submit(os._exit, 7)
        wrong = workers.submit(os.listdir, "/nowhere")
        refused = workers.submit(parse_bits, 5)
        waiting = workers.submit(os.getenv, "OMP_WAIT_POLICY")
        assert good.result() == file_digest(SHORT_TEXT)
        assert waiting.result() == "PASSIVE"  # all use all processors: whoever waits must not spin
        assert "OMP_WAIT_POLICY" not in os.environ
        for future, text, hint in (
            (killed, "the worker process was ended by SIGKILL", "run it again: finished work is kept"),
            (left, "the worker process ended with exit code 7 and no answer", "run it again: finished work is kept"),
        ):
            with pytest.raises(WorkerError, match=f"^{text}$") as found:
                future.result()
            assert found.value.hint == hint
        with pytest.raises(WorkerError, match=r"^FileNotFoundError: .* '/nowhere' \(.*executor.py:\d+\)$"):
            wrong.result()
        with pytest.raises(UsageError, match="bits") as raised:
            refused.result()
        assert raised.value.exit_code == 2
        sleeping = workers.submit(time.sleep, 600)
        wait_for(lambda: bool(workers._running))  # its process is there
    finally:
        before = time.monotonic()
        workers.close()
    assert time.monotonic() - before < 300
    with pytest.raises(WorkerError, match="was ended by SIGKILL"):
        sleeping.result()


def parse_bits(bits: int) -> None:
    raise UsageError(f"bits = {bits}", hint="2, 3, 4 or 8")


def test_what_cannot_be_sent_is_told() -> None:
    import pickle

    for outcome, text in (
        ((True, Odd()), "its result cannot be sent: cannot pickle '_thread.lock' object"),
        ((False, OddError(1, 2)), "OddError: 1 and 2"),
    ):
        good, error = pickle.loads(portable(outcome))
        assert (good, str(error)) == (False, text)
    assert pickle.loads(portable((False, OddError(1, 2))))[1].hint == "add them"
    good, error = attempt(int, "x")
    assert str(error).startswith("ValueError: invalid literal for int() with base 10: 'x' (")


def test_workers_are_forked_from_one_thread() -> None:
    """Pools of OpenBLAS end when a process forks (and start again); any other thread would make forking unsafe."""
    code = """
import os, threading, weightworks.engine.preload, weightworks.plan.stage
if os.fork() == 0:
    os._exit(0)
os.wait()
print(threading.active_count(), len(os.listdir("/proc/self/task")))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout == "1 1\n", run.stderr


def test_another_kind_of_worker_refuses(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes on a cluster are those of the run that was planned, or none."""
    plan = place.plan()
    step = plan.steps["dense"]
    order = Production(
        plan.task(step, model=plan.model_of, run={}, quiet=True), step.key.digest, (), place.runs, place.folder / "memo"
    )
    monkeypatch.setattr(task, "environment", lambda: {**environment(), "torch": "1.0", "threads": "64"})
    with pytest.raises(
        ResourceError, match=r"is another than the run was planned for \(torch: 2\S* -> 1.0; threads: 1 -> 64\)"
    ):
        produce(order)
    assert not place.runs.exists()


def test_a_missing_input_is_said(place: Place) -> None:
    plan = place.plan()
    step = plan.steps["dense"]
    order = Production(
        plan.task(step, model=plan.model_of, run={}, quiet=True),
        step.key.digest,
        ("ab" * 32,),
        place.runs,
        place.folder / "memo",
    )
    with pytest.raises(CheckpointError, match="the input under abababababab is gone or damaged"):
        produce(order)


def test_gpus_are_part_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert keys._accelerators(tmp_path) == ""
    for number, name in enumerate(("NVIDIA H200", "NVIDIA A10", "NVIDIA H200")):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t 5\n")
    assert keys._accelerators(tmp_path) == "NVIDIA A10, NVIDIA H200"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert keys._accelerators(tmp_path) == ""


def test_a_lock_whose_file_was_removed_is_taken_again(tmp_path: Path) -> None:
    """A run that waits for a key while the key is removed must not work under a lock that nobody else can see."""
    workspace = Workspace(tmp_path, Digests(tmp_path / "memo"))
    entered, leave = threading.Event(), threading.Event()

    def wait() -> None:
        with workspace.only_one("k"):
            entered.set()
            leave.wait(300)

    with workspace.only_one("k"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.05)
        shutil.rmtree(workspace.cache / "k")  # as remove() does, with the lock in hand
    assert entered.wait(300)
    try:
        assert workspace.busy("k")
        with pytest.raises(OutputError, match="a run is working on it"):
            workspace.remove("k")
    finally:
        leave.set()
        waiting.join()
    workspace.remove("k")
    assert not workspace.busy("k")
