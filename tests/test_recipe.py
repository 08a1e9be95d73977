"""Recipes read: names, products, inputs, variables, parents, ``--set``; every mistake told with its line."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from compress.quantize import gptq
from weightworks.errors import UsageError
from weightworks.plan import document
from weightworks.plan.graph import Recipe, Stage
from weightworks.plan.matrix import MAYBE, ONE, Tag, joined, shown, suffix
from weightworks.plan.reader import ordered
from weightworks.plan.recipe import load_recipe

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
WITH = 'with: {num_samples: "${windows}"}'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a checkpoint folder, texts, and files that are neither."""
    (tmp_path / "model").mkdir()
    for name in ("text", "a", "b"):
        (tmp_path / f"{name}.txt").touch()
    (tmp_path / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str, *sets: str, **others: str) -> Recipe:
    """The recipe ``text``; ``others`` are files beside it, by stem."""
    for name, content in others.items():
        Path(f"{name}.yaml").write_text(content, encoding="utf-8")
    Path("r.yaml").write_text(text, encoding="utf-8", newline="")
    return load_recipe(Path("r.yaml"), sets)


def refused(text: str, *sets: str, **others: str) -> list[str]:
    """The mistakes told of ``text``, a line each."""
    with pytest.raises(UsageError) as caught:
        read(text, *sets, **others)
    first, *lines = str(caught.value).splitlines()
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    assert first == f"r.yaml: {count}; nothing was run"
    assert caught.value.hint == "see: compress schema, docs/recipes.md"
    assert all(line.startswith("  ") for line in lines)
    return [line[2:] for line in lines]


def stages(text: str) -> str:
    """A recipe with one source and these stages."""
    return f"version: 1\nsources: {{base: model}}\nstages:\n{text}"


def inputs(recipe: Recipe, role: str = "model") -> dict[str, Any]:
    return {name: stage.inputs.get(role) for name, stage in recipe.stages.items()}


# What a good recipe stands for.


def test_a_recipe() -> None:
    recipe = read(GOOD)
    assert (recipe.name, recipe.path, recipe.text) == ("r", "r.yaml", GOOD)
    assert recipe.sources == {"base": "model"}
    assert list(recipe.stages) == ["small[bits=3]", "small[bits=4]", "scores"]
    assert recipe.report == ("scores",)
    small = recipe.stages["small[bits=4]"]
    assert (small.label, small.options, small.settings) == ("quantize.gptq", {"bits": 4}, {"num_samples": 16})
    assert (small.inputs, small.tags) == ({"model": ("base",)}, (("small", "bits", 4),))
    assert str(small.place) == "r.yaml:6"
    scores = recipe.stages["scores"]
    assert (scores.inputs, scores.tags) == ({"models": ("base", "small[bits=3]", "small[bits=4]")}, ())
    assert scores.needs == ("base", "small[bits=3]", "small[bits=4]")


def test_matrix_is_the_product_in_order() -> None:
    recipe = read(
        stages("""
  small:
    from: base
    matrix:
      use: [quantize.rtn, quantize.gptq]
      group_size: [-1, 64]
      sym: [true, false]
""")
    )
    names = [
        f"small[use={use},group_size={size},sym={sym}]"
        for use, size, sym in itertools.product(["rtn", "gptq"], [-1, 64], ["true", "false"])
    ]
    assert list(recipe.stages) == names
    assert [stage.method for stage in recipe.stages.values()] == ["rtn"] * 4 + ["gptq"] * 4
    assert recipe.stages[names[1]].options == {"group_size": -1, "sym": False}


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("bits", 3, "3"),
        ("group_size", -1, "-1"),
        ("damp", 0.5, "0.5"),
        ("damp", 1.0, "1"),
        ("sym", True, "true"),
        ("scheme", None, "none"),
        ("use", "quantize.gptq", "gptq"),
        ("dataset", "texts/a b.txt", "texts-a-b.txt"),
        ("pattern", "2:4", "2:4"),
        ("ignore", ["*.gate", "lm_head"], "*.gate+lm_head"),
        ("ignore", [], "none"),
        ("dataset", "", "empty"),
        ("dataset", "x" * 41, "89ae7c50f66f"),
    ],
)
def test_values_in_names(option: str, value: Any, name: str) -> None:
    if len(name) == 12 and name.isalnum():
        assert re.fullmatch("[0-9a-f]{12}", shown(option, value))
        assert shown(option, value) != shown(option, value + "x")
    else:
        assert shown(option, value) == name


def test_an_option_that_two_stages_vary_bears_their_names() -> None:
    assert suffix([]) == ""
    assert suffix([("a", "bits", 3), ("a", "seed", 0), ("b", "bits", 4)]) == "[a.bits=3,seed=0,b.bits=4]"


FAN = """
  small: {use: quantize.gptq, from: base, matrix: {bits: [3, 4]}}
  again: {use: quantize.rtn, from: small, matrix: {group_size: [32, 64]}}
  last: {use: quantize.rtn, from: again}
  scores: {use: score.perplexity, from: [last], with: {texts: [a.txt]}}
  each: {use: score.perplexity, from: {models: base, baseline: small}, with: {texts: [a.txt]}}
"""


def test_a_stage_that_reads_one_of_many_is_multiplied_with_it() -> None:
    recipe = read(stages(FAN))
    read_by = inputs(recipe)
    assert read_by["again[group_size=32,bits=4]"] == ("small[bits=4]",)
    assert read_by["last[group_size=64,bits=3]"] == ("again[group_size=64,bits=3]",)
    names = [f"[group_size={size},bits={bits}]" for size in (32, 64) for bits in (3, 4)]
    assert [name for name in recipe.stages if name.startswith("again")] == [f"again{name}" for name in names]
    assert [name for name in recipe.stages if name.startswith("last")] == [f"last{name}" for name in names]
    assert recipe.stages["scores"].inputs == {"models": tuple(f"last{name}" for name in names)}  # many: all of them
    each = recipe.stages["each[bits=3]"].inputs
    assert each == {"models": ("base",), "baseline": ("small[bits=3]",)}


def test_from_is_a_name_a_list_or_roles() -> None:
    expected = {"model": ("base",)}
    for given in ("base", "[base]", "{model: base}", "{model: [base]}"):
        assert read(stages(f"  q: {{use: quantize.rtn, from: {given}}}")).stages["q"].inputs == expected


def test_one_member_by_its_name() -> None:
    recipe = read(stages(FAN + "  one: {use: quantize.rtn, from: 'again[group_size=64,bits=3]'}\n"))
    assert recipe.stages["one[group_size=64,bits=3]"].inputs == {"model": ("again[group_size=64,bits=3]",)}


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """quantize.gptq with a second input."""
    monkeypatch.setattr(gptq, "ROLES", {"model": ONE, "teacher": MAYBE}, raising=False)


@pytest.mark.usefixtures("teacher")
def test_two_inputs_from_one_multiplied_stage_are_of_one_member() -> None:
    recipe = read(
        stages("""
  a: {use: quantize.rtn, from: base, matrix: {bits: [3, 4]}}
  b: {use: quantize.rtn, from: a, matrix: {group_size: [32, 64]}}
  other: {use: quantize.rtn, from: base, matrix: {bits: [2, 8]}}
  c: {use: quantize.gptq, from: {model: b, teacher: a}}
  d: {use: quantize.gptq, from: {model: a, teacher: other}}
""")
    )
    found = {name: stage.inputs for name, stage in recipe.stages.items() if name[0] in "cd"}
    assert found == {
        **{
            f"c[group_size={size},bits={bits}]": {
                "model": (f"b[group_size={size},bits={bits}]",),
                "teacher": (f"a[bits={bits}]",),
            }
            for size in (32, 64)
            for bits in (3, 4)
        },
        **{
            f"d[a.bits={mine},other.bits={its}]": {"model": (f"a[bits={mine}]",), "teacher": (f"other[bits={its}]",)}
            for mine in (3, 4)
            for its in (2, 8)
        },
    }


def test_join_is_the_filtered_product() -> None:
    """Against brute force, for every small pattern of tags that outputs can share."""

    def outputs(
        name: str, marks: Sequence[tuple[str, str]], values: Sequence[Any]
    ) -> list[tuple[str, tuple[Tag, ...]]]:
        products = itertools.product(values, repeat=len(marks))
        return [
            (f"{name}{index}", tuple((*mark, value) for mark, value in zip(marks, chosen, strict=True)))
            for index, chosen in enumerate(products)
        ]

    marks = [("a", "x"), ("a", "y"), ("b", "x")]
    patterns = [list(part) for size in range(3) for part in itertools.combinations(marks, size)]
    for chosen in itertools.product(patterns, repeat=3):
        roles = [(f"r{k}", outputs(f"s{k}", pattern, [[1], "v", 2])) for k, pattern in enumerate(chosen)]
        expected = []
        for combination in itertools.product(*(each for _, each in roles)):
            tags: dict[Any, Tag] = {}
            if all(tags.setdefault(tag[:2], tag) == tag for _, own in combination for tag in own):
                names = {role: (name,) for (role, _), (name, _) in zip(roles, combination, strict=True)}
                expected.append((names, tuple(tags.values())))
        assert list(joined(roles)) == expected


def test_stages_come_after_what_they_read_and_else_as_written() -> None:
    text = "".join(f"  {name}: {{use: quantize.rtn, from: {source}}}\n" for name, source in
                   [("e", "d"), ("a", "base"), ("d", "c"), ("b", "base"), ("c", "base"), ("f", "base")])  # fmt: skip
    assert list(read(stages(text)).stages) == ["a", "b", "c", "d", "e", "f"]


def test_order_of_names() -> None:
    circles: list[list[str]] = []
    assert ordered({"b": ["a"], "a": [], "c": ["b", "x"]}, circles.append) == ["a", "b", "c"]
    assert circles == []
    assert ordered({"a": ["b"], "b": ["c"], "c": ["b"], "d": ["d"], "e": ["c"]}, circles.append) == list("bacde")
    assert circles == [["b", "c", "b"], ["d", "d"]]


def test_only() -> None:
    recipe = read(stages(FAN)).only(["again[group_size=32,bits=4]"])
    assert list(recipe.stages) == ["small[bits=4]", "again[group_size=32,bits=4]"]
    assert recipe.sources == {"base": "model"}
    assert list(read(stages(FAN)).only(["small"]).stages) == ["small[bits=3]", "small[bits=4]"]
    assert read(GOOD).only(["scores"]).report == ("scores",)
    assert read(GOOD).only(["small"]).report == ()
    with pytest.raises(UsageError, match=re.escape("--only smal: no such stage (did you mean 'small'?)")):
        read(GOOD).only(["smal"])


def test_a_source_that_nothing_reads_is_left_out_by_only() -> None:
    text = GOOD.replace("base: model", "base: model\n  other: org/name@main")
    assert read(text).sources == {"base": "model", "other": "org/name@main"}
    assert read(text).only(["small"]).sources == {"base": "model"}


def test_a_recipe_of_a_thousand_stages() -> None:
    recipe = read(GOOD.replace("[3, 4]", f"[3, 4], seed: {list(range(500))}"))
    assert len(recipe.stages) == 1001
    assert len(recipe.stages["scores"].needs) == 1001


# Variables.


def variables(text: str, option: str) -> Any:
    """What ``option`` of a stage becomes, the recipe's vars being ``text``."""
    recipe = read(
        f"version: 1\nvars: {text}\n{stages(f'  q: {{use: quantize.gptq, from: base, with: {option}}}')[11:]}"
    )
    return {**recipe.stages["q"].options, **recipe.stages["q"].settings}


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ("{x: 3}", "{bits: '${x}'}", {"bits": 3}),  # whole: its own type
        ("{x: false}", "{sym: '${x}'}", {"sym": False}),
        ("{x: [a, b]}", "{ignore: '${x}'}", {"ignore": ["a", "b"]}),
        ("{x: a}", "{ignore: ['${x}', 'b${x}']}", {"ignore": ["a", "ba"]}),
        ("{x: 8}", "{max_shard_size: '${x}GB'}", {"max_shard_size": "8GB"}),  # part of a text: as written
        ("{x: true}", "{dataset: 'a${x}$$'}", {"dataset": "atrue$"}),
        ("{x: 1}", "{dataset: '$${x} $5 $$'}", {"dataset": "${x} $5 $"}),
        ("{x: '${y}/a', y: '${z}', z: b}", "{dataset: '${x}.set'}", {"dataset": "b/a.set"}),  # in any order
        ("{x: '$${y}'}", "{dataset: '${x}'}", {"dataset": "${y}"}),  # what a variable holds is not read again
        ("{x: null}", "{scheme: '${x}'}", {"scheme": None}),
    ],
)
def test_variables(text: str, option: str, value: dict[str, Any]) -> None:
    assert variables(text, option) == value


def test_variables_elsewhere() -> None:
    recipe = read("""
version: 1
vars: {model: model, kind: quantize, all: [base], bits: [3, 4], report: scores}
sources: {base: "${model}"}
stages:
  small: {use: "${kind}.rtn", from: "${all}", matrix: {bits: "${bits}"}}
  scores: {use: score.perplexity, from: small, with: {texts: [a.txt]}}
report: ["${report}"]
""")
    assert list(recipe.stages) == ["small[bits=3]", "small[bits=4]", "scores"]
    assert recipe.report == ("scores",)


# Parents.

CHILD = "extends: base.yaml\n"


def test_extends_merges_key_by_key() -> None:
    recipe = read(
        CHILD
        + """
vars: {windows: 8}
stages:
  small:
    with: {seq-len: 128, num-samples: 4}
    matrix: {bits: [8]}
  more: {use: quantize.rtn, from: base}
report: [scores]
""",
        base=GOOD,
    )
    assert list(recipe.stages) == ["small[bits=8]", "scores", "more"]
    assert recipe.stages["small[bits=8]"].settings == {"num_samples": 4, "seq_len": 128}


def test_null_takes_away_what_the_parent_has() -> None:
    recipe = read(
        CHILD + "stages: {small: {matrix: null, with: {num_samples: null}}, scores: null}\nreport: null\n", base=GOOD
    )
    assert list(recipe.stages) == ["small"]
    assert (recipe.stages["small"].settings, recipe.report) == ({}, ())


def test_later_parents_prevail_and_paths_are_relative_to_the_file() -> None:
    Path("deep").mkdir()
    Path("deep/vars.yaml").write_text("vars: {windows: 4}")
    Path("deep/both.yaml").write_text("extends: [../base.yaml, vars.yaml]\n")
    recipe = read("extends: deep/both.yaml\n", base=GOOD)
    assert recipe.stages["small[bits=3]"].settings == {"num_samples": 4}


def test_a_parent_of_two_parents_is_no_circle() -> None:
    recipe = read("extends: [a.yaml, b.yaml]", a=CHILD, b=CHILD, base=GOOD)
    assert list(recipe.stages) == list(read(GOOD).stages)


def test_mistakes_name_the_file_they_are_in() -> None:
    parent = GOOD.replace("gptq", "gpqt").replace("text.txt]", "text.txt], sq_len: 3")
    assert refused(CHILD + "stages:\n  small:\n    form: base\n", base=parent) == [
        "base.yaml:7: stage 'small': unknown method 'gpqt' for quantize (did you mean 'gptq'?)",
        "base.yaml:14: score.perplexity has no option 'sq_len' (did you mean 'seq_len'?)",
        "r.yaml:4: stage 'small' has no key 'form' (did you mean 'from'?)",
    ]


@pytest.mark.parametrize(
    ("text", "base", "expected"),
    [
        ("extends: nope.yaml", "", "r.yaml:1: extends: no such file nope.yaml; a path is relative to this file"),
        ("extends: model", "", "r.yaml:1: extends: no such file model; a path is relative to this file"),
        ("extends: [3]", "", "r.yaml:1: 'extends' must be a file name or a list of them; this is 3"),
        ("extends:", "", "r.yaml:1: 'extends' must be a file name or a list of them; this is empty"),
        ("extends: r.yaml", "", "r.yaml:1: extends: r.yaml extends this file in turn, or is this file"),
        (CHILD, "extends: r.yaml", "base.yaml:1: extends: r.yaml extends this file in turn, or is this file"),
        (
            CHILD,
            "- a",
            "base.yaml:1: a recipe must be a mapping with version, extends, vars, sources, stages, report; this is a list",
        ),
    ],
)
def test_parents_that_cannot_be_read_are_all_that_is_told(text: str, base: str, expected: str) -> None:
    assert refused(
        f"{text}\nstages:\n  q: {{use: quantize.rtn, from: base, with: {{bits: '${{bits}}'}}}}\n", base=base
    ) == [expected]


def test_a_parent_that_is_no_yaml_is_named() -> None:
    with pytest.raises(
        UsageError, match=re.escape("base.yaml:2: not valid YAML: a comma or the end of what line 1 opens")
    ):
        read(CHILD, base="a: [1\n")


# --set.


def test_set() -> None:
    recipe = read(GOOD, "small.seq-len=64", "small.num_samples=4", "scores.texts=[a.txt, b.txt]", "small.dataset=a=b")
    assert recipe.stages["small[bits=3]"].settings == {"seq_len": 64, "num_samples": 4, "dataset": "a=b"}
    assert recipe.stages["scores"].options == {"texts": ["a.txt", "b.txt"]}


def test_set_a_variable() -> None:
    assert read(GOOD, "vars.windows=3").stages["small[bits=3]"].settings == {"num_samples": 3}
    text = GOOD.replace("vars: {windows: 16}\n", "")  # one that the recipe leaves to the command line
    assert read(text, "vars.windows=3").stages["small[bits=3]"].settings == {"num_samples": 3}


def test_set_a_matrix_option() -> None:
    assert list(read(GOOD, "small.bits=8").stages) == ["small[bits=8]", "scores"]
    assert list(read(GOOD, "small.bits=[2, 8]").stages) == ["small[bits=2]", "small[bits=8]", "scores"]
    assert list(read(GOOD, "small.bits=null").stages) == ["small", "scores"]


def test_set_method_and_inputs() -> None:
    recipe = read(GOOD, "small.use=quantize.rtn", "scores.from=small")
    assert recipe.stages["small[bits=3]"].method == "rtn"
    assert recipe.stages["scores"].inputs == {"models": ("small[bits=3]", "small[bits=4]")}


def test_set_an_option_of_a_stage_whose_name_has_a_dot() -> None:
    assert read(stages("  a.b: {use: quantize.rtn, from: base}"), "a.b.bits=3").stages["a.b"].options == {"bits": 3}


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("small.bits", "STAGE.OPTION=VALUE or vars.NAME=VALUE is expected"),
        ("bits=3", "STAGE.OPTION=VALUE or vars.NAME=VALUE is expected"),
        ("", "STAGE.OPTION=VALUE or vars.NAME=VALUE is expected"),
        ("smal.bits=3", "no such stage 'smal' (did you mean 'small'?)"),
        ("vars.window=3", "no such variable 'window' (did you mean 'windows'?)"),
        ("small.bit=3", "quantize.gptq has no option 'bit' (did you mean 'bits'?)"),
        ("small.bits=5", "quantize.gptq: option 'bits' = 5: input should be 2, 3, 4 or 8"),
        ("small.bits=[3, 5]", "quantize.gptq: option 'bits' = 5: input should be 2, 3, 4 or 8"),
        ("small.seed=${windo}", "unknown variable 'windo' (did you mean 'windows'?)"),
        ("small.seed=!!mine 3", "the tag !!mine is not known here; a recipe holds plain values"),
        ("small.dataset='a", "not valid YAML: the quote that opens here is never closed"),
    ],
)
def test_mistakes_of_set_name_it(text: str, mistake: str) -> None:
    assert refused(GOOD, text) == [f"--set {text}: {mistake}"]


# YAML.


def test_anchors_and_merge_keys() -> None:
    recipe = read(
        stages("""
  a: &common
    use: quantize.rtn
    from: base
    with: &few {bits: 4, seed: 1}
  b:
    <<: *common
    with: {<<: *few, seed: 2}
  c: {<<: [{with: {bits: 8}}, *common], from: a}
""")
    )
    assert recipe.stages["b"].options == {"bits": 4}
    assert recipe.stages["b"].settings == {"seed": 2}
    assert (recipe.stages["c"].options, recipe.stages["c"].inputs) == ({"bits": 8}, {"model": ("a",)})
    assert [stage.place.line for stage in recipe.stages.values()] == [5, 9, 12]


def test_a_mistake_that_is_merged_stands_where_it_is_written() -> None:
    text = stages(
        "  a: &common\n    use: quantize.rtn\n    from: base\n    with: {bit: 4}\n  b:\n    <<: *common\n    from: a\n    bits: 3\n"
    )
    assert refused(text) == [
        "r.yaml:7: quantize.rtn has no option 'bit' (did you mean 'bits'?)",  # of both stages, told once
        "r.yaml:11: stage 'b' has no key 'bits' (options stand under 'with')",
    ]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("yes", "yes"), ("on", "on"), ("no", "no"), ("2024-01-01", "2024-01-01"), ("12:30:00", "12:30:00"),
        ("'3'", "3"), ("!!str 3", "3"), ("<<", "<<"), ("=", "="), ("|\n        a\n        b\n", "a\nb\n"),
    ],
)  # fmt: skip
def test_plain_text(written: str, value: str) -> None:
    text = stages(f"  q:\n    use: quantize.gptq\n    from: base\n    with:\n      dataset: {written}\n")
    assert read(text).stages["q"].settings == {"dataset": value}


@pytest.mark.parametrize(("written", "value"), [("010", 10), ("0o10", 8), ("0x10", 16), ("1_000", 1000), ("+1", 1)])
def test_numbers(written: str, value: int) -> None:
    text = stages(f"  q: {{use: quantize.gptq, from: base, with: {{seed: {written}}}}}")
    assert read(text).stages["q"].settings == {"seed": value}


def test_names_that_yaml_1_1_would_read_as_something_else() -> None:
    text = "version: 1\nsources: {on: model, null_: model}\nstages: {yes: {use: quantize.rtn, from: on}, no: {use: quantize.rtn, from: yes}}"
    assert list(read(text).stages) == ["yes", "no"]


def test_windows_line_ends_and_a_byte_order_mark() -> None:
    assert list(read("\ufeff" + GOOD.replace("\n", "\r\n")).stages) == list(read(GOOD).stages)


KEYS = "version, extends, vars, sources, stages, report"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", f"r.yaml:1: a recipe must be a mapping with {KEYS}; this is empty"),
        ("# nothing\n", f"r.yaml:1: a recipe must be a mapping with {KEYS}; this is empty"),
        ("hello", f"r.yaml:1: a recipe must be a mapping with {KEYS}; this is 'hello'"),
        ("- version: 1\n", f"r.yaml:1: a recipe must be a mapping with {KEYS}; this is a list"),
        (GOOD + "[a, b]: 1\n", "r.yaml:16: a key is a name; this one is a list"),
        (GOOD + "{a: b}: 1\n", "r.yaml:16: a key is a name; this one is a mapping"),
        (GOOD + "~: 1\n", "r.yaml:16: a key is a name; this one is empty"),
        (GOOD + "7: 1\n", "r.yaml:16: unknown key '7' (known: extends, report, sources, stages, vars, version)"),
        (GOOD + "vars: {}\n", "r.yaml:16: key 'vars' is given twice, first in line 2"),
        (GOOD + "<<: 1\n", "r.yaml:16: '<<' takes a mapping by its alias, or a list of them, such as <<: *common"),
        (GOOD.replace("16", "&a [*a]"), "r.yaml:2: values are nested more than 40 deep, or hold themselves by an alias"),
        (GOOD.replace("{windows: 16}", "&a {windows: 16, <<: *a}"), "r.yaml:2: '<<' merges a mapping into itself"),
        (GOOD.replace("16", "!!python/object/apply:os.system [ls]"), "r.yaml:2: the tag !!python/object/apply:os.system is not known here; a recipe holds plain values"),
        (GOOD.replace("16", "!mine 16"), "r.yaml:2: the tag !mine is not known here; a recipe holds plain values"),
        (GOOD.replace("16", "!!int many"), "r.yaml:2: 'many' cannot be read as a number; put a text in quotes"),
        (GOOD.replace("16", '"\\0"'), "r.yaml:2: a text holds a character that no text file can hold"),
        (GOOD.replace("16", '"\\ud800"'), "r.yaml:2: a text holds a character that no text file can hold"),
    ],
)  # fmt: skip
def test_odd_yaml(text: str, expected: str) -> None:
    assert refused(text) == [expected]


def test_a_page_of_aliases_that_stands_for_billions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "MOST", 10_000)
    lines = "".join(f"  a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 12))
    text = GOOD.replace("vars: {windows: 16}\n", f"vars:\n  windows: 16\n  a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8]\n{lines}")
    with pytest.raises(UsageError) as caught:
        read(text)
    assert str(caught.value) == "r.yaml:4: the recipe holds more than 10,000 values, those behind aliases counted"


FLOW = (
    "a comma or the end of what line {} opens with a bracket is expected; inside brackets, texts that hold [ ] {{ }} or "
    "a comma need quotes, such as \"${{name}}\" and 'small[bits=3]'"
)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("version: 1\n\tvars:\n", 2, "a tab stands where only spaces may; indent with spaces"),
        ("a: [1, 2\nb: 3\n", 2, FLOW.format(1)),
        ("a: {bits: ${bits}}\n", 1, FLOW.format(1)),
        ("a: [small[bits=3]]\n", 1, FLOW.format(1)),
        ("a: 1\nb: *nope\n", 2, "'*nope' refers to no anchor '&nope'; a text that starts with '*' needs quotes"),
        ("a: *.mlp.*\n", 1, "'*.mlp.*' refers to no anchor '&.mlp.*'; a text that starts with '*' needs quotes"),
        ("a: * b\n", 1, "a text that starts with '*' or '&' needs quotes"),
        ("a: @x\n", 1, "a text that starts with '@' needs quotes"),
        ("a: %x\n", 1, "a text that starts with '%' needs quotes"),
        ("a: ]\n", 1, "a value is expected where ']' stands; a text that starts with it needs quotes"),
        ("a: >x\n", 1, "'|' and '>' open a text of several lines; a text that starts with one of them needs quotes"),
        ("a: 'x\nb: 1\n", 1, "the quote that opens here is never closed"),
        ('a: "C:\\q"\n', 1, "unknown escape character 'q': in double quotes a backslash is an escape; use single quotes"),
        ('a: 1\nb: "\\U99999999"\n', 2, "an escape \\U names no character"),
        ("a: b: c\n", 1, "a ':' stands where none may; mind the indentation, and quote a text that holds ': '"),
        ("a: 1\n b: 2\n", 2, "a ':' stands where none may; mind the indentation, and quote a text that holds ': '"),
        ("a:\n  b: 1\n c: 2\n", 3, "this does not fit what line 1 begins; mind the indentation"),
        ("a: 1\nb\nc: 2\n", 2, "a ':' after the key is missing"),
        ("a: 1\n---\nb: 2\n", 2, "a second document starts here; a recipe is one"),
        ("%YAML 2.0\n---\na: 1\n", 1, "only YAML of version 1 can be read"),
        ("a: 1\nb: \x01\n", 2, "character U+0001 cannot stand in a text file"),
    ],
)  # fmt: skip
def test_what_is_no_yaml(text: str, line: int, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(text)
    assert str(caught.value) == f"r.yaml:{line}: not valid YAML: {reason}"
    assert caught.value.hint == "nothing was run; see: docs/recipes.md"


def test_deep_nesting() -> None:
    with pytest.raises(UsageError, match=r"^r\.yaml: values are nested more than 40 deep$"):
        read("[" * 500)


@pytest.mark.parametrize(
    ("path", "reason"), [("nope.yaml", "No such file or directory"), ("model", "Is a directory"), ("odd.yaml", "not UTF-8 text")]
)  # fmt: skip
def test_files_that_cannot_be_read(path: str, reason: str) -> None:
    Path("odd.yaml").write_bytes(b"version: 1 \xff\xfe")
    with pytest.raises(UsageError, match=re.escape(f"{path}: cannot be read ({reason})")) as caught:
        load_recipe(Path(path))
    assert caught.value.hint == "give a recipe file, see recipes/"


# Mistakes.

MISTAKES: list[tuple[str, str, list[str]]] = [  # in GOOD, this is replaced by that; what is told
    # The top.
    ("version: 1\n", "", ["1: 'version: 1' is missing"]),
    ("version: 1", "version: 2", ["1: 'version' must be 1, the only one this program reads; this is 2"]),
    ("version: 1", "version: '1'", ["1: 'version' must be 1, the only one this program reads; this is '1'"]),
    ("report:", "reports:", ["15: unknown key 'reports' (did you mean 'report'?)"]),
    # Sources.
    ("sources:\n  base: model\n", "", ["1: 'sources' is missing"]),
    ("sources:\n  base: model\n", "sources: model\n", ["3: 'sources' must be a mapping of names; this is 'model'"]),
    ("base: model", "base: nowhere", ["4: source 'base': no such folder nowhere; a path is relative to the working directory"]),
    ("base: model", "base: ./org/name", ["4: source 'base': no such folder ./org/name; a path is relative to the working directory"]),
    ("base: model", "base: ~nobody/x", ["4: source 'base': no such folder ~nobody/x; a path is relative to the working directory"]),
    ("base: model", f"base: {'x' * 300}", [f"4: source 'base': no such folder {'x' * 300}; a path is relative to the working directory"]),
    ("base: model", "base: model.safetensors", ["4: source 'base': model.safetensors is a file; give the checkpoint folder that holds it"]),
    ("base: model", "base: 7", ["4: source 'base' must be a folder or a hub id; this is 7"]),
    ("base: model", "base:", ["4: source 'base' must be a folder or a hub id; this is empty"]),
    ("base: model", "base: model\n  my model: model", ["5: source 'my model': a name is made of letters, digits, '_', '-' and '.', and begins with a letter or '_'"]),
    # Variables.
    ("${windows}", "${window}", ["9: unknown variable 'window' (did you mean 'windows'?)"]),
    ("${windows}", "${windows", ["9: '${windows': '}' is missing after '${'; write $${ for a plain ${"]),
    ("16", "{a: 1}", ["2: variable 'windows' must be a value or a list; this is a mapping"]),
    ("16", "[1]}\n#", ["10: quantize.gptq: option 'num_samples' = [1]: input should be a valid integer"]),
    ("16}", "'${b}', b: '${windows}'}", ["2: variables refer to each other in a circle: windows -> b -> windows"]),
    ("16}", "[1], b: 'a${windows}'}", ["2: variable 'windows' is a list: it cannot be a part of a text", "9: quantize.gptq: option 'num_samples' = [1]: input should be a valid integer"]),
    # Stages.
    ("  small:\n", "  4bit: {use: quantize.rtn, from: base}\n  small:\n", ["6: stage '4bit': a name is made of letters, digits, '_', '-' and '.', and begins with a letter or '_'"]),
    ("  small:\n", "  base: {use: quantize.rtn, from: small}\n  small:\n", ["6: stage 'base': a source has this name; choose another"]),
    ("  small:\n", "  report.json: {use: quantize.rtn, from: base}\n  small:\n", ["6: stage 'report.json': a file of this name is written beside it; choose another"]),
    ("  small:\n", "  small-bits-3: {use: quantize.rtn, from: base}\n  small:\n", ["7: stages 'small-bits-3' and 'small[bits=3]' would share the folder small-bits-3"]),
    ("  small:\n", "  empty:\n  small:\n", ["6: stage 'empty' must be a mapping with use, from, with, matrix; this is empty"]),
    ("  small:\n", "  a:\n    use: quantize.rtn\n    from: base\n    bits: 3\n  small:\n", ["9: stage 'a' has no key 'bits' (options stand under 'with')"]),
    ("    from: base\n", "    from: base\n    form: base\n", ["9: stage 'small' has no key 'form' (did you mean 'from'?)"]),
    # Methods.
    ("    use: quantize.gptq\n", "", ["6: stage 'small': 'use' is missing, such as use: quantize.gptq"]),
    ("use: quantize.gptq", "use: quantize.gpqt", ["7: stage 'small': unknown method 'gpqt' for quantize (did you mean 'gptq'?)"]),
    ("use: quantize.gptq", "use: quantise.gptq", ["7: stage 'small': unknown method 'quantise.gptq' (did you mean 'quantize.gptq'?)"]),
    ("use: quantize.gptq", "use: gptq", ["7: stage 'small': unknown method 'gptq' (did you mean 'quantize.gptq'?)"]),
    ("use: quantize.gptq", "use: 4", ["7: stage 'small': 'use' must be KIND.METHOD, such as quantize.gptq; this is 4"]),
    # Inputs.
    ("    from: base\n", "", ["6: stage 'small': 'from' is missing; it names sources or stages"]),
    ("from: base", "from: []", ["8: stage 'small': 'from' is missing; it names sources or stages"]),
    ("from: base", "from: bose", ["8: stage 'small' reads 'bose', which is neither source nor stage (did you mean 'base'?)"]),
    ("from: base", "from: 5", ["8: stage 'small': 'from' must name sources or stages; this is 5"]),
    ("from: base", "from: small", ["6: stage 'small' reads itself"]),
    ("from: base", "from: scores", ["6: stages read each other in a circle: small -> scores -> small"]),
    ("from: base", "from: base[bits=3]", ["8: stage 'small' reads 'base[bits=3]', which does not exist (known: base)"]),
    ("from: base", "from: {model: base, teacher: base}", ["8: stage 'small': quantize.gptq has no input 'teacher' (known: model)"]),
    ("from: base", "from: {model: }", ["8: stage 'small': 'model' in 'from' must name sources or stages; this is empty"]),
    ("[base, small]", "[small, small]", ["13: stage 'scores': 'from' names 'small' twice"]),
    ("[base, small]", "['small[bits=5]']", ["13: stage 'scores' reads 'small[bits=5]', which does not exist (did you mean 'small[bits=4]'?)"]),
    ("[base, small]", "{baseline: base}", ["11: stage 'scores': score.perplexity needs 'models' in 'from'"]),
    ("[base, small]", "{models: small, baseline: [base, small]}", ["13: stage 'scores': 'baseline' of score.perplexity takes one checkpoint or none, 2 given"]),
    ("[base, small]", "{models: []}", ["13: stage 'scores': 'models' of score.perplexity takes checkpoints, none given"]),
    ("report:", "  more: {use: quantize.rtn, from: scores}\nreport:", ["15: stage 'more' reads 'scores', which is a score; a checkpoint is needed"]),
    # Options.
    (WITH, "with: 5", ["9: stage 'small': 'with' must be a mapping of options; this is 5"]),
    (WITH, "with: {num_sample: 5}", ["9: quantize.gptq has no option 'num_sample' (did you mean 'num_samples'?)"]),
    (WITH, "with: {num_samples: '16'}", ["9: quantize.gptq: option 'num_samples' = '16': input should be a valid integer"]),
    (WITH, "with: {num_samples: 0}", ["9: quantize.gptq: option 'num_samples' = 0: input should be greater than or equal to 1"]),
    (WITH, "with: {sym: yes}", ["9: quantize.gptq: option 'sym' = 'yes': input should be a valid boolean"]),
    (WITH, "with: {seed: 2024-01-01}", ["9: quantize.gptq: option 'seed' = '2024-01-01': input should be a valid integer"]),
    (WITH, "with: {num_samples: 1, num-samples: 2}", ["9: stage 'small': option 'num_samples' is given twice in 'with'"]),
    (WITH, "with: {overwrite: true}", ["9: 'overwrite' is for a whole run: give --overwrite on the command line"]),
    (WITH, "with:\n      seed: 1\n      max-memory: 8GB", ["11: 'max_memory' is for a whole run: give --max-memory on the command line"]),
    (WITH, "with: {ignore: ['re:(']}", ["9: quantize.gptq: option 'ignore' = ['re:(']: not a regular expression: missing ), unterminated subpattern at position 0"]),
    ("    with: {texts: [text.txt]}\n", "", ["11: score.perplexity: option 'texts' is required"]),
    # Matrix.
    ("[3, 4]", "4", ["10: stage 'small': matrix option 'bits' must be a list of values; this is 4"]),
    ("[3, 4]", "[]", ["10: stage 'small': matrix option 'bits' must be a list of values; this is empty"]),
    ("[3, 4]", "[3, 3]", ["10: stage 'small': matrix option 'bits' holds 3 twice"]),
    ("[3, 4]", "[3, 3.0]", ["10: stage 'small': matrix option 'bits': 3 and 3.0 would both be called 3"]),
    ("[3, 4]", "\n      [3,\n       5]", ["12: quantize.gptq: option 'bits' = 5: input should be 2, 3, 4 or 8"]),
    ("bits: [3, 4]", "bit: [3, 4]", ["10: quantize.gptq has no option 'bit' (did you mean 'bits'?)"]),
    ("matrix: {bits: [3, 4]}", "matrix: [3, 4]", ["10: stage 'small': 'matrix' must be a mapping of options; this is a list"]),
    ("matrix: {bits: [3, 4]}", "matrix: {num_samples: [1, 2]}", ["10: stage 'small': matrix option 'num_samples' is given in 'with' too"]),
    ("matrix: {bits: [3, 4]}", "matrix: {use: [quantize.rtn]}", ["10: stage 'small': matrix option 'use' is given outside of 'matrix' too"]),
    ("    use: quantize.gptq\n    from: base\n", "    from: base\n    matrix: {use: [quantize.rtn, score.perplexity]}\n  other:\n    use: quantize.gptq\n    from: base\n", ["6: score.perplexity: option 'texts' is required", "8: stage 'small': methods of one kind are expected, these are quantize and score", "16: stage 'scores' reads 'small', which is a score; a checkpoint is needed"]),
    ("[3, 4]", "[3, 4], seed: [" + ", ".join(map(str, range(500))) + "], group_size: [" + ", ".join(map(str, range(1, 200))) + "]", ["6: stage 'small': its matrix makes 199,000 stages, more than 100,000"]),
    # Report.
    ("[scores]", "scores", ["15: 'report' must be a list of score stages, such as [scores]; this is 'scores'"]),
    ("[scores]", "[score]", ["15: report: no such stage 'score' (did you mean 'scores'?)"]),
    ("[scores]", "[small]", ["15: report: stage 'small' is no score; the report compares scores"]),
    ("[scores]", "[scores, scores]", ["15: report: stage 'scores' is named twice"]),
    ("[scores]", "[{a: 1}]", ["15: 'report' must be a list of score stages; this is a mapping"]),
    ("[scores]", "['small[bits=7]']", ["15: report: no such stage 'small[bits=7]' (did you mean 'small[bits=4]'?)"]),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), MISTAKES)
def test_mistakes(old: str, new: str, expected: list[str]) -> None:
    assert GOOD.count(old) == 1 or old in ("[scores]", "report:")
    assert refused(GOOD.replace(old, new, 1)) == [f"r.yaml:{line}" for line in expected]


def test_mistakes_are_many_and_distinct() -> None:
    forms = {re.sub(r"\d+|'[^']*'", "", line) for _, _, lines in MISTAKES for line in lines}
    assert len(forms) >= 40


def test_all_mistakes_at_once_in_the_order_of_the_file() -> None:
    text = """
version: 3
suorces: {}
vars: {a: "${b}"}
sources:
  base: nowhere
  9: model
stages:
  one: {use: quantize.gptq, from: bose, with: {bits: 5, sed: 1, group-size: 0}}
  two:
    use: quantise.rtn
    matrix: {bits: [], seed: [1, x, -1]}
  three: {use: quantize.rtn, from: three}
  four: 4
report: [one, fore]
"""
    assert refused(text) == [
        "r.yaml:2: 'version' must be 1, the only one this program reads; this is 3",
        "r.yaml:3: unknown key 'suorces' (did you mean 'sources'?)",
        "r.yaml:4: unknown variable 'b' (known: a)",
        "r.yaml:6: source 'base': no such folder nowhere; a path is relative to the working directory",
        "r.yaml:7: source '9': a name is made of letters, digits, '_', '-' and '.', and begins with a letter or '_'",
        "r.yaml:9: quantize.gptq has no option 'sed' (did you mean 'seed'?)",
        "r.yaml:9: quantize.gptq: option 'bits' = 5: input should be 2, 3, 4 or 8",
        "r.yaml:9: quantize.gptq: option 'group_size' = 0: must be -1 (per channel) or at least 1",
        "r.yaml:9: stage 'one' reads 'bose', which is neither source nor stage (did you mean 'base'?)",
        "r.yaml:10: stage 'two': 'from' is missing; it names sources or stages",
        "r.yaml:11: stage 'two': unknown method 'quantise.rtn' (did you mean 'quantize.rtn'?)",
        "r.yaml:12: stage 'two': matrix option 'bits' must be a list of values; this is empty",
        "r.yaml:13: stage 'three' reads itself",
        "r.yaml:14: stage 'four' must be a mapping with use, from, with, matrix; this is 4",
        "r.yaml:15: report: no such stage 'fore' (did you mean 'four'?)",
    ]


def test_an_option_of_a_type_that_a_check_does_not_expect() -> None:
    text = GOOD.replace(WITH, "with:\n      scheme: [W4A16]")
    (line,) = refused(text)
    assert line.startswith("r.yaml:10: quantize.gptq: option 'scheme' = ['W4A16']: ")


def test_of_thousands_of_mistakes_the_first_are_told() -> None:
    text = stages("".join(f"  q{k}: {{use: quantize.rtn, from: bose{k}}}\n" for k in range(1000)))
    with pytest.raises(UsageError) as caught:
        read(text)
    lines = str(caught.value).splitlines()
    assert len(lines) == 52
    assert (lines[0], lines[-1]) == ("r.yaml: 1,000 mistakes; nothing was run", "  and 950 more")


def test_control_characters_do_not_reach_the_terminal() -> None:
    (line,) = refused(GOOD.replace("from: base", 'from: "b\\x1b[31m\\nse"'))
    assert line.startswith("r.yaml:8: stage 'small' reads 'b?[31m se', which")


# Random edits.

PIECES = [
    *"\t\n :-[]{}&*!|>'\"%@`,?#\\$~=<0xe.",
    "!!", "<<: ", "? ", "---\n", "%YAML 1.1\n", "&a ", "*tpl", '"\\U99999999"', "\x85", "\u2028", "\ufeff", "null", "[]", "{}",
    ".nan", "1e999", "2001-99-99", "${", "${list}", "!!set ", "!!int ", "!!null ", "!!seq ", "[a]: ", "base", "small", "other", "from: ",
]  # fmt: skip
RICH = GOOD.replace("windows: 16", "windows: 16, list: [3, 4], flag: true").replace("[3, 4]}\n  s", '"${list}"}\n  s').replace(
    "report:",
    """\
  tpl: &tpl
    use: quantize.rtn
    from: {model: small}
    with: {ignore: ["a", 'b'], sym: "${flag}"}
  other:
    <<: *tpl
    matrix:
      group_size: [-1, 32]
      format: [dense, gptq]
report:""",
)  # fmt: skip


def edits(seed: int) -> Iterator[Callable[[str], str]]:
    """A few random changes of a text."""
    draw = random.Random(seed)

    def insert(text: str) -> str:
        at = draw.randrange(len(text))
        return text[:at] + draw.choice(PIECES) + text[at:]

    def cut(text: str) -> str:
        at = draw.randrange(len(text))
        return text[:at] + text[at + draw.randint(1, 6) :]

    def swap_words(text: str) -> str:
        word = draw.choice(list(re.finditer(r"[\w.]+", text)))
        return text[: word.start()] + draw.choice([*PIECES, *re.findall(r"[\w.]+", RICH)]) + text[word.end() :]

    def swap_lines(text: str) -> str:
        lines = text.split("\n")
        one, other = draw.randrange(len(lines)), draw.randrange(len(lines))
        lines[one], lines[other] = lines[other], lines[one]
        return "\n".join(lines)

    return (draw.choice([insert, cut, swap_words, swap_lines]) for _ in range(draw.randint(1, 4)))


def test_random_edits_give_a_recipe_or_a_list_of_mistakes() -> None:
    assert len(read(RICH).stages) == 13
    read_whole = 0
    for seed in range(400):
        text = RICH
        for edit in edits(seed):
            text = edit(text)
        try:
            recipe = read(text)
        except UsageError as error:
            lines = str(error).splitlines()
            assert re.match(r"r\.yaml(:\d+)?: ", lines[0]), text
            assert all(re.match(r"  (r\.yaml:\d+: |and \d)", line) for line in lines[1:]), text
        else:
            read_whole += 1
            assert all(isinstance(stage, Stage) for stage in recipe.stages.values())
    assert 5 < read_whole < 200


def test_files_that_are_missing() -> None:
    """Told of with the other mistakes, at the line of the option, once for all members."""
    text = stages(
        """\
  small:
    use: quantize.gptq
    from: base
    matrix: {bits: [3, 4, 5]}
    with:
      dataset: gone.jsonl
  plain: {use: quantize.rtn, from: base, with: {dataset: gone.txt}}
  scores:
    use: score.perplexity
    from: [base, small]
    with:
      texts: [a.txt, no/b.txt, org/set]
  asked:
    use: score.harness
    from: base
    with:
      tasks: [mine]
      include_path: nowhere
"""
    )
    assert refused(text) == [
        "r.yaml:7: quantize.gptq: option 'bits' = 5: input should be 2, 3, 4 or 8",
        "r.yaml:9: quantize.gptq: 'dataset': gone.jsonl: no such file",
        "r.yaml:15: score.perplexity: 'texts': no/b.txt: no such file",
        "r.yaml:21: score.harness: nowhere: no such folder",
    ]
