"""The loop of methods that train: schedules, masks held at every step, windows in order, killed and continued, refused."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Commands, Fault
from torch import nn

from compress import prune
from compress.rates import Schedule, adapted_top, rates, read_history
from weightworks.engine.modelwise import curve
from weightworks.engine.optimizer import Optimizer
from weightworks.errors import CalibrationError, MethodError, UsageError
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.snapshot import Snapshot, write_snapshot
from weightworks.store.sources import file_digest
from weightworks.stream.calibration import Calibration
from weightworks.stream.lessons import Lessons
from weightworks.testing.tiny import CALIBRATION_TEXT

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = {"dataset": str(CALIBRATION_TEXT), "seq_len": 32, "device": "cpu", "dtype": "float32"}
QUICK: dict[str, Any] = {**TEXT, "method": "imp", "steps": 3, "batch_size": 2, "rounds": 2, "held_out": 2}
DONE = "weightworks.store.writer:CheckpointWriter.done"
ALWAYS: list[Fault] = [["constant", f"weightworks.engine.modelwise:SAVE_{name}", 0] for name in ("SECONDS", "SHARE")]


def words(**options: Any) -> list[str]:
    """``options`` as they are typed."""
    return [text for name, value in options.items() for text in ("--" + name.replace("_", "-"), str(value))]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.iterdir())}


# Schedules.


def test_linear_and_cosine_rise_and_fall() -> None:
    linear, cosine = rates("llr", 20, top=1.0, warmup=0.1), rates("clr", 20, top=1.0, warmup=0.1)
    assert linear[:3] == cosine[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert linear[2:] == pytest.approx([1 - step / 18 for step in range(18)])
    assert cosine[2:] == pytest.approx([(1 + math.cos(math.pi * step / 18)) / 2 for step in range(18)])
    assert rates("llr", 3, top=2.0, warmup=0.0) == pytest.approx([2.0, 4 / 3, 2 / 3])
    assert rates("llr", 1, top=2.0) == [2.0]


def test_schedules_that_follow_the_original() -> None:
    history = [float(rate) for rate in range(100, 0, -1)]
    assert rates("lrw", 4, top=9.0, history=history) == [4.0, 3.0, 2.0, 1.0]
    assert rates("ft", 3, top=9.0, history=[*history, 0.0]) == [1.0, 1.0, 1.0]  # the last rate with which it moved
    assert rates("ft", 3, top=9.0) == [9.0, 9.0, 9.0]
    compressed = rates("slr", 10, top=9.0, warmup=0.0, history=history)
    assert compressed == pytest.approx([100 - 9.9 * step for step in range(10)])
    warm = rates("slr", 10, top=9.0, warmup=0.2, history=history)
    assert warm[:3] == pytest.approx([100 / 3, 200 / 3, 100.0])
    known: tuple[tuple[Schedule, list[float]], ...] = (("lrw", history[:3]), ("slr", []))
    for schedule, rest in known:
        with pytest.raises(MethodError, match=f"schedule {schedule}: the original schedule"):
            rates(schedule, 4, top=1.0, history=rest)


def test_allr_follows_what_pruning_took() -> None:
    """A random choice of p takes sqrt(p) of the norm and gets the whole rate; the smallest weights take less."""
    assert adapted_top(math.sqrt(0.25), 0.25, top=2.0, steps=10, original=0) == pytest.approx(2.0)
    assert adapted_top(0.1, 0.25, top=2.0, steps=10, original=0) == pytest.approx(0.4)
    assert adapted_top(0.1, 0.25, top=2.0, steps=30, original=100) == pytest.approx(
        0.6
    )  # the share of steps is the least
    assert adapted_top(0.9, 0.25, top=2.0, steps=300, original=100) == 2.0
    assert adapted_top(0.0, 0.0, top=2.0, steps=10, original=0) == 2.0  # nothing was pruned


def test_history_is_read_from_the_trainer(tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    log = [{"step": 2, "learning_rate": 0.4, "loss": 1}, {"step": 4, "learning_rate": 0.2}, {"step": 6, "eval_loss": 3}]
    path.write_text(json.dumps({"global_step": 6, "log_history": log}))
    assert read_history(str(path)) == pytest.approx([0.4, 0.4, 0.3, 0.2, 0.2, 0.2])
    path.write_text("[0.5, 0.25]")
    assert read_history(str(path)) == [0.5, 0.25]
    for text in ("{}", "[", '["a"]', "[-1]", "[]", '{"log_history": [{"step": 1}]}'):
        path.write_text(text)
        with pytest.raises(MethodError, match="cannot be read as learning rates"):
            read_history(str(path))


# The optimizer.


def values(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {"w": nn.Parameter(torch.randn(6, 8, generator=generator)), "gain": nn.Parameter(torch.ones(8))}


def push(held: Mapping[str, nn.Parameter], step: int) -> None:
    """Gradients that follow from the step alone."""
    generator = torch.Generator().manual_seed(step)
    for value in held.values():
        value.grad = torch.randn(value.shape, generator=generator)


def test_optimizer_is_adamw_where_nothing_is_pruned() -> None:
    ours, theirs = values(), values()
    optimizer = Optimizer(ours, {}, decay=0.1, clip=0.0)
    reference = torch.optim.AdamW(
        [{"params": [theirs["w"]], "weight_decay": 0.1}, {"params": [theirs["gain"]], "weight_decay": 0.0}], lr=0.05
    )
    for step in range(5):
        push(ours, step)
        push(theirs, step)
        optimizer.step(0.05)
        reference.step()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_masks_are_held_whatever_decay_and_old_moments_do() -> None:
    held = values()
    masks: dict[str, torch.Tensor] = {}
    optimizer = Optimizer(held, masks, decay=0.5, clip=1.0)
    push(held, 0)
    optimizer.step(0.1)  # every weight has moments
    masks["w"] = torch.rand(6, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    for step in range(1, 11):
        push(held, step)
        optimizer.step(0.1)
        assert not held["w"][~masks["w"]].view(torch.int32).any()  # to the bit
        for key in ("exp_avg", "exp_avg_sq"):
            assert not optimizer.adam.state[held["w"]][key][~masks["w"]].any()
    assert (held["w"][masks["w"]] != 0).all()


def test_pruned_gradients_do_not_count_when_clipping() -> None:
    held = values()
    masks = {"w": torch.zeros(6, 8, dtype=torch.bool)}
    masks["w"][0, 0] = True
    optimizer = Optimizer(held, masks, decay=0.0, clip=1.0)
    held["w"].grad, held["gain"].grad = torch.full((6, 8), 100.0), torch.zeros(8)
    assert optimizer.step(0.1) == pytest.approx(100.0)


def test_optimizer_continues_to_the_bit(tmp_path: Path) -> None:
    whole, cut = values(), values()
    straight, first = (Optimizer(held, {}, decay=0.1, clip=1.0) for held in (whole, cut))
    for step in range(6):
        push(whole, step)
        straight.step(0.05)
    for step in range(3):
        push(cut, step)
        first.step(0.05)
    write_snapshot(tmp_path / "state", dict(first.state()))
    snapshot = Snapshot(tmp_path / "state")
    again = Optimizer(cut, {}, decay=0.1, clip=1.0)
    again.restore(snapshot.infos, snapshot.read)
    for step in range(3, 6):
        push(cut, step)
        again.step(0.05)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


# Windows.


def text(count: int, length: int = 4) -> Calibration:
    return Calibration(torch.arange(count * length).view(count, length), "numbers", count)


def test_every_window_comes_once_then_again_in_another_order() -> None:
    lessons = Lessons.of(text(25), 5, seed=0)
    assert (len(lessons.rows), len(lessons.held_out)) == (20, 5)
    seen = torch.cat([lessons.batch(step, 8).tokens for step in range(5)])[:, 0].tolist()  # two rounds of all twenty
    held_out = lessons.held_out.batch(range(5)).tokens[:, 0].tolist()
    assert sorted(seen[:20]) == sorted(seen[20:])
    assert sorted(seen[:20] + held_out) == list(range(0, 100, 4))
    assert seen[:20] != seen[20:]
    again, other = (Lessons.of(text(25), 5, seed=seed) for seed in (0, 1))
    assert torch.equal(lessons.batch(3, 8).tokens, again.batch(3, 8).tokens)
    assert not torch.equal(lessons.batch(3, 8).tokens, other.batch(3, 8).tokens)
    assert lessons.passed(5, 8) == 160
    assert len(Lessons.of(text(8), 5, seed=0).held_out) == 2  # at most a quarter


def test_a_single_window_is_too_little() -> None:
    with pytest.raises(CalibrationError, match="1 window or example is too little to train on"):
        Lessons.of(text(1), 4, seed=0)
    assert len(Lessons.of(text(2), 4, seed=0).rows) == 1


def test_curve_is_of_means() -> None:
    assert curve([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
    assert curve([1.0, 3.0], 5) == [1.0, 3.0]


# Whole runs.


def test_killed_again_and_again(compress: Commands, small: Path, tmp_path: Path) -> None:
    """At every journal entry, put by after each step; the end is the same, byte for byte."""
    command = ("prune", small, *words(**QUICK, rewind="step", rewind_step=1, weight_decay=0.1), "-q", "-o", "out")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert compress(*command, cwd=tmp_path / "a").code == 0
    fault, killed = ["signal_at", DONE, 1, {"after": True}], 0
    while (run := compress(*command, cwd=tmp_path / "b", faults=[fault, *ALWAYS])).code == -signal.SIGKILL:
        killed += 1
        assert killed < 20
    assert run.code == 0, run.err
    assert killed == 9  # the proof, three steps in two rounds, what was trained, what was copied
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b" / "out")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["out", "out.run.log"]


def test_killed_while_it_is_put_by(compress: Commands, small: Path, tmp_path: Path) -> None:
    command = ("prune", small, *words(**QUICK), "-q", "-o", "out")
    assert compress(*command, cwd=tmp_path).code == 0
    before = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "first")
    where = "weightworks.engine.modelwise:write_snapshot"
    for fault in (["signal_at", where, 2], ["signal_at", where, 2, {"after": True}]):
        assert compress(*command, cwd=tmp_path, faults=[fault, *ALWAYS]).code == -signal.SIGKILL
    run = compress(*command[:-3], "-o", "out", cwd=tmp_path)
    assert run.code == 0, run.err
    assert "resuming after step 2 of round 1" in run.err
    assert contents(tmp_path / "out") == before


def test_blocks_run_again_give_the_same_bytes(small: Path, tmp_path: Path) -> None:
    """Gradient checkpointing, asked for and because memory is short; it is chosen by memory, so it must not show."""
    made = [
        prune(small, **QUICK, gradient_checkpointing=way, output_dir=tmp_path / way).target / "model.safetensors"
        for way in ("on", "off")
    ]
    assert file_digest(made[0]) == file_digest(made[1])


def test_parts_of_a_batch_add_up(small: Path, tmp_path: Path) -> None:
    options = {**QUICK, "batch_size": 4, "rounds": 1, "steps": 2}
    ways = {parts: prune(small, **options, accumulate=parts, output_dir=tmp_path / str(parts)) for parts in (1, 4)}
    losses = [out.provenance["training"]["rounds"][0]["losses"] for out in ways.values() if out.provenance]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    views = [DenseView(Checkpoint.open(out.target)) for out in ways.values()]
    for name in views[0].names:
        assert torch.allclose(views[0].read(name, torch.float32), views[1].read(name, torch.float32), atol=2e-2)


def test_bfloat16_trains_float32_values(small: Path, tmp_path: Path) -> None:
    """With a rate so low that a step is lost on bfloat16 weights, sixteen steps still add up."""
    options = {**QUICK, "dtype": "bfloat16", "rounds": 1, "steps": 16, "lr": 1e-4, "schedule": "ft", "sparsity": 0.1}
    outcome = prune(small, **options, output_dir=tmp_path / "out")
    assert outcome.provenance is not None
    rounds = outcome.provenance["training"]["rounds"]
    assert rounds[0]["held_out_after"] < rounds[0]["held_out_begun"] - 0.01
    with pytest.raises(MethodError, match="--dtype float16 cannot train"):
        prune(small, **{**QUICK, "dtype": "float16"}, output_dir=tmp_path / "half")


def test_a_training_that_diverges_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"the training diverged: loss (nan|inf).* at step \d of round 1") as caught:
        prune(small, **{**QUICK, "steps": 8, "lr": 1e30, "max_grad_norm": 0.0}, output_dir=tmp_path / "out")
    assert "--lr" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["out.run.log"]


def test_provenance_tells_of_the_training(compress: Commands, small: Path, tmp_path: Path) -> None:
    run = compress("prune", small, *words(**QUICK), "-o", "out", "--json", cwd=tmp_path)
    facts = run.json["training"]
    assert facts["steps"] == 6
    assert facts["tokens"] == 6 * 2 * 32
    assert facts["trained_share"] == 1.0
    assert len(facts["rounds"]) == 2
    assert all(len(one["losses"]) == 3 for one in facts["rounds"])
    assert facts["held_out"]["before"] == facts["rounds"][0]["held_out_before"]
    assert facts["rounds"][1]["held_out_before"] == facts["rounds"][0]["held_out_after"]
    assert run.json["calibration"]["windows_held_out"] == 2
    assert "held-out loss" in run.err
    assert "| training |" in (tmp_path / "out" / "README.md").read_text()


def test_dry_run_says_what_it_takes(compress: Commands, small: Path, tmp_path: Path) -> None:
    command = ("prune", small, *words(**QUICK), "-o", "out", "--dry-run", "--json")
    costs = compress(*command, cwd=tmp_path).json["estimate"]
    assert costs["recompute"] is False
    assert costs["disk_bytes"] > costs["output_bytes"] + 2 * 12 * 330_000
    assert not list(tmp_path.iterdir())
    tight = compress(*command, "--max-memory", str(costs["peak_bytes"] - 200_000), cwd=tmp_path).json["estimate"]
    assert tight["recompute"] is True
    assert tight["peak_bytes"] < costs["peak_bytes"]
    run = compress(*command[:-2], "--max-memory", "50MB", cwd=tmp_path)
    assert run.code == 1
    assert "too little memory" in run.err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"accumulate": 3}, "batch_size = 2 cannot be taken in accumulate = 3 parts"),
        ({"schedule": "lrw"}, "schedule lrw follows the original schedule: lr_history is needed"),
        ({"rewind": "step"}, "rewind = step and rewind_step belong together"),
        ({"rewind": "step", "rewind_step": 4}, "rewind_step = 4 is more than the 3 steps of a round"),
        ({"scope": "global", "pattern": "2:4"}, "no N:M pattern"),
        ({"scope": "global", "sparsity": 0.995}, "min_density = 0.01 is more than the 0.005 that stay"),
        ({"lr_history": " "}, "must be the name of a file"),
        ({"budget": "owl"}, "prune.imp has no option 'budget'"),
    ],
)
def test_what_cannot_be_is_refused(small: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        prune(small, **{**QUICK, **options})


def test_history_is_part_of_what_is_made(small: Path, tmp_path: Path) -> None:
    """The same name with other rates is another run."""
    path = tmp_path / "rates.json"
    made = []
    for text in ("[0.001, 0.001, 0.001]", "[0.002, 0.001, 0.001]"):
        path.write_text(text)
        options = {**QUICK, "schedule": "slr", "lr_history": str(path), "overwrite": True}
        outcome = prune(small, **options, output_dir=tmp_path / "out")
        assert not outcome.cached
        assert outcome.provenance is not None
        made.append(outcome.provenance["stage"])
    assert made[0] != made[1]


SCHEDULES: tuple[Schedule, ...] = ("ft", "lrw", "slr", "clr", "llr", "allr")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_are_never_negative_and_as_many_as_steps(schedule: Schedule) -> None:
    for steps in (1, 2, 7):
        found = rates(schedule, steps, top=1e-3, history=[1e-3] * 10)
        assert len(found) == steps
        assert all(0 < rate <= 1e-3 for rate in found)
