"""The statistics of a linear layer and the factor of their inverse: exact, in place, and honest when H is bad."""

from __future__ import annotations

import pytest
import torch

from compress.hessian import Hessian, factor, inverse_cholesky_, permute_
from weightworks.stream import gram

pytestmark = pytest.mark.usefixtures("one_thread")


def definite(size: int, seed: int = 0) -> torch.Tensor:
    """A well conditioned covariance [size, size] in float32."""
    x = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(seed))
    return (x.T @ x / (2 * size)).add_(0.1 * torch.eye(size))


def expected_factor(matrix: torch.Tensor) -> torch.Tensor:
    """Lower L with inv(H) = L L', in float64 by the textbook."""
    return torch.linalg.cholesky(torch.linalg.inv(matrix.double()))


@pytest.fixture(params=["torch", "scipy"])
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small matrices by the narrow path, and by the wide one in several tiles."""
    if request.param == "scipy":
        monkeypatch.setattr(gram, "WIDE", 1)
        monkeypatch.setattr(gram, "TILE", 16)
    return str(request.param)


@pytest.mark.parametrize("size", [1, 2, 16, 33, 100])
def test_factor_of_the_inverse(size: int, narrow: str) -> None:
    matrix = definite(size)
    found = matrix.flip(0, 1).contiguous()
    assert inverse_cholesky_(found)
    torch.testing.assert_close(found.double(), expected_factor(matrix), rtol=1e-4, atol=1e-5)
    assert torch.equal(found, found.tril())


@pytest.mark.parametrize("size", [gram.WIDE - 1, gram.WIDE, gram.WIDE + 65])
def test_factor_of_the_inverse_at_the_real_width(size: int) -> None:
    matrix = definite(size)
    found = matrix.flip(0, 1).contiguous()
    assert inverse_cholesky_(found)
    torch.testing.assert_close(found.double(), expected_factor(matrix), rtol=1e-3, atol=1e-4)


def test_a_failed_factorisation_can_be_tried_again(narrow: str) -> None:
    matrix = definite(40) - torch.eye(40)
    found = matrix.flip(0, 1).contiguous()
    assert not inverse_cholesky_(found)
    assert torch.equal(found.tril(-1), matrix.flip(0, 1).tril(-1))


@pytest.mark.parametrize("size", [8, 40])
def test_statistics_are_those_of_all_batches(size: int, narrow: str) -> None:
    inputs = torch.randn(100, size, generator=torch.Generator().manual_seed(0))
    hessian = Hessian(size)
    for batch in inputs.split(30):
        hessian.add(batch.bfloat16())
    matrix = hessian.finish()
    x = inputs.bfloat16().double()
    torch.testing.assert_close(matrix.double(), 2 / 100 * x.T @ x, rtol=1e-5, atol=1e-5)
    assert torch.equal(matrix, matrix.T)
    assert (hessian.tokens, hessian.dropped) == (100, 0)


def test_batches_with_nan_or_infinity_are_dropped_whole(narrow: str) -> None:
    hessian = Hessian(16)
    hessian.add(torch.ones(3, 16))
    for value in (torch.nan, torch.inf, -torch.inf):
        batch = torch.ones(2, 16)
        batch[1, 3] = value
        hessian.add(batch)
    hessian.add(torch.tensor([[3e38] * 16, [-3e38] * 16]))  # finite, though its sum may not be
    assert (hessian.tokens, hessian.dropped) == (5, 6)


def test_no_tokens_give_zeros(narrow: str) -> None:
    assert not Hessian(16).finish().any()


@pytest.mark.parametrize("size", [5, 16, 40])
def test_permutation_in_place(size: int, narrow: str) -> None:
    matrix = definite(size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    found = matrix.clone()
    permute_(found, order)
    assert torch.equal(found, matrix[order][:, order])


def test_order_and_damping(narrow: str) -> None:
    matrix = definite(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    found = factor(matrix.clone(), order, damp_percent=0.05)
    damped = matrix.double() + 0.05 * matrix.diagonal().double().mean() * torch.eye(40)
    assert found.lower is not None
    torch.testing.assert_close(found.lower.double(), expected_factor(damped[order][:, order]), rtol=1e-4, atol=1e-5)
    assert (found.damping, found.steps) == (0.05, [])


# The failure ladder


def test_a_singular_hessian_is_damped(narrow: str) -> None:
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    found = factor(x.T @ x, torch.arange(40), damp_percent=0.01)
    assert found.lower is not None
    assert torch.isfinite(found.lower).all()
    assert found.steps == []


def test_damping_rises_until_it_works(narrow: str) -> None:
    matrix = definite(40)
    lowest = float(torch.linalg.eigvalsh(matrix)[0])
    matrix -= (lowest + 0.105 * float(matrix.diagonal().mean())) * torch.eye(40)  # lowest eigenvalue now below zero
    mean = float(matrix.diagonal().mean())
    lowest = float(torch.linalg.eigvalsh(matrix)[0])
    found = factor(matrix.clone(), torch.arange(40), damp_percent=0.01)
    assert found.lower is not None
    assert found.damping == pytest.approx(-lowest / mean, abs=0.011)
    assert found.steps == [f"damping raised from 0.01 to {found.damping:g}"]
    damped = matrix.double() + found.damping * mean * torch.eye(40)
    torch.testing.assert_close(found.lower.double(), expected_factor(damped), rtol=2e-2, atol=1e-3)


def test_then_the_diagonal_gets_a_floor(narrow: str) -> None:
    """Two inputs with tiny variances and an impossible covariance: only the floor can help."""
    matrix = torch.eye(40)
    matrix[0, 0] = matrix[1, 1] = -2.0
    found = factor(matrix, torch.arange(40), damp_percent=0.01)
    assert found.lower is not None
    assert found.steps == ["damping raised from 0.01 to 1, diagonal floor 1e-06"]
    assert torch.isfinite(found.lower).all()


def test_what_nothing_helps_is_given_up_in_words(narrow: str) -> None:
    matrix = torch.full((40, 40), 10.0)
    matrix.diagonal().fill_(1.0)  # correlations of ten
    found = factor(matrix, torch.arange(40), damp_percent=0.01)
    assert found.lower is None
    assert found.steps == ["not positive definite at any damping"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_diagonal_that_is_not_finite_is_given_up(value: float, narrow: str) -> None:
    matrix = definite(40)
    matrix[3, 3] = value
    found = factor(matrix, torch.arange(40), damp_percent=0.01)
    assert found.lower is None
    assert found.steps == ["statistics are not finite"]


def test_nan_beside_the_diagonal_is_given_up(narrow: str) -> None:
    matrix = definite(40)
    matrix[3, 5] = matrix[5, 3] = torch.nan
    found = factor(matrix, torch.arange(40), damp_percent=0.01)
    assert found.lower is None
    assert found.steps == ["not positive definite at any damping"]
