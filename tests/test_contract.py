"""What every quantization method keeps to. Methods come from the catalog, so a new one is tested by being there."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import annotated_types
import pytest
import torch
from commands import FEW, Commands
from conftest import REPOSITORY
from pydantic.fields import FieldInfo

from weightworks.errors import UsageError
from weightworks.options import Options
from weightworks.stage import catalog
from weightworks.stage.catalog import Entry
from weightworks.store.checkpoint import Checkpoint, file_digest
from weightworks.store.dense import DenseView

METHODS = [entry for entry in catalog.methods().values() if entry.kind == "quantize"]


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
    for name in made.source.tensors.keys() - linears:
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
        assert 0 < row["bytes_out"] < row["bytes_in"] / 3
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


def examples(field: FieldInfo) -> list[Any]:
    """Values of a field that its type and bounds allow, other than the default."""
    schema = Options.__class__("One", (Options,), {"__annotations__": {"x": field.annotation}}).model_json_schema()
    kinds = schema["properties"]["x"]
    kinds = [kinds, *kinds.get("anyOf", [])]
    for kind in kinds:
        if "enum" in kind:
            return [value for value in kind["enum"] if value != field.default]
        if kind.get("type") == "boolean":
            return [not field.default]
        if kind.get("type") == "integer":
            return [2 * field.default]
        if kind.get("type") == "number":
            return [field.default / 2]
        if kind.get("type") == "array":
            return [["lm_head"]]
    return []


def test_options_round_trip(entry: Entry) -> None:
    options_class = entry.load().Options
    sets: list[Options] = [options_class()]
    for name, field in options_class.model_fields.items():
        values = examples(field)
        assert values, f"no example of option {name}"
        sets += [options_class(**{name: value}) for value in values]
    for options in sets:
        resolved = options.resolved()
        assert options_class(**resolved) == options
        assert options_class(**json.loads(json.dumps(resolved))) == options
        assert list(resolved) == list(options_class.model_fields)


def test_values_out_of_bounds_are_refused(entry: Entry) -> None:
    options_class, tried = entry.load().Options, 0
    for name, field in options_class.model_fields.items():
        beyond: list[Any] = ["no such choice", object()]
        for bound in field.metadata:
            if isinstance(bound, annotated_types.Ge):
                beyond.append(bound.ge - 1)
            if isinstance(bound, annotated_types.Le):
                beyond.append(bound.le + 1)
            if isinstance(bound, annotated_types.Gt):
                beyond.append(bound.gt)
            if isinstance(bound, annotated_types.Lt):
                beyond.append(bound.lt)
        for value in beyond:
            with pytest.raises(UsageError, match=rf"{entry.label}: option '{name}(\.0)?' = "):
                options_class.parse({name: value}, where=entry.label)
            tried += 1
    assert tried >= 2 * len(options_class.model_fields)
    with pytest.raises(UsageError, match=rf"{entry.label} has no option 'no_such'"):
        options_class.parse({"no_such": 1}, where=entry.label)


def test_shared_options_have_their_bounds(entry: Entry) -> None:
    for wrong in ({"bits": 5}, {"bits": 1}, {"group_size": 0}, {"group_size": -2}, {"scheme": "W4A16", "bits": 8}):
        with pytest.raises(UsageError):
            entry.load().Options.parse(wrong, where=entry.label)


def test_every_option_says_what_it_means(entry: Entry) -> None:
    for name, field in entry.load().Options.model_fields.items():
        assert field.description, name
        assert not field.is_required(), name


def test_summary_paper_version_and_test_file(entry: Entry) -> None:
    module = entry.load()
    assert entry.summary
    assert entry.summary == " ".join(module.__doc__.split("\n\n")[0].split())
    assert isinstance(module.PAPER, str)
    assert module.PAPER
    assert isinstance(module.VERSION, int)
    assert module.VERSION >= 1
    method = module.Method(module.Options())
    assert method.options == module.Options()
    assert hasattr(method, "apply") != (hasattr(method, "watch") and hasattr(method, "solve"))
    assert method.scheme() is not None
    named = re.compile(rf"\b{re.escape(entry.module)}\b|\bcompress\.quantize import \(?[\w, \n]*\b{entry.name}\b")
    tests = [path.name for path in sorted((REPOSITORY / "tests").glob("test_*.py")) if named.search(path.read_text())]
    assert tests, f"no test file imports {entry.module}"
