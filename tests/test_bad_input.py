"""Input that cannot be worked on, through the command line: one clear sentence, its exit code, nothing left behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import FEW, Commands, Run
from safetensors.torch import load_file, save_file

from weightworks.store.checkpoint import INDEX, SINGLE, Checkpoint
from weightworks.store.shards import plan_shards

NAMES = [f"model-{k:05d}-of-00003.safetensors" for k in (1, 2, 3)]


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """The embedded model in a folder of its own; the files are links, to be replaced, not changed."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_llama.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same in three shards."""
    tensors = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    shards = plan_shards(Checkpoint.open(tiny(model)).specs, 4_000_000)
    assert list(shards) == NAMES
    for shard, specs in shards.items():
        save_file({spec.name: tensors[spec.name] for spec in specs}, model / shard, metadata={"format": "pt"})
    weight_map = {spec.name: shard for shard, specs in shards.items() for spec in specs}
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return model


def tiny(model: Path) -> Path:
    """Where the links of ``model`` lead."""
    return (model / "config.json").resolve().parent


def rewrite(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def change(model: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Let ``edit`` change the tensors of ``model``."""
    tensors = load_file(model / SINGLE)
    edit(tensors)
    (model / SINGLE).unlink()
    save_file(tensors, model / SINGLE, metadata={"format": "pt"})


@pytest.fixture
def refuse(compress: Commands, tmp_path: Path) -> Callable[..., Run]:
    """Runs ``compress quantize`` where it must fail with ``code`` and leave nothing at the target and beside it."""

    def run(
        *words: str | Path, code: int = 1, text: str, hint: str = "", faults: list[list[object]] | None = None
    ) -> Run:
        words = words if {"-o", "--output-dir"} & set(words) else (*words, "-o", "out")
        before = sorted(tmp_path.iterdir())
        done = compress("quantize", *words, cwd=tmp_path, faults=faults or [])
        assert done.code == code, done.err
        assert done.out == ""
        assert text in done.err
        assert hint in done.err
        assert "Traceback" not in done.err
        assert [path for path in sorted(tmp_path.iterdir()) if path not in before and path.suffix != ".log"] == []
        return done

    return run


# The checkpoint.


def test_missing_folder(refuse: Callable[..., Run], tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", text="nowhere: no such folder", hint="give a local folder, or org/name[@revision]")


def test_hub_id_without_a_hub(refuse: Callable[..., Run]) -> None:
    refuse("someone/nothing", text="someone/nothing: no such folder, and the hub did not give it")


def test_empty_folder(refuse: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse("empty", text="empty: the folder is empty; a checkpoint holds config.json and *.safetensors")


def test_file_in_place_of_a_folder(refuse: Callable[..., Run], tiny_llama: Path) -> None:
    refuse(tiny_llama / SINGLE, text="model.safetensors: is a file; give the checkpoint folder that holds it")


def test_no_config(refuse: Callable[..., Run], model: Path) -> None:
    (model / "config.json").unlink()
    refuse(model, text="no config.json", hint="give the folder that `save_pretrained` wrote")


def test_config_of_an_unknown_model(refuse: Callable[..., Run], model: Path) -> None:
    rewrite(model / "config.json", b'{"model_type": "lama"}')
    refuse(model, text="transformers cannot build a causal LM from config.json", hint="check model_type")


def test_config_of_another_model(refuse: Callable[..., Run], model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    rewrite(model / "config.json", json.dumps({**config, "num_hidden_layers": 7}).encode())
    refuse(model, text="9 tensors that LlamaForCausalLM needs are missing: model.layers.6.")


def test_config_of_another_size(refuse: Callable[..., Run], model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    rewrite(model / "config.json", json.dumps({**config, "intermediate_size": 512}).encode())
    refuse(
        model,
        text="18 tensors do not fit LlamaForCausalLM: model.layers.0.mlp.gate_proj.weight is [768, 256], the model has [512, 256]",
        hint="config.json belongs to another model",
    )


def test_no_weights(refuse: Callable[..., Run], model: Path) -> None:
    (model / SINGLE).unlink()
    refuse(model, text=f"no weights: neither {SINGLE} nor {INDEX}")


def test_truncated_shard(refuse: Callable[..., Run], sharded: Path) -> None:
    shard = sharded / NAMES[1]
    rewrite(shard, shard.read_bytes()[:-1000])
    refuse(sharded, text=f"{NAMES[1]}: truncated: the header needs", hint="fetch the shard again")


def test_missing_shard(refuse: Callable[..., Run], sharded: Path) -> None:
    (sharded / NAMES[2]).unlink()
    refuse(sharded, text=f"missing shard {NAMES[2]} named in {INDEX}")


def test_wrong_header(refuse: Callable[..., Run], model: Path) -> None:
    rewrite(model / SINGLE, b"<html>not found</html>" * 100)
    refuse(model, text=f"{SINGLE}: wrong header: it claims", hint="the file is not safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.5.mlp.down_proj.weight",
        "model.layers.3.input_layernorm.weight",
        "model.norm.weight",
        "something.the.model.has.no.place.for",
    ],
)
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_nan_is_found_before_the_first_block(refuse: Callable[..., Run], model: Path, name: str, method: str) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors.setdefault(name, torch.zeros(4, 4, dtype=torch.bfloat16)).view(-1)[3] = torch.nan

    change(model, spoil)
    run = refuse(
        model,
        *FEW,
        "--method",
        method,
        text=f"tensor '{name}' holds 1 NaN or infinite values",
        hint="repair the source",
    )
    assert not re.search(r"(block|tensor) \d+/", run.err)  # neither the first block nor the first tensor was reached


def test_after_the_repair_the_same_command_goes_through(
    refuse: Callable[..., Run], compress: Commands, model: Path, tmp_path: Path
) -> None:
    sound = (model / SINGLE).resolve()
    change(model, lambda tensors: tensors["model.norm.weight"].fill_(torch.inf))
    refuse(model, "--method", "rtn", text="tensor 'model.norm.weight' holds 256 NaN or infinite values")
    rewrite(model / SINGLE, sound.read_bytes())
    assert compress("quantize", model, "--method", "rtn", "-o", "out", cwd=tmp_path).code == 0


def test_already_quantized(refuse: Callable[..., Run], quantized: Path) -> None:
    refuse(
        quantized,
        text="is already quantized (compressed-tensors, 4 bits)",
        hint="start from the dense checkpoint it was made from",
    )


def test_quantized_by_a_method_we_cannot_decode(refuse: Callable[..., Run], model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    rewrite(model / "config.json", json.dumps({**config, "quantization_config": {"quant_method": "awq"}}).encode())
    refuse(model, text="quantized as awq/None, which cannot be decoded")


def as_pickle(model: Path) -> Path:
    tensors = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    return model


def test_pickle_is_refused(refuse: Callable[..., Run], model: Path) -> None:
    refuse(
        as_pickle(model),
        text="weights are pickled (pytorch_model.bin), and a pickle can run code",
        hint="convert them to safetensors, or pass --allow-pickle if you trust the source",
    )


def test_pickle_with_leave_gives_the_same_weights(
    compress: Commands, model: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    as_pickle(model)
    words = ("--method", "rtn", "-q", "-o")
    run = compress("quantize", model, "--allow-pickle", *words, "pickled", cwd=tmp_path)
    assert run.code == 0, run.err
    assert compress("quantize", tiny_llama, *words, "plain", cwd=tmp_path).code == 0
    pickled, plain = (load_file(tmp_path / name / SINGLE) for name in ("pickled", "plain"))
    assert pickled.keys() == plain.keys()
    assert all(torch.equal(pickled[name], plain[name]) for name in plain)
    assert not list((tmp_path / "pickled").glob("*.bin"))


# The request.


def test_width_that_the_group_does_not_divide_lists_every_tensor(refuse: Callable[..., Run], tiny_llama: Path) -> None:
    run = refuse(
        tiny_llama,
        *FEW,
        "--group-size",
        "96",
        text="quantize.gptq cannot quantize 36 of 42 tensors as asked:",
        hint="widths here: [256, 768]; choose a --group-size that divides them, -1 for per channel, or --ignore them",
    )
    listed = re.findall(r"  (model\.\S+): width 256 is not divisible by the group size 96", run.err)
    assert len(set(listed)) == 36
    assert not [name for name in listed if "down_proj" in name]  # 768 = 8 x 96


def test_everything_ignored(refuse: Callable[..., Run], tiny_llama: Path) -> None:
    refuse(tiny_llama, "--ignore", "model.*", text="nothing to do: no linear layer is left after --ignore")


def test_order_that_the_format_cannot_hold(refuse: Callable[..., Run], tiny_llama: Path) -> None:
    refuse(tiny_llama, "--act-order", "dynamic", text="compressed-tensors has no g_idx; use --act-order static")


def test_unknown_option(refuse: Callable[..., Run], tiny_llama: Path) -> None:
    refuse(tiny_llama, "--group-sise", "64", code=2, text="No such option: --group-sise", hint="--group-size")


def test_unknown_method(refuse: Callable[..., Run], tiny_llama: Path) -> None:
    refuse(tiny_llama, "--method", "gpqt", code=2, text="unknown method 'gpqt' for quantize (did you mean 'gptq'?)")


def test_unreadable_memory_limit(refuse: Callable[..., Run], tiny_llama: Path) -> None:
    refuse(
        tiny_llama,
        "--max-memory",
        "8 apples",
        code=2,
        text="option 'max_memory' = '8 apples': must be a size such as 800MB, 8GB or 16GiB",
    )


def test_unknown_device(refuse: Callable[..., Run], tiny_llama: Path) -> None:
    refuse(tiny_llama, "--device", "abacus", code=2, text="--device abacus: unknown", hint="auto, cpu, cuda")


def test_bad_pattern(refuse: Callable[..., Run], tiny_llama: Path) -> None:
    refuse(tiny_llama, "--ignore", "re:(", code=2, text="option 'ignore'", hint="'re:('")


def test_window_longer_than_the_context_is_cut_and_said(compress: Commands, tiny_llama: Path, tmp_path: Path) -> None:
    run = compress("quantize", tiny_llama, "--seq-len", "4096", "--num-samples", "4", "--dry-run", cwd=tmp_path)
    assert run.code == 0
    assert "4 windows of 512 tokens" in run.err
    assert "(asked for 4096 tokens, the model takes no more)" in run.err
    assert "takes no more" not in compress("quantize", tiny_llama, *FEW, "--dry-run", cwd=tmp_path).err


# The calibration text.


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("text.txt", None, "text.txt: no such file"),
        ("text.txt", b"\x93\x00\xff\xfe binary", "text.txt: cannot be read as UTF-8 text"),
        ("text.jsonl", b"\x93\x00\xff\xfe binary", "text.jsonl: cannot be read as UTF-8 text"),
        ("text.txt", b"", "text.txt: the text is empty"),
        ("text.jsonl", b"\n\n", "text.jsonl: the text is empty"),
        ("text.jsonl", b'{"text": "a"}\n{"text"', "text.jsonl, line 2: not valid JSON"),
        ("text.jsonl", b'{"words": "a"}\n', "text.jsonl, line 1: no text in fields words"),
        ("text.jsonl", b"3\n", "text.jsonl, line 1: a row is int, a JSON object or string is expected"),
        ("text.parquet", b"not parquet", "text.parquet: cannot be read as parquet"),
        ("text.txt", b"Too short.", "text.txt: 4 tokens is shorter than one window of 64"),
    ],
)
def test_bad_calibration_text(
    refuse: Callable[..., Run], tiny_llama: Path, tmp_path: Path, name: str, content: bytes | None, text: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refuse(tiny_llama, *FEW, "--dataset", name, text=text)


def test_folder_in_place_of_a_text(refuse: Callable[..., Run], tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    refuse(tiny_llama, *FEW, "--dataset", "texts", text="texts: no such file")


def test_data_set_that_no_hub_gives(refuse: Callable[..., Run], tiny_llama: Path) -> None:
    refuse(tiny_llama, *FEW, "--dataset", "builtins", text="builtins: no such file, and no data set of that name")


def test_no_tokenizer(refuse: Callable[..., Run], model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    refuse(model, *FEW, text="no tokenizer could be loaded", hint="put tokenizer.json into the checkpoint folder")


# The place of the output, and the machine.


def test_read_only_place(refuse: Callable[..., Run], tiny_llama: Path, tmp_path: Path) -> None:
    refuse(
        tiny_llama,
        *FEW,
        text=f"{tmp_path}: cannot write there",
        hint="choose a writable place with --output-dir",
        faults=[["read_only", str(tmp_path)]],
    )


def test_place_below_a_file(refuse: Callable[..., Run], tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refuse(tiny_llama, "--method", "rtn", "-o", "file/out", text=f"{tmp_path}/file: cannot write there")


def test_existing_output(refuse: Callable[..., Run], tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("kept")
    hint = "choose another --output-dir, or pass --overwrite to replace it"
    refuse(tiny_llama, *FEW, text=f"{tmp_path}/out: already exists", hint=hint)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]


def test_output_of_another_run(
    refuse: Callable[..., Run], compress: Commands, tiny_llama: Path, tmp_path: Path
) -> None:
    assert compress("quantize", tiny_llama, "--method", "rtn", "-o", "out", cwd=tmp_path).code == 0
    refuse(tiny_llama, "--method", "rtn", "--bits", "8", text=f"{tmp_path}/out: already exists")
    run = compress("quantize", tiny_llama, "--method", "rtn", "--bits", "8", "--overwrite", "-o", "out", cwd=tmp_path)
    assert run.code == 0
    assert "made by quantize.rtn bits 8" in compress("inspect", tmp_path / "out").err
    (tmp_path / "out" / "generation_config.json").write_text("{}")
    refuse(
        tiny_llama,
        "--method",
        "rtn",
        "--bits",
        "8",
        text="was made by this very command but has changed since: generation_config.json: content differs",
        hint="pass --overwrite to make it again",
    )


def test_output_onto_the_input(refuse: Callable[..., Run], model: Path) -> None:
    for words in (["--method", "rtn"], ["--method", "rtn", "--overwrite"]):
        refuse(model, *words, "-o", model, text="model: is an input, or holds one; it would be replaced")
        refuse(model, *words, "-o", model.parent, text="is an input, or holds one")
        assert (model / SINGLE).is_file()


def test_too_little_disk(refuse: Callable[..., Run], tiny_llama: Path, tmp_path: Path) -> None:
    refuse(
        tiny_llama,
        *FEW,
        text=f"too little disk at {tmp_path}: ",
        hint="free some space, or choose another --output-dir",
        faults=[["small_disk", 1_000_000]],
    )


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_too_little_memory(refuse: Callable[..., Run], tiny_llama: Path, method: str) -> None:
    refuse(
        tiny_llama,
        *FEW,
        "--method",
        method,
        "--max-memory",
        "1MB",
        text="too little memory: about ",
        hint="raise --max-memory",
    )
