"""merge lora, lego and extract-lora from folder to folder: sums that hold, kills that do no harm, refusals that explain."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Commands, Run
from safetensors.torch import load_file, save_file

from weightworks.errors import MethodError
from weightworks.plan.adapters import run_adapter
from weightworks.stage.settings import Settings
from weightworks.store.adapters import Adapter
from weightworks.store.checkpoint import Checkpoint
from weightworks.testing.tiny import make_model

pytestmark = pytest.mark.usefixtures("one_thread")

Merge = Callable[..., Run]
NAMES = ("q_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("adapters") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> list[Path]:
    """Two adapters of the base, of ranks 2 and 3; the second has fewer modules and other scalings."""
    tensors = Checkpoint.open(base).tensors
    made = []
    for number, (rank, names) in enumerate([(2, NAMES), (3, NAMES[:1])]):
        draws, state = torch.Generator().manual_seed(number), {}
        for name, info in tensors.items():
            module = name.removesuffix(".weight")
            if module.rsplit(".", maxsplit=1)[-1] in names:
                a, b = (
                    torch.randn(rank, info.shape[1], generator=draws),
                    torch.randn(info.shape[0], rank, generator=draws),
                )
                state[f"base_model.model.{module}.lora_A.weight"] = a / 50
                state[f"base_model.model.{module}.lora_B.weight"] = b / 50
        folder = base.parent / f"adapter-{number}"
        folder.mkdir()
        save_file(state, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank * (1 + number), "base_model_name_or_path": "base"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        made.append(folder)
    return made


@pytest.fixture
def merge(compress: Commands, tmp_path: Path) -> Merge:
    def run(*words: str | Path, **options: Any) -> Run:
        return compress(*words, program="merge", cwd=tmp_path, **options)

    return run


def total(base: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open("+".join(map(str, (base, *adapters))))
    return {name: checkpoint.read(name, torch.float32) for name in checkpoint.tensors}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "README.md"}


def test_cat_is_the_sum_of_adapters(merge: Merge, base: Path, adapters: list[Path], tmp_path: Path) -> None:
    run = merge("lora", *adapters, "--base", base, "--weights", "1,-0.5", "-o", "out", "--json")
    assert run.code == 0, run.err
    plain, one, two = total(base), total(base, adapters[0]), total(base, adapters[1])
    result = total(base, tmp_path / "out")
    for name, before in plain.items():
        expected = before + (one[name] - before) - 0.5 * (two[name] - before)
        torch.testing.assert_close(result[name], expected, rtol=0, atol=1e-6)
    facts = run.json
    assert facts["residual"]["total"] < 1e-12
    assert facts["residual"]["stored"] < 1e-7
    assert {row["rank"] for row in facts["report"]} == {2, 5}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(NAMES)
    assert config["r"] in (2, 5)
    assert set(config["rank_pattern"].values()) == {7 - config["r"]}
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "provenance.json",
    ]  # fmt: skip
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()
    again = merge("lora", *adapters, "--base", base, "--weights", "1,-0.5", "-o", "out")
    assert "already done" in again.err


def test_negation_and_analogy_are_exact(merge: Merge, adapters: list[Path], tmp_path: Path) -> None:
    assert merge("lora", adapters[0], "--weights", "-1", "-o", "minus").code == 0
    assert merge("lora", adapters[0], tmp_path / "minus", "-o", "none").code == 0  # no base is needed
    none = Adapter.open(tmp_path / "none")
    for module in none.pairs:
        a, b = none.factors(module)
        assert float((b.double() @ a.double()).abs().max()) < 1e-15
        before, after = Adapter.open(adapters[0]), Adapter.open(tmp_path / "minus")
        assert torch.equal(after.factors(module)[1], before.factors(module)[1])
        assert torch.equal(after.factors(module)[0], -before.factors(module)[0])
    run = merge(
        "lora", adapters[0], adapters[1], adapters[1], "--weights", "1,1,-1", "--method", "svd", "-o", "same", "--json"
    )
    assert run.code == 0, run.err
    assert run.json["residual"]["total"] < 1e-12


@pytest.mark.parametrize("method", ["svd", "lego", "core"])
def test_other_merges_tell_how_far_they_are(merge: Merge, adapters: list[Path], base: Path, method: str) -> None:
    inner = ("--using", "soup", "--using-options", "weights=1,3") if method == "core" else ("--rank", "2")
    command = ("lego",) if method == "lego" else ("lora", "--method", method)
    run = merge(*command, *adapters, "--base", base, *inner, "-o", method, "--json")
    assert run.code == 0, run.err
    report = {row["tensor"]: row for row in run.json["report"]}
    shared_ = [row for name, row in report.items() if "q_proj" in name]
    assert all(0 < row["residual"] < 1.5 for row in shared_)
    assert all(abs(row["residual"] - row["residual_stored"]) < 1e-6 for row in report.values())
    assert set(run.json["quality"]) == {"base", "with the adapter"}
    if method == "core":  # the soup of cores is the soup of updates
        alone = next(row for name, row in report.items() if "down_proj" in name)
        assert abs(alone["residual"] - 0.75) < 1e-6
        assert run.json["identity"]["inner"]["method"] == "merge.soup"


def test_whole_tensors_are_merged_as_differences(
    merge: Merge, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    norm = Checkpoint.open(base).read("model.norm.weight", torch.float32)
    whole = tmp_path / "whole"
    shutil.copytree(adapters[0], whole)
    state = load_file(whole / "adapter_model.safetensors")
    save_file({**state, "base_model.model.model.norm.weight": norm + 0.5}, whole / "adapter_model.safetensors")
    run = merge("lora", whole, adapters[1], "-o", "out")
    assert run.code == 1
    assert "model.norm.weight are held whole (modules_to_save): give --base" in run.err
    run = merge("lego", whole, adapters[1], "--base", base, "-o", "out")
    assert "model.norm.weight are held whole (modules_to_save), which only cat and svd add up" in run.err
    assert merge("lora", whole, adapters[1], "--base", base, "--weights", "2,1", "-o", "out").code == 0
    torch.testing.assert_close(total(base, tmp_path / "out")["model.norm.weight"], norm + 1)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] == ["model.norm"]


# Extraction.


@pytest.fixture(scope="module")
def tuned(base: Path, adapters: list[Path]) -> Path:
    """The base with the first adapter in its weights, and a norm changed."""
    folder = base.parent / "tuned"
    shutil.copytree(base, folder)
    state = total(base, adapters[0])
    state["model.norm.weight"] = state["model.norm.weight"] * 1.25
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return folder


def test_extraction_and_back(merge: Merge, base: Path, tuned: Path, tmp_path: Path) -> None:
    run = merge("extract-lora", base, tuned, "--rank", "2", "--keep-whole", "-o", "out", "--json")
    assert run.code == 0, run.err
    for name, tensor in total(tuned).items():
        torch.testing.assert_close(total(base, tmp_path / "out")[name], tensor, rtol=0, atol=2e-6)
    facts = run.json
    assert facts["residual"]["stored"] < 1e-5
    assert facts["fallbacks"] == []
    kinds = {row["tensor"]: row["method"] for row in facts["report"]}
    assert kinds["model.norm.weight"] == "whole"
    assert (
        sum(kind == "adapter.extract" for kind in kinds.values())
        == len(load_file(tmp_path / "out" / "adapter_model.safetensors")) // 2
    )
    assert set(kinds) == set(Checkpoint.open(base).tensors)
    assert facts["quality"]["fine-tune"] == pytest.approx(facts["quality"]["with the adapter"], rel=1e-5)

    run = merge("extract-lora", base, tuned, "--energy", "0.5", "-o", "half", "--json", "--strict")
    assert run.code == 3
    left = "model.norm.weight: changed by 25.00% of its norm, not in the adapter: not a matrix product (--keep-whole saves it whole)"
    assert run.json["fallbacks"] == [left]
    rows = [row for row in run.json["report"] if row.get("rank")]
    assert all(row["residual"] ** 2 <= 0.5 for row in rows)
    assert {row["rank"] for row in rows} <= {1, 2}


def test_a_dora_becomes_a_plain_adapter(merge: Merge, base: Path, adapters: list[Path], tmp_path: Path) -> None:
    dora = tmp_path / "dora"
    shutil.copytree(adapters[0], dora)
    state = load_file(dora / "adapter_model.safetensors")
    for name in [name for name in state if "lora_B" in name]:
        state[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.full((state[name].shape[0],), 0.6)
    save_file(state, dora / "adapter_model.safetensors")
    config = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    run = merge("lora", dora, adapters[1], "-o", "out")
    assert run.code == 1
    assert "merge extract-lora BASE BASE+dora" in run.err
    run = merge("extract-lora", base, f"{base}+{dora}", "--energy", "1", "-o", "plain", "--json")
    assert run.code == 0, run.err
    for name, tensor in total(base, dora).items():
        torch.testing.assert_close(total(base, tmp_path / "plain")[name], tensor, rtol=0, atol=1e-5)


# Kills, and what is refused.


@pytest.mark.parametrize("command", ["lora", "extract-lora"])
def test_killed_and_run_again(
    merge: Merge, compress: Commands, base: Path, tuned: Path, adapters: list[Path], tmp_path: Path, command: str
) -> None:
    inputs = adapters if command == "lora" else [base, tuned]
    whole = merge(command, *inputs, "-o", "whole/out")
    assert whole.code == 0, whole.err
    kill = ["signal_at", "weightworks.store.writer:CheckpointWriter.done", 3]
    first = merge(command, *inputs, "-o", "cut/out", faults=[kill])
    assert first.code == -signal.SIGKILL
    assert not (tmp_path / "cut" / "out").exists()
    again = merge(command, *inputs, "-o", "cut/out")
    assert again.code == 0, again.err
    assert "resuming after" in again.err
    assert bytes_of(tmp_path / "cut" / "out") == bytes_of(tmp_path / "whole" / "out")
    assert not (tmp_path / "cut" / "out.partial").exists()


def test_mistakes_are_explained(merge: Merge, base: Path, adapters: list[Path], tmp_path: Path) -> None:
    for words, code, text in [
        (["lora", base, "-o", "x"], 1, "no adapter_config.json; an adapter folder holds it"),
        (["lora", *adapters, "--weights", "1,2,3", "-o", "x"], 2, "weights has 3 values, for 2 models"),
        (
            ["lora", *adapters, "--method", "svdd", "-o", "x"],
            2,
            "unknown method 'svdd' for adapter (did you mean 'svd'?)",
        ),
        (["lora", *adapters, "--rank", "2", "-o", "x"], 2, "adapter.cat has no option 'rank'"),
        (["lora", *adapters, "--method", "core", "--using", "soups", "-o", "x"], 2, "unknown method 'soups' for merge"),
        (
            ["lora", *adapters, "--method", "core", "--using", "soup", "--using-options", "density", "-o", "x"],
            2,
            "expected NAME=VALUE",
        ),
        (["lora", *adapters, "-o", adapters[0], "--overwrite"], 1, "is an input, or holds one"),
        (["extract-lora", base, adapters[0], "-o", "x"], 1, "no config.json"),
        (["lora", "--method", "extract", *adapters, "-o", "x"], 2, "extract is no merge of adapters"),
    ]:
        run = merge(*words)
        assert (run.code, text in run.err) == (code, True), (words, run.err)
    assert list(tmp_path.iterdir()) == []


def test_adapters_that_mean_modules_differently(adapters: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(adapters[0], other)
    state = load_file(other / "adapter_model.safetensors")
    name = next(name for name in state if "q_proj.lora_B" in name)
    state[name] = state[name][:-1].contiguous()
    save_file(state, other / "adapter_model.safetensors")
    with pytest.raises(
        MethodError, match=r"layers\.0\.self_attn\.q_proj is \d+ x \d+ in adapter-0, \d+ x \d+ in other"
    ):
        run_adapter("cat", [str(adapters[0]), str(other)], {}, Settings(), output_dir=tmp_path / "out")


def test_in_recipes(
    merge: Merge, compress: Commands, base: Path, tuned: Path, adapters: list[Path], tmp_path: Path
) -> None:
    """An adapter made by a stage from sources; a source that is MODEL+ADAPTER, merged like any model."""
    sources = {"base": base, "tuned": tuned, "one": adapters[0], "two": adapters[1], "sum": f"{base}+{adapters[1]}"}
    lines = ["version: 1", "sources:", *(f"  {name}: {path}" for name, path in sources.items()), "stages:"]
    lines += ["  both: {use: adapter.cat, from: {models: [one, two], base: base}}"]
    lines += ["  lora: {use: adapter.extract, from: {models: [tuned], base: base}, with: {rank: 2}}"]
    lines += ["  soup: {use: merge.soup, from: {models: [sum, base]}}"]
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    run = compress("run", tmp_path / "r.yaml", cwd=tmp_path)
    assert run.code == 0, run.err
    made = {path.name: path for path in tmp_path.glob("**/cache/*/*") if path.is_dir()}
    soup, plain, one = Checkpoint.open(made["soup"]), total(base), total(base, adapters[1])
    for name, tensor in plain.items():
        torch.testing.assert_close(soup.read(name), ((tensor + one[name]) / 2).bfloat16(), rtol=1e-2, atol=1e-6)
    assert merge("lora", *adapters, "--base", base, "-o", "out").code == 0
    weights = "adapter_model.safetensors"
    assert (made["both"] / weights).read_bytes() == (tmp_path / "out" / weights).read_bytes()
    config = json.loads((adapters[0] / "adapter_config.json").read_text())
    (adapters[0] / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    run = compress("explain", tmp_path / "r.yaml", "--json", cwd=tmp_path)
    (adapters[0] / "adapter_config.json").write_text(json.dumps(config))
    states = {stage["stage"]: stage["state"] for stage in run.json["stages"]}
    assert states["soup"] == "cached"
    assert states["both"] != "cached"


def test_a_dry_run_writes_nothing(merge: Merge, base: Path, tuned: Path, tmp_path: Path) -> None:
    run = merge("extract-lora", base, tuned, "--dry-run")
    assert run.code == 0, run.err
    assert "dry run: nothing was written" in run.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("way", ["cat", "extract"])
def test_stock_peft_loads_what_is_written(
    way: str, base: Path, adapters: list[Path], tuned: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    inputs, options = (adapters, {}) if way == "cat" else ([tuned], {"energy": 0.9, "keep_whole": True})
    run_adapter(way, [*map(str, inputs)], options, Settings(), base=str(base), output_dir=tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    assert not [str(one.message) for one in recwarn if "missing" in str(one.message).lower()]
    for name, tensor in total(base, tmp_path / "out").items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)
