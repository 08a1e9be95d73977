"""The files that options name: that one is missing is told with a recipe's other mistakes, at its line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weightworks.errors import WeightworksError
from weightworks.plan.keys import shaped_by_text
from weightworks.stage import catalog
from weightworks.store.sources import is_text_file


def missing(entry: catalog.Entry, options: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The option at fault and a sentence, for each file that well-formed values name and that is not there."""
    module = entry.load()
    dataset = settings.get("dataset", "builtin")
    if shaped_by_text(module.Method) and is_text_file(dataset) and not Path(dataset).expanduser().is_file():
        yield "dataset", f"{entry.label}: 'dataset': {dataset}: no such file"
    if entry.kind == "select" and dataset in ("builtin", "self"):
        yield "dataset", f"{entry.label}: 'dataset': rows are chosen from a data set, '{dataset}' has none"
    text = options.get("renormalise")
    if isinstance(text, str) and is_text_file(text) and not Path(text).expanduser().is_file():
        yield "renormalise", f"{entry.label}: 'renormalise': {text}: no such file"
    if hasattr(module.Method, "files"):
        try:
            module.Method(module.Options(**options)).files()
        except WeightworksError as error:
            text = str(error)
            yield next((name for name, value in options.items() if _named(value, text)), ""), f"{entry.label}: {text}"


def _named(value: Any, text: str) -> bool:
    """Whether ``text`` speaks of an option's value, or of one in its list."""
    return any(isinstance(one, str) and one in text for one in (value if isinstance(value, list) else [value]))
