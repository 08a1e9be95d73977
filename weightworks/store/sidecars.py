"""Tokenizer, chat template, generation config and licence: carried over byte for byte."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from weightworks.store.writer import writing

# Written by us, or describing weights that change.
OWN = {"config.json", "README.md", "provenance.json", "quantize_config.json", "quant_config.json", "recipe.yaml"}
SUFFIXES = {".json", ".model", ".txt", ".jinja", ".py", ".tiktoken", ".bpe", ".md"}


def sidecars(root: Path) -> list[Path]:
    """Files of a checkpoint folder that a stage copies unchanged, sorted by name.

    Weight indexes, weights and earlier reports are not among them; one level of folders is (``additional_chat_templates``),
    unless it is a checkpoint of its own or one in the making.
    """
    files = [path for path in root.iterdir() if path.is_file()]
    folders = [path for path in root.iterdir() if path.is_dir() and path.suffix != ".partial"]
    folders = [folder for folder in folders if not (folder / "config.json").exists()]
    files += [path for folder in folders for path in folder.iterdir() if path.is_file()]
    return sorted(path for path in files if _carried(path.relative_to(root)))


def _carried(path: Path) -> bool:
    if path.name in OWN or path.name.endswith(".index.json") or any(part.startswith(".") for part in path.parts):
        return False
    return path.suffix in SUFFIXES or path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "USE_POLICY"))


def copy_sidecars(root: Path, target: Path, *, without: Collection[str] = ()) -> list[str]:
    """Copy them, but for those named ``without``; returns their names relative to the folder."""
    names = []
    for path in sidecars(root):
        relative = path.relative_to(root)
        if str(relative) in without:
            continue
        content = path.read_bytes()
        with writing(target / relative):
            (target / relative).parent.mkdir(exist_ok=True)
            (target / relative).write_bytes(content)
        names.append(str(relative))
    return names
