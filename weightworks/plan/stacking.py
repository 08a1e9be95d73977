"""What a configuration of mergekit makes of models that are open: layers stacked, and the options of every tensor resolved.

A tensor's layer is the first number in its name. What is outside the layers belongs to the first slice if its name says
embedding, else to the last; there, the depth that gradients go by is 0. Tensors of equal options share one method.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightworks.engine.mergejob import Input, MergeJob
from weightworks.engine.mergeplan import Layout, Part, counted, refuse, stored
from weightworks.plan.located import Problems
from weightworks.plan.mergekit import SEE, Configuration, Slice, Source
from weightworks.plan.parameters import Resolver
from weightworks.store.tensorfile import TensorSpec

LAYER = re.compile(r"((?:.*?\.)?)(\d+)\.(.+)")
FIRST = re.compile(r"embed|wte|wpe|emb_")  # tensors that come before the layers, by their names
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # what configurations call the number of layers


@dataclass(frozen=True)
class Spot:
    """Where a tensor of the output stands: its slice, its layer in there (None: outside), its depth for gradients."""

    part: Slice
    layer: int | None
    depth: float


class Layers:
    """The layers of a model by the names of its tensors: ``stacks`` are the numbers of layers by prefix."""

    def __init__(self, names: Sequence[str]) -> None:
        numbers: dict[str, set[int]] = {}
        self.names = names
        for name in names:
            if found := LAYER.fullmatch(name):
                numbers.setdefault(found[1], set()).add(int(found[2]))
        self.stacks = {prefix: max(seen) + 1 for prefix, seen in numbers.items() if seen == set(range(max(seen) + 1))}

    def inside(self, name: str) -> tuple[str, int, str] | None:
        """Prefix, layer and the rest of a name; None outside of layers."""
        found = LAYER.fullmatch(name)
        return (found[1], int(found[2]), found[3]) if found and found[1] in self.stacks else None

    def of(self, prefix: str, layer: int) -> list[str]:
        """What tensors of one layer are called in there."""
        start = f"{prefix}{layer}."
        return [name.removeprefix(start) for name in self.names if name.startswith(start)]

    @property
    def outside(self) -> list[str]:
        return [name for name in self.names if self.inside(name) is None]


class Stacking:
    """Lays out what a configuration asks for. ``numbers`` are those of the models by name, as the job has them."""

    def __init__(self, configuration: Configuration, problems: Problems, numbers: Mapping[str, int]) -> None:
        self.configuration, self.problems, self.numbers = configuration, problems, numbers
        self.resolver = Resolver(configuration, problems)
        self.misfits: list[str] = []

    def layout(self, job: MergeJob) -> Layout:
        """The layout; raises with all lines at fault, then with all tensors that do not fit."""
        self.job = job
        self.layers = {name: Layers(sorted(self._input(name).tensors)) for name in self.configuration.models}
        self._check_slices()
        self.problems.raise_if_any(self.configuration.file, hint=SEE)
        found = [self._part(name, place, sources) for name, place, sources in self._planned()]
        self.problems.raise_if_any(self.configuration.file, hint=SEE)
        left_out = self._extra() if not self.configuration.sliced else {}
        refuse(job.label, self.misfits)
        parts = sorted((part for part in found if part is not None), key=lambda part: part.spec.name)
        return Layout(parts, left_out, self._unused(parts, left_out), self.configuration.notes, self._config())

    def _input(self, model: str) -> Input:
        if model == self.configuration.base and self.job.base is not None:
            return self.job.base
        return self.job.models[self.numbers[model]]

    @property
    def apart(self) -> bool:
        """Whether task vectors are taken from the base, which then is none of the models."""
        return self.job.base is not None

    def _check_slices(self) -> None:
        """Counts of models, bases and layers that are not there, told by line."""
        form, module, name = self.configuration.form, self.resolver.module, self.configuration.method
        if form.base in ("required", "first") and self.configuration.base is None:
            self.problems.add(self.configuration.base_place, f"{name} needs base_model")
        for part in self.configuration.slices:
            models = [source.model for source in part.sources]
            if form.base in ("required", "first", "optional") and self.configuration.base not in (None, *models):
                self.problems.add(part.place, "base_model is none of the sources of this slice")
            count = sum(not (self.apart and model == self.configuration.base) for model in models)
            if count < module.Method.LEAST or (module.Method.MOST is not None and count > module.Method.MOST):
                beside = " beside the base" if self.apart else ""
                self.problems.add(part.place, f"{name} takes {counted(module.Method)} models{beside}, {count} given")
            for source in part.sources:
                stacks = self.layers[source.model].stacks
                if source.layers is not None and len(stacks) != 1:
                    shown = ", ".join(f"{prefix}0 to {count - 1}" for prefix, count in stacks.items()) or "none"
                    text = f"slices are of models with one stack of layers; {source.model} has {shown}"
                    self.problems.add(source.place, text)
                elif source.layers is not None and source.layers[1] > (count := next(iter(stacks.values()))):
                    text = f"layer_range {list(source.layers)}: {source.model} has {count} layers"
                    self.problems.add(source.place, text)

    def _planned(self) -> Iterator[tuple[str, Spot, list[tuple[Source, str]]]]:
        """Every tensor of the output: its name, its place, and the tensors it is made of, source by source."""
        first, last = self.configuration.slices[0], self.configuration.slices[-1]
        for part in [first] if first is last else [first, last]:
            for name in self.layers[self._leading(part).model].outside:
                if (first if FIRST.search(name) else last) is part:
                    yield name, Spot(part, None, 0.0), [(source, name) for source in part.sources]
        if not self.configuration.sliced:
            yield from self._whole(first)
            return
        number = 0
        for part in self.configuration.slices:
            lead = self._leading(part)
            assert lead.layers is not None, "a slice without ranges is refused before"
            count = lead.layers[1] - lead.layers[0]
            prefix = next(iter(self.layers[lead.model].stacks))
            for layer in range(count):
                depth = layer / (count - 1) if count > 1 else 1.0
                for rest in self.layers[lead.model].of(prefix, lead.layers[0] + layer):
                    tensors = [(source, self._inner(source, layer, rest)) for source in part.sources]
                    yield f"{prefix}{number}.{rest}", Spot(part, layer, depth), tensors
                number += 1

    def _whole(self, part: Slice) -> Iterator[tuple[str, Spot, list[tuple[Source, str]]]]:
        """The layers of models as they are; every stack has its own depth."""
        layers = self.layers[self._leading(part).model]
        for name in layers.names:
            if (inside := layers.inside(name)) is not None:
                count = layers.stacks[inside[0]]
                depth = inside[1] / (count - 1) if count > 1 else 1.0
                yield name, Spot(part, inside[1], depth), [(source, name) for source in part.sources]

    def _leading(self, part: Slice) -> Source:
        """The source that a slice's tensors, shapes and dtypes are those of: the base, or the first."""
        return next((one for one in part.sources if one.model == self.configuration.base), part.sources[0])

    def _inner(self, source: Source, layer: int, rest: str) -> str:
        assert source.layers is not None
        prefix = next(iter(self.layers[source.model].stacks))
        return f"{prefix}{source.layers[0] + layer}.{rest}"

    def _part(self, name: str, place: Spot, sources: list[tuple[Source, str]]) -> Part | None:
        """One tensor of the output; what does not fit is noted."""
        configuration, policy = self.configuration, self.job.options.on_missing
        lead = self._leading(place.part)
        own = next(tensor for source, tensor in sources if source is lead)
        known = self._input(lead.model).tensors[own]
        spec = TensorSpec(name, known.shape, known.dtype)
        apart = [tensor for source, tensor in sources if self.apart and source.model == configuration.base]
        models = [one for one in sources if not (self.apart and one[0].model == configuration.base)]
        if configuration.form.base == "first":
            models.sort(key=lambda one: one[0].model != configuration.base)
        having = [one for one in models if one[1] in self._input(one[0].model).tensors]
        lacking = [one[0].model for one in models if one not in having]
        if lacking and (policy == "error" or (policy == "base" and not apart)):
            self.misfits.append(f"{name}: not in {', '.join(lacking)}")
            return None
        for source, tensor in having:
            seen = self._input(source.model).tensors[tensor].shape
            if seen != spec.shape:
                self.misfits.append(f"{name}: {list(seen)} in {source.model}, {list(spec.shape)} in {lead.model}")
        chosen = models if policy == "base" else having
        base, numbers = (
            (apart[0] if apart else None),
            [(self.numbers[source.model], tensor) for source, tensor in chosen],
        )
        if not spec.dtype.is_floating_point or not chosen:
            return Part(spec, tuple(numbers), base, None)
        if len(chosen) < self.resolver.module.Method.LEAST:
            self.misfits.append(f"{name}: only in {', '.join(source.model for source, _ in chosen)}")
        method = self.resolver.method(place.part, name, chosen, place.depth)
        return None if method is None else Part(stored(spec, configuration.out_dtype), tuple(numbers), base, method)

    def _extra(self) -> dict[str, str]:
        """Tensors that the model lacks whose names the output has."""
        part = self.configuration.slices[0]
        lead, found = self._leading(part).model, {}
        for model in dict.fromkeys(source.model for source in part.sources):
            for name in sorted(set(self.layers[model].names) - set(self.layers[lead].names)):
                if self.job.options.on_missing == "error":
                    self.misfits.append(f"{name}: in {model}, not in {lead}")
                else:
                    found[f"{model}: {name}"] = f"{lead} has no such tensor"
        return found

    def _unused(self, parts: Sequence[Part], left_out: Mapping[str, str]) -> dict[str, str]:
        """Tensors that no slice asks for."""
        used = {(self.job.models[number].name, name) for part in parts for number, name in part.models}
        used |= {
            (self.job.base.name, part.base) for part in parts if self.job.base is not None and part.base is not None
        }
        return {
            text: "in no slice"
            for item in self.job.inputs
            for name in item.tensors
            if (item.name, name) not in used and (text := f"{item.name}: {name}") not in left_out
        }

    # config.json

    def _config(self) -> dict[str, Any]:
        """What stacking changes in the configuration: the number of layers, and every list with an entry a layer."""
        if not self.configuration.sliced:
            return {}
        config = self.job.reference.checkpoint.config
        holder = "text_config" if any(key in config.get("text_config", {}) for key in COUNTS) else None
        inner = dict(config if holder is None else config[holder])
        lists = _per_layer(inner)
        changed: dict[str, Any] = {}
        leads = [self._leading(part) for part in self.configuration.slices]
        for key in COUNTS:
            if key in inner:
                changed[key] = sum(lead.layers[1] - lead.layers[0] for lead in leads if lead.layers)
        for key in lists:
            entries: list[Any] = []
            for lead in leads:
                theirs = self._input(lead.model).checkpoint.config
                theirs = theirs if holder is None else theirs.get(holder, {})
                assert lead.layers is not None
                entries += (theirs.get(key) or inner[key])[lead.layers[0] : lead.layers[1]]
            changed[key] = entries
        return changed if holder is None else {holder: {**inner, **changed}}


def _per_layer(config: Mapping[str, Any]) -> list[str]:
    """Entries of a configuration that are lists with a value for each layer."""
    count = next((config[key] for key in COUNTS if key in config), None)
    return [key for key, value in config.items() if isinstance(value, list) and len(value) == count]
