"""What holds of every run while it works: it is logged, and what it has finished outlives a failure or an interruption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from weightworks.errors import ResourceError, SourceChangedError, WeightworksError, unreachable
from weightworks.report.progress import Progress
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.writer import CheckpointWriter
from weightworks.stream.memory import ran_out

LESS = "run it again with a smaller --max-memory or --seq-len, or close other programs"
AGAIN = "close other programs and run the same command again"  # where no option takes less


class Logged(Protocol):
    """A job that writes to a target and tells how it gets on."""

    progress: Progress

    @property
    def target(self) -> Path: ...

    @property
    def watched(self) -> Sequence[Checkpoint]: ...


def log_path(target: Path) -> Path:
    """The log beside the output."""
    return target.with_name(target.name + ".run.log")


@contextmanager
def working(job: Logged, writer: CheckpointWriter, *, out_of_memory: str = LESS) -> Iterator[None]:
    """The work of ``job``: its log is written beside the target, ``writer`` and log are closed at the end.

    The staging folder is left for the next run, unless work was refused before it began or an input changed under it.
    ``out_of_memory`` says what to do about too little memory, which becomes a :class:`ResourceError`.
    """
    job.progress.log_to(log_path(job.target))
    writer.watched = job.watched
    try:
        yield
    except BaseException as error:
        job.progress.note(f"{type(error).__name__}: {error}")
        changed = isinstance(error, SourceChangedError)
        if changed or (isinstance(error, WeightworksError) and not writer.steps):
            writer.discard()  # of no use, or refused before work: there is nothing to continue
        if ran_out(error):
            raise ResourceError("out of memory; what is finished is kept", hint=out_of_memory) from error
        if isinstance(error, OSError):
            raise unreachable(error) from error
        raise
    finally:
        writer.close()
        job.progress.close()
