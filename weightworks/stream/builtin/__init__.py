"""The built-in calibration text: our own sample, mixed with the documentation and sources every Python carries.

``calibration.txt`` (several registers and languages, dialogue, lists, mathematics, code) was written for this package.
A large calibration needs more than it holds, so it is interleaved with Python's documentation topics and with modules
of the standard library. ``verification.txt`` is never used for calibration: it checks saved models.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path

HERE = Path(__file__).parent
PIECE = 2_000  # characters taken in turn from each source: a few windows of one subject, then another
BYTES_PER_TOKEN = 5  # generous: tokenizers of large models take about 4
# Modules with more prose and plain code than tables; all are part of every CPython installation.
MODULES = """
argparse ast asyncio.base_events calendar collections contextlib copy csv dataclasses datetime decimal difflib
doctest email.message enum fractions ftplib functools gettext glob gzip heapq html.parser http.client http.cookies
imaplib inspect ipaddress json.decoder json.encoder locale logging mailbox numbers optparse pathlib pickle
pickletools platform plistlib pprint pydoc queue random re._compiler reprlib sched selectors shelve shlex shutil
smtplib socketserver statistics string subprocess tarfile tempfile textwrap threading timeit tokenize trace
traceback types typing unittest.case unittest.mock urllib.parse urllib.request uuid warnings wave weakref
xml.dom.minidom zipfile
""".split()  # noqa: SIM905 (a list of sixty strings is harder to read)


def description() -> str:
    """What the text consists of, for the report."""
    return f"builtin (own sample text; documentation topics and library sources of Python {platform.python_version()})"


def calibration_text(tokens: int) -> str:
    """About ``tokens`` tokens of text or more, never less than the whole own sample."""
    own = (HERE / "calibration.txt").read_text(encoding="utf-8")
    pieces: list[str] = []
    size = 0
    for turn in zip_longest(_cut([own]), _cut(_topics()), _cut(_sources()), fillvalue=""):
        pieces += turn
        size += sum(len(piece) for piece in turn)
        if size > max(tokens * BYTES_PER_TOKEN, 3 * len(own)):
            break
    return "".join(pieces)


def verification_text() -> str:
    """The text that checks saved models; no calibration uses it."""
    return (HERE / "verification.txt").read_text(encoding="utf-8")


def _cut(texts: Iterator[str] | list[str]) -> Iterator[str]:
    """Pieces of about PIECE characters that end at line ends."""
    for text in texts:
        start = 0
        while start < len(text):
            stop = text.find("\n", start + PIECE) + 1 or len(text)
            yield text[start:stop]
            start = stop


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    return chain(topics[name] + "\n\n" for name in sorted(topics))


def _sources() -> Iterator[str]:
    for name in MODULES:
        found = importlib.util.find_spec(name)
        if found and found.origin and found.origin.endswith(".py"):
            yield Path(found.origin).read_text(encoding="utf-8")
