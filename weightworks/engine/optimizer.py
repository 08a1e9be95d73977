"""AdamW that holds masks: what is pruned has no gradient, no moments, and stays zero whatever the decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

STATE = ("step", "exp_avg", "exp_avg_sq")  # what torch's AdamW keeps of a value; the last two are moments


class Optimizer:
    """AdamW over ``values``, with the live ``masks`` (bool by name, True where kept) of some of them.

    ``decay`` is of matrices only: gains of norms and biases are left alone. ``clip`` is the norm of all gradients together
    above which they are scaled down, 0 for none.
    """

    def __init__(
        self, values: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor], *, decay: float, clip: float
    ) -> None:
        self.values, self.masks, self.decay, self.clip = values, masks, decay, clip
        self.restart()

    def restart(self) -> None:
        """Forget all moments."""
        matrices = [value for value in self.values.values() if value.ndim > 1]
        others = [value for value in self.values.values() if value.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": self.decay}, {"params": others, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW([group for group in groups if group["params"]], foreach=False)
        self.adam.zero_grad()

    @torch.no_grad()
    def step(self, rate: float) -> float:
        """Take one step with the gradients there are, and forget them; returns their norm before clipping."""
        for name, mask in self._held():
            if (gradient := self.values[name].grad) is not None:
                gradient.masked_fill_(~mask, 0)
        parameters = list(self.values.values())
        norm = nn.utils.clip_grad_norm_(parameters, self.clip or torch.inf, foreach=False)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad()
        self.hold()
        return float(norm)

    @torch.no_grad()
    def hold(self) -> None:
        """Zero what is pruned, its moments too: a weight that went under in decay or in an old moment would come back."""
        for name, mask in self._held():
            value, pruned = self.values[name], ~mask
            value.masked_fill_(pruned, 0)
            for key in STATE[1:]:
                if key in (state := self.adam.state.get(value, {})):
                    state[key].masked_fill_(pruned, 0)

    def _held(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Masks of what is trained itself; a mask may be one of a weight that is adapted."""
        return ((name, mask) for name, mask in self.masks.items() if name in self.values)

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All there is to put by, by name."""
        for name, value in self.values.items():
            yield from ((f"{key} {name}", tensor) for key, tensor in self.adam.state.get(value, {}).items())

    def restore(self, names: Iterable[str], read: Callable[[str], torch.Tensor]) -> None:
        """Continue with the state that ``read`` gives by ``names``."""
        self.restart()
        known = set(names)
        for name, value in self.values.items():
            if f"{STATE[0]} {name}" in known:
                step, *moments = (read(f"{key} {name}") for key in STATE)
                kept = dict(zip(STATE[1:], (moment.to(value.device) for moment in moments), strict=True))
                self.adam.state[value] = {STATE[0]: step, **kept}
