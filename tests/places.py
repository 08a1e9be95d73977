"""Folders where recipes run, and what tests ask of them."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import ONE_THREAD, SHORT_TEXT, Commands, Fault, Run, Started
from safetensors.torch import load_file, save_file

from cli.recipes import execute, make_plan
from weightworks.plan.keys import environment
from weightworks.plan.run import Plan
from weightworks.store.sources import file_digest

RECIPE = f"""
version: 1
vars: {{model: ../model, text: {SHORT_TEXT}}}
sources: {{base: "${{model}}"}}
stages:
  dense:
    use: quantize.rtn
    from: base
    with: {{bits: 8, group_size: 64, format: dense}}
  small:
    use: quantize.gptq
    from: dense
    with: {{bits: 4, group_size: 64, ignore: ["*.mlp.*"], dataset: "${{text}}", num_samples: 4, seq_len: 64}}
  other: {{use: quantize.rtn, from: base, with: {{bits: 4, group_size: 64}}}}
  scores:
    use: score.perplexity
    from: [base, dense, small, other]
    with: {{texts: [{SHORT_TEXT}], seq_len: 64, max_tokens: 256}}
report: [scores]
"""
STAGES = ("dense", "small", "other", "scores")
LATER = "weightworks.stream.activations:Activations.forget"  # once a block of GPTQ, after its journal entry


@contextmanager
def on_one_thread() -> Iterator[None]:
    """This process computes as the commands do, so that either finds what the other made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", ONE_THREAD["OMP_NUM_THREADS"])
        environment.cache_clear()
        yield
    environment.cache_clear()


def two_blocks(tiny_llama: Path, folder: Path) -> Path:
    """The first two blocks of the embedded model: half a second a stage."""
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not re.search(r"\.layers\.[2-9]\.", name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class Place:
    """A folder with a recipe, where commands run; its workspace is the default one."""

    folder: Path
    compress: Commands

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def run(self, *words: str, faults: Sequence[Fault] = (), recipe: str = "r.yaml") -> Run:
        return self.start(*words, faults=faults, recipe=recipe).wait()

    def start(self, *words: str, faults: Sequence[Fault] = (), recipe: str = "r.yaml") -> Started:
        return self.compress.start("run", recipe, "--json", *words, cwd=self.folder, faults=faults)

    def plan(self, *sets: str) -> Plan:
        """The plan of the recipe, in this process."""
        plan: Plan = make_plan(self.folder / "r.yaml", str(self.runs), list(sets), None)
        return plan

    def walk(self, *sets: str, executor: str = "local") -> Plan:
        """The recipe run in this process, without a page."""
        plan = self.plan(*sets)
        code = execute(plan, 1, executor, None, None, resume=True, quiet=True)
        assert code == 0, [step.error for step in plan.steps.values()]
        return plan

    def logs(self, stage: str) -> str:
        return "".join(path.read_text() for path in self.runs.glob(f"cache/*/{stage}.run.log"))


def new_place(folder: Path, compress: Commands, model: Path, text: str = RECIPE) -> Place:
    folder.mkdir()
    (folder / "r.yaml").write_text(text.replace("../model", str(model)))
    return Place(folder, compress)


def outputs(runs: Path) -> dict[str, str]:
    """Digests of all files of all outputs by key, stage and name."""
    found = {}
    for record in runs.glob("cache/*/record.json"):
        folder = record.parent / json.loads(record.read_text())["folder"]
        found |= {str(path.relative_to(runs)): file_digest(path) for path in folder.rglob("*") if path.is_file()}
    return found


def states(run: Run) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in run.json["stages"] if stage["state"] != "source"}


def ran(plan: Plan) -> set[str]:
    return {name for name, step in plan.steps.items() if step.state == "ran"}


def folder_of(plan: Plan, stage: str) -> Path:
    output = plan.steps[stage].output
    assert output is not None
    return output.folder


def wait_for(happened: Callable[[], Any], seconds: float = 300.0) -> None:
    """Wait for something that comes unless the code is wrong, however busy the machine is."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def wait_until_stopped(pid: int) -> None:
    """Wait until a process is where a fault stops it (SIGSTOP)."""
    wait_for(lambda: psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE))
    assert psutil.Process(pid).status() == psutil.STATUS_STOPPED, "it ended instead"
