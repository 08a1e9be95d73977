"""The pages of docs/ say what the code says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

from cli.describe import markdown

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]


def test_methods_page_is_what_the_option_classes_say() -> None:
    assert (DOCS / "methods.md").read_text(encoding="utf-8") == markdown(), (
        "docs/methods.md is out of date: python -m cli.describe > docs/methods.md"
    )


def test_methods_page_is_the_same_every_time() -> None:
    assert markdown() == markdown()


def modules(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")} - {"__init__"}


def test_architecture_page_names_every_room() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    plan = text.split("## Rooms")[1].split("\n## ")[0]
    named = set(re.findall(r"\w+", plan))
    rooms = [folder for folder in (REPOSITORY / "weightworks").iterdir() if (folder / "__init__.py").is_file()]
    for folder in [*rooms, REPOSITORY / "compress", REPOSITORY / "cli"]:
        assert {folder.name, *modules(folder)} - named == set()


def test_example_method_of_the_architecture_page_runs() -> None:
    """The file that page shows is a whole method: it has all a method needs, and rounds a weight."""
    import torch

    from weightworks.stage.protocols import Target

    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    source = text.split("## A new quantization method")[1].split("```python\n")[1].split("```")[0]
    assert ast.get_docstring(ast.parse(source))
    assert len(source.splitlines()) <= 45
    space: dict[str, object] = {"__name__": "example"}
    exec(compile(source, "docs/architecture.md", "exec"), space)
    options, method = space["Options"], space["Method"]
    assert isinstance(space["VERSION"], int)
    assert isinstance(space["PAPER"], str)
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    solution = method(options(bits=4)).apply(weight.clone(), Target("w", torch.float16))  # type: ignore[operator]
    assert (solution.dense() - weight).norm() < 0.2 * weight.norm()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
