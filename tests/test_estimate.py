"""What a run will take, said before it: output bytes exactly, peak memory within a fifth, and nothing written for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from commands import FEW, ONE_THREAD, SHORT_TEXT, Commands
from conftest import REPOSITORY

from weightworks.engine import machine

# Runs a command and writes the peak of its resident memory into a file. It is read from the process itself: the kernel
# hands the peak of a parent down to its children's resource usage.
MEASURED = """
import sys
from cli.compress_app import main
report = sys.argv.pop(1)
try:
    main()
finally:
    with open("/proc/self/status") as status, open(report, "w") as file:
        file.write(next(line for line in status if line.startswith("VmHWM")).split()[1])
"""


def everything(place: Path) -> list[tuple[str, int]]:
    return [(str(path), path.stat().st_mtime_ns) for path in sorted([place, *place.rglob("*")])]


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_dry_run_writes_nothing(
    compress: Commands, tiny_llama: Path, tmp_path: Path, method: str, own_cache: Path
) -> None:
    assert compress("--version").code == 0  # the server of warm processes has measured the machine by now
    before = everything(tmp_path), everything(own_cache), everything(tiny_llama)
    run = compress("quantize", tiny_llama, *FEW, "--method", method, "--dry-run", "--json", cwd=tmp_path)
    assert run.code == 0
    assert (everything(tmp_path), everything(own_cache), everything(tiny_llama)) == before
    for said in ("  time ", "  peak memory ", "  disk ", "  output ", "dry run: nothing was written"):
        assert said in run.err
    facts = run.json["estimate"]
    assert facts["disk_bytes"] >= facts["output_bytes"] > 0
    assert facts["seconds"] > 0
    assert facts["limit_bytes"] > facts["peak_bytes"]


@pytest.mark.parametrize(
    "words",
    [
        ("--format", "compressed-tensors"),
        ("--format", "compressed-tensors", "--asym", "--bits", "3", "--clip", "off"),
        ("--format", "compressed-tensors", "--bits", "2", "--group-size", "32", "--clip", "off"),
        ("--format", "compressed-tensors", "--max-shard-size", "700KB"),
        ("--format", "gptq", "--bits", "8", "--group-size", "-1"),
        ("--format", "gptq_v2", "--asym"),
        ("--format", "dense"),
        ("--ignore", "*.mlp.*", "--ignore", "re:.*layers\\.3\\."),
    ],
    ids=" ".join,
)
def test_output_bytes_are_exact(compress: Commands, tiny_llama: Path, tmp_path: Path, words: Sequence[str]) -> None:
    command = ("quantize", tiny_llama, "--method", "rtn", *words, "-q", "-o", "out")
    said = compress(*command, "--dry-run", "--json", cwd=tmp_path).json["estimate"]["output_bytes"]
    run = compress(*command, cwd=tmp_path)
    assert run.code == 0, run.err
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) == said


# Peak memory, in processes of their own.


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two blocks whose weights, activations and statistics show in a process's memory."""
    folder = tmp_path_factory.mktemp("middle") / "model"
    words = [folder, "--layers", "2", "--hidden", "1024", "--ffn", "2560", "--vocab", "8192"]
    maker = REPOSITORY / "benchmarks" / "make_checkpoint.py"
    subprocess.run([sys.executable, maker, *words], check=True, stdout=subprocess.DEVNULL)
    return folder


def command(place: Path, *words: str | Path) -> tuple[dict[str, Any], int]:
    """Run a command; returns its JSON and the peak of its memory in bytes."""
    process = subprocess.run(
        [sys.executable, "-c", MEASURED, str(place / "peak"), *map(str, words), "--json", "-q"],
        cwd=place,
        env={**os.environ, **ONE_THREAD},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout), int((place / "peak").read_text()) * 1024


def predicted(place: Path, *words: str | Path) -> dict[str, Any]:
    facts: dict[str, Any] = command(place, *words, "--dry-run")[0]["estimate"]
    return facts


WINDOWS = ("--dataset", str(SHORT_TEXT), "--num-samples", "8", "--seq-len", "512")
TRAINED = ("--dataset", str(SHORT_TEXT), "--seq-len", "256", "--steps", "1", "--batch-size", "8", "--dtype", "float32")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured by /proc")
def test_peak_memory_is_predicted(tiny_llama: Path, middle: Path, tmp_path: Path) -> None:
    cases: dict[str, tuple[str | Path, ...]] = {
        "tiny gptq float32": ("quantize", tiny_llama, *FEW, "--dtype", "float32"),
        "tiny rtn": ("quantize", tiny_llama, "--method", "rtn"),
        "middle rtn": ("quantize", middle, "--method", "rtn"),
        "middle gptq bfloat16": ("quantize", middle, *WINDOWS, "--dtype", "bfloat16"),
        "middle gptq float32 on disk": ("quantize", middle, *WINDOWS, "--dtype", "float32", "--max-memory"),
        "middle sparsegpt float32": ("prune", middle, *WINDOWS, "--dtype", "float32"),
        "middle wanda bfloat16": ("prune", middle, *WINDOWS, "--method", "wanda", "--dtype", "bfloat16"),
        "tiny imp": ("prune", tiny_llama, "--method", "imp", "--rounds", "1", *TRAINED),
    }

    def measure(name: str) -> tuple[dict[str, Any], int]:
        place, words = tmp_path / name, cases[name]
        place.mkdir()
        if words[-1] == "--max-memory":  # so little that activations, 16 MB, must go to disk
            words = (*words, str(predicted(place, *words[:-1])["peak_bytes"] - 8_000_000))
        facts = predicted(place, *words)
        return facts, command(place, *words)[1]

    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(cases, pool.map(measure, cases), strict=True))
    seen = {name: round(facts["peak_bytes"] / peak, 3) for name, (facts, peak) in results.items()}
    assert {name: ratio for name, ratio in seen.items() if not 0.8 <= ratio <= 1.2} == {}, seen
    assert {name: facts["on_disk"] for name, (facts, _) in results.items()} == {name: "disk" in name for name in cases}
    peaks = {name: peak for name, (_, peak) in results.items()}
    assert peaks["middle gptq bfloat16"] > peaks["tiny gptq float32"] + 80e6  # else the libraries alone were measured


# What the machine has left.


def test_control_groups_bound_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = machine.free_memory()
    inner = tmp_path / "slice" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    assert machine.free_memory() == pytest.approx(free, rel=0.2)  # no control groups at all
    (tmp_path / "membership").write_text("0::/slice/inner\n")
    assert machine.free_memory() == pytest.approx(free, rel=0.2)  # groups without a limit

    def limit(group: Path, bound: str, used: int, cached: int) -> None:
        (group / "memory.max").write_text(bound + "\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon {used - cached}\ninactive_file {cached}\nactive_file 0\n")

    limit(inner, "max", 500_000, 0)
    assert machine.free_memory() == pytest.approx(free, rel=0.2)
    limit(inner, "1000000", 900_000, 300_000)
    assert machine.free_memory() == 400_000  # cached file pages go when memory is wanted
    limit(inner.parent, "700000", 600_000, 100_000)
    assert machine.free_memory() == 200_000  # an outer group is tighter
    (tmp_path / "membership").write_text("4:memory,cpu:/old\n")
    old = tmp_path / "memory" / "old"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("5000")
    (old / "memory.usage_in_bytes").write_text("6000")
    (old / "memory.stat").write_text("cache 0\n")
    assert machine.free_memory() == 0
