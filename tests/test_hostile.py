"""Hostile files: whatever is in them, reading ends in time, with our errors or none, and changes nothing elsewhere."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CheckpointMaker
from hostile import Broken, Workshop, promised, spoiled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightworks.errors import CheckpointError, OutputError, UsageError, WeightworksError
from weightworks.plan.recipe import load_recipe
from weightworks.store.adapters import is_simple, pattern
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.documents import MOST_BYTES, read_json
from weightworks.store.manifest import changed_files
from weightworks.store.tensorfile import TensorSpec
from weightworks.store.writer import CheckpointWriter
from weightworks.stream import calibration

NAMES = [word[4:] for word in dir(Workshop) if word.startswith("_of_")]
BOUNDED = settings(
    max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("hostile") / "home")


@pytest.mark.filterwarnings("default")  # of transformers, about what a spoiled config.json says
@pytest.mark.parametrize("name", NAMES)
def test_spoiled(workshop: Workshop, name: str) -> None:
    target = workshop.targets[name]

    @BOUNDED
    @given(st.randoms(use_true_random=False))
    def hold(chance: random.Random) -> None:
        workshop(name, spoiled(chance.choice(target.seeds), target.kind, chance))

    hold()
    for seed in target.seeds:
        with promised(workshop.home):
            target.read(seed)


def header(entries: object, tail: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + tail


ENTRY = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
BYTE = header({"a": ENTRY}, b"x")
PLACE = "base_model.model.model.layers.0.self_attn.q_proj"
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("header", header({"a": {**ENTRY, "data_offsets": [0.0, 1.0]}}, b"x"), "has offsets 0.0, 1.0"),
        ("header", header({"a": {**ENTRY, "shape": [True]}}, b"x"), "has shape \\[True\\]"),
        ("header", header({"\ud800": ENTRY}, b"x"), "surrogates not allowed"),
        ("header", b"\xff" * 8 + b"{}", "wrong header: it claims"),
        ("index", b'{"weight_map": {"a": "../model/model.safetensors"}}', "is not the name of a file in this folder"),
        ("index", b'{"weight_map": {"a": "/dev/zero"}}', "is not the name of a file in this folder"),
        ("index", b'{"weight_map": {"a": "' + b"a" * 300 + b'"}}', "is not the name of a file in this folder"),
        ("journal", b"0\n", "line 1 is no record of weightworks"),
        ("journal", b'{"identity": [], "layout": "x"}\n', "line 1 is no record"),
        ("jsonl", b"[" * 100_000, "not valid JSON"),
        ("parquet", b"PAR1" + b"\0" * 8 + b"PAR1", "cannot be read as parquet"),
        ("mergekit", b'"\\UFFFFFFFF"', "names no character"),
        ("recipe", b"a: &a [*a, *a]", "nested more than"),
        ("recipe", b"!!python/object/apply:os.system [id]", "tag"),
        ("provenance", b'{"files": {}}', "not as weightworks writes it"),
        ("adapter_config", json.dumps({**LORA, "alpha_pattern": {"q": "x"}}).encode(), "'q' is 'x', not a positive"),
        (
            "adapter_config",
            json.dumps({**LORA, "rank_pattern": {"(a+)+$": 2}}).encode(),
            "certain to be matched quickly",
        ),
        ("adapter_weights", header({PLACE + "x" * 300: ENTRY}, b"x"), "longer than 300 characters"),
        ("sparse_manifest", b'{"layout": 1, "files": [], "sparse": {}}', "not a manifest of a sparse export"),
        ("sparse_manifest", b'{"layout": 1, "files": {"../x": ""}, "sparse": {}}', "'../x' is not a file name"),
        ("sparse_file", header({}), "does not decode"),
        ("tokenizer", b'{"model": {"vocab": {"a": 0}}, "version": 1}', "the tokenizer cannot be used"),
        ("tokenizer", b'{"model": {"vocab": {"a": Infinity}}}', "no vocabulary of tokens and ids"),
        ("history", b'[{"step": 1}]', "cannot be read as learning rates"),
        ("history", b'{"log_history": [{"step": 9999999999, "learning_rate": 1}]}', "steps are more than"),
    ],
)
def test_found_by_fuzzing(workshop: Workshop, name: str, data: bytes, said: str) -> None:
    """The smallest inputs that once ended in a traceback, never ended, or led elsewhere."""
    with promised(workshop.home), pytest.raises(WeightworksError, match=said):
        workshop.targets[name].read(data)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 10**9}, "config.json has num_hidden_layers 1000000000, more than 10,000"),
        ({"num_key_value_heads": [1]}, "transformers cannot build a causal LM"),
        ({"architectures": 3}, None),
    ],
)
def test_config(workshop: Workshop, change: dict[str, object], said: str | None) -> None:
    config = json.loads(workshop.sound["config.json"])
    data = json.dumps({**config, **change}).encode()
    if said is None:
        workshop("config", data)
        return
    with promised(workshop.home), pytest.raises(WeightworksError, match=said):
        workshop.targets["config"].read(data)


def test_half_of_a_surrogate_pair_is_read_as_no_character(workshop: Workshop) -> None:
    with promised(workshop.home):
        workshop.targets["jsonl"].read(b'{"text": "\\ud800"}\n{"messages": ["odd turn"]}\n')


def test_remembered_digests_of_another_form_are_forgotten(workshop: Workshop) -> None:
    file = str((workshop.model / "config.json").resolve())
    workshop("model_remembered", json.dumps({file: 0.5}).encode())


def test_the_watch_sees_what_it_forbids(workshop: Workshop, tmp_path: Path) -> None:
    """A promise that cannot be broken would test nothing."""
    acts: list[Callable[[], object]] = [
        lambda: (tmp_path / "outside").write_text("x"),
        lambda: os.system("true"),
        lambda: (workshop.home / "model" / "config.json").rename(tmp_path / "outside"),
    ]
    for act in acts:
        with pytest.raises(Broken), promised(workshop.home):
            act()
    assert not (tmp_path / "outside").exists()


def test_links_in_a_staging_folder_are_refused(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("untouched")
    specs, staging = [TensorSpec("a", (2,), torch.float32)], tmp_path / "out.partial"
    for name in ("config.json", "lock", "journal.jsonl"):
        staging.mkdir()
        (staging / name).symlink_to(precious)
        with pytest.raises(OutputError, match=f"{name}: is a link"):
            CheckpointWriter(tmp_path / "out", specs, {})
        (staging / name).unlink()
        staging.rmdir()
    (tmp_path / "elsewhere").mkdir()
    staging.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match=r"out\.partial: is a link"):
        CheckpointWriter(tmp_path / "out", specs, {})
    assert precious.read_text() == "untouched"
    assert not list((tmp_path / "elsewhere").iterdir())


def test_provenance_is_held_against_files_of_its_folder_only(tmp_path: Path) -> None:
    problems = changed_files(tmp_path, {"files": {"/etc/hostname": "", "../x": "", "inner/none": ""}})
    assert problems == [
        "'/etc/hostname': is not the name of a file in this folder",
        "'../x': is not the name of a file in this folder",
        "inner/none: missing",
    ]


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that stand for far more than they hold: the limit is met before the memory is."""
    sparse = tmp_path / "config.json"
    with sparse.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(CheckpointError, match="more than the 100,000,000"):
        read_json(sparse)
    recipe = tmp_path / "r.yaml"
    with recipe.open("wb") as file:
        file.truncate(9_000_000)
    with pytest.raises(UsageError, match="larger than 8,000,000 bytes"):
        load_recipe(recipe)
    monkeypatch.setattr(calibration, "MOST_CHARACTERS", 1_000_000)
    rows = pa.array(["x" * 1000]).dictionary_encode()
    table = pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * 50_000, pa.int32()), rows.dictionary)})
    bomb = tmp_path / "rows.parquet"
    pq.write_table(table, bomb)
    assert bomb.stat().st_size < 10_000
    with pytest.raises(WeightworksError, match="holds more than 1,000,000 characters of rows"):
        calibration.read_texts(str(bomb))


def test_a_pickle_is_not_run_even_with_leave(make_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    folder = make_checkpoint({"a": torch.ones(1)})
    (folder / "model.safetensors").unlink()
    payload = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    (folder / "pytorch_model.bin").write_bytes(payload)
    with pytest.raises(CheckpointError, match="pickled"):
        Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match="not a pickle of tensors"):
        Checkpoint.open(folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_patterns_of_adapters_are_matched_as_ever() -> None:
    patterns = {r"^model\.layers\.\d+\.mlp.*": 1, "q_proj|v_proj": 2, r"layers.[01].self_attn.(?:k|o)_proj": 3}
    assert all(map(is_simple, patterns))
    assert not any(map(is_simple, ["(a*)*", "(a|a)+", "a*a*a*a*", "(?=a)", "(", "a" * 3000]))
    assert pattern(patterns, "model.layers.3.mlp.up_proj", 0) == 1
    assert pattern(patterns, "model.layers.3.self_attn.v_proj", 0) == 2
    assert pattern(patterns, "model.layers.1.self_attn.o_proj", 0) == 3
    assert pattern(patterns, "model.layers.2.self_attn.o_proj", 0) == 0
