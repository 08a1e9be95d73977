"""What all scores share: the models opened, the length of their windows, values with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from pydantic import Field

from weightworks.errors import UsageError
from weightworks.options import Options
from weightworks.stage.protocols import Subject
from weightworks.stage.settings import Settings
from weightworks.store.sources import is_text_file

if TYPE_CHECKING:
    from weightworks.store.dense import DenseView


class TextOptions(Options):
    """Options of scores that read texts in windows."""

    texts: list[str] = Field(min_length=1, description="text files")
    seq_len: int = Field(2048, ge=2, description="tokens a window; capped by the shortest context of the models")
    max_tokens: int | None = Field(None, ge=2, description="score only so many tokens of each text")

    def files(self) -> list[Path]:
        """Those texts that are local files. Raises :class:`UsageError` if one that must be is not there."""
        gone = [text for text in self.texts if is_text_file(text) and not Path(text).expanduser().is_file()]
        if gone:
            raise UsageError(
                f"'texts': {', '.join(gone)}: no such file", hint="paths are relative to the working directory"
            )
        return [path for text in self.texts if (path := Path(text).expanduser()).is_file()]


def open_all(subjects: Sequence[Subject], baseline: str, settings: Settings) -> dict[str, DenseView]:
    """All models by name, opened by their headers; what cannot be opened is refused before any work.

    Raises :class:`UsageError` when two models have one name, or none has the baseline's.
    """
    from weightworks.store.checkpoint import Checkpoint
    from weightworks.store.dense import DenseView

    names = [subject.name for subject in subjects]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"several models to score are named {', '.join(twice)}")
    if baseline not in names:
        raise UsageError(f"the baseline '{baseline}' is not among the models to score: {', '.join(names)}")
    return {
        subject.name: DenseView(Checkpoint.open(subject.model, allow_pickle=settings.allow_pickle))
        for subject in subjects
    }


def device_of(settings: Settings) -> torch.device:
    """The device that models are scored on; auto takes a GPU if there is one."""
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(settings.device)
    except RuntimeError:
        raise UsageError(f"--device {settings.device}: unknown device", hint="known: auto, cpu, cuda, cuda:N") from None


def memory_of(settings: Settings) -> int:
    """Bytes of memory a score may take: ``max_memory`` where it is given, else what the machine has free."""
    limit = settings.memory_limit
    return int(psutil.virtual_memory().available) if limit is None else limit


def shared_length(views: Mapping[str, DenseView], wanted: int | None) -> int:
    """The longest window all models can take, by their configurations, and no longer than ``wanted`` tokens."""
    from weightworks.stream.skeleton import CONTEXT_KEYS, UNLIMITED

    lengths = [UNLIMITED if wanted is None else wanted]
    for view in views.values():
        config = view.checkpoint.config.get("text_config") or view.checkpoint.config
        lengths.append(int(next((config[key] for key in CONTEXT_KEYS if config.get(key)), UNLIMITED)))
    return min(lengths)


def row(name: str, view: DenseView, metrics: dict[str, dict[str, float | None]], **details: Any) -> dict[str, Any]:
    """What a result says of one model."""
    checkpoint = view.checkpoint
    return {
        "model": name,
        "content": checkpoint.digest,
        "bytes": checkpoint.nbytes,
        "metrics": metrics,
        **details,
    }


def figures(
    value: float, error: float | None, change: float | None, change_error: float | None
) -> dict[str, float | None]:
    """A metric of one model: its value and its change against the baseline, each with its standard error.

    An error is None where it is not known (one window, one question), a change where the two cannot be compared.
    """
    return {"value": value, "error": error, "change": change, "change_error": change_error}


def over_texts(samples: Sequence[torch.Tensor]) -> tuple[float, float | None]:
    """The mean over texts of the means of their windows, and its standard error; windows are taken as independent.

    ``samples``: per text, a value of each window, [windows]. The error is None where a text is a single window.
    """
    means = [float(part.double().mean()) for part in samples]
    mean = math.fsum(means) / len(means)
    if any(len(part) < 2 for part in samples):
        return mean, None
    variance = math.fsum(float(part.double().var()) / len(part) for part in samples) / len(samples) ** 2
    return mean, math.sqrt(variance)
