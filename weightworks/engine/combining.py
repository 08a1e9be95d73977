"""Several adapters made one: what can be refused is refused from headers, then each module by itself, in weight space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import weightworks
from weightworks.engine.adapting import Solved, named, stored
from weightworks.engine.identity import environment, origin
from weightworks.engine.inmemory import merged
from weightworks.errors import MethodError, UsageError
from weightworks.report.card import adapter_card
from weightworks.report.progress import Progress
from weightworks.stage.adapting import Cores, Factors, Made, Updates
from weightworks.stage.settings import Settings
from weightworks.store.adapted import fitted, place
from weightworks.store.adapters import Adapter
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.layout import Format

SMALL = 1 << 30  # rows times ranks squared


@dataclass
class CombineJob:
    """A merge of ``adapters``, planned but not run. ``inner`` is the merge method for cores, where the method projects.

    ``base`` is needed only for tensors that adapters hold whole, and to check that they fit and to score the result.
    """

    label: str
    version: int
    method: Any
    settings: Settings
    adapters: Sequence[Adapter]
    base: Checkpoint | None
    target: Path
    progress: Progress
    device: torch.device
    inner: Any = None
    inner_facts: Mapping[str, Any] = field(default_factory=dict)
    skeleton: Any = field(init=False, default=None)
    returns_tuple: int = field(init=False, default=0)
    format: Format | None = field(init=False, default=None)

    @property
    def watched(self) -> list[Checkpoint]:
        """What is read, and must not change meanwhile."""
        return [*(one.store for one in self.adapters), *([self.base] if self.base else [])]

    def __post_init__(self) -> None:
        problems = [f"{self.label} {text}" for text in self.options.lengths(len(self.adapters))]
        if problems:
            raise UsageError("; ".join(problems), hint="see: merge lora --help")
        if problems := [*self._alien(), *self._unlike(), *self._whole_refused()]:
            raise MethodError(f"{self.label} cannot merge these adapters: {'; '.join(problems)}")
        if self.base is not None:
            for adapter in self.adapters:
                fitted(adapter, self.base)

    def _alien(self) -> Iterator[str]:
        """Updates that are not a product of two matrices."""
        for adapter in self.adapters:
            kinds = {"DoRA": "magnitude", "biases of B": "bias"}
            for what, part in kinds.items():
                if any(getattr(pair, part) is not None for pair in adapter.pairs.values()):
                    yield (
                        f"{adapter.name} has {what}, so its update is no product; make it a plain one first: "
                        f"merge extract-lora BASE BASE+{adapter.name}"
                    )

    def _unlike(self) -> Iterator[str]:
        """Modules that adapters mean differently."""
        for module in self.modules:
            seen = {
                (pair.rows, pair.columns, pair.embedding, pair.transposed): adapter.name
                for adapter in self.adapters
                if (pair := adapter.pairs.get(module)) is not None
            }
            if len(seen) > 1:
                shapes = ", ".join(
                    f"{rows} x {columns}{' of an embedding' * embedding}{' transposed' * transposed} in {name}"
                    for (rows, columns, embedding, transposed), name in seen.items()
                )
                yield f"{module} is {shapes}"

    def _whole_refused(self) -> Iterator[str]:
        """Tensors held whole, where there is no base to take their difference from or the method cannot add them."""
        if not self.whole:
            return
        shown = ", ".join(self.whole[:5]) + (f" and {len(self.whole) - 5} more" if len(self.whole) > 5 else "")
        if not self.method.LINEAR:
            yield f"{shown} are held whole (modules_to_save), which only cat and svd add up"
        elif self.base is None:
            yield f"{shown} are held whole (modules_to_save): give --base, from which they differ"

    @property
    def options(self) -> Any:
        return self.method.options

    @cached_property
    def modules(self) -> list[str]:
        """All modules that an adapter has, in order of names."""
        return sorted({module for adapter in self.adapters for module in adapter.pairs})

    @cached_property
    def whole(self) -> list[str]:
        """All parameters that an adapter holds whole."""
        return sorted({name for adapter in self.adapters for name in adapter.whole})

    @property
    def units(self) -> list[str]:
        return [*self.modules, *self.whole]

    @property
    def small(self) -> bool:
        """Decompositions of [rows, sum of ranks]: not worth dividing until they take a second."""
        work = [
            max(pair.rows, pair.columns)
            * sum(one.pairs[module].rank for one in self.adapters if module in one.pairs) ** 2
            for module in self.modules
            for pair in [next(one.pairs[module] for one in self.adapters if module in one.pairs)]
        ]
        return max(work, default=0) < SMALL

    @property
    def weights(self) -> list[float]:
        """What each adapter's update is multiplied by."""
        return self.options.each("weights", len(self.adapters)) or [1.0] * len(self.adapters)

    def updates(self, module: str) -> Updates:
        """What the adapters do to one module; factors in float64, scaling and weight in A."""
        parts, numbers = [], []
        for number, (adapter, weight) in enumerate(zip(self.adapters, self.weights, strict=True)):
            if (pair := adapter.pairs.get(module)) is not None:
                a, b = adapter.factors(module, torch.float64)
                parts.append(Factors(b, a * (pair.scaling * weight)))
                numbers.append(number)
        return Updates(module, tuple(parts), tuple(numbers), len(self.adapters), self.settings.seed)

    def solve(self, unit: str) -> Solved:
        if unit not in set(self.modules):
            return self._add_whole(unit)
        updates, dtype = self.updates(unit), getattr(torch, self.options.out_dtype)
        made = self.method.combine(updates) if self.inner is None else self._restored(unit, self._cores(updates))
        total, result = Factors.stacked(updates.parts), stored(made.factors, dtype)
        norm = total.norm
        row = {
            "tensor": f"{unit}.weight",
            "shape": [total.b.shape[0], total.a.shape[1]],
            "method": self.label,
            "rank": made.factors.rank,
            "ranks_in": [part.rank for part in updates.parts],
            "norm": made.factors.norm,
            "norm_of_sum": norm,
            "residual": made.factors.distance(total) / norm if norm else 0.0,
            "residual_stored": result.distance(total) / norm if norm else 0.0,
            **made.facts,
        }
        embedding = any(adapter.pairs[unit].embedding for adapter in self.adapters if unit in adapter.pairs)
        return Solved(named(unit, made.factors, dtype, embedding=embedding), row)

    def _cores(self, updates: Updates) -> Cores:
        cores: Cores = self.method.project(updates)
        return cores

    def _restored(self, module: str, cores: Cores) -> Made:
        made: Made = self.method.restore(cores, self.merged_cores[module].double())
        return made

    @cached_property
    def merged_cores(self) -> dict[str, torch.Tensor]:
        """What the inner merge makes of the cores of all modules: they are small, and it may look at all of them first."""
        models: list[dict[str, torch.Tensor]] = [{} for _ in self.adapters]
        for module in self.modules:
            for model, core in zip(models, self._cores(self.updates(module)).cores, strict=True):
                model[module] = core.float()
        base = {module: torch.zeros_like(core) for module, core in models[0].items()}
        wanted = None if self.inner.BASE == "refused" else base
        keys = [adapter.digest for adapter in self.adapters]
        return merged(self.inner, models, wanted, seed=self.settings.seed, keys=keys)

    def _add_whole(self, name: str) -> Solved:
        """W + sum_i w_i (T_i - W), of the tensors T_i that adapters hold in place of W."""
        assert self.base is not None
        target = place(name, self.base)
        assert target is not None, "adapters were held against the base"
        before = self.base.read(target, torch.float32)
        result, key = before.clone(), ""
        for adapter, weight in zip(self.adapters, self.weights, strict=True):
            if name in adapter.whole:
                key = key or adapter.whole[name]
                result += weight * (adapter.store.read(adapter.whole[name], torch.float32) - before)
        norm = float(torch.linalg.vector_norm(result - before, dtype=torch.float64))
        row = {"tensor": name, "shape": list(before.shape), "method": f"{self.label}, whole", "norm": norm}
        return Solved({key: result.to(getattr(torch, self.options.out_dtype))}, row)

    # What the end of a stage asks.

    def traits(self) -> dict[str, Any]:
        first = self.adapters[0].config
        biases = [
            adapter.config.get("bias") for adapter in self.adapters if adapter.config.get("bias") not in (None, "none")
        ]
        return {
            "base_model_name_or_path": first.get("base_model_name_or_path"),
            "task_type": first.get("task_type") or "CAUSAL_LM",
            "fan_in_fan_out": any(
                pair.transposed and not pair.embedding for adapter in self.adapters for pair in adapter.pairs.values()
            ),
            "bias": biases[0] if biases else "none",
            **(
                {"ensure_weight_tying": True}
                if any(one.config.get("ensure_weight_tying") for one in self.adapters)
                else {}
            ),
        }

    @property
    def checkpoint(self) -> Checkpoint:
        return self.base or self.adapters[0].store

    def config(self) -> dict[str, Any]:
        raise NotImplementedError("an adapter has no config.json")

    def quantization_config(self) -> dict[str, Any]:
        raise NotImplementedError("an adapter is not quantized")

    def origin(self) -> dict[str, Any]:
        return {
            "models": [origin(adapter) for adapter in self.adapters],
            "base": None if self.base is None else origin(self.base),
        }

    def account(self) -> dict[str, Any]:
        counts = {adapter.source: len(adapter.store.tensors) for adapter in self.adapters}
        return {
            "input": sum(counts.values()),
            "inputs": counts,
            "transformed": len(self.units),
            "copied": 0,
            "dropped": 0,
        }

    def uncovered(self) -> list[str]:
        """What is not as it seems: bases that differ."""
        bases = {adapter.name: adapter.base for adapter in self.adapters if adapter.base}
        if len(set(bases.values())) < 2:
            return []
        return ["trained on different bases: " + ", ".join(f"{name} on {base}" for name, base in bases.items())]

    def card(self, provenance: dict[str, Any]) -> str:
        return adapter_card([adapter.name for adapter in self.adapters], self.base, self.target.name, provenance)

    def identity(self, **facts: Any) -> dict[str, Any]:
        """What the output's bytes depend on."""
        return {
            "method": self.label,
            "method_version": self.version,
            "weightworks": weightworks.__version__,
            "options": {name: value for name, value in self.options.resolved().items() if name != "check"},
            "input": {
                "models": [adapter.digest for adapter in self.adapters],
                "base": None if self.base is None else self.base.digest,
            },
            "seed": self.settings.seed,
            "environment": environment(self.device),
            **self.inner_facts,
            **facts,
        }
