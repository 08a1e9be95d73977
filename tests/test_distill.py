"""Distillation: its losses, that a teacher in memory and one on disk teach the same, masks held, killed and continued, refused."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Commands

from compress import recover
from compress.recover.distill import Method, Options
from weightworks.engine.imitating import Imitating, counterparts, distance, divergence
from weightworks.engine.job import Job
from weightworks.engine.teacher import Teacher
from weightworks.engine.trained import given_masks, whole
from weightworks.errors import MethodError, UsageError
from weightworks.report.progress import Progress
from weightworks.stage.settings import Settings
from weightworks.store.checkpoint import MASKS, Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.masks import Masks
from weightworks.store.sources import file_digest
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.calibration import Calibration
from weightworks.stream.lessons import Lessons
from weightworks.stream.whole import Whole
from weightworks.testing.tiny import CALIBRATION_TEXT, make_model

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TEXT: dict[str, Any] = {"dataset": str(CALIBRATION_TEXT), "seq_len": 32, "device": "cpu", "dtype": "float32"}
QUICK: dict[str, Any] = {**TEXT, "method": "distill", "steps": 3, "batch_size": 2, "held_out": 2, "lr": 1e-2, "rank": 4}
DONE = "weightworks.store.writer:CheckpointWriter.done"
ALWAYS = [["constant", f"weightworks.engine.modelwise:SAVE_{name}", 0] for name in ("SECONDS", "SHARE")]


def words(**options: Any) -> list[str]:
    return [text for key, value in options.items() for text in ("--" + key.replace("_", "-"), str(value))]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.iterdir())}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Losses.


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_that_of_the_definition(temperature: float) -> None:
    logits, taught = normal(5, 7, seed=0), normal(5, 7, seed=1)
    p, q = (torch.softmax(one / temperature, -1) for one in (taught, logits))
    expected = temperature**2 * (p * (p / q).log()).sum()
    torch.testing.assert_close(divergence(logits, taught, temperature), expected)
    assert float(divergence(taught, taught, temperature)) == 0.0


def test_distance_is_relative_token_by_token() -> None:
    taught = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    assert float(distance(taught * 1.1, taught)) == pytest.approx(2 * 0.01, rel=1e-4)


def test_gradients_are_those_of_finite_differences() -> None:
    logits, taught = normal(4, 6, seed=2).requires_grad_(), normal(4, 6, seed=3)
    assert torch.autograd.gradcheck(lambda one: divergence(one, taught, 2.0), (logits,))
    assert torch.autograd.gradcheck(lambda one: distance(one, taught), (logits,))


def test_gradients_are_not_smaller_at_a_higher_temperature() -> None:
    logits, taught = normal(64, 16, seed=4), normal(64, 16, seed=5)
    norms = []
    for temperature in (1.0, 8.0):
        own = logits.clone().requires_grad_()
        divergence(own, taught, temperature).backward()
        assert own.grad is not None
        norms.append(float(own.grad.norm()))
    assert 0.3 < norms[1] / norms[0] < 3


def test_blocks_have_their_counterparts() -> None:
    assert counterparts(4, 4) == [0, 1, 2, 3]
    assert counterparts(2, 6) == [2, 5]
    assert counterparts(3, 4)[-1] == 3


@contextmanager
def imitating(sparse: Path, small: Path, folder: Path, **options: Any) -> Iterator[tuple[Whole, Imitating, Lessons]]:
    """The model in memory, and its loss against the original."""
    method, settings, target = Method(Options(**options)), Settings(**TEXT), folder / "out"
    parts = "recover.distill", 1, method, settings, Checkpoint.open(sparse), target, Progress(quiet=True), CPU
    job = Job(*parts, Checkpoint.open(small))
    writer = CheckpointWriter(target, job.specs, {"method": "test"}, side=job.side)
    tokens = torch.randint(512, (8, 16), generator=torch.Generator().manual_seed(0))
    lessons = Lessons.of(Calibration(tokens, "numbers", 8), 2, seed=0)
    teacher = Teacher.of(job)
    assert teacher is not None
    teacher.loss(lessons)
    loss = Imitating(job, writer, teacher, lessons, torch.float32)
    model = whole(job, torch.float32)
    model.load(masks=given_masks(job))
    yield model, loss, lessons
    loss.close()
    model.unload()
    writer.close()


def test_the_whole_loss_has_the_gradient_of_differences(sparse: Path, small: Path, tmp_path: Path) -> None:
    """Along a random direction of all norms, through logits, hidden states and text at once."""
    options: dict[str, Any] = {"train": ["norm"], "text_weight": 0.5, "temperature": 2.0}
    with imitating(sparse, small, tmp_path, **options) as (model, imitation, lessons):
        batch = lessons.batch(0, 4)
        values = list(model.values.values())
        gradients = torch.autograd.grad(imitation.loss(model, batch), values)
        along = [torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) for value in values]
        slope = sum(float((gradient * way).sum()) for gradient, way in zip(gradients, along, strict=True))
        found = []
        with torch.no_grad():
            for sign in (1, -2):
                for value, way in zip(values, along, strict=True):
                    value.add_(sign * 1e-3 * way)
                found.append(float(imitation.loss(model, batch)))
    assert slope == pytest.approx((found[0] - found[1]) / 2e-3, rel=2e-2)


def test_teachers_in_memory_and_on_disk_teach_the_same(sparse: Path, small: Path, tmp_path: Path) -> None:
    losses = {}
    for where in ("memory", "disk"):
        with (
            imitating(sparse, small, tmp_path / where, teacher_in=where) as (model, imitation, lessons),
            torch.no_grad(),
        ):
            batch = lessons.batch(1, 4)
            losses[where] = float(imitation.loss(model, batch))
            halves = sum(float(imitation.loss(model, part)) for part in batch.parts(2))
        assert halves == pytest.approx(losses[where], rel=1e-5)
    assert losses["memory"] == pytest.approx(losses["disk"], rel=1e-4)


# Whole runs.


@pytest.mark.parametrize("way", [{}, {"train": ["full"], "lr": 1e-3, "teacher_in": "disk"}], ids=str)
def test_zeros_stay_and_the_teacher_is_approached(
    small: Path, sparse: Path, tmp_path: Path, way: dict[str, Any]
) -> None:
    outcome = recover(sparse, teacher=small, **{**QUICK, "steps": 12, **way}, output_dir=tmp_path / "out")
    assert outcome.fallbacks == []
    assert outcome.provenance is not None
    curve = outcome.provenance["training"]["rounds"][0]["losses"]
    assert min(curve[-3:]) < 0.97 * curve[0]
    assert file_digest(outcome.target / MASKS) == file_digest(sparse / MASKS)
    masks, view = Masks.of(sparse), DenseView(Checkpoint.open(outcome.target))
    assert masks is not None
    for name in masks.infos:
        mask = masks.read(name, view.shape(name))
        assert not view.read(name)[~mask].view(torch.int16).any()  # to the bit
        assert torch.all(mask.view(len(mask), -1, 4).sum(-1) == 2)
    changed = {row["tensor"] for row in outcome.provenance["report"]}
    assert ("model.embed_tokens.weight" in changed) == (way.get("train") == ["full"])


def test_the_original_has_nothing_to_learn_of_itself(small: Path, tmp_path: Path) -> None:
    """Its hidden states are its own, and their gradient is zero; that of the divergence is of rounding, which Adam enlarges."""
    outcome = recover(small, teacher=small, **QUICK, logits_weight=0.0, output_dir=tmp_path / "out")
    assert outcome.provenance is not None
    assert outcome.provenance["training"]["rounds"][0]["losses"] == [0.0] * 3
    before, after = (Checkpoint.open(folder) for folder in (small, outcome.target))
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_killed_again_and_again(compress: Commands, small: Path, sparse: Path, tmp_path: Path, where: str) -> None:
    options = {key: value for key, value in QUICK.items() if key != "steps"}
    command = ("recover", sparse, "--teacher", small, *words(**options, steps=2, teacher_in=where), "-q", "-o", "out")
    (tmp_path / "a").mkdir()
    assert compress(*command, cwd=tmp_path / "a").code == 0
    (tmp_path / "b").mkdir()
    faults, killed = [["signal_at", DONE, 1, {"after": True}], *ALWAYS], 0
    while (run := compress(*command, cwd=tmp_path / "b", faults=faults)).code == -signal.SIGKILL:
        killed += 1
        assert killed < 12
    assert run.code == 0, run.err
    # The proof, the teacher's loss, two steps, the changed, the copied; and two blocks of a teacher that is streamed.
    assert killed == 6 + (2 if where == "disk" else 0)
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b" / "out")


def test_a_teacher_of_more_blocks(sparse: Path, small: Path, tmp_path: Path) -> None:
    """The states after half of its blocks are those after the first of two."""
    deep = make_model(tmp_path / "deep", blocks=4)
    outcome = recover(sparse, teacher=deep, **QUICK, teacher_in="disk", output_dir=tmp_path / "out")
    assert outcome.provenance is not None
    assert outcome.provenance["training"]["held_out"]["teacher"] > 0


def test_estimates_say_where_the_teacher_is(compress: Commands, small: Path, sparse: Path, tmp_path: Path) -> None:
    command = ("recover", sparse, "--teacher", small, *words(**QUICK), "--dry-run", "-o", "out")
    costs = {}
    for where in ("memory", "disk"):
        run = compress(*command, "--teacher-in", where, "--json", cwd=tmp_path)
        assert run.code == 0, run.err
        costs[where] = run.json["estimate"]
        assert ("streamed once" in run.err) == (where == "disk")
    assert costs["memory"]["teacher_bytes"] == 2 * Checkpoint.open(small).nbytes  # float32 of what is bfloat16
    assert costs["memory"]["taught_bytes"] == 0
    assert costs["disk"]["taught_bytes"] > 0
    assert costs["disk"]["disk_bytes"] == costs["memory"]["disk_bytes"] + costs["disk"]["taught_bytes"]


def test_what_cannot_be_is_refused(small: Path, sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="distillation imitates the original") as caught:
        recover(sparse, **QUICK, output_dir=tmp_path / "out")
    assert caught.value.hint == "name it: --teacher ORIGINAL"
    wide = make_model(tmp_path / "wide", width=256)
    with pytest.raises(MethodError, match="hidden states of 256 numbers cannot be imitated by those of 128") as caught:
        recover(sparse, teacher=wide, **QUICK, output_dir=tmp_path / "out")
    assert caught.value.hint == "imitate the logits alone: --states-weight 0"
    with pytest.raises(UsageError, match="nothing of the teacher is imitated"):
        recover(sparse, teacher=small, **QUICK, logits_weight=0.0, states_weight=0.0)
    with pytest.raises(UsageError, match="full is every parameter: nothing can be added to it"):
        recover(sparse, teacher=small, **QUICK, train=["full", "norm"])
    assert not (tmp_path / "out.partial").exists()
