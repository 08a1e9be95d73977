"""Configurations of mergekit: what they mean, what comes of them, and how mistakes are told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Commands
from conftest import CheckpointMaker
from merges import Tensors, assert_golden, golden

from weightworks.errors import MethodError, UsageError
from weightworks.plan.config import run_config
from weightworks.plan.document import parse
from weightworks.plan.located import Problems
from weightworks.plan.parameters import value_at, value_in
from weightworks.plan.stage import Outcome
from weightworks.stage.mergekit import known
from weightworks.stage.settings import Settings
from weightworks.store.checkpoint import Checkpoint
from weightworks.testing.merge_contract import small_models

DETERMINISTIC = (
    "task_arithmetic", "task_arithmetic_norm_l08", "ties", "ties_nonorm_l12", "ties_equalw_d100", "breadcrumbs", "breadcrumbs_ties",
    "model_stock", "model_stock_filterwise", "linear", "slerp_near_t03", "slerp_far_t03", "slerp_far_t075", "nuslerp_far",
)  # fmt: skip
REGISTERED = (
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear", "karcher", "linear",
    "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "ram", "ramplus_tl", "sce", "slerp", "task_arithmetic",
    "ties",
)  # fmt: skip


def configured(folder: Path, document: Any, **how: Any) -> Outcome:
    """What a configuration makes, given as data or as text."""
    path = folder / "merge.yaml"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    options = {"check": "files", **how.pop("options", {})}
    return run_config(path, options, Settings(device="cpu"), output_dir=folder / "out", **how)


def mistakes(folder: Path, document: Any, **how: Any) -> list[str]:
    """The lines of what is wrong with a configuration, without the file's name."""
    with pytest.raises(UsageError) as caught:
        configured(folder, document, **how)
    lines = str(caught.value).splitlines()[1:]
    return [line.strip().removeprefix(f"{folder / 'merge.yaml'}:") for line in lines]


def tensors(folder: Path) -> Tensors:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def model(start: float, layers: int = 4) -> Tensors:
    """A model in which every number tells its tensor: layer k is start + k, the embedding start + 50, the norm start + 90."""
    found = {
        f"model.layers.{k}.{part}.weight": torch.full((2, 3), float(start + k))
        for k in range(layers)
        for part in ("attn", "mlp")
    }
    return {
        "model.embed_tokens.weight": torch.full((5, 3), start + 50.0),
        "model.norm.weight": torch.full((3,), start + 90.0),
        **found,
    }


def config(layers: int = 4, **more: Any) -> dict[str, Any]:
    return {"model_type": "llama", "num_hidden_layers": layers, **more}


def test_every_method_of_mergekit_has_one_that_stands_for_it() -> None:
    assert sorted(known()) == [*REGISTERED]


@pytest.mark.parametrize("run", DETERMINISTIC)
def test_results_are_those_of_mergekit(
    shared: Path, make_checkpoint: CheckpointMaker, tmp_path: Path, run: str
) -> None:
    case = golden(shared, "mergekit")
    facts = case.facts["runs"][run]
    folders = {name: str(make_checkpoint(case.of(name), name=name)) for name in facts["models"]}
    document = {"merge_method": facts["method"], "dtype": "float32", "models": [], "parameters": {}}
    weights = facts["parameters"].get("weight")
    document["parameters"] = {name: value for name, value in facts["parameters"].items() if name != "weight"}
    for name, folder in folders.items():
        own = weights.get(name) if isinstance(weights, dict) else weights
        document["models"].append({"model": folder, "parameters": {} if own is None else {"weight": own}})
    if facts["base"] is not None:
        document["base_model"] = folders[facts["base"]]
    made = configured(tmp_path, document)
    assert_golden(tensors(made.target), case.of(run), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("setting", "tensor", "depth", "expected"),
    [
        ("0.5", "x", 0.3, 0.5),
        ("'1e-3'", "x", 0.3, 0.001),
        ("[0, 1]", "x", 0.25, 0.25),
        ("[0, 1, 0]", "x", 0.75, 0.5),
        ("[3]", "x", 1.0, 3),
        ("[true, false]", "x", 0.99, True),
        ("[true, false]", "x", 1.0, False),
        ("[{filter: mlp, value: [1, 2]}, {value: 7}]", "layers.0.mlp.up", 0.5, 1.5),
        ("[{filter: mlp, value: [1, 2]}, {value: 7}]", "layers.0.attn.q", 0.5, 7),
        ("[{filter: '*', value: 4}, {filter: attn, value: 7}]", "layers.0.attn.q", 0.5, 4),
        ("{filter: mlp, value: 1}", "layers.0.attn.q", 0.5, None),
    ],
)
def test_values_over_depth_and_by_filter(setting: str, tensor: str, depth: float, expected: Any) -> None:
    found = value_at(parse(setting, "f", Problems()), tensor, depth)
    assert (None if found is None else found.value) == expected


def test_the_innermost_scope_that_has_a_value_counts() -> None:
    scopes = [parse(text, "f", Problems()).value for text in ("{w: {filter: mlp, value: 1}}", "{w: 2}", "{w: 3, v: 4}")]
    asked = (("w", "mlp"), ("w", "attn"), ("v", "mlp"), ("u", "mlp"))
    found = [value_in(scopes, name, tensor, 0.0) for name, tensor in asked]
    assert [one and one.value for one in found] == [1, 2, 4, None]


def test_layers_are_stacked(make_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """Layers are renumbered, configurations adjusted, ends taken from the first and the last slice, the rest accounted for."""
    kinds = ["full", "full", "sliding", "sliding"]
    one = make_checkpoint(model(100), name="one", config=config(layer_types=kinds, vocab_size=5))
    two = make_checkpoint(model(200), name="two", config=config(layer_types=kinds[::-1], vocab_size=5), shards=3)
    made = configured(tmp_path, {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(one), "layer_range": [1, 4]}]},
            {"sources": [{"model": str(two), "layer_range": [0, 2]}]},
        ],
    })  # fmt: skip
    found = tensors(made.target)
    assert [float(found[f"model.layers.{k}.mlp.weight"][0, 0]) for k in range(5)] == [101, 102, 103, 200, 201]
    assert len(found) == 2 * 5 + 2
    assert float(found["model.embed_tokens.weight"][0, 0]) == 150
    assert float(found["model.norm.weight"][0]) == 290
    written = json.loads((made.target / "config.json").read_text())
    assert written["num_hidden_layers"] == 5
    assert written["layer_types"] == ["full", "sliding", "sliding", "sliding", "sliding"]
    assert made.provenance is not None
    left_out = made.provenance["tensors"]["left_out"]
    assert sorted(name.partition(": ")[2] for name in left_out if name.startswith(str(one))) == [
        "model.layers.0.attn.weight", "model.layers.0.mlp.weight", "model.norm.weight",
    ]  # fmt: skip
    assert set(left_out.values()) == {"in no slice"}
    assert made.fallbacks == []  # it is what was asked for


def test_depth_is_that_of_the_slice(make_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """Outside the layers it is 0, in a slice of one layer 1; precedence goes from the source outwards."""
    one = str(make_checkpoint(model(0), name="one", config=config()))
    made = configured(tmp_path, {
        "merge_method": "passthrough",
        "parameters": {"scale": [10, 20]},
        "slices": [
            {"sources": [{"model": one, "layer_range": [1, 4]}]},
            {"sources": [{"model": one, "layer_range": [1, 2]}]},
            {"sources": [{"model": one, "layer_range": [2, 3]}], "parameters": {"scale": 3}},
            {
                "sources": [{"model": one, "layer_range": [3, 4], "parameters": {"scale": {"filter": "mlp", "value": 5}}}],
                "parameters": {"scale": 3},
            },
        ],
    })  # fmt: skip
    found = tensors(made.target)
    values = [float(found[f"model.layers.{k}.attn.weight"][0, 0]) for k in range(6)]
    assert values == [1 * 10, 2 * 15, 3 * 20, 1 * 20, 2 * 3, 3 * 3]
    assert float(found["model.layers.5.mlp.weight"][0, 0]) == 3 * 5
    assert float(found["model.embed_tokens.weight"][0, 0]) == 50 * 10
    assert float(found["model.norm.weight"][0]) == 90 * 3  # of the last slice


def test_slices_of_several_models_and_a_base(make_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """Task vectors are taken layer by layer, from wherever the base's layers are asked for."""
    base, a, b = (
        str(make_checkpoint(model(start), name=name, config=config()))
        for start, name in ((0, "base"), (1000, "a"), (5000, "b"))
    )
    made = configured(tmp_path, {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "slices": [
            {
                "sources": [
                    {"model": a, "layer_range": [2, 4], "parameters": {"weight": 0.5}},
                    {"model": base, "layer_range": [0, 2]},
                    {"model": b, "layer_range": [1, 3], "parameters": {"weight": [0.25, 0.75]}},
                ]
            }
        ],
    })  # fmt: skip
    found = tensors(made.target)
    first = 0 + 0.5 * (1002 - 0) + 0.25 * (5001 - 0)
    second = 1 + 0.5 * (1003 - 1) + 0.75 * (5002 - 1)
    assert [float(found[f"model.layers.{k}.mlp.weight"][0, 0]) for k in range(2)] == [first, second]
    assert json.loads((made.target / "config.json").read_text())["num_hidden_layers"] == 2


def test_a_model_has_its_own_density(make_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    zero, one = {"w": torch.zeros(1, 4)}, {"w": torch.tensor([[1.0, 2, 3, 4]])}
    base, model_ = (str(make_checkpoint(kept, name=name)) for name, kept in (("base", zero), ("model", one)))
    models = [
        {"model": model_, "parameters": {"weight": 1, "density": 0.25}},
        {"model": model_, "parameters": {"weight": 1}},  # mergekit's default: all
    ]
    made = configured(
        tmp_path, {"merge_method": "ties", "base_model": base, "models": models, "parameters": {"normalize": False}}
    )
    assert tensors(made.target)["w"].tolist() == [[1, 2, 3, 8]]


def test_all_mistakes_are_told_with_their_lines(make_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    one = make_checkpoint(model(0), name="one", config=config())
    *found, last = mistakes(
        tmp_path,
        f"""merge_method: tis
base_model: {tmp_path}/nowhere
models:
  - model: {one}
    parametres: {{weight: 1}}
  - parameters: {{weight: 1}}
slices: []
modules: {{text: 1}}
dtype: int8
tokenizer: {{source: union, tokens: {{x: 1}}, pad_to_multiple_of: 8}}
chat_template: [1]
colour: red
""",
    )
    assert found == [
        "1: exactly one of models, slices and modules must be there; this has models and slices and modules",
        "1: unknown merge_method 'tis' (did you mean 'ties'?)",
        f"2: base_model: no such folder {tmp_path}/nowhere; a path is relative to the working directory",
        "5: an entry of models has no key 'parametres' (did you mean 'parameters'?)",
        "6: 'model' is missing",
        "7: 'slices' must be a list that holds something; this is a list",
        "8: modules: merging the modules of a model by different means is not supported; give models or slices",
        "9: dtype: 'int8' cannot be written; known: float32, bfloat16, float16",
        "10: tokenizer: pad_to_multiple_of: padding the vocabulary is not supported; rows that stand for no token are kept",
        "10: tokenizer: tokens: choosing the rows of single tokens is not supported",
    ]
    assert last.startswith("12: unknown key 'colour' (known: ")


def test_mistakes_in_parameters(make_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    base, one, two = (str(make_checkpoint(model(k), name=f"m{k}", config=config())) for k in range(3))
    found = mistakes(
        tmp_path,
        f"""merge_method: ties
base_model: {base}
models:
  - model: {one}
    parameters: {{weight: 1, densty: 0.5}}
  - model: {two}
    parameters: {{weight: {{filter: mlp}}, density: [a, {{}}]}}
parameters:
  rescale: true
""",
    )
    assert found == [
        "5: unknown parameter 'densty' (did you mean 'density'?)",
        "7: 'density': every condition must be a mapping with value, and perhaps filter; this is 'a'",
        "7: 'density': every condition must be a mapping with value, and perhaps filter; this is a mapping",
        "7: 'weight': every condition must be a mapping with value, and perhaps filter; this is a mapping",
    ]
    later = f"""merge_method: della
base_model: {base}
models:
  - model: {one}
    parameters: {{weight: 1, density: 1.5, epsilon: 0.1}}
  - model: {two}
    parameters: {{epsilon: 0.2}}
parameters:
  rescale: 3
"""
    assert mistakes(tmp_path, later) == [
        f"6: parameter 'weight' is missing for {two}",
        "9: 'rescale: 3' is not supported for della (only false, true)",
    ]
    later = later.replace("{epsilon: 0.2}", "{weight: 1, epsilon: 0.2}").replace("rescale: 3", "rescale: false")
    assert mistakes(tmp_path, later) == ["5: 'epsilon' must be one for all models; it is 0.1, 0.2"]
    later = later.replace("epsilon: 0.2", "epsilon: 0.1")
    assert mistakes(tmp_path, later) == [
        "5: della: option 'densities' = [1.5, 1.0]: each density must be greater than 0 and at most 1"
    ]


def test_mistakes_in_slices(make_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    one = str(make_checkpoint(model(0), name="one", config=config()))
    found = mistakes(
        tmp_path,
        f"""merge_method: passthrough
slices:
  - sources:
      - model: {one}
        layer_range: [2, 2]
      - {{model: {one}}}
  - sources: [{{model: {one}, layer_range: [0, 2]}}, {{model: {one}, layer_range: [0, 3]}}]
  - {{}}
  - base_model: x
    sources: [{{model: {one}, layer_range: [0, 1]}}]
""",
    )
    assert found == [
        "5: layer_range [2, 2] holds no layer",
        "6: 'layer_range' is missing, such as layer_range: [0, 8]",
        "7: all sources of a slice must have the same number of layers",
        "8: a slice: 'sources' is missing",
        "9: base_model: a base of one slice alone is not supported; give one of the file",
    ]
    found = mistakes(
        tmp_path,
        f"""merge_method: slerp
slices:
  - sources: [{{model: {one}, layer_range: [0, 9]}}]
""",
    )
    assert found == [
        "1: slerp needs base_model",
        "3: layer_range [0, 9]: " + one + " has 4 layers",
        "3: slerp takes exactly 2 models, 1 given",
    ]


def test_tensors_that_do_not_fit_are_all_named(make_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    one, two = model(0), model(1)
    two["model.layers.1.mlp.weight"] = torch.zeros(2, 4)
    del two["model.layers.2.mlp.weight"]
    two["model.layers.3.more.weight"] = torch.zeros(1)
    paths = [str(make_checkpoint(kept, name=f"m{k}", config=config())) for k, kept in enumerate((one, two))]
    document = {"merge_method": "linear", "models": [{"model": path, "parameters": {"weight": 1}} for path in paths]}
    with pytest.raises(MethodError) as caught:
        configured(tmp_path, document)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        f"model.layers.1.mlp.weight: [2, 4] in {paths[1]}, [2, 3] in {paths[0]}",
        f"model.layers.2.mlp.weight: not in {paths[1]}",
        f"model.layers.3.more.weight: in {paths[1]}, not in {paths[0]}",
    ]


TEMPLATES = {"a": "{{ a }}", "b": "{{ b }} ", "c": "{{ b }}"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("auto", "{{ b }}"),  # two of three have it
        ("{{ mine }}", "{{ mine }}"),
        ("short", "{{ short }}"),  # an input has one of this name
        ("chatml", "9: chat_template: no input has one called 'chatml'; write the template of Jinja itself, or auto"),
    ],
)
def test_chat_templates(make_checkpoint: CheckpointMaker, tmp_path: Path, given: str, expected: str) -> None:
    paths = []
    for name, template in TEMPLATES.items():
        folder = make_checkpoint(model(0), name=name, config=config())
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "own": name}))
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "short.jinja").write_text("{{ short }}")
        paths.append(folder)
    lines = ["merge_method: linear", "models:"]
    for path in paths:
        lines += [f"  - model: {path}", "    parameters: {weight: 1}"]
    text = "\n".join([*lines, f"chat_template: '{given}'"])
    if expected.startswith("9:"):
        assert mistakes(tmp_path, text) == [expected]
        return
    made = configured(tmp_path, text)
    assert (made.target / "chat_template.jinja").read_text() == expected
    assert json.loads((made.target / "tokenizer_config.json").read_text()) == {"own": "a"}


def test_what_differs_from_mergekit_is_said(make_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    base, one, two = (str(make_checkpoint(model(k), name=f"m{k}", config=config())) for k in range(3))
    models = [{"model": path, "parameters": {"weight": 1, "lambda": 2, "t": 1}} for path in (one, two)]
    made = configured(
        tmp_path, {"merge_method": "ties", "base_model": base, "models": models, "dtype": "bfloat16"}, dry_run=False
    )
    notes = "\n".join(made.fallbacks)
    assert "computed in float32 or wider all the same, written as bfloat16" in notes
    assert "'lambda' is of a tensor, not of a model: as in mergekit it changes nothing here" in notes
    assert "'t' is no parameter of ties: it changes nothing" in notes
    assert "changes as large as the threshold are all kept" in notes
    assert {value.dtype for value in tensors(made.target).values()} == {torch.bfloat16}


def small(places: Sequence[int]) -> list[str]:
    return [str(small_models()[place]) for place in places]


def test_the_command_stacks_a_model_that_loads(merge: Commands, tmp_path: Path) -> None:
    """The whole way: a dry run that writes nothing and knows the bytes, a run that stock transformers loads, a second one."""
    one, two = small((1, 2))
    (tmp_path / "stack.yaml").write_text(f"""
merge_method: slerp
base_model: {one}
slices:
  - sources: [{{model: {one}, layer_range: [0, 2]}}, {{model: {two}, layer_range: [0, 2]}}]
  - sources: [{{model: {one}, layer_range: [1, 2]}}, {{model: {two}, layer_range: [1, 2]}}]
parameters: {{t: [{{filter: mlp, value: [0, 1]}}, {{value: 0.5}}]}}
""")
    words = ("config", "stack.yaml", "-o", "out", "--json")
    dry = merge(*words, "--dry-run", "-q", cwd=tmp_path)
    assert dry.code == 0, dry.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stack.yaml"]
    run = merge(*words, cwd=tmp_path)
    assert run.code == 0, run.err
    weights = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert dry.json["estimate"]["output_bytes"] == sum(weights)
    assert run.json["checks"]["loader"] == "stock transformers"
    assert run.json["checks"]["blocks"] == 3
    assert run.json["identity"]["configured"]["configuration"]["merge_method"] == "slerp"
    assert merge(*words, cwd=tmp_path).json["cached"]
    assert merge("config", "none.yaml", cwd=tmp_path).code == 2
