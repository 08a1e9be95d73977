"""Smaller models: what is written is the model with units masked, on every architecture; resumed; refused where no
configuration says it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, LLAMA, Architecture
from commands import Commands
from transformers import AutoModelForCausalLM

from weightworks.engine.reducing import ReduceJob, as_model
from weightworks.errors import ArchitectureError, MethodError
from weightworks.plan.reduce import plan_reduction
from weightworks.plan.stage import Outcome, default_target, run_stage
from weightworks.report.progress import Progress
from weightworks.stage import catalog
from weightworks.stage.settings import Settings
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.reduced import Cut, ReducedView, Restored
from weightworks.store.sources import file_digest
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.skeleton import Skeleton
from weightworks.testing.tiny import CALIBRATION_TEXT

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = Settings(num_samples=4, seq_len=32, dtype="float32", dataset=str(CALIBRATION_TEXT))
TOKENS = torch.arange(2 * 40).view(2, 40) * 37 % 2048
UNITS = {"sparsity": 0.5, "round_to": 8}
HEADS = {**UNITS, "head_sparsity": 0.5}
NO_HEADS = {"opt", "gpt2", "gpt2-base", "gpt_neox", "falcon"}  # the size of a head is what the width leaves for it
UNKNOWN = {"bloom", "mamba2"}


def reduce(source: Path, target: Path, method: str, **options: Any) -> Outcome:
    return run_stage("prune", method, str(source), options, SETTINGS, output_dir=target)


def planned(source: Path, method: str, **options: Any) -> ReduceJob:
    module = catalog.find("prune", method).load()
    checkpoint, made = Checkpoint.open(source), module.Method(module.Options(**options))
    cpu, quiet = torch.device("cpu"), Progress(quiet=True)
    return plan_reduction(f"prune.{method}", 1, made, SETTINGS, checkpoint, Path("unused"), quiet, cpu)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(TOKENS, use_cache=False).logits
    return result


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def filled(skeleton: Skeleton, reader: Any) -> torch.Tensor:
    """Logits of a structure with the tensors that ``reader`` gives."""
    for part in (None, *range(len(skeleton.blocks))):
        skeleton.load(reader, skeleton.names_of(part), torch.float32)
    return logits(skeleton.model)


def masked(source: Path, target: Path) -> torch.Tensor:
    """Logits of the model in ``source`` with zeros where ``target`` has no rows or columns; these are found by comparison."""
    before, after = Checkpoint.open(source), Checkpoint.open(target)
    cuts = []
    for name, info in before.tensors.items():
        cut, small = Cut.copy(name), after.info(name).shape
        for axis in range(len(info.shape)):
            if len(info.shape) > 1 and info.shape[axis] != small[axis]:
                cut = cut.narrowed(axis, places(before.read(name), after.read(name), axis))
        cuts.append(cut if len(info.shape) > 1 else Cut.copy(name))
    whole = {name: before.read(name) for name in before.tensors}
    for cut in cuts:
        for axis, kept in cut.picks.items():
            gone = torch.ones(whole[cut.name].shape[axis], dtype=torch.bool)
            gone[kept] = False
            whole[cut.name].transpose(0, axis)[gone] = 0
    job = planned(source, "shortgpt", layers=1)  # for its structure
    return filled(job.skeleton, Held(whole))


class Held:
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def is_packed(self, name: str) -> bool:
        return False

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.tensors[name] if dtype is None else self.tensors[name].to(dtype)


def places(before: torch.Tensor, after: torch.Tensor, axis: int) -> torch.Tensor:
    """Which rows (columns) of one matrix another has, compared where both have the same."""
    old, new = before.transpose(0, axis).float(), after.transpose(0, axis).float()
    equal = (old[None, :, :] == new[:, None, :]).all(-1)
    assert bool((equal.sum(1) == 1).all())
    found = equal.int().argmax(1)
    assert torch.equal(found, found.sort().values)
    return found


@pytest.mark.parametrize("kind", [name for name in ARCHITECTURES if name not in UNKNOWN])
def test_the_smaller_model_is_the_masked_one(kind: str, tmp_path: Path) -> None:
    """Before it is saved, with the first units kept; and as stock transformers loads it, with those that were chosen."""
    source = ARCHITECTURES[kind].save(tmp_path / "source")
    options = UNITS if kind in NO_HEADS else HEADS
    job = planned(source, "structured", **options)
    view = ReducedView(job.checkpoint, job.layout.cuts)
    before = filled(as_model(job, TOKENS).skeleton, view)
    torch.testing.assert_close(before, filled(job.skeleton, Restored(job.checkpoint, job.layout.cuts, view)), **CLOSE)
    outcome = reduce(source, tmp_path / "out", "structured", **options)
    assert outcome.provenance is not None
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), masked(source, tmp_path / "out"), **CLOSE)
    assert outcome.estimate is not None
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert written == outcome.estimate.output_bytes
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    changed = outcome.provenance["reduction"]["config"]
    assert changed == {key: config[key] for key in changed}
    if kind not in NO_HEADS:
        assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 16)


CLOSE = {"atol": 1e-5, "rtol": 1e-5}


DEPTH = ("llama-tied-sharded", "gemma3", "opt", "gpt2-base", "bloom", "qwen3_moe", "mamba2")


@pytest.mark.parametrize("kind", DEPTH)
def test_the_shorter_model_is_the_one_whose_blocks_are_passed_by(kind: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[kind]
    source = architecture.save(tmp_path / "source")
    outcome = reduce(source, tmp_path / "out", "shortgpt", layers=1)
    assert outcome.provenance is not None
    kept = [row["block"] for row in outcome.provenance["report"] if not row["dropped"]]
    model = loaded(source)
    blocks = model.get_submodule(planned(source, "shortgpt", layers=1).skeleton.blocks[0][0].rpartition(".")[0])
    for index, block in enumerate(blocks):
        if index not in kept:
            block.forward = passed_by(type(block).forward, block)
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), logits(model), **CLOSE)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    before = json.loads((source / "config.json").read_text())
    if "layer_types" in before:
        assert config["layer_types"] == [before["layer_types"][index] for index in kept]
    assert outcome.estimate is not None
    assert outcome.estimate.output_bytes == sum(
        path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")
    )


def passed_by(forward: Callable[..., Any], block: Any) -> Callable[..., Any]:
    """A block that gives what it is given."""

    def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = forward(block, hidden.clone(), *args, **kwargs)
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    return run


# Refused before work.


@pytest.mark.parametrize("kind", ["opt", "gpt2", "gpt_neox"])
def test_heads_that_no_configuration_can_say_are_refused(kind: str, tmp_path: Path) -> None:
    source = ARCHITECTURES[kind].save(tmp_path / "source")
    with pytest.raises(
        ArchitectureError, match=r"with 2 of 4 heads has no configuration: .* tensors do not fit"
    ) as info:
        reduce(source, tmp_path / "out", "structured", **{**HEADS, "sparsity": 0.0})
    assert info.value.hint == "remove channels only"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("bloom", UNITS, r"BloomForCausalLM with 128 of 256 channels has no configuration: .* no entry has that value"),
        ("bloom", HEADS, r"no heads are known that can go \(transformer.h.0.self_attention: moving its units"),
        ("falcon", HEADS, r"in FalconForCausalLM no heads are known that can go"),
        ("mamba2", UNITS, r"no units of its blocks are known to be exchangeable"),
    ],
)
def test_what_is_not_understood_is_refused(kind: str, options: dict[str, Any], text: str, tmp_path: Path) -> None:
    source = ARCHITECTURES[kind].save(tmp_path / "source")
    with pytest.raises(ArchitectureError, match=text):
        reduce(source, tmp_path / "out", "structured", **options)


def test_numbers_of_heads_that_would_do_are_told(tmp_path: Path) -> None:
    """transformers wants heads to divide the width of the stream, whatever their size."""
    options = {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 4}
    source = Architecture("llama", options).save(tmp_path / "source")
    with pytest.raises(ArchitectureError, match=r"with 6 of 8 heads has no configuration: .* not a multiple") as info:
        planned(source, "structured", sparsity=0.0, head_sparsity=0.25, round_to=8)
    assert info.value.hint == "its configuration can express 2 or 4 of 8; else remove channels only"


def test_widths_that_round_to_all_are_refused(tmp_path: Path) -> None:
    source = ARCHITECTURES["llama"].save(tmp_path / "source")
    with pytest.raises(MethodError, match=r"rounded, nothing would go of 96 channels, 1 inputs each"):
        reduce(source, tmp_path / "out", "structured", sparsity=0.01, round_to=16)


def test_a_size_that_others_share_is_found_by_building(tmp_path: Path) -> None:
    """Feed-forward parts as wide as the stream and as many as there are positions; two heads, blocks and groups."""
    options = {
        **LLAMA,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    source = Architecture("llama", options).save(tmp_path / "source")
    config = planned(source, "structured", **HEADS).config()
    assert (config["intermediate_size"], config["hidden_size"], config["max_position_embeddings"]) == (32, 64, 64)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["num_hidden_layers"]) == (2, 1, 2)


def test_names_that_older_files_have_are_changed_too(tmp_path: Path) -> None:
    """transformers writes num_local_experts; published files say num_experts."""
    source = ARCHITECTURES["qwen3_moe"].save(tmp_path / "source")
    path = source / "config.json"
    text = json.loads(path.read_text())
    text["num_experts"] = text.pop("num_local_experts")
    path.write_text(json.dumps(text))
    config = planned(source, "experts", sparsity=0.5).config()
    assert config["num_experts"] == 2
    assert "num_local_experts" not in config


def test_folders_are_called_after_what_went(tmp_path: Path) -> None:
    source = Checkpoint.open(ARCHITECTURES["mixtral"].save(tmp_path / "model"))
    wanted = {
        "model-structured-s25-h50": ("structured", {"head_sparsity": 0.5}),
        "model-structured-h50": ("structured", {"head_sparsity": 0.5, "sparsity": 0.0}),
        "model-shortgpt-s25": ("shortgpt", {}),
        "model-shortgpt-without-1": ("shortgpt", {"layers": 1}),
        "model-laco": ("laco", {}),
        "model-experts-s50-merged": ("experts", {"sparsity": 0.5, "removal": "merge"}),
    }
    for name, (method, options) in wanted.items():
        assert str(default_target(source, method, catalog.find("prune", method).load().Options(**options))) == name


# Killed again and again.

LACO = {"merge_layers": 2, "lowest_layer": 0, "threshold": 0.0}


@pytest.mark.parametrize(
    ("method", "options"),
    [("structured", {**HEADS, "repair": "least-squares"}), ("laco", LACO)],
    ids=["units", "blocks"],
)
def test_killed_at_every_journal_entry(
    method: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ARCHITECTURES["llama"].save(tmp_path / "source")
    reduce(source, tmp_path / "whole" / "out", method, **options)
    done, killed = CheckpointWriter.done, 0

    def stopped(self: CheckpointWriter, *args: Any) -> None:
        done(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "done", stopped)
    while killed < 20:
        try:
            reduce(source, tmp_path / "pieces" / "out", method, **options)
        except KeyboardInterrupt:
            killed += 1
        else:
            break
    assert killed >= 5
    contents = [
        {path.name: file_digest(path) for path in (tmp_path / where / "out").iterdir()} for where in ("whole", "pieces")
    ]
    assert contents[0] == contents[1]


RECIPE = """
version: 1
sources: {base: SOURCE}
stages:
  narrow: {use: prune.structured, from: base, with: {sparsity: 0.5, round_to: 16, dataset: TEXT, num_samples: 4, seq_len: 32}}
  short: {use: prune.shortgpt, from: narrow, with: {layers: 1, dataset: TEXT, num_samples: 4, seq_len: 32}}
  packed: {use: quantize.rtn, from: short, with: {bits: 4, group_size: 16}}
"""


def test_a_recipe_goes_on_with_smaller_models(compress: Commands, tmp_path: Path) -> None:
    source = ARCHITECTURES["llama"].save(tmp_path / "source")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("SOURCE", str(source)).replace("TEXT", str(CALIBRATION_TEXT)))
    run = compress("run", recipe, "--json", cwd=tmp_path)
    assert run.code == 0, run.err
    folders = {stage["name"]: Path(stage["folder"]) for stage in run.json["stages"]}
    config = json.loads((folders["packed"] / "config.json").read_text())
    assert (config["intermediate_size"], config["num_hidden_layers"]) == (48, 1)
    assert compress("verify", folders["short"]).code == 0
    again = compress(
        "run", recipe, "--set", "narrow.round_to=8", "--set", "narrow.importance=taylor", "--dry-run", cwd=tmp_path
    )
    assert again.code == 0, again.err
