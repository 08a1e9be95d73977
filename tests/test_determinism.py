"""The same inputs give the same bytes, however the work is cut: slabs, journal steps, memory, processes, jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import FEW, Commands
from test_resume import contents

from weightworks.store.sparse import densify, export

MERGING, TENSORWISE = "weightworks.engine.merging:", "weightworks.engine.tensorwise:"
SMALL_SLABS = [["constant", f"{MERGING}JOURNAL_BYTES", 100_000]]
QUANTIZE = ("quantize", "{model}", *FEW, "--bits", "4", "--group-size", "64")
WAYS: dict[str, tuple[str, tuple[str, ...], list[tuple[list[list[Any]], tuple[str, ...]]]]] = {
    "quantize gptq": ("compress", QUANTIZE, [([["planned", {"on_disk": True}]], ()), ([], ("--max-memory", "2GB"))]),
    "quantize rtn": (
        "compress",
        ("quantize", "{model}", "--method", "rtn", "--group-size", "64"),
        [
            ([["constant", f"{TENSORWISE}JOURNAL_BYTES", 50_000]], ()),
            ([["constant", f"{TENSORWISE}TASK_BYTES", 50_000]], ()),
        ],
    ),
    "prune sparsegpt": (
        "compress",
        ("prune", "{model}", *FEW, "--pattern", "2:4"),
        [([["planned", {"on_disk": True}]], ())],
    ),
    "merge ties": ("merge", ("ties", "--base", "{model}", "{sparse}", "{model}"), [(SMALL_SLABS, ())]),
    "merge soup": ("merge", ("soup", "{model}", "{sparse}"), [(SMALL_SLABS, ())]),
}


@pytest.mark.parametrize("name", WAYS)
def test_however_it_is_cut(compress: Commands, small: Path, sparse: Path, tmp_path: Path, name: str) -> None:
    program, words, ways = WAYS[name]
    words = tuple(word.format(model=small, sparse=sparse) for word in words)
    found = []
    for number, (faults, more) in enumerate([([], ()), *ways]):
        place = tmp_path / str(number)
        place.mkdir()
        run = compress(*words, *more, "-o", "out", cwd=place, faults=faults, program=program)
        assert run.code == 0, run.err
        found.append(contents(place / "out"))
    assert all(other == found[0] for other in found[1:])


def test_an_export_and_its_inverse_run_again_find_what_is_there(sparse: Path, tmp_path: Path) -> None:
    said: list[str] = []
    for _ in range(2):
        export(str(sparse), tmp_path / "compact", say=said.append)
        densify(str(tmp_path / "compact"), tmp_path / "whole", say=said.append)
    assert len([line for line in said if line.startswith("already done")]) == 2
    assert contents(tmp_path / "whole") == contents(sparse)
