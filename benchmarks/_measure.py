"""Runs a command and says what it cost; prints tables and writes JSON. Shared by every benchmark.

This module and the scripts that measure memory never import torch themselves: Linux hands the peak resident size of a
parent down to the child it starts, so a parent of 300 MB would hide every smaller child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MB = 1e6
UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}


@dataclass(frozen=True)
class Usage:
    """What one command cost: the process and all children it waited for.

    ``cpu_seconds`` is user plus system; ``peak_bytes`` is the largest resident size of any one process of the tree.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    exit_code: int
    stdout: str
    stderr: str

    def figures(self) -> dict[str, Any]:
        """The numbers alone, as JSON-compatible data."""
        return {key: value for key, value in asdict(self).items() if key not in ("stdout", "stderr")}


def run(
    command: Sequence[str | Path],
    *,
    check: bool = True,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    watch: Callable[[int], None] | None = None,
) -> Usage:
    """Run ``command`` to its end and measure it; ``watch`` gets the process id as soon as it runs.

    With ``check`` a failure ends the benchmark with the last lines the command wrote.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen(words, stdout=out, stderr=err, cwd=cwd, env={**os.environ, **(env or {})})
        try:
            if watch:
                watch(process.pid)
            _, status, resources = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read())
    usage = Usage(
        wall_seconds=wall,
        cpu_seconds=resources.ru_utime + resources.ru_stime,
        peak_bytes=resources.ru_maxrss * 1024,  # Linux counts in KiB
        exit_code=process.returncode,
        stdout=texts[0],
        stderr=texts[1],
    )
    if check and usage.exit_code != 0:
        tail = "\n".join((usage.stderr or usage.stdout).strip().splitlines()[-15:])
        sys.exit(f"{' '.join(words)}\nfailed with exit code {usage.exit_code}:\n{tail}")
    return usage


def last_json(text: str) -> dict[str, Any]:
    """The JSON object on the last line of ``text`` that is one."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise ValueError(f"no JSON line in: {text[-500:]!r}")


def folder_bytes(folder: Path) -> int:
    """The size of all files directly in ``folder``."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def parse_bytes(text: str) -> int:
    """``500MB`` (decimal) or ``1GiB`` (binary) as a number of bytes."""
    upper = text.strip().upper()
    unit = next((unit for unit in sorted(UNITS, key=len, reverse=True) if upper.endswith(unit)), "")
    return int(float(upper.removesuffix(unit)) * UNITS.get(unit, 1))


def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print an aligned Markdown table; the first column is text, the others are numbers."""
    lines = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    padded = [
        " | ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    rule = " | ".join("-" * (width - 1) + (":" if column else "-") for column, width in enumerate(widths))
    print(f"\n{title}\n")
    for line in (padded[0], rule, *padded[1:]):
        print(f"| {line} |")
    print(flush=True)


def note(text: str) -> None:
    """Say what is being done, on stderr, so that stdout holds only tables."""
    print(text, file=sys.stderr, flush=True)


def save_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write ``result`` where ``--json`` said, if it did."""
    if path:
        path.write_text(json.dumps(result, indent=2) + "\n")
        note(f"wrote {path}")
