"""The JSON Schema of recipes: sound, complete, of one mind with the reader about recipes good and bad."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from commands import SHORT_TEXT
from conftest import REPOSITORY

from weightworks.errors import UsageError
from weightworks.plan.document import parse
from weightworks.plan.located import Problems
from weightworks.plan.matrix import MOST, ROLES, RUN_WIDE
from weightworks.plan.reader import STAGE, TOP
from weightworks.plan.recipe import load_recipe
from weightworks.plan.schema import schema
from weightworks.stage import catalog
from weightworks.stage.settings import Settings

SCHEMA = schema()
SHIPPED = sorted((REPOSITORY / "recipes").glob("*.yaml"))
GOOD = """\
version: 1
vars: {windows: 16}
sources:
  base: model
stages:
  small:
    use: quantize.gptq
    from: base
    with: {num_samples: "${windows}"}
    matrix: {bits: [3, 4]}
  scores:
    use: score.perplexity
    from: [base, small]
    with: {texts: [text.txt]}
report: [scores]
"""


def complaints(text: str) -> list[str]:
    """What the schema has against a recipe: where, and which rule."""
    problems = Problems()
    document = parse(text, "recipe", problems).plain()
    assert not problems.found
    found = jsonschema.Draft202012Validator(SCHEMA).iter_errors(document)
    return sorted(f"{'.'.join(map(str, error.absolute_path))}: {error.validator}" for error in found)


def test_schema_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


def test_every_reference_leads_somewhere() -> None:
    def references(part: Any) -> list[str]:
        if isinstance(part, dict):
            own = [part["$ref"]] if isinstance(part.get("$ref"), str) else []
            return own + [found for inner in part.values() for found in references(inner)]
        return [found for inner in part for found in references(inner)] if isinstance(part, list) else []

    for reference in set(references(SCHEMA)):
        place: Any = SCHEMA
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]
        assert isinstance(place, dict)


@pytest.mark.parametrize("entry", catalog.methods().values(), ids=lambda entry: entry.label)
def test_every_option_of_every_method_is_there(entry: catalog.Entry) -> None:
    own = entry.load().Options.model_fields
    given = SCHEMA["$defs"][f"with.{entry.label}"]
    wanted = {*own, *Settings.model_fields} - ({*RUN_WIDE} - {*own})
    assert set(given["properties"]) == set(SCHEMA["$defs"][f"matrix.{entry.label}"]["properties"]) == wanted
    assert given["additionalProperties"] is False
    assert wanted <= set(SCHEMA["$defs"]["with.any"]["properties"])
    for name, field in own.items():
        option = given["properties"][name]
        assert option["description"] == field.description
        assert {"type": "null"} in option["anyOf"]
        assert {"$ref": "#/$defs/variable"} in option["anyOf"]
        if not field.is_required():
            default = field.get_default(call_default_factory=True)
            assert option["default"] == default
            jsonschema.Draft202012Validator({**option, "$defs": SCHEMA["$defs"]}).validate(default)


def test_every_method_can_be_used() -> None:
    uses = SCHEMA["$defs"]["use"]["anyOf"][0]
    assert uses["enum"] == list(catalog.methods())
    assert uses["enumDescriptions"] == [entry.summary for entry in catalog.methods().values()]


def test_what_people_read_is_described() -> None:
    top = SCHEMA["properties"]
    assert list(top) == ["version", "extends", "vars", "sources", "stages", "report"]
    stage = SCHEMA["$defs"]["stage"]["properties"]
    assert list(stage) == ["use", "from", "with", "matrix"]
    assert all("description" in part for part in [*top.values(), *list(stage.values())[1:], SCHEMA["$defs"]["use"]])


# Recipes.


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    recipe = load_recipe(path)
    assert recipe.report
    assert complaints(recipe.text) == []
    assert recipe.text.startswith("# ")  # what it is for
    assert f"compress run recipes/{path.name}" in recipe.text


def test_some_recipes_are_shipped() -> None:
    assert {"quantize-4bit", "bits-by-method"} <= {path.stem for path in SHIPPED}


RIGHT = [
    ("", ""),
    ("num_samples", "num-samples"),
    ("from: base", "from: [base]"),
    ("from: base", "from: {model: base}"),
    ("[base, small]", "{models: [small], baseline: base}"),
    ("[base, small]", "${all}"),
    ("[3, 4]", '"${bits}"'),
    ("[3, 4]", '[3, "${bits}"]'),
    ("use: quantize.gptq", 'use: "${kind}.gptq"'),
    ("report: [scores]\n", ""),
]


@pytest.mark.parametrize(("old", "new"), RIGHT)
def test_right_recipes(old: str, new: str) -> None:
    assert complaints(GOOD.replace(old, new, 1)) == []


def test_methods_by_matrix() -> None:
    text = GOOD.replace("    use: quantize.gptq\n", "").replace("{bits", "{use: [quantize.rtn, quantize.gptq], bits")
    assert complaints(text) == []
    assert complaints(text.replace("quantize.rtn", "quantize.rtm")) == ["stages.small.matrix.use: anyOf"]
    assert complaints(text.replace("[3, 4]", "[3, 5]")) == ["stages.small.matrix.bits: anyOf"]


def test_a_recipe_that_extends_another_may_leave_out_and_take_away() -> None:
    assert complaints("extends: base.yaml\n") == []
    text = "extends: [a.yaml, b.yaml]\nvars: null\nsources: {base: null}\nstages:\n  a: null\n  b: {with: {bits: 3, seed: null}}\n"
    assert complaints(text) == []
    assert complaints(text.replace("bits: 3", "bits: 5")) == ["stages.b.with.bits: anyOf"]
    assert complaints(text.replace("bits", "bit")) == ["stages.b.with: additionalProperties"]


WRONG = [
    ("version: 1\n", "", ": required"),
    ("version: 1", "version: 2", "version: const"),
    ("version: 1", "version: '1'", "version: const"),
    ("report:", "reports:", ": additionalProperties"),
    ("sources:\n  base: model\n", "", ": required"),
    ("sources:\n  base: model\n", "sources: {}\n", "sources: minProperties"),
    ("sources:\n  base: model\n", "sources: model\n", "sources: type"),
    ("base: model", "base: ''", "sources.base: minLength"),
    ("base: model", "my base: model", "sources: pattern"),
    ("{windows: 16}", "{windows: {a: 1}}", "vars.windows: type"),
    ("  small:\n", "  4bit:\n", "stages: pattern"),
    ("stages:\n", "stages:\n  empty:\n", "stages.empty: type"),
    ("use: quantize.gptq", "use: quantize.gpqt", "stages.small.use: anyOf"),
    ("use: quantize.gptq", "use: gptq", "stages.small.use: anyOf"),
    ("    use: quantize.gptq\n", "", "stages.small: anyOf"),
    ("    from: base\n", "", "stages.small: required"),
    ("from: base", "form: base", "stages.small: additionalProperties"),
    ("from: base", "from: 5", "stages.small.from: type"),
    ("from: base", "from: [base, base]", "stages.small.from: anyOf"),
    ("from: base", "from: {model: base, teacher: base}", "stages.small.from: anyOf"),
    ("[base, small]", "[]", "stages.scores.from: anyOf"),
    ("    with: {texts: [text.txt]}\n", "", "stages.scores: anyOf"),
    ("with: {texts: [text.txt]}", "with: 5", "stages.scores.with: type"),
    ("[text.txt]", "[]", "stages.scores.with.texts: anyOf"),
    ("num_samples", "num_sample", "stages.small.with: additionalProperties"),
    ("num_samples", "max_memory", "stages.small.with: additionalProperties"),
    ('"${windows}"', "0", "stages.small.with.num_samples: anyOf"),
    ('"${windows}"', "'16'", "stages.small.with.num_samples: anyOf"),
    ("[3, 4]", "4", "stages.small.matrix.bits: anyOf"),
    ("[3, 4]", "[]", "stages.small.matrix.bits: anyOf"),
    ("[3, 4]", "[3, 5]", "stages.small.matrix.bits: anyOf"),
    ("bits: [3, 4]", "bit: [3, 4]", "stages.small.matrix: additionalProperties"),
    ("[scores]", "scores", "report: anyOf"),
    ("[scores]", "[scores, scores]", "report: anyOf"),
    ("    from: base\n", "    from: base\n    bits: 3\n", "stages.small: additionalProperties"),
]


@pytest.mark.parametrize(("old", "new", "expected"), WRONG)
def test_wrong_recipes_are_refused_by_schema_and_reader(
    old: str, new: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = GOOD.replace(old, new, 1)
    assert expected in complaints(text)
    (tmp_path / "model").mkdir()
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        load_recipe(Path("recipe.yaml"))


def test_making_it_loads_no_heavy_library() -> None:
    code = "import sys; from weightworks.plan.schema import schema; schema(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "weightworks.score.perplexity" in loaded
    assert loaded & {"torch._C", "numpy._core", "scipy._lib", "transformers"} == set()  # "torch" alone is a stand-in


# The page.

PAGE = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("text", [text for text in BLOCKS if "stages:" in text])
def test_recipes_of_the_page(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in SHIPPED:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(REPOSITORY)
    text = text.replace("my-text.txt", str(SHORT_TEXT))
    (tmp_path / "page.yaml").write_text(text, encoding="utf-8")
    assert load_recipe(tmp_path / "page.yaml").report == ("scores",)
    assert complaints(text) == []


def test_page_names_every_key_setting_and_role() -> None:
    named = set(re.findall(r"`(\w+)`", PAGE))
    assert {*TOP, *STAGE, *Settings.model_fields} <= named
    for kind, roles in ROLES.items():
        row = next(line for line in PAGE.splitlines() if line.startswith("|") and f"`{kind}`" in line)
        assert set(re.findall(r"`(\w+)`:", row)) == set(roles)
    assert f"{MOST:,} stages" in PAGE
