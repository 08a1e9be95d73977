"""The learned soup: weights of the models, block by block or tensor by tensor, fitted to held-out text by gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from merge._greedy import line, no_candidate
from weightworks.stage.merging import Bench, Fit, Whole

RATE = 0.05  # of AdamW, the authors'
BATCH_TOKENS = 2048  # of a step: as many windows as make about so many
EVERYWHERE = "model"  # the one group where all tensors share their weights


@dataclass(frozen=True)
class Learned:
    """``weights`` by group [N], each adding up to one; mean loss (nats) of every epoch; ``beta``, the scale of logits."""

    weights: Mapping[str, Sequence[float]]
    losses: Sequence[float]
    beta: float


def group_of(whole: Whole, parameter: str, per: str) -> str:
    """The name under which ``parameter`` shares its weights with others."""
    return {"tensor": parameter, "block": whole.blocks[parameter]}.get(per, EVERYWHERE)


def learn(whole: Whole, per: str, epochs: int) -> Learned:
    """Minimise the cross entropy of beta f(x; sum_i alpha_i theta_i) over alpha = softmax(a), a [N] a group, and beta.

    Starts from the uniform soup and beta = 1; AdamW without weight decay, windows in text order (Wortsman et al. 2022,
    appendix I). Raises nothing: a loss that is no number is returned as it is.
    """
    with repeatable():
        return _learn(whole, per, epochs)


def _learn(whole: Whole, per: str, epochs: int) -> Learned:
    groups = {name: group_of(whole, name, per) for name in whole.stacks}
    count = next(iter(whole.stacks.values())).shape[0]
    logits = {group: torch.zeros(count, requires_grad=True) for group in dict.fromkeys(groups.values())}
    beta = torch.ones((), requires_grad=True)
    optimizer = torch.optim.AdamW([*logits.values(), beta], lr=RATE, weight_decay=0.0)
    batch = max(1, BATCH_TOKENS // whole.windows.shape[1])
    losses = []
    for _ in range(epochs):
        total, tokens_seen = 0.0, 0
        for tokens in whole.windows.split(batch):
            alpha = {group: value.softmax(0) for group, value in logits.items()}
            mixed = {name: mix(alpha[groups[name]], stack) for name, stack in whole.stacks.items()}
            out = beta * whole.logits(mixed, tokens)[:, :-1].float()  # [batch, seq - 1, vocabulary]
            loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen = tokens[:, 1:].numel()
            total, tokens_seen = total + float(loss.detach()) * seen, tokens_seen + seen
        losses.append(total / tokens_seen)
    weights = {group: value.detach().double().softmax(0).tolist() for group, value in logits.items()}
    return Learned(weights, losses, float(beta.detach()))


@contextmanager
def repeatable() -> Iterator[None]:
    """Only kernels whose sums do not depend on which thread comes first: the weights must be the same the next time."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def mix(alpha: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
    """sum_i alpha_i theta_i of ``stack`` [N, ...] with ``alpha`` [N]."""
    return torch.tensordot(alpha, stack, dims=1)


def fit(bench: Bench, *, per: str, epochs: int) -> Fit:
    """The learned soup of the models on ``bench``; what it scores beside each of them and their uniform soup."""
    names = bench.names
    alone = [bench.perplexity([number]) for number in range(len(names))]
    members = [number for number, value in enumerate(alone) if math.isfinite(value)]
    if not members:
        raise no_candidate(names)
    uniform = bench.perplexity(members)
    whole = bench.whole(members)
    learned = learn(whole, per, epochs)
    found = {
        tensor: list(learned.weights[group_of(whole, name, per)])
        for name, tensors in whole.tensors.items()
        for tensor in tensors
    }
    del whole
    soup = bench.perplexity(members, found)
    lines = [line(value, names[number]) for number, value in enumerate(alone)]
    lines += [line(uniform, "their uniform soup"), line(soup, "the learned soup")]
    facts = {
        "way": f"learned by {per}",
        "perplexity": soup,
        "uniform": uniform,
        "losses": list(learned.losses),
        "beta": learned.beta,
        "weights": {group: list(values) for group, values in learned.weights.items()},
        "lines": lines,
    }
    return Fit(members, found, facts)
