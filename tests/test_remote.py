"""A workspace on storage that fsspec reaches: outputs made on one machine are found on another, whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from commands import ONE_THREAD

from weightworks.errors import OutputError, UsageError
from weightworks.plan.remote import Remote
from weightworks.plan.workspace import Output, Workspace, write_json
from weightworks.store.sources import Digests, file_digest

KEY = "ab" * 32


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """An S3 server in this process, with a bucket; the variables that lead there."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install s3fs 'moto[server]'")
    server = pytest.importorskip("moto.server", reason="moto is not installed: pip install s3fs 'moto[server]'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "some",
        "AWS_SECRET_ACCESS_KEY": "thing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield variables
    moto.stop()


@pytest.fixture(params=["file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place on storage."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://bucket/{tmp_path.name}"
    return f"file://{tmp_path}/storage" if request.param == "file" else f"memory://{tmp_path.name}"


class Storage:
    """A place on storage as the tests see it, past :class:`Remote`."""

    def __init__(self, url: str) -> None:
        self.fs, self.root = fsspec.core.url_to_fs(url)

    def names(self) -> set[str]:
        return {path.rpartition("/")[2] for path in self.fs.find(self.root)}

    def at(self, *parts: str) -> str:
        return "/".join([self.root, "cache", KEY, *parts])


@pytest.fixture
def machines(url: str, tmp_path: Path) -> tuple[Workspace, Workspace]:
    """Two machines' views of one storage."""
    return tuple(Workspace(tmp_path / name, Digests(tmp_path / f"{name}.json"), remote=Remote(url)) for name in "ab")  # type: ignore[return-value]


def made(workspace: Workspace) -> Output:
    folder = workspace.place(KEY, "small[bits=3]")
    (folder / "additional").mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "additional" / "template.jinja").write_text("{{ x }}")
    names = ("model.safetensors", "additional/template.jinja")
    write_json(folder / "provenance.json", {"files": {name: file_digest(folder / name) for name in names}})
    (workspace.cache / KEY / "small-bits-3.run.log").write_text("what happened here")
    return workspace.keep(KEY, folder, {"stage": "small[bits=3]", "seconds": 1.0})


def test_an_output_is_found_elsewhere(machines: tuple[Workspace, Workspace], url: str, tmp_path: Path) -> None:
    here, there = machines
    assert there.find(KEY) is None
    first = made(here)
    found = there.find(KEY)
    assert found is not None
    assert found.record == first.record
    assert found.folder == tmp_path / "b" / "cache" / KEY / "small-bits-3"
    assert (found.folder / "model.safetensors").read_bytes() == b"weights"
    assert (found.folder / "additional" / "template.jinja").read_text() == "{{ x }}"
    storage = Storage(url)
    assert storage.names() == {
        "model.safetensors",
        "template.jinja",
        "provenance.json",
        "record.json",
    }  # no log, no lock
    storage.fs.rm(storage.root, recursive=True)
    assert there.find(KEY) is not None  # once fetched, it is here


@pytest.mark.parametrize("fault", ["no record yet", "a file is missing", "a file is damaged"])
def test_half_an_output_is_none(machines: tuple[Workspace, Workspace], url: str, fault: str) -> None:
    here, there = machines
    made(here)
    storage = Storage(url)
    if fault == "no record yet":
        storage.fs.rm_file(storage.at("record.json"))
    elif fault == "a file is missing":
        storage.fs.rm_file(storage.at("small-bits-3", "model.safetensors"))
    else:
        storage.fs.pipe_file(storage.at("small-bits-3", "model.safetensors"), b"Weights")
    assert there.find(KEY) is None
    made(here)  # made again, it is sent again
    assert there.find(KEY) is not None


RECIPE = """
version: 1
sources: {base: MODEL}
stages:
  small: {use: quantize.rtn, from: base, with: {bits: 4, ignore: ["*.mlp.*"]}}
"""


def test_a_run_on_s3(s3: dict[str, str], tiny_llama: Path, tmp_path: Path) -> None:
    """What one machine has made, another finds; the page is there too."""
    (tmp_path / "r.yaml").write_text(RECIPE.replace("MODEL", str(tiny_llama)))
    command = [sys.executable, "-c", "from cli.compress_app import main; main()", "run", "r.yaml", "--json"]
    folders = []
    for machine, state in (("a", "ran"), ("b", "cached")):
        run = subprocess.run(
            [*command, "--workspace", "s3://bucket/runs"],
            cwd=tmp_path,
            env={**os.environ, **s3, **ONE_THREAD, "XDG_CACHE_HOME": str(tmp_path / machine)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        stage = json.loads(run.stdout)["stages"][1]
        assert stage["state"] == state
        assert stage["folder"].startswith(str(tmp_path / machine))
        folders.append(Path(stage["folder"]))
    assert file_digest(folders[0] / "model.safetensors") == file_digest(folders[1] / "model.safetensors")
    storage = Storage("s3://bucket/runs/r")
    assert storage.names() == {"report.html", "report.json"}


def test_what_storage_refuses_is_said(s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, text in (
        ("s3://no-such-bucket/runs", "The specified bucket does not exist"),
        ("s3://bucket", "Could not connect to the endpoint URL"),
    ):
        if "connect" in text:
            monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
            fsspec.get_filesystem_class("s3").clear_instance_cache()
        with pytest.raises(OutputError, match=text):
            made(Workspace(tmp_path / "w", Digests(tmp_path / "memo"), remote=Remote(url)))
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_reports_go_up_too(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("<html>")
    Remote(f"file://{tmp_path}/storage").publish(page, "sweep/report.html")
    assert (tmp_path / "storage" / "sweep" / "report.html").read_text() == "<html>"


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--workspace nowhere://x/y: Protocol not known: nowhere"):
        Remote("nowhere://x/y")
