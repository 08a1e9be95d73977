"""An output tells where it comes from, and how to make it again: the recipe it prints gives the same bytes."""

from __future__ import annotations

from pathlib import Path

from commands import FEW, Commands

from weightworks.store.sources import file_digest


def files(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in folder.iterdir() if path.is_file()}


def test_an_output_is_made_again_from_its_recipe(compress: Commands, tiny_llama: Path, tmp_path: Path) -> None:
    """Two stages: rounded to 8 bits and written dense, then GPTQ."""
    rounded = ("quantize", tiny_llama, "--method", "rtn", "--bits", "8", "--format", "dense", "-o", "rounded", "-q")
    assert compress(*rounded, cwd=tmp_path).code == 0
    assert (
        compress("quantize", "rounded", *FEW, "--bits", "3", "--seed", "5", "-o", "small", "-q", cwd=tmp_path).code == 0
    )
    told = compress("inspect", "--lineage", "small", "--json", cwd=tmp_path)
    assert [stage["identity"]["method"] for stage in told.json["lineage"]] == ["quantize.rtn", "quantize.gptq"]
    assert str(tiny_llama) in told.err
    recipe = compress("recipe", "small", cwd=tmp_path)
    assert recipe.code == 0
    (tmp_path / "again.yaml").write_text(recipe.out)
    assert compress("run", "again.yaml", "--workspace", "runs", "-q", cwd=tmp_path).code == 0
    again, first = files(tmp_path / "runs" / "again" / "small"), files(tmp_path / "small")
    assert again.keys() == first.keys()
    differing = {name for name in first if again[name] != first[name]}
    assert differing <= {"provenance.json", "README.md"}  # they name the folder that was read


def test_a_merge_is_made_again_from_its_recipe(
    compress: Commands, merge: Commands, tiny_llama: Path, tmp_path: Path
) -> None:
    """A tree: the original is rounded, and merged with what it was before; the original is one source, named once."""
    words = ("quantize", tiny_llama, "--method", "rtn", "--bits", "3", "--format", "dense", "-o", "rounded", "-q")
    assert compress(*words, cwd=tmp_path).code == 0
    words = ("task-arithmetic", "rounded", tiny_llama, "--base", tiny_llama, "--weights", "0.25,1", "-o", "mixed", "-q")
    assert merge(*words, cwd=tmp_path).code == 0
    told = compress("inspect", "--lineage", "mixed", "--json", cwd=tmp_path)
    assert [stage["name"] for stage in told.json["lineage"]] == ["rtn", "mixed"]
    assert told.json["lineage"][1]["from"] == {"models": ["rtn", "source"], "base": ["source"]}
    assert told.err.count(f"{tiny_llama}  (digest") == 3
    (tmp_path / "again.yaml").write_text(compress("recipe", "mixed", cwd=tmp_path).out)
    assert compress("run", "again.yaml", "--workspace", "runs", "-q", cwd=tmp_path).code == 0
    again, first = files(tmp_path / "runs" / "again" / "mixed"), files(tmp_path / "mixed")
    differing = {name for name in first if again[name] != first[name]}
    assert differing <= {"provenance.json", "README.md"}
    assert [stage["method"] for stage in compress("inspect", "mixed", "--json", cwd=tmp_path).json["lineage"]] == [
        "merge.task_arithmetic",
        "quantize.rtn",
    ]


def test_no_provenance_is_said(compress: Commands, tiny_llama: Path) -> None:
    for words in (("inspect", "--lineage", tiny_llama), ("recipe", tiny_llama)):
        run = compress(*words)
        assert run.code == 1
        assert f"{tiny_llama}: no provenance.json, so nothing is known of how it was made" in run.err
