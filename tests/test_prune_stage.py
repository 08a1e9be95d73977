"""``compress prune`` from folder to folder: masks beside the weights, exact counts on disk, resumed, estimated, told."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from commands import FEW, SHORT_TEXT, Commands
from safetensors import safe_open

from compress import prune
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.masks import MASKS, Masks
from weightworks.store.sources import file_digest

DONE = "weightworks.store.writer:CheckpointWriter.done"
MLP_ONLY = ("--ignore", "*.self_attn.*")  # three linears a block: quicker, and ``ignore`` is used


def contents(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.iterdir())}


def zeros(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weights that have a mask, with it."""
    view, masks = DenseView(Checkpoint.open(folder)), Masks.of(folder)
    assert masks is not None
    return {name: (view.read(name), masks.read(name, view.shape(name))) for name in masks.infos}


@pytest.fixture(scope="module")
def half(compress: Commands, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model at 2:4 by the default method; not to be changed."""
    place = tmp_path_factory.mktemp("pruned")
    run = compress("prune", tiny_llama, *FEW, "--pattern", "2:4", cwd=place)
    assert run.code == 0, run.err
    for said in (
        "50.00% of 4,718,592 weights are zero",
        "on disk        1.00x",
        "with a bitmask 0.61x",
        "run time gain",
    ):
        assert said in run.err
    return place / "tiny-llama-sparsegpt-2of4"


def test_two_of_four_are_kept_everywhere(half: Path) -> None:
    found = zeros(half)
    assert len(found) == 42
    for weight, mask in found.values():
        assert torch.all(mask.view(len(mask), -1, 4).sum(-1) == 2)
        assert not weight[~mask].view(torch.int16).any()  # to the bit: no zero has a sign


def test_provenance_and_card_tell_the_truth(half: Path) -> None:
    facts = json.loads((half / "provenance.json").read_text())
    assert facts["checks"]["masks"] == {"tensors": 42, "weights": 4718592, "kept": 2359296}
    assert facts["files"][MASKS] == file_digest(half / MASKS)
    assert facts["fallbacks"] == []
    assert facts["size"]["bytes_in"] == facts["size"]["bytes_out"]
    assert facts["size"]["bitmask_bytes"] == facts["size"]["bytes_out"] - 2359296 * 2 + 4718592 // 8
    assert all(row["sparsity"] == 0.5 and 0 < row["relative_error"] < 0.3 for row in facts["report"])
    card = (half / "README.md").read_text()
    for said in ("pruned to 2 of every 4 (sparsegpt)", "- pruned\n", "none in stock transformers", "--pattern 2:4"):
        assert said in card


def test_stock_transformers_loads_it_and_verify_agrees(half: Path, compress: Commands) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(half)
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], zeros(half)[name][0])
    run = compress("verify", half)
    assert run.code == 0, run.err
    assert "50.0000% of 4,718,592 weights in 42 tensors are zero" in run.err


def test_a_weight_that_grew_back_fails_verification(half: Path, compress: Commands, tmp_path: Path) -> None:
    damaged = shutil.copytree(half, tmp_path / "damaged")
    info = Checkpoint.open(damaged).info("model.layers.0.mlp.up_proj.weight")
    mask = zeros(half)[info.name][1]
    place = int((~mask).flatten().nonzero()[0])
    with (damaged / info.shard).open("r+b") as file:
        file.seek(info.offset + 2 * place)
        file.write(b"\x80\x3f")  # one, in bfloat16
    run = compress("verify", damaged)
    assert run.code == 4
    assert "FAILED  masks: tensor 'model.layers.0.mlp.up_proj.weight': 1 weights" in run.err


SPLIT = ("--method", "magnitude", "--scope", "global", "--sparsity", "0.6")
OWL = ("--method", "wanda", "--budget", "owl", "--sparsity", "0.7")
JOINT = ("--bits", "4", "--group-size", "32")


@pytest.mark.parametrize(
    "words",
    [SPLIT, ("--method", "magnitude", "--budget", "owl"), (*JOINT, "--asym"), (*JOINT, "--pattern", "4:8")],
    ids=" ".join,
)
def test_bytes_are_said_exactly_and_counts_are_kept(
    compress: Commands, tiny_llama: Path, tmp_path: Path, words: Sequence[str]
) -> None:
    command = ("prune", tiny_llama, *FEW, *MLP_ONLY, *words, "-o", "out", "-q", "--json")
    said = compress(*command, "--dry-run", cwd=tmp_path).json["estimate"]["output_bytes"]
    assert not list(tmp_path.iterdir())
    run = compress(*command, cwd=tmp_path)
    assert run.code == 0, run.err
    out, facts = tmp_path / "out", run.json
    assert sum(path.stat().st_size for path in out.glob("*.safetensors")) == said
    found, share = zeros(out), facts["identity"]["options"]["sparsity"]
    kept, total = (sum(int(count) for count in counts) for counts in zip(
        *((mask.sum(), mask.numel()) for _, mask in found.values()), strict=True
    ))  # fmt: skip
    assert len(found) == 18
    assert kept == total - round(total * share) == facts["size"]["kept_weights"]
    assert all(not weight[~mask].any() for weight, mask in found.values())
    if "--bits" in words:
        assert facts["size"]["bits_a_weight"] < 5
        assert "bitmask_bytes" not in facts["size"]


def test_one_threshold_divides_the_model(compress: Commands, tiny_llama: Path, tmp_path: Path) -> None:
    assert compress("prune", tiny_llama, *SPLIT, "-q", "-o", "out", cwd=tmp_path).code == 0
    before = DenseView(Checkpoint.open(tiny_llama))
    kept = [before.read(name).abs()[mask] for name, (_, mask) in zeros(tmp_path / "out").items()]
    gone = [before.read(name).abs()[~mask] for name, (_, mask) in zeros(tmp_path / "out").items()]
    assert min(float(w.min()) for w in kept) >= max(float(w.max()) for w in gone)


@pytest.mark.parametrize("words", [OWL, (*JOINT, "--repair", "dsnot")], ids=" ".join)
def test_killed_again_and_again(compress: Commands, tiny_llama: Path, tmp_path: Path, words: Sequence[str]) -> None:
    """After each journal entry, those of surveys too; the end is the same, byte for byte."""
    command = ("prune", tiny_llama, *FEW, *MLP_ONLY, *words, "-q", "-o", "out")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert compress(*command, cwd=tmp_path / "a").code == 0
    fault, killed = ["signal_at", DONE, 1, {"after": True}], 0
    while (run := compress(*command, cwd=tmp_path / "b", faults=[fault])).code == -signal.SIGKILL and killed < 30:
        killed += 1
    assert run.code == 0, run.err
    assert killed >= (14 if words is OWL else 8)  # a proof, six blocks, the copied tensors; six blocks and a survey
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b" / "out")


def test_owl_shares_out_by_blocks(compress: Commands, tiny_llama: Path, tmp_path: Path) -> None:
    run = compress("prune", tiny_llama, *FEW, *MLP_ONLY, *OWL, "-q", "--json", "-o", "out", cwd=tmp_path)
    rows: list[dict[str, Any]] = run.json["report"]
    blocks = [[row["sparsity"] for row in rows if f"layers.{k}." in row["tensor"]] for k in range(6)]
    for block in blocks:
        assert max(block) - min(block) < 1e-4
    shares = [block[0] for block in blocks]
    assert 0.1 < max(shares) - min(shares) <= 0.17
    assert sum(shares) / 6 == pytest.approx(0.7, abs=1e-4)


def test_widths_that_no_pattern_fits_are_refused_at_once(compress: Commands, tiny_llama: Path, tmp_path: Path) -> None:
    run = compress("prune", tiny_llama, "--method", "magnitude", "--pattern", "3:7", cwd=tmp_path)
    assert run.code == 1
    assert "prune.magnitude cannot prune 42 of 42 tensors as asked" in run.err
    assert "width 256 is not a multiple of 7, as the pattern 3:7 needs" in run.err
    assert "choose a --pattern N:M with an M that divides them" in run.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_masks_have_the_shape_of_the_tensors(name: str, tmp_path: Path) -> None:
    """GPT-2 stores [in, out]: patterns run along the inputs, masks lie as the tensors do. Experts are pruned one by one."""
    source = ARCHITECTURES[name].save(tmp_path / "source")
    outcome = prune(source, method="magnitude", pattern="2:4", output_dir=tmp_path / "out", device="cpu")
    found = zeros(tmp_path / "out")
    assert outcome.fallbacks == []
    for weight, mask in found.values():
        assert weight.shape == mask.shape
        along_inputs = mask.T if name == "gpt2" else mask
        assert torch.all(along_inputs.reshape(len(along_inputs), -1, 4).sum(-1) == 2)
    if name == "mixtral":
        assert sum("experts" in tensor for tensor in found) == 24


def test_masks_are_plain_safetensors(half: Path) -> None:
    with safe_open(half / MASKS, "pt") as file:
        names = list(file.keys())
        assert names[0].endswith(".weight.mask")
        assert file.get_tensor("model.layers.0.mlp.up_proj.weight.mask").dtype == torch.uint8


def test_the_same_command_again_does_nothing(half: Path, compress: Commands, tiny_llama: Path) -> None:
    before = contents(half)
    run = compress("prune", tiny_llama, *FEW, "--pattern", "2:4", cwd=half.parent)
    assert "already done" in run.err
    assert contents(half) == before


RECIPE = """
version: 1
sources: {base: MODEL}
stages:
  sparse:
    from: base
    matrix: {use: [prune.magnitude, prune.wanda]}
    with: {pattern: "2:4", ignore: ["*.self_attn.*"], dataset: TEXT, num_samples: 4, seq_len: 64}
  small: {use: quantize.rtn, from: "sparse[use=wanda]", with: {bits: 4, group_size: 64}}
  scores: {use: score.perplexity, from: [base, sparse, small], with: {texts: [TEXT], seq_len: 64, max_tokens: 256}}
report: [scores]
"""


def test_recipes_prune(compress: Commands, tiny_llama: Path, tmp_path: Path) -> None:
    """Members of a matrix, what is made of them, scores and page; zeros stay zero on a symmetric grid."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("MODEL", str(tiny_llama)).replace("TEXT", str(SHORT_TEXT)))
    run = compress("run", recipe, "--json", cwd=tmp_path)
    assert run.code == 0, run.err
    stages = {stage["name"]: stage for stage in run.json["stages"]}
    assert stages["sparse[use=wanda]"]["state"] == "ran"
    assert compress("run", recipe, cwd=tmp_path).code == 0
    sparse, small = (Path(stages[name]["folder"]) for name in ("sparse[use=wanda]", "small[use=wanda]"))
    decoded = DenseView(Checkpoint.open(small))
    for name, (_, mask) in zeros(sparse).items():
        assert not decoded.read(name)[~mask].any()
