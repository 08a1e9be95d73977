"""A workspace on storage that fsspec reaches: outputs made on one machine are found on another, whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from weightworks.errors import UsageError
from weightworks.plan.remote import Remote
from weightworks.plan.workspace import Output, Workspace, write_json
from weightworks.store.sources import Digests, file_digest

KEY = "ab" * 32


@pytest.fixture
def machines(tmp_path: Path) -> tuple[Workspace, Workspace]:
    """Two machines' views of one storage."""
    remote = Remote(f"file://{tmp_path}/storage")
    return tuple(Workspace(tmp_path / name, Digests(tmp_path / f"{name}.json"), remote=remote) for name in "ab")  # type: ignore[return-value]


def made(workspace: Workspace) -> Output:
    folder = workspace.place(KEY, "small[bits=3]")
    (folder / "additional").mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "additional" / "template.jinja").write_text("{{ x }}")
    names = ("model.safetensors", "additional/template.jinja")
    write_json(folder / "provenance.json", {"files": {name: file_digest(folder / name) for name in names}})
    (workspace.cache / KEY / "small-bits-3.run.log").write_text("what happened here")
    return workspace.keep(KEY, folder, {"stage": "small[bits=3]", "seconds": 1.0})


def test_an_output_is_found_elsewhere(machines: tuple[Workspace, Workspace], tmp_path: Path) -> None:
    here, there = machines
    assert there.find(KEY) is None
    first = made(here)
    found = there.find(KEY)
    assert found is not None
    assert found.record == first.record
    assert found.folder == tmp_path / "b" / "cache" / KEY / "small-bits-3"
    assert (found.folder / "model.safetensors").read_bytes() == b"weights"
    assert (found.folder / "additional" / "template.jinja").read_text() == "{{ x }}"
    stored = {path.name for path in (tmp_path / "storage").rglob("*") if path.is_file()}
    assert stored == {"model.safetensors", "template.jinja", "provenance.json", "record.json"}  # no log, no lock
    shutil.rmtree(tmp_path / "storage")
    assert there.find(KEY) is not None  # once fetched, it is here


@pytest.mark.parametrize("fault", ["no record yet", "a file is missing", "a file is damaged"])
def test_half_an_output_is_none(machines: tuple[Workspace, Workspace], tmp_path: Path, fault: str) -> None:
    here, there = machines
    made(here)
    stored = tmp_path / "storage" / "cache" / KEY
    if fault == "no record yet":
        (stored / "record.json").unlink()
    elif fault == "a file is missing":
        (stored / "small-bits-3" / "model.safetensors").unlink()
    else:
        (stored / "small-bits-3" / "model.safetensors").write_bytes(b"Weights")
    assert there.find(KEY) is None
    made(here)  # made again, it is sent again
    assert there.find(KEY) is not None


def test_reports_go_up_too(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("<html>")
    Remote(f"file://{tmp_path}/storage").publish(page, "sweep/report.html")
    assert (tmp_path / "storage" / "sweep" / "report.html").read_text() == "<html>"


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--workspace nowhere://x/y: Protocol not known: nowhere"):
        Remote("nowhere://x/y")
