"""The engine of merges: killed, out of disk, refused; what its bytes do not depend on; tensors that some inputs lack or share."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Commands, Fault, Run
from conftest import CheckpointMaker
from safetensors.torch import load_file, save_file

from weightworks.errors import MethodError, NotFiniteError, OutputError, UsageError
from weightworks.plan.merge import run_merge
from weightworks.plan.stage import Outcome
from weightworks.stage.settings import Settings
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.sources import file_digest
from weightworks.store.tensorfile import write_bytes
from weightworks.testing.merge_contract import small_models

Tensors = dict[str, torch.Tensor]
Merge = Callable[..., Run]
DONE = "weightworks.store.writer:CheckpointWriter.done"
FILLING = "weightworks.store.writer:CheckpointWriter.filling"
TEXT = "weightworks.store.writer:CheckpointWriter.write_text"
COMMIT = "weightworks.store.writer:CheckpointWriter.commit"
OFTEN: Fault = ["constant", "weightworks.engine.merging:JOURNAL_BYTES", 200_000]
TIES = ("ties", "--density", "0.3")  # a threshold of the whole model: two surveys, and one of signs
OPCM = ("opcm",)  # whole tensors, and a state beside the weights
DARE = ("dare", "--density", "0.5")


def run(
    name: str,
    models: Sequence[Path | str],
    target: Path,
    *,
    base: Path | str | None = None,
    settings: Settings | None = None,
    dry_run: bool = False,
    **options: Any,
) -> Outcome:
    """A merge in this process; nothing is loaded unless ``check`` says so."""
    return run_merge(
        name,
        [str(model) for model in models],
        {"check": "files", **options},
        settings or Settings(device="cpu"),
        base=None if base is None else str(base),
        output_dir=target,
        dry_run=dry_run,
    )


def tensors(folder: Path) -> Tensors:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def words(method: Sequence[str]) -> list[str]:
    base, *models = map(str, small_models())
    return [*method, *models, "--base", base, "-o", "out", "--check", "files", "--max-shard-size", "500kB", "-q"]


@pytest.fixture(scope="module")
def undisturbed(merge: Merge, tmp_path_factory: pytest.TempPathFactory) -> dict[Sequence[str], dict[str, str]]:
    """What each method writes if nothing happens to it."""
    place = tmp_path_factory.mktemp("undisturbed")
    for method in (TIES, OPCM):
        (place / method[0]).mkdir()
        made = merge(*words(method), cwd=place / method[0], faults=[OFTEN])
        assert made.code == 0, made.err
    return {method: contents(place / method[0] / "out") for method in (TIES, OPCM)}


@pytest.mark.parametrize("method", [TIES, OPCM])
@pytest.mark.parametrize(
    ("fault", "at_least"),
    [
        pytest.param(["signal_at", DONE, 1, {"after": True}], 5, id="after each journal entry"),
        pytest.param(["signal_at", DONE, 3], 2, id="before every third"),
        pytest.param(["signal_at", FILLING, 8], 1, id="inside a tensor"),
    ],
)
def test_killed_again_and_again(
    merge: Merge,
    undisturbed: dict[Sequence[str], dict[str, str]],
    tmp_path: Path,
    method: Sequence[str],
    fault: Fault,
    at_least: int,
) -> None:
    """In surveys and between tensors: the bytes of all files, the state too, are those of an undisturbed run."""
    killed = 0
    while (made := merge(*words(method), cwd=tmp_path, faults=[fault, OFTEN])).code == -signal.SIGKILL:
        killed += 1
        assert killed < 60
        assert not (tmp_path / "out").exists()
    assert made.code == 0, made.err
    assert killed >= at_least
    assert contents(tmp_path / "out") == undisturbed[method]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.run.log"]


def test_killed_at_the_end(merge: Merge, undisturbed: dict[Sequence[str], dict[str, str]], tmp_path: Path) -> None:
    """Before the index, the configuration, the provenance, the card, and the rename; then after it."""
    for fault in (*(["signal_at", TEXT, number] for number in (1, 2, 3, 4)), ["signal_at", COMMIT, 1]):
        assert merge(*words(OPCM), cwd=tmp_path, faults=[fault, OFTEN]).code == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    assert merge(*words(OPCM), cwd=tmp_path, faults=[["signal_at", COMMIT, 1, {"after": True}]]).code == -signal.SIGKILL
    again = merge(*words(OPCM)[:-1], cwd=tmp_path)
    assert "already done" in again.err
    assert contents(tmp_path / "out") == undisturbed[OPCM]


def test_full_disk_leaves_work_that_is_continued(
    undisturbed: dict[Sequence[str], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *models = small_models()
    monkeypatch.setattr("weightworks.engine.merging.JOURNAL_BYTES", 200_000)
    settings = Settings(device="cpu", max_shard_size="500kB")
    written = 0

    def full(*args: Any) -> Any:
        nonlocal written
        written += 1
        if written == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(*args)

    with monkeypatch.context() as patch:
        patch.setattr("weightworks.store.writer.write_bytes", full)
        with pytest.raises(OutputError, match="No space left") as caught:
            run("ties", models, tmp_path / "out", base=base, settings=settings, density=0.3)
    assert "finished work is kept" in caught.value.hint
    assert (tmp_path / "out.partial").is_dir()
    assert not (tmp_path / "out").exists()
    made = run("ties", models, tmp_path / "out", base=base, settings=settings, density=0.3)
    assert made.target.is_dir()
    found, expected = contents(tmp_path / "out"), undisturbed[TIES]
    assert {name: found[name] for name in found if name.endswith(".safetensors")} == {
        name: expected[name] for name in expected if name.endswith(".safetensors")
    }


def test_a_disk_too_small_from_the_start_is_left_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OutputError, match="No space left"):
        run("soup", small_models()[1:], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    models = small_models()[1:]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        run("soup", models, tmp_path / "out")
    with pytest.raises(OutputError, match=r"is the input|is an input"):
        run("soup", models, models[0], settings=Settings(device="cpu", overwrite=True))
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    run("soup", models, tmp_path / "out", settings=Settings(device="cpu", overwrite=True))
    assert run("soup", models, tmp_path / "out").cached
    with pytest.raises(OutputError, match="already exists"):
        run("soup", models, tmp_path / "out", weights=[1.0, 2.0, 3.0])


def test_two_runs_at_one_target(merge: Merge, commands: Commands, tmp_path: Path) -> None:
    """The second is refused while the first is at work, and finds all done after it."""
    slow: Fault = ["signal_at", DONE, 2, {"sent": int(signal.SIGSTOP)}]
    first = commands.start(*words(TIES), cwd=tmp_path, faults=[slow, OFTEN], program="merge")
    journal = tmp_path / "out.partial" / "journal.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        pass
    second = merge(*words(TIES), cwd=tmp_path, faults=[OFTEN])
    first.send(signal.SIGCONT)
    assert second.code == 1
    assert "another run is writing there" in second.err
    assert first.wait().code == 0
    assert merge(*words(TIES), cwd=tmp_path).code == 0


@pytest.fixture(scope="session")
def commands(compress: Commands) -> Commands:
    return compress


# What the bytes do not depend on.


def weights(folder: Path) -> list[bytes]:
    """The bytes of all tensors, by name."""
    return [value.reshape(-1).view(torch.uint8).numpy().tobytes() for _, value in sorted(tensors(folder).items())]


def sharded(source: Path, target: Path, parts: int) -> Path:
    """The same checkpoint in ``parts`` files, tensors dealt in another order."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    held = dict(sorted(load_file(source / "model.safetensors").items(), reverse=True))
    placed = {}
    for part in range(parts):
        own = dict(list(held.items())[part::parts])
        file = f"part-{part}.safetensors"
        save_file(own, target / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(own, file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return target


@pytest.mark.parametrize("method", [TIES, DARE, OPCM])
def test_files_of_inputs_and_outputs_make_no_difference(tmp_path: Path, method: Sequence[str]) -> None:
    """Shards of inputs, names of folders and files, the size of what is written, slabs, and threads."""
    base, *models = small_models()
    options = {"density": float(method[2])} if len(method) > 1 else {}
    whole = weights(run(method[0], models, tmp_path / "whole", base=base, **options).target)
    moved = [sharded(model, tmp_path / f"m{number}", number + 2) for number, model in enumerate(models)]
    small = Settings(device="cpu", max_shard_size="300kB")
    made = run(method[0], moved, tmp_path / "sharded", base=sharded(base, tmp_path / "b", 5), settings=small, **options)
    assert len(list(made.target.glob("model-*.safetensors"))) > 1
    assert weights(made.target) == whole
    if method is OPCM:  # the sums of LAPACK go by threads, which therefore are part of what a run is known by
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert weights(run(method[0], models, tmp_path / "threads", base=base, **options).target) == whole
    finally:
        torch.set_num_threads(threads)


def test_order_of_models_makes_no_difference_to_what_is_drawn(tmp_path: Path) -> None:
    base, one, two, _ = small_models()
    first = weights(run("dare", [one, two], tmp_path / "a", base=base, density=0.5).target)
    assert weights(run("dare", [two, one], tmp_path / "b", base=base, density=0.5).target) == first
    seeded = run("dare", [one, two], tmp_path / "c", base=base, density=0.5, settings=Settings(device="cpu", seed=1))
    assert weights(seeded.target) != first


def test_dry_run_knows_the_bytes_and_writes_nothing(tmp_path: Path) -> None:
    base, *models = small_models()
    for settings in (Settings(device="cpu"), Settings(device="cpu", max_shard_size="300kB")):
        dry = run("opcm", models, tmp_path / "out", base=base, settings=settings, dry_run=True)
        assert list(tmp_path.iterdir()) == []
        made = run("opcm", models, tmp_path / "out", base=base, settings=settings)
        assert dry.estimate is not None
        assert dry.estimate.output_bytes == sum(path.stat().st_size for path in made.target.glob("*.safetensors"))
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out.run.log").unlink()


# Inputs.


def tiny(make_checkpoint: CheckpointMaker, name: str, **changed: torch.Tensor | None) -> Path:
    """A checkpoint of two matrices, a vector, a scalar and a buffer; ``changed`` replaces tensors, None takes one away."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    kept: dict[str, torch.Tensor | None] = {
        "a": torch.randn(4, 6, generator=generator),
        "b": torch.randn(3, 4, generator=generator).bfloat16(),
        "norm": torch.randn(5, generator=generator),
        "scale": torch.randn((), generator=generator),
        "steps": torch.tensor([3, 4]),
    }
    return make_checkpoint({key: value for key, value in {**kept, **changed}.items() if value is not None}, name=name)


def test_scalars_are_merged_and_buffers_copied(make_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    models = [tiny(make_checkpoint, name) for name in "xyz"]
    made = run("soup", models, tmp_path / "out")
    found, given = tensors(made.target), [tensors(model) for model in models]
    assert found["scale"].shape == ()
    assert float(found["scale"]) == pytest.approx(sum(float(one["scale"]) for one in given) / 3)
    assert found["steps"].tolist() == [3, 4]
    assert made.provenance is not None
    account = made.provenance["tensors"]
    assert (account["transformed"], account["copied"], account["dropped"]) == (4, 1, 0)
    other = tiny(make_checkpoint, "w", steps=torch.tensor([3, 5]))
    with pytest.raises(MethodError, match=r"'steps' is torch.int64 and differs between .*x and .*w"):
        run("soup", [*models, other], tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_not_a_number_is_named_with_its_model(make_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    good, bad = tiny(make_checkpoint, "x"), tiny(make_checkpoint, "y", a=torch.full((4, 6), float("inf")))
    with pytest.raises(NotFiniteError, match=r"tensor 'a' of .*y holds 24 NaN or infinite values"):
        run("soup", [good, bad], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] in ([], ["out.run.log"])


def test_all_that_does_not_fit_is_named_at_once(make_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    one = tiny(make_checkpoint, "x")
    two = tiny(make_checkpoint, "y", a=torch.zeros(4, 7), b=None, more=torch.zeros(2))
    three = tiny(make_checkpoint, "z", norm=torch.zeros(6))
    with pytest.raises(MethodError) as caught:
        run("soup", [one, two, three], tmp_path / "out")
    lines = [line.strip().replace(f"{tmp_path}/", "") for line in str(caught.value).splitlines()]
    assert lines[0] == "merge.soup cannot merge these models: 4 tensors do not fit:"
    assert lines[1:] == [
        "a: [4, 7] in y, [4, 6] in x", "b: not in y", "norm: [6] in z, [5] in x", "more: in y, not in x",
    ]  # fmt: skip
    config = json.loads((three / "config.json").read_text())
    (three / "config.json").write_text(json.dumps({**config, "model_type": "opt"}))
    with pytest.raises(MethodError, match=r"different architectures cannot be merged: .*x is llama, .*z is opt"):
        run("soup", [one, three], tmp_path / "out")


def test_policies_for_tensors_that_some_lack(make_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """base: a difference of zero; skip-model: the weights of the others, divided by their own sum; both are told."""
    base = tiny(make_checkpoint, "base")
    full = tiny(make_checkpoint, "full")
    half = tiny(make_checkpoint, "half", b=None, extra=torch.ones(2))
    zero, one, two = (tensors(path) for path in (base, full, half))
    with pytest.raises(MethodError, match="b: not in"):
        run("task_arithmetic", [full, half], tmp_path / "error", base=base)
    with pytest.raises(UsageError, match="on-missing base needs a base"):
        run("soup", [full, half], tmp_path / "error", on_missing="base")
    options = {"scaling": 1.0, "weights": [1.0, 3.0], "normalize": True, "out_dtype": "float32"}
    by_base = run("task_arithmetic", [full, half], tmp_path / "first", base=base, on_missing="base", **options)
    skipped = run("task_arithmetic", [full, half], tmp_path / "skip", base=base, on_missing="skip-model", **options)
    delta = one["b"].float() - zero["b"].float()
    assert torch.allclose(tensors(by_base.target)["b"], zero["b"].float() + delta / 4)
    assert torch.allclose(tensors(skipped.target)["b"], zero["b"].float() + delta)
    both = zero["a"] + (one["a"] - zero["a"]) / 4 + (two["a"] - zero["a"]) * 3 / 4
    for made, text in ((by_base, "b: the base stands for"), (skipped, "b: merged without")):
        assert torch.allclose(tensors(made.target)["a"], both, atol=1e-6)
        assert any(line.startswith(text) and line.endswith("half") for line in made.fallbacks)
        assert made.provenance is not None
        assert [name.rpartition(": ")[2] for name in made.provenance["tensors"]["left_out"]] == ["extra"]


def test_values_beyond_float16_are_refused(make_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    large = tiny(make_checkpoint, "x", a=torch.full((4, 6), 1e5))
    with pytest.raises(MethodError, match=r"'a' has values beyond float16's 65504"):
        run("soup", [large], tmp_path / "out", out_dtype="float16")
    assert not (tmp_path / "out").exists()


def test_quantized_inputs_are_decoded(quantized: Path, tiny_llama: Path, tmp_path: Path) -> None:
    made = run("soup", [tiny_llama, quantized], tmp_path / "out", weights=[0.0, 1.0], out_dtype="float32")
    name = "model.layers.0.mlp.up_proj.weight"
    found, dense = tensors(made.target)[name], Checkpoint.open(tiny_llama).read(name, torch.float32)
    assert 0 < float((found - dense).norm() / dense.norm()) < 0.2
    assert len(torch.unique(found[0, :128])) <= 16
    assert "quantization_config" not in json.loads((made.target / "config.json").read_text())


def test_one_model_twice_one_alone_and_a_hundred(make_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    one = tiny(make_checkpoint, "x")
    for number, models in enumerate(([one], [one, one])):
        assert weights(run("soup", models, tmp_path / f"out{number}").target) == weights(one)
    hundred = [tiny(make_checkpoint, f"m{number}") for number in range(100)]
    made = tensors(run("soup", hundred, tmp_path / "hundred", out_dtype="float32").target)
    mean = torch.stack([tensors(model)["a"].double() for model in hundred]).mean(0)
    assert torch.allclose(made["a"].double(), mean, atol=1e-6)


# Embeddings that are shared with the head, and those that are not.


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Models with a head of their own (apart), without one (shared), and with a copy of the embedding (copy)."""
    place = tmp_path_factory.mktemp("families")
    found: dict[str, list[Path]] = {"apart": [], "shared": [], "copy": []}
    for number, source in enumerate(small_models()[1:3]):
        for kind, made in found.items():
            folder = place / f"{kind}{number}"
            shutil.copytree(source, folder)
            kept = load_file(source / "model.safetensors")
            if kind != "apart":
                config = json.loads((folder / "config.json").read_text())
                (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
                kept["lm_head.weight"] = kept["model.embed_tokens.weight"].clone()
            if kind == "shared":
                del kept["lm_head.weight"]
            save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
            made.append(folder)
    return found


def test_shared_embeddings_are_merged_once(families: dict[str, list[Path]], tmp_path: Path) -> None:
    """A head that is stored all the same is left out, and said to be; the result loads."""
    plain = tensors(run("soup", families["shared"], tmp_path / "plain").target)
    for number, kinds in enumerate((("shared", "copy"), ("copy", "shared"), ("copy", "copy"))):
        chosen = [families[kind][place] for place, kind in enumerate(kinds)]
        made = run("soup", chosen, tmp_path / f"out{number}", check="full")
        found = tensors(made.target)
        assert found.keys() == plain.keys()
        assert "lm_head.weight" not in found
        assert all(torch.equal(value, plain[name]) for name, value in found.items())
        assert json.loads((made.target / "config.json").read_text())["tie_word_embeddings"] is True
        assert made.provenance is not None
        assert made.fallbacks == []
        left_out = made.provenance["tensors"]["left_out"]
        assert {name.rpartition(": ")[2] for name in left_out} == {"lm_head.weight"}
        assert len(left_out) == kinds.count("copy")


@pytest.mark.parametrize("kind", ["shared", "copy"])
@pytest.mark.parametrize("first", [True, False])
def test_shared_and_separate_embeddings_are_taken_apart(
    families: dict[str, list[Path]], tmp_path: Path, kind: str, first: bool
) -> None:
    one, two = families[kind][0], families["apart"][1]
    made = run("soup", [one, two] if first else [two, one], tmp_path / "out", check="full")
    found, given, other = tensors(made.target), tensors(one), tensors(two)
    head = (given["model.embed_tokens.weight"].float() + other["lm_head.weight"].float()) / 2
    assert torch.allclose(found["lm_head.weight"].float(), head, atol=1e-2)
    assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert json.loads((made.target / "config.json").read_text())["tie_word_embeddings"] is False
    assert any("its head is its embedding" in line for line in made.fallbacks)
