"""The greedy soup: members by their own score, each kept if the average with it scores better."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from weightworks.errors import MethodError
from weightworks.stage.merging import Bench, Fit


@dataclass(frozen=True)
class Trial:
    """An average that was scored: numbers of its members, its perplexity, whether it was taken on."""

    members: tuple[int, ...]
    perplexity: float
    accepted: bool


@dataclass(frozen=True)
class Choice:
    """``members`` in argument order; each candidate's own ``perplexity``; the averages tried, in turn."""

    members: tuple[int, ...]
    alone: tuple[float, ...]
    trials: tuple[Trial, ...]

    @property
    def perplexity(self) -> float:
        """That of the chosen average."""
        accepted = [trial.perplexity for trial in self.trials if trial.accepted]
        return accepted[-1] if accepted else min(filter(math.isfinite, self.alone), default=math.nan)


def greedy(
    names: Sequence[str],
    perplexity: Callable[[Sequence[int]], float],
    *,
    min_gain: float = 0.0,
    or_equal: bool = False,
) -> Choice:
    """Choose among N candidates by held-out ``perplexity`` of averages, in N + N - 1 scores.

    Candidates come in order of their own perplexity, equal ones in order of ``names``. A candidate is taken on if the
    average with it has a lower perplexity, by the fraction ``min_gain`` at least; with ``or_equal`` the least gain itself
    is enough. Each is tried once (Wortsman et al. 2022, algorithm 1; its text says ``or_equal``, its code does not).
    """
    alone = tuple(perplexity([number]) for number in range(len(names)))
    ranked = sorted(
        (number for number, value in enumerate(alone) if math.isfinite(value)),
        key=lambda number: (alone[number], names[number], number),
    )
    if not ranked:
        return Choice((), alone, ())
    members: tuple[int, ...] = (ranked[0],)
    best, trials = alone[ranked[0]], []
    for number in ranked[1:]:
        tried = tuple(sorted((*members, number)))  # in argument order, as the merge adds them up
        value = perplexity(tried)
        gain = 1 - value / best
        accepted = gain >= min_gain if or_equal else gain > 0 and gain >= min_gain
        trials.append(Trial(tried, value, accepted))
        if accepted:
            members, best = tried, value
    return Choice(members, alone, tuple(trials))


def choose(bench: Bench, *, min_gain: float, or_equal: bool) -> Fit:
    """The greedy soup of the models on ``bench``, and what the report says of how it came about."""
    names = bench.names
    choice = greedy(names, bench.perplexity, min_gain=min_gain, or_equal=or_equal)
    if not choice.members:
        raise no_candidate(names)
    lines = [line(value, names[number]) for number, value in enumerate(choice.alone)]
    trials: list[dict[str, Any]] = []
    for trial in choice.trials:
        members = [names[number] for number in trial.members]
        trials.append({"members": members, "perplexity": trial.perplexity, "accepted": trial.accepted})
        lines.append(line(trial.perplexity, f"{' + '.join(members)}: {'kept' if trial.accepted else 'not kept'}"))
    facts = {"way": "greedy", "perplexity": choice.perplexity, "trials": trials, "lines": lines}
    return Fit(choice.members, None, facts)


def line(value: float, what: str) -> str:
    """A line of the table of scores."""
    return f"{value:10.4f}  {what}" if math.isfinite(value) else f"{'none':>10}  {what}: rejected"


def no_candidate(names: Sequence[str]) -> MethodError:
    return MethodError(
        f"no model can be scored: the weights or the perplexity of {', '.join(names)} are not finite",
        hint="repair the models, or give others",
    )
