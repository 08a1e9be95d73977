"""What a run says while it works: a bar on a terminal, a line a step elsewhere, and always a log beside the output."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, TextIO


class Progress:
    """Tells a person on ``stream`` (stderr) and the log at ``log`` what happens. ``quiet`` keeps the log only."""

    def __init__(self, *, stream: TextIO | None = None, quiet: bool = False, verbose: bool = False) -> None:
        self.stream = stream or sys.stderr
        self.quiet, self.verbose = quiet, verbose
        self._log: TextIO | None = None
        self._bar: Any = None
        self._started = time.monotonic()

    def log_to(self, path: Path) -> None:
        """Append to the log at ``path``, a line at a time."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._log = path.open("a", encoding="utf-8", buffering=1)
        self._log.write(time.strftime("--- %Y-%m-%d %H:%M:%S ") + " ".join(sys.argv) + "\n")

    def say(self, text: str, *, detail: bool = False) -> None:
        """One line; a ``detail`` is shown with ``-v`` only, but always logged."""
        self.note(text)
        if self.quiet or (detail and not self.verbose):
            return
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            self.stream.write(text + "\n")
            self.stream.flush()

    def note(self, text: str) -> None:
        """One line in the log alone."""
        if self._log:
            self._log.write(f"{time.monotonic() - self._started:9.1f}s {text}\n")

    def begin(self, label: str, total: int, done: int = 0, *, every: float = 0.0) -> None:
        """A stretch of ``total`` steps, ``done`` of them finished earlier; a line at most ``every`` so many seconds."""
        self._every, self._shown = every, time.monotonic()
        self._label, self._total, self._done = label, total, done
        self._first, self._since = done, time.monotonic()
        if self.stream.isatty() and not self.quiet:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=label, unit="block", file=self.stream, leave=False)

    def step(self, text: str) -> None:
        """One step is finished; ``text`` says which, with its figures."""
        self._done += 1
        elapsed = time.monotonic() - self._since
        left = elapsed / max(self._done - self._first, 1) * (self._total - self._done)
        line = f"{self._label} {self._done}/{self._total}: {text}"
        if self._bar is not None:
            self._bar.update()
            self._bar.set_postfix_str(text)
            self.say(line, detail=True)
        else:
            now = time.monotonic()
            due = self._done == self._total or now - self._shown >= self._every
            self._shown = now if due else self._shown
            self.say(f"{line} ({elapsed:.0f} s, about {left:.0f} s left)", detail=not due)

    def end(self) -> None:
        """The stretch is over."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        self.end()
        if self._log:
            self._log.close()
            self._log = None
