"""One method tried on one small model: found, loaded and run when first needed, then looked at from all sides."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightworks.stage import catalog
from weightworks.stage.catalog import Entry

if TYPE_CHECKING:
    from weightworks.store.checkpoint import Checkpoint
    from weightworks.store.dense import DenseView

# Enough for a definite Hessian of the tiny model's widest layer; a second of work.
CALIBRATION: dict[str, Any] = {"num_samples": 16, "seq_len": 64, "device": "cpu", "dtype": "float32"}
BRIEF: dict[str, Any] = {"steps": 3}  # of a method that trains; its options are those of all training

NEEDS: dict[str, Any] = {"blocks": {"blocks": 4}, "experts": {"experts": 4}}  # of a model, by what a method removes


class Trial:
    """The method ``label`` on the checkpoint ``model``, by default one that is made on the spot.

    What a property cannot deliver it raises as an :class:`AssertionError` that says so.
    """

    def __init__(self, label: str, model: Path | None) -> None:
        self.label = label
        self._model = model

    @cached_property
    def entry(self) -> Entry:
        """The method in the catalog."""
        kind, _, name = self.label.partition(".")
        with told(f"{self.label} is not found"):
            return catalog.find(kind, name)

    @cached_property
    def module(self) -> Any:
        """Its module, which has all that a method needs."""
        with told(f"{self.label} cannot be used"):
            module = self.entry.load()
            reason = catalog.fault(module, self.entry.kind)
        demand(reason is None, f"{self.label} cannot be used: {reason}")
        return module

    @cached_property
    def folder(self) -> Path:
        """A folder for what the checks share, removed when the last of them is gone."""
        folder = Path(tempfile.mkdtemp(prefix="weightworks-conformance-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    @cached_property
    def model(self) -> Path:
        """The model's folder."""
        from weightworks.testing.tiny import make_model

        return self._model or make_model(self.folder / "model", **NEEDS.get(self.reduces or "", {}))

    @property
    def reduces(self) -> str | None:
        """What a method that makes a model smaller removes; None for all others."""
        return getattr(self.module.Method, "reduces", None)

    @cached_property
    def made(self) -> Path:
        """What the method made of the model with its defaults."""
        return self.run(self.folder / "made")

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """The record of that run."""
        from weightworks.store.manifest import read_provenance

        provenance = read_provenance(self.made)
        demand(provenance is not None, f"{self.label} left no provenance.json in {self.made}")
        assert provenance is not None
        return provenance

    @cached_property
    def source(self) -> Checkpoint:
        """The model's tensors."""
        from weightworks.store.checkpoint import Checkpoint

        return Checkpoint.open(self.model)

    @cached_property
    def result(self) -> DenseView:
        """The tensors that the result stands for, packed ones decoded, an adapter added to the model."""
        from weightworks.store.adapters import CONFIG
        from weightworks.store.checkpoint import Checkpoint
        from weightworks.store.dense import DenseView

        beside = (self.made / CONFIG).is_file()
        return DenseView(Checkpoint.open(f"{self.model}+{self.made}" if beside else self.made))

    @cached_property
    def options(self) -> dict[str, Any]:
        """The defaults; a method that trains takes a few steps only: it is asked whether it works, not how well."""
        options = self.module.Options()
        with told(f"{self.label}: Method({options!r}) fails"):
            trains = hasattr(self.module.Method(options), "regime")
        resolved: dict[str, Any] = options.resolved()
        return resolved | (BRIEF if trains else {})

    @property
    def changed(self) -> set[str]:
        """Names of the tensors that the method says it replaced."""
        rescaled = self.provenance.get("smoothing", {}).get("rescaled", [])
        return {row["tensor"] for row in self.provenance["report"]} | set(rescaled)

    def run(self, target: Path, values: Mapping[str, Any] | None = None) -> Path:
        """Run the method with ``options``, some ``values`` in their place; returns the folder it made."""
        from weightworks.plan.stage import run_stage
        from weightworks.stage.settings import Settings
        from weightworks.testing.tiny import CALIBRATION_TEXT

        options = self.options if values is None else {**BRIEF, **values}
        settings = Settings(**CALIBRATION, dataset=str(CALIBRATION_TEXT))
        with told(f"{self.label} with its defaults does not run on {self.model}"), one_thread():
            run_stage(
                self.entry.kind,
                self.entry.name,
                str(self.model),
                options,
                settings,
                teacher=str(self.model) if self.entry.kind == "recover" else None,  # it may be its own
                output_dir=target,
            )
        return target


def demand(condition: bool, sentence: str) -> None:
    """Raise :class:`AssertionError` with ``sentence`` unless the condition holds."""
    __tracebackhide__ = True  # pytest shows the clause that failed instead
    if not condition:
        raise AssertionError(sentence)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Whatever is raised inside is raised as an :class:`AssertionError` that says what failed, and why."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:  # the code of others may raise anything
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small are faster on one thread, and equal on every machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
