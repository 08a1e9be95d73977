"""``compress export --gguf``: what stock transformers loads is what was written, and what cannot be written is refused."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from commands import Commands
from conftest import CheckpointMaker
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from weightworks.errors import ArchitectureError, CheckpointError, MethodError, OutputError, UsageError
from weightworks.plan.verify import verify
from weightworks.store import ggufexport
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.ggml import Q8_0, TYPES
from weightworks.store.ggufexport import KINDS, export
from weightworks.store.gguffile import decoded, read_gguf
from weightworks.store.inspection import inspect
from weightworks.testing.stored import Loaded, load_apart
from weightworks.testing.tiny import make_model

TOKENS = torch.arange(64).view(2, 32) * 7 % 500
TEXT = "It's 12345 o'clock;  the bread\n\n\tcosts €3.50 — naïve?  END"
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "rope_theta": 5e5, "head_dim": 16},
    "mistral": {"sliding_window": None, "num_key_value_heads": 1},
    "qwen2": {"use_sliding_window": False, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0},
}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 500}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of untrained models of an architecture, with a tokenizer of bytes; not to be changed."""
    root = tmp_path_factory.mktemp("models")

    def make(kind: str) -> Path:
        folder = root / f"{kind}-untrained"
        if not folder.exists():
            torch.manual_seed(0)
            shape = {"vocab_size": 500} if kind == "gpt2" else WIDE
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **ARCHITECTURES[kind]}))
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(folder)
        return folder

    return make


def rounded_logits(folder: Path, kind: str) -> torch.Tensor:
    """Logits of the checkpoint's weights after our encoder and decoder, computed by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in model.state_dict().items():
        if weight.ndim > 1 and "wpe" not in name:
            turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            chosen = TYPES[kind]
            if any(part in name for part in ("embed", "lm_head", "wte")) and chosen.bits < Q8_0.bits:
                chosen = Q8_0
            rows = weight.T.contiguous() if turned else weight
            decoded = chosen.decode(chosen.encode(rows))
            weight.copy_(decoded.T if turned else decoded)
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one block whose rows are whole blocks of every type."""
    return make_model(tmp_path_factory.mktemp("wide") / "model", blocks=1, width=256)


@dataclass(frozen=True)
class Exported:
    """What one fresh process of stock transformers made of files, by folder and type; what the export said of each."""

    loaded: dict[tuple[str, str], Loaded]
    facts: dict[tuple[str, str], dict[str, Any]]
    out: Path


@pytest.fixture(scope="module")
def exported(models: Callable[[str], Path], wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model in every type; each architecture in two, by the configuration of its source where transformers do not
    find all of it in the file (biases, the size of heads, gpt2's positions)."""
    out = tmp_path_factory.mktemp("exported")
    facts = {("wide", kind): export(str(wide), kind, out / f"wide-{kind}.gguf") for kind in KINDS}
    for name in ARCHITECTURES:
        for kind in ("BF16", "Q8_0"):
            facts[name, kind] = export(str(models(name)), kind, out / f"{name}-{kind}.gguf")
    folders = {
        f"{name}-{kind}": (
            out,
            {
                "gguf_file": f"{name}-{kind}.gguf",
                **({"config": str(models(name))} if name in ("llama", "qwen3", "gpt2") else {}),
            },
        )
        for name, kind in facts
    }
    loaded = load_apart(sys.executable, folders, TOKENS, tmp_path_factory.mktemp("logits"))[0]
    return Exported({key: loaded[f"{key[0]}-{key[1]}"] for key in facts}, facts, out)


def test_stock_transformers_give_the_logits_of_the_decoded_weights(exported: Exported, wide: Path) -> None:
    for kind in KINDS:
        assert exported.loaded["wide", kind].difference(rounded_logits(wide, kind)) < 1e-6, kind
        assert not exported.facts["wide", kind]["remarks"]
    q8, q4k, q4, bf16 = (exported.facts["wide", kind] for kind in ("Q8_0", "Q4_K", "Q4_0", "BF16"))
    assert q8["bits_a_weight"] == 8.5
    assert bf16["relative_error"] == 0 < q8["relative_error"] < q4k["relative_error"] < q4["relative_error"] < 0.08
    ids = AutoTokenizer.from_pretrained(wide)(TEXT)["input_ids"]
    tokenizer = AutoTokenizer.from_pretrained(exported.out, gguf_file="wide-Q8_0.gguf")
    assert tokenizer(TEXT)["input_ids"] == ids
    assert tokenizer.decode(ids) == TEXT


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_architectures(name: str, exported: Exported, models: Callable[[str], Path]) -> None:
    for kind in ("BF16", "Q8_0"):
        assert exported.loaded[name, kind].difference(rounded_logits(models(name), kind)) < 2e-6
    assert exported.facts[name, "BF16"]["remarks"] == [
        "the folder has no tokenizer.json, so the file has no vocabulary: engines cannot read text with it"
    ]
    metadata = read_gguf(exported.out / f"{name}-BF16.gguf").metadata
    called = {"mistral": "llama"}.get(name, name)
    assert metadata["general.architecture"] == called
    assert metadata[f"{called}.block_count"] == 2
    assert metadata[f"{called}.attention.head_count"] == 4
    if name == "llama":
        assert metadata["llama.rope.freq_base"] == 5e5


def test_headers_are_those_the_library_reads(small: Path, tmp_path: Path) -> None:
    file = Path(export(str(small), "Q4_K", tmp_path / "a.gguf")["file"])
    theirs, ours = gguf.GGUFReader(file), read_gguf(file)
    assert {key for key in theirs.fields if not key.startswith("GGUF.")} == set(ours.metadata)
    assert ours.metadata["tokenizer.ggml.tokens"] == theirs.fields["tokenizer.ggml.tokens"].contents()
    for tensor in theirs.tensors:
        own = ours.tensors[tensor.name]
        assert (own.shape, own.offset, own.nbytes) == (tuple(tensor.shape[::-1]), tensor.data_offset, tensor.n_bytes)
        assert own.kind == tensor.tensor_type.name
    assert len(theirs.tensors) == len(ours.tensors)


def test_packed_weights_that_fit_are_not_rounded_again(small: Path, tmp_path: Path) -> None:
    from compress import quantize

    packed = quantize(small, method="rtn", bits=4, group_size=32, device="cpu", output_dir=tmp_path / "packed").target
    facts = export(str(packed), "Q4_0", tmp_path / "a.gguf")
    assert not facts["remarks"]
    view, file = DenseView(Checkpoint.open(packed)), read_gguf(tmp_path / "a.gguf")
    name = "model.layers.1.mlp.up_proj.weight"
    found = torch.cat(list(decoded(file, file.tensors["blk.1.ffn_up.weight"]))).view(view.shape(name))
    assert torch.equal(found, view.read(name))
    again = export(str(packed), "MXFP4", tmp_path / "b.gguf")["remarks"]
    assert again == ["14 packed weights do not fit the grid of MXFP4 as they are: they were rounded again"]
    assert read_gguf(tmp_path / "b.gguf").metadata["weightworks.remarks"] == again


def test_killed_exports_continue(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(str(small), "Q4_0", tmp_path / "whole.gguf")
    monkeypatch.setattr(ggufexport, "STEP_BYTES", 1)
    right, written = ggufexport._put, []

    def dying(*args: Any) -> None:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(args)
        right(*args)

    monkeypatch.setattr(ggufexport, "_put", dying)
    with pytest.raises(KeyboardInterrupt):
        export(str(small), "Q4_0", tmp_path / "again.gguf")
    assert not (tmp_path / "again.gguf").exists()
    rest: list[Any] = []
    monkeypatch.setattr(ggufexport, "_put", lambda *args: (rest.append(args), right(*args)))
    export(str(small), "Q4_0", tmp_path / "again.gguf")
    assert len(rest) == 21 - 5
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_command(tiny_llama: Path, compress: Commands, tmp_path: Path) -> None:
    run = compress("export", tiny_llama, "--gguf", "q8_0", "--json", cwd=tmp_path)
    assert run.code == 0, run.err
    assert run.json["file"] == "tiny-llama-Q8_0.gguf"
    assert run.json["types"] == {"Q8_0": 43, "F32": 13}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny-llama-Q8_0.gguf"]
    assert "already exists" in compress("export", tiny_llama, "--gguf", "Q8_0", cwd=tmp_path).err
    told = compress("inspect", "tiny-llama-Q8_0.gguf", cwd=tmp_path)
    assert told.code == 0
    assert "blk.*.attn_q.weight" in told.err
    checked = compress("verify", "tiny-llama-Q8_0.gguf", "--json", cwd=tmp_path)
    assert checked.code == 0
    assert checked.json["checks"][1]["seen"] == "56 tensors decoded, no NaN, no infinity"
    assert compress("export", tiny_llama, "--gguf", "Q4_0", "--sparse", cwd=tmp_path).code == 2
    assert "did you mean 'Q4_K'?" in compress("export", tiny_llama, "--gguf", "Q4_X", cwd=tmp_path).err


def test_torn_files_are_told(small: Path, tmp_path: Path) -> None:
    file = Path(export(str(small), "Q8_0", tmp_path / "a.gguf")["file"])
    data = file.read_bytes()
    for length in (3, 20, 500, len(data) - 1000):
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"a\.gguf: wrong header"):
            inspect(str(file))
        assert [check["ok"] for check in verify(str(file))] == [False]
    file.write_bytes(b"GGML" + data[4:])
    with pytest.raises(CheckpointError, match="does not begin with GGUF"):
        read_gguf(file)


def changed(folder: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target


def array_of(inner: int, body: bytes, count: int = 1) -> bytes:
    return struct.pack("<IQ", inner, count) + body


HOSTILE: dict[str, tuple[bytes, int, str]] = {
    "alignment": (struct.pack("<I", 0), 4, "general.alignment is 0, not a number of bytes"),
    "text": (struct.pack("<Q", 1) + b"x", 8, "general.alignment is 'x', not a number of bytes"),
    "nested": (b"".join(array_of(9, b"") for _ in range(9000)), 9, "arrays are nested more than 4 deep"),
    "endless": (array_of(8, b"", 2**60), 9, "the file ends at byte .*, within the header"),
    "unknown": (array_of(77, b""), 9, "a value of type 77"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_told(name: str, tmp_path: Path) -> None:
    value, kind, text = HOSTILE[name]
    key = b"general.alignment"
    pair = struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value
    path = tmp_path / "hostile.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair)
    with pytest.raises(CheckpointError, match=text):
        read_gguf(path)


def test_what_a_file_cannot_say_is_refused(small: Path, models: Callable[[str], Path], tmp_path: Path) -> None:
    for number, (config, told) in enumerate(
        [
            ({"model_type": "opt"}, "model_type is 'opt'"),
            ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
            ({"rope_parameters": {"rope_type": "longrope"}}, "scaled by 'longrope'"),
            ({"model_type": "qwen2", "num_hidden_layers": 3}, "tensors are missing"),
        ]
    ):
        folder = changed(small, tmp_path / str(number), **config)
        with pytest.raises((ArchitectureError, CheckpointError), match=told):
            export(str(folder), "Q8_0", tmp_path / "a.gguf")
    with pytest.raises(ArchitectureError, match="scale_attn_by_inverse_layer_idx is True"):
        export(
            str(changed(models("gpt2"), tmp_path / "g", scale_attn_by_inverse_layer_idx=True)), "Q8_0", tmp_path / "a"
        )
    with pytest.raises(UsageError, match="unknown type 'Q5_K'"):
        export(str(small), "Q5_K")
    assert not list(tmp_path.glob("a*"))


def test_values_that_do_not_fit_are_refused(make_checkpoint: CheckpointMaker, small: Path, tmp_path: Path) -> None:
    view = Checkpoint.open(small)
    tensors = {name: view.read(name) for name in view.tensors}
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e5
    folder = make_checkpoint(tensors, config=dict(view.config))
    with pytest.raises(
        MethodError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' holds 99840; F16 goes up to 65504"
    ):
        export(str(folder), "F16", tmp_path / "a.gguf")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"tensors are missing.*blk\.0\.ffn_up\.weight"):
        export(str(make_checkpoint(tensors, config=dict(view.config), name="less")), "Q8_0", tmp_path / "b.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_stretched_positions(small: Path, tmp_path: Path) -> None:
    """Factors of Llama 3 are those by which transformers divides its frequencies."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    folder = changed(small, tmp_path / "long", rope_parameters={**rope, "original_max_position_embeddings": 64})
    facts = export(str(folder), "Q8_0", tmp_path / "a.gguf")
    file = read_gguf(tmp_path / "a.gguf")
    found = torch.cat(list(decoded(file, file.tensors["rope_freqs.weight"])))
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(small))
    model = AutoModelForCausalLM.from_pretrained(folder)
    size = plain.config.head_dim
    usual = 10000.0 ** (-torch.arange(0, size, 2) / size)
    torch.testing.assert_close(usual / model.model.rotary_emb.inv_freq, found, rtol=1e-5, atol=0)
    assert 1 < found[3] < 8
    assert "rope_freqs.weight, which transformers does not read" in facts["remarks"][0]
    linear = changed(
        small, tmp_path / "linear", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    )
    export(str(linear), "Q8_0", tmp_path / "b.gguf")
    assert read_gguf(tmp_path / "b.gguf").metadata["llama.rope.scaling.factor"] == 2.0


def test_outputs_of_another_run_are_not_continued(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ggufexport, "_prove", stopped)
        with pytest.raises(KeyboardInterrupt):
            export(str(small), "Q4_0", tmp_path / "a.gguf")
    with pytest.raises(OutputError, match="differs in type"):
        export(str(small), "Q8_0", tmp_path / "a.gguf")
    assert export(str(small), "Q8_0", tmp_path / "a.gguf", resume=False)["types"]["Q8_0"] == 16
