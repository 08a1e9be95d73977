"""Recipes on a real Ray cluster of several workers: stages and tensors spread, workers are killed, bytes stay the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from at_workers import PARTS, Event, Eventful, begun, tries
from commands import ONE_THREAD, SHORT_TEXT, Commands
from places import LATER, Place, new_place, on_one_thread, outputs, ran, two_blocks, wait_for

from weightworks.engine.executor import WorkerError
from weightworks.plan.run import Runner
from weightworks.report.progress import Progress
from weightworks.stage.settings import parse_size
from weightworks.store.sources import file_digest

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
from weightworks.engine.ray_executor import OnRay  # noqa: E402

HERE = Path(__file__).resolve().parent
WORKERS = 2
ROUNDING = "compress.quantize.rtn:Method.apply"


@pytest.fixture(scope="module", autouse=True)
def cluster(one_thread: None) -> Iterator[None]:
    """A local cluster, started once; its workers are processes of their own."""
    with on_one_thread():
        variables = {"PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))}
        ray.init(
            address="local",  # not a cluster that somebody left running
            num_cpus=WORKERS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": variables},  # workers find what tests have them do
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_blocks(tiny_llama, tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def undisturbed(compress: Commands, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a local run makes."""
    place = new_place(tmp_path_factory.mktemp("local") / "place", compress, model)
    place.walk()
    return outputs(place.runs)


@pytest.fixture
def place(compress: Commands, model: Path, tmp_path: Path) -> Place:
    return new_place(tmp_path / "place", compress, model)


def test_work_spreads_and_killed_workers_are_replaced(place: Place, undisturbed: dict[str, str]) -> None:
    """Two stages take all processors before either goes on; their parts, two at least at a time, need some. One worker is
    killed in the middle of a stage, one in the middle of a part. The bytes are those of a local run."""
    stages = Event(meet=2, place="stages")
    parts = Event(meet=2, kill=ROUNDING, number=2)
    plan = place.plan()
    events = {"dense": stages, "other": stages, "small": Event(kill=LATER), PARTS: parts}
    executor = Eventful(OnRay(), place.folder, events)
    code = Runner(plan, executor, Progress(quiet=True), run={}, limit=0).run()
    assert code == 0, [step.error for step in plan.steps.values()]
    assert ran(plan) == set(plan.steps)
    assert outputs(place.runs) == undisturbed
    for name in ("stages", "small", PARTS):
        assert len(tries(place.folder / name)) >= 2
    for name in ("small", PARTS):  # what the killed worker had begun last, another began again; a survivor may
        killed, order = int((place.folder / name / "killed").read_text()), begun(place.folder / name)
        last = [task for process, task in order if process == killed][-1]
        assert any(task == last and process != killed for process, task in order)
    assert "resuming after block 1 of 2" in place.logs("small")
    assert os.getpid() not in tries(place.folder / "stages") | tries(place.folder / PARTS)
    assert place.plan().to_run == []  # what the cluster made, local runs find


def test_what_workers_answer() -> None:
    executor = OnRay()
    good = executor.submit(file_digest, SHORT_TEXT)
    wrong = executor.submit(os.listdir, "/nowhere")
    refused = executor.submit(parse_size, "5 apples")
    killed = executor.submit(signal.raise_signal, signal.SIGKILL)
    assert good.result() == file_digest(SHORT_TEXT)
    assert refused.result() is None
    with pytest.raises(WorkerError, match=r"^FileNotFoundError: .* '/nowhere' \(.*executor.py:\d+\)$"):
        wrong.result()
    with pytest.raises(WorkerError, match=r"^the Ray task failed: .*worker"):
        killed.result()
    executor.close()
    assert ray.is_initialized()  # the cluster is not the executor's


def test_a_killed_run_takes_its_workers_along(place: Place) -> None:
    """A run in a process of its own, with a cluster of its own."""
    command = [sys.executable, "-c", "from cli.compress_app import main; main()", "run", "r.yaml", "--executor", "ray"]
    run = subprocess.Popen(command, cwd=place.folder, env={**os.environ, **ONE_THREAD}, stderr=subprocess.DEVNULL)
    staging = place.runs / "cache"
    wait_for(lambda: run.poll() is not None or any(staging.glob("*/*.partial/journal.jsonl")), seconds=300)
    workers = [process for process in psutil.Process(run.pid).children(recursive=True) if works(process)]
    assert workers
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert alive == []


def works(process: psutil.Process) -> bool:
    """Whether a process does tasks. Ray's own services call themselves agents; they stay for a minute."""
    name = " ".join(process.cmdline())
    return name.startswith("ray::") and "Agent" not in name
