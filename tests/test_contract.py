"""What every method of ours keeps to. Methods come from the catalog, so a new one is tested by being there.

All pass the conformance tests that others run on theirs, on random weights; what they make of the embedded model, a
trained one, is held to more.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import FEW, Commands
from conftest import REPOSITORY

from weightworks.errors import UsageError
from weightworks.stage import catalog
from weightworks.stage.catalog import Entry
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.sources import file_digest
from weightworks.testing import Check, conformance
from weightworks.testing.contract import beyond, examples

OURS = [entry for entry in catalog.declared() if entry.distribution is None]
METHODS = [entry for entry in OURS if entry.kind == "quantize"]
CHECKS = {f"{entry.label}-{check.__name__}": check for entry in OURS for check in conformance(entry.label)}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_conformance(check: Check, tmp_path: Path) -> None:
    check(tmp_path)


@dataclass(frozen=True)
class Made:
    """What a method made of the embedded model with its defaults."""

    entry: Entry
    folder: Path
    source: Checkpoint
    result: DenseView
    provenance: dict[str, Any]

    @property
    def changed(self) -> set[str]:
        """Tensors that the method replaced."""
        return {row["tensor"] for row in self.provenance["report"]}


@pytest.fixture(scope="module", params=METHODS, ids=[entry.label for entry in METHODS])
def made(
    request: pytest.FixtureRequest, compress: Commands, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    place = tmp_path_factory.mktemp(request.param.name)
    run = compress("quantize", tiny_llama, "--method", request.param.name, *FEW, "-o", "out", cwd=place)
    assert run.code == 0, run.err
    folder = place / "out"
    return Made(
        request.param,
        folder,
        Checkpoint.open(tiny_llama),
        DenseView(Checkpoint.open(folder)),
        json.loads((folder / "provenance.json").read_text()),
    )


def test_defaults_run_without_a_fallback(made: Made) -> None:
    identity = made.provenance["identity"]
    assert identity["method"] == made.entry.label
    assert identity["options"] == made.entry.load().Options().resolved()
    assert made.provenance["fallbacks"] == []
    quality = made.provenance["quality"]
    assert quality["dense"] < quality["result"] < 1.1 * quality["dense"]


def test_same_seed_same_bytes(made: Made, compress: Commands, tiny_llama: Path, tmp_path: Path) -> None:
    words = ("quantize", tiny_llama, "--method", made.entry.name, *FEW, "-o", "out")
    assert compress(*words, "-q", cwd=tmp_path).code == 0
    again = {path.name: file_digest(path) for path in (tmp_path / "out").iterdir()}
    assert again == {path.name: file_digest(path) for path in made.folder.iterdir()}


def test_every_linear_of_the_blocks_is_changed_and_nothing_else(made: Made) -> None:
    linears = {name for name in made.source.tensors if re.search(r"layers\.\d+\.(mlp|self_attn)\.", name)}
    assert made.changed == linears
    rescaled = made.provenance.get("smoothing", {}).get("rescaled", [])
    assert all(name.endswith("layernorm.weight") for name in rescaled)
    for name in made.source.tensors.keys() - linears - {*rescaled}:
        assert made.result.checkpoint.info(name).dtype == made.source.info(name).dtype
        assert torch.equal(
            made.result.read(name).view(torch.int16), made.source.read(name).view(torch.int16)
        )  # byte for byte, NaN or not


def test_shapes_are_kept_and_values_are_finite(made: Made) -> None:
    assert set(made.result.names) == set(made.source.tensors)
    for name in made.source.tensors:
        tensor = made.result.read(name)
        assert tensor.shape == made.source.info(name).shape
        assert torch.isfinite(tensor).all()


def test_report_has_figures_of_every_tensor(made: Made) -> None:
    for row in made.provenance["report"]:
        assert row["method"] == made.entry.label
        assert row["shape"] == list(made.source.info(row["tensor"]).shape)
        assert row["bytes_in"] == made.source.info(row["tensor"]).nbytes
        dense = made.result.format is None  # of a method that no container holds
        assert 0 < row["bytes_out"] < row["bytes_in"] / 3 or (dense and row["bytes_out"] == row["bytes_in"])
        errors = [value for key, value in row.items() if key.startswith("relative_")]
        assert errors
        assert all(0 < value < 0.1 for value in errors)


def test_every_file_has_its_digest(made: Made) -> None:
    files = {path.name for path in made.folder.iterdir()} - {"provenance.json", "README.md"}
    assert set(made.provenance["files"]) == files
    assert all(made.provenance["files"][name] == file_digest(made.folder / name) for name in files)


# What the file of a method holds.


@pytest.fixture(params=METHODS, ids=[entry.label for entry in METHODS])
def entry(request: pytest.FixtureRequest) -> Entry:
    return request.param


def test_no_option_escapes_the_checks(entry: Entry) -> None:
    """Of every option a value beside the default is taken, of choices each one; and values beyond it are known."""
    options_class = entry.load().Options
    for name, schema in options_class.model_json_schema()["properties"].items():
        values = list(examples(options_class, name))
        assert values, f"no example of option {name}"
        taken = [not options_class.problems({name: value}, where=entry.label) for value in values]
        choices = any("enum" in kind for kind in [schema, *schema.get("anyOf", [])])
        assert all(taken) if choices else any(taken), name
        assert len(list(beyond(options_class, name))) >= 2, name


def test_shared_options_have_their_bounds(entry: Entry) -> None:
    for wrong in ({"bits": 5}, {"bits": 1}, {"group_size": 0}, {"group_size": -2}, {"scheme": "W4A16", "bits": 8}):
        with pytest.raises(UsageError):
            entry.load().Options.parse(wrong, where=entry.label)


def test_a_test_file_names_the_method(entry: Entry) -> None:
    named = re.compile(rf"\b{re.escape(entry.module)}\b|\bcompress\.quantize import \(?[\w, \n]*\b{entry.name}\b")
    tests = [path.name for path in sorted((REPOSITORY / "tests").glob("test_*.py")) if named.search(path.read_text())]
    assert tests, f"no test file imports {entry.module}"
