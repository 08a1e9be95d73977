"""The ``weightworks`` command: ``compress`` and ``merge`` behind a name that no other package has."""

from __future__ import annotations

import sys

import weightworks
from cli.render import show
from weightworks.errors import nearest


def main() -> None:
    """Entry point of ``weightworks``."""
    word = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if word == "compress":
        del sys.argv[1]
        from cli.compress_app import main as compress

        compress()
    elif word == "merge":
        del sys.argv[1]
        from cli.merge_app import main as merge

        merge()
    elif word == "--version":
        sys.stdout.write(f"weightworks {weightworks.__version__}\n")
    elif word in ("--help", "-h"):
        show(
            "usage: weightworks compress ... | weightworks merge ...\n\n"
            "The two commands behind a name that no other package has."
        )
    else:
        show(f"error: unknown command '{word}' ({nearest(word, ['compress'])})")
        raise SystemExit(2)
