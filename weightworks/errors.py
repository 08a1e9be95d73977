"""The errors raised on purpose: one tree, one text, one hint, one exit code each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WeightworksError(Exception):
    """Something was refused or failed for a reason we can name.

    ``str(error)`` says what happened, where, the value seen and the value allowed; ``hint`` says what to do.
    ``exit_code`` is what the command line returns for it.
    """

    exit_code = 1

    def __init__(self, text: str, *, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


class UsageError(WeightworksError):
    """The request itself is wrong: unknown option or method, value out of bounds."""

    exit_code = 2


class CheckpointError(WeightworksError):
    """An input checkpoint is missing, incomplete, corrupt, or of a kind we do not read."""


class SourceChangedError(CheckpointError):
    """An input changed while it was read: what was made of it is of neither content, and is thrown away."""


class OutputError(WeightworksError):
    """The target cannot be written: it exists, is read-only, or the disk is too small."""


class CalibrationError(WeightworksError):
    """The calibration or evaluation text is missing, unreadable or too short."""


class ArchitectureError(WeightworksError):
    """The model's blocks could not be found, or replaying them does not reproduce the model."""


class MethodError(WeightworksError):
    """A method cannot do what was asked on this checkpoint; every offending tensor is named."""


class NotFiniteError(MethodError):
    """A tensor of an input holds NaN or infinite values."""


class ResourceError(WeightworksError):
    """The estimate exceeds the memory or disk at hand."""


class DegradedError(WeightworksError):
    """The work is done and published, but a fallback was used and ``--strict`` was given."""

    exit_code = 3


class VerificationError(WeightworksError):
    """The saved output does not say what the run computed; it is left in the staging folder."""

    exit_code = 4


def unreachable(error: OSError) -> WeightworksError:
    """What the operating system has against reading or writing a file, in a sentence: it vanished, or its disk did."""
    reason = error.strerror or (str(error).strip() or type(error).__name__).splitlines()[0]
    where = f"{error.filename}: " if error.filename else ""
    return WeightworksError(
        f"{where}cannot be read or written ({reason})", hint="see that it is there, and run the same command again"
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """A phrase that suggests the nearest known name, or lists what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"
