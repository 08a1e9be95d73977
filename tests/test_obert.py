"""oBERT and the Fisher matrix it asks: against dense algebra, in both forms; gradients against whole-model backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from commands import FEW, Commands

from compress import prune
from compress.fisher import Blocks, Fisher, Free
from compress.masks import top_mask
from compress.prune import obert
from weightworks.engine.gradients import Backward
from weightworks.stage.protocols import Solution, Target
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.sources import file_digest

pytestmark = pytest.mark.usefixtures("one_thread")
ELEMENTS, COUNT, DAMPING = 24, 40, 1e-2


def gradients(elements: int = ELEMENTS, count: int = COUNT) -> torch.Tensor:
    return torch.randn(count, elements, generator=torch.Generator().manual_seed(0))


def told(fisher: Fisher, every: torch.Tensor) -> Fisher:
    for gradient in every:
        fisher.add(gradient)
    return fisher


def dense(every: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """F, float64 [d, d]."""
    g = every.double()
    return g.T @ g / len(g) + damping * torch.eye(g.shape[1], dtype=torch.float64)


def block_diagonal(matrix: torch.Tensor, size: int) -> torch.Tensor:
    place = torch.arange(len(matrix)) // size
    return matrix * (place[:, None] == place[None])


@pytest.mark.parametrize("size", [1, 5, 8, 24, 50])
def test_blocks_are_the_inverse(size: int) -> None:
    fisher = told(Blocks(ELEMENTS, size, COUNT, DAMPING), gradients())
    expected = torch.linalg.inv(block_diagonal(dense(gradients()), size)).diagonal()
    torch.testing.assert_close(fisher.inverse_diagonal().double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("count", [8, 40])
def test_the_matrix_free_form_is_the_inverse_and_mfacs_recursion(count: int) -> None:
    every = gradients(count=count)
    fisher = told(Free(ELEMENTS, count, DAMPING), every)
    expected = torch.linalg.inv(dense(every)).diagonal()
    torch.testing.assert_close(fisher.inverse_diagonal().double(), expected, rtol=1e-3, atol=0)
    g, terms = every.double(), []  # c_i = inv(F_{i-1}) g_i and D_i = m + g_i c_i
    for one in g:
        c = one / DAMPING - sum((float(b @ one) / d * b for b, d in terms), torch.zeros_like(one))
        terms.append((c, count + float(one @ c)))
    recursion = 1 / DAMPING - sum(c.square() / d for c, d in terms)
    torch.testing.assert_close(fisher.inverse_diagonal().double(), recursion, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("fisher", "size"), [("blocks", 8), ("blocks", 24), ("matrix-free", 24)])
def test_updates_are_the_joint_minimum(fisher: str, size: int) -> None:
    """dw = -inv(F)[:, P] inv(inv(F)[P, P]) w_P for all removed weights P together."""
    every, weight = gradients(), torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(1))
    made = Blocks(ELEMENTS, size, COUNT, DAMPING) if fisher == "blocks" else Free(ELEMENTS, COUNT, DAMPING)
    mask = torch.rand(ELEMENTS, generator=torch.Generator().manual_seed(2)) < 0.6
    result = told(made, every).updated(weight, mask)
    inverse = torch.linalg.inv(block_diagonal(dense(every), size))
    gone = ~mask
    change = -inverse[:, gone] @ torch.linalg.inv(inverse[gone][:, gone]) @ weight[gone].double()
    torch.testing.assert_close(result.double(), (weight + change).masked_fill(gone, 0), rtol=1e-3, atol=1e-4)
    assert not result[gone].any()


def test_a_single_removal_costs_its_score() -> None:
    every, weight = gradients(), torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(1))
    fisher = told(Blocks(ELEMENTS, ELEMENTS, COUNT, DAMPING), every)
    mask = torch.arange(ELEMENTS) != 7
    change = (fisher.updated(weight, mask) - weight).double()
    score = weight[7] ** 2 / (2 * fisher.inverse_diagonal()[7])
    assert float(change @ dense(every) @ change) / 2 == pytest.approx(float(score), rel=1e-3)


def answer(weight: torch.Tensor, every: torch.Tensor, **options: Any) -> Any:
    method = obert.Method(obert.Options(**options))
    traced = told(method.trace(weight.numel(), len(every), torch.device("cpu")), every)
    return method.answer(weight.clone(), traced, Target("w", torch.float32))


def test_blocks_of_one_rank_by_w_squared_f() -> None:
    weight, every = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), gradients(128)
    solution = answer(weight, every, fisher_block=1, damp=1e-6)
    scores = weight.square() * (every.square().mean(0) + 1e-6).view(8, 16)
    assert torch.equal(solution.mask, top_mask(scores, 64))
    assert torch.equal(solution.dense(), weight.masked_fill(~solution.mask, 0))  # nothing to make up with


@pytest.mark.parametrize("fisher", ["blocks", "matrix-free"])
def test_much_damping_is_magnitude(fisher: str) -> None:
    weight, every = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), gradients(128)
    solution = answer(weight, every, fisher=fisher, damp=1e6)
    assert torch.equal(solution.mask, top_mask(weight.abs(), 64))
    torch.testing.assert_close(solution.dense(), weight.masked_fill(~solution.mask, 0), rtol=1e-4, atol=1e-5)


# Gradients of a streamed model.


class Noting:
    """Keeps gradients as they come."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def add(self, gradient: torch.Tensor) -> None:
        self.seen.append(gradient.clone())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_gradients_are_those_of_the_whole_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block from the last, they equal one backward pass through stock transformers, window by window."""
    from transformers import AutoModelForCausalLM

    source, kept, tokens = ARCHITECTURES[name].save(tmp_path / "source"), {}, []
    right = Backward.__init__

    def noting(self: Backward, *args: Any, **kwargs: Any) -> None:
        right(self, *args, **kwargs)
        tokens.append(self.windows.tokens)

    def answered(self: obert.Method, weight: torch.Tensor, traced: Noting, target: Target) -> Solution:
        kept[target.name] = traced.seen
        mask = top_mask(weight.abs(), weight.numel() // 2)
        return Solution(weight.masked_fill(~mask, 0), mask=mask)

    monkeypatch.setattr(Backward, "__init__", noting)
    monkeypatch.setattr(obert.Method, "trace", lambda self, elements, count, device: Noting())
    monkeypatch.setattr(obert.Method, "answer", answered)
    prune(source, method="obert", output_dir=tmp_path / "out", num_samples=3, seq_len=32, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    state = dict(model.named_parameters())
    for number, window in enumerate(tokens[0]):
        model.zero_grad()
        model(input_ids=window[None], labels=window[None]).loss.backward()
        for tensor, seen in kept.items():
            if tensor not in state or state[tensor].grad is None:
                continue  # an expert's slice of a fused parameter
            whole = state[tensor].grad
            expected = whole.T if name == "gpt2" else whole
            torch.testing.assert_close(
                seen[number], expected, rtol=1e-3, atol=1e-6 + 1e-4 * float(expected.abs().max())
            )
    assert any(tensor in state for tensor in kept)


MLP = ("--ignore", "*.self_attn.*", "--method", "obert", "--sparsity", "0.7", "-q")


def test_it_prunes_and_resumes(compress: Commands, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    whole = compress("prune", tiny_llama, *FEW, *MLP, "-o", "a", "--json", cwd=tmp_path)
    assert whole.code == 0, whole.err
    rows = whole.json["report"]
    assert [row["tensor"] for row in rows] == sorted(
        (row["tensor"] for row in rows), key=lambda name: name.split(".")[2]
    )
    assert all(abs(row["sparsity"] - 0.7) < 1e-4 and row["added_loss"] > 0 for row in rows)
    fault = ["signal_at", "weightworks.store.writer:CheckpointWriter.done", 2, {"after": True}]
    for _ in range(12):
        run = compress("prune", tiny_llama, *FEW, *MLP, "-o", "b/a", cwd=tmp_path, faults=[fault])
        if run.code == 0:
            break
    assert run.code == 0, run.err
    folders = tmp_path / "a", tmp_path / "b" / "a"
    first, second = ({path.name: file_digest(path) for path in folder.iterdir()} for folder in folders)
    assert first == second


def test_little_memory_gives_the_same_bytes(compress: Commands, tiny_llama: Path, tmp_path: Path) -> None:
    """Traces in several rounds, gradients between blocks on disk."""
    words = ("prune", tiny_llama, *FEW, *MLP)
    assert compress(*words, "-o", "a", cwd=tmp_path).code == 0
    (tmp_path / "b").mkdir()
    tight = ["planned", {"on_disk": True, "statistics_bytes": 1}]
    assert compress(*words, "-o", "b/a", cwd=tmp_path, faults=[tight]).code == 0
    a, b = (DenseView(Checkpoint.open(tmp_path / place)) for place in ("a", "b/a"))
    for name in a.names:
        assert torch.equal(a.read(name), b.read(name)), name
