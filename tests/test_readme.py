"""The README is run: every block after ``<!-- test -->``, in order, in a folder of its own.

Shell blocks are given to bash with a ``compress`` that hands its words to the warm processes of ``commands.py``; Python
blocks run in a fresh Python.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Commands
from conftest import REPOSITORY

from cli.compress_app import COMMANDS

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^<!-- test -->\n```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
MORE = (
    "tiny-llama-structured-s25",
    "tiny-sparse",
    "tiny-thresholds",
    "tiny-healed",
    "chosen-rows",
    "tiny-stored",
    "tiny-again",
    "both",
    "by-data",
    "toward",
    "continued",
    "merged-in-python",
)
CLIENT = """#!{python}
import os, sys, tempfile
from pathlib import Path
sys.path.insert(0, {tests!r})
from commands import Started
with tempfile.TemporaryDirectory() as folder:
    streams = [os.path.join(folder, name) for name in ("out", "err")]
    request = dict(program=os.path.basename(sys.argv[0]), words=sys.argv[1:], cwd=os.getcwd(), faults=[], streams=streams)
    run = Started(request, Path({address!r})).wait()
sys.stdout.write(run.out)
sys.stderr.write(run.err)
sys.exit(run.code)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder in which the README's paths exist."""
    for name in ("examples", "weightworks", "recipes"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    return tmp_path


@pytest.fixture
def environment(compress: Commands, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One in which ``compress`` and ``merge`` are on the path."""
    assert compress("--version").code == 0  # the server listens
    programs = tmp_path_factory.mktemp("bin")
    for name in ("compress", "merge"):
        client = programs / name
        client.write_text(
            CLIENT.format(python=sys.executable, tests=str(Path(__file__).parent), address=str(compress.address))
        )
        client.chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}


def test_readme_runs(folder: Path, environment: dict[str, str]) -> None:
    starts = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    for language, text in BLOCKS:
        done = subprocess.run(
            [*starts[language], text],
            cwd=folder,
            env=environment,
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    made = {path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink()}
    assert made == {"tiny-llama-gptq-w4g128", "tiny-w8", "my_tasks", "tiny-asym", "tiny-rtn", "runs", *MORE}
    page = (folder / "runs" / "bits-by-method" / "report.html").read_text(encoding="utf-8")
    assert "small[use=gptq,bits=4]" in page


RECIPES = [
    path.name for path in sorted((REPOSITORY / "recipes").glob("*.yaml")) if f"recipes/{path.name}" not in README
]


@pytest.mark.parametrize("name", RECIPES)
def test_other_recipes_run(name: str, folder: Path, compress: Commands) -> None:
    run = compress("run", f"recipes/{name}", "--json", "-q", cwd=folder)
    assert run.code == 0, run.err
    assert {stage["state"] for stage in run.json["stages"]} == {"source", "ran"}
    assert run.json["scores"]


@pytest.mark.parametrize("name", COMMANDS)
def test_readme_shows_every_command(name: str) -> None:
    assert any(f"compress {name}" in text for language, text in BLOCKS if language == "sh")


def test_shell_blocks_that_are_not_run_are_few() -> None:
    """Those that would set up a machine or need a network."""
    shell = re.findall(r"^```sh\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    tested = [text for language, text in BLOCKS if language == "sh"]
    for text in shell:
        assert text in tested or text.startswith(("make ", "compress quantize org/name"))
