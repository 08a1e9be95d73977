"""Reading checkpoints: equal to the safetensors library on good files, one exact sentence on every bad one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CheckpointMaker
from safetensors.torch import load_file, save_file

from weightworks.errors import CheckpointError, MethodError
from weightworks.store.checkpoint import INDEX, SINGLE, Checkpoint
from weightworks.store.sources import resolve
from weightworks.store.tensorfile import DTYPES, read_header
from weightworks.store.writer import check_finite

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
HEAD = "dense.weight"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        HEAD: torch.randn(6, 4, generator=generator),
        "embed.weight": torch.randn(5, 3, generator=generator).bfloat16(),
        "norm.weight": torch.ones(4, dtype=torch.float16),
        "position": torch.arange(7),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "codes": torch.arange(12, dtype=torch.uint8).view(3, 4),
        "narrow": torch.randn(2, 3, generator=generator).to(torch.float8_e4m3fn),
    }


def raw_file(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header: JSON of ``header``, or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def refusal(source: Path | str, **options: bool) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(source, **options)
    return caught.value


# Good checkpoints


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_reads_what_the_library_wrote(make_checkpoint: CheckpointMaker, shards: int) -> None:
    folder = make_checkpoint(tensors(), shards=shards)
    checkpoint = Checkpoint.open(folder)
    expected = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert set(checkpoint.tensors) == set(expected) == set(tensors())
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())
    assert len({info.shard for info in checkpoint.tensors.values()}) == shards
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype and read.shape == tensor.shape
        assert torch.equal(read.float(), tensor.float()), name
        assert torch.equal(checkpoint.read(name, torch.float64), tensor.to(torch.float64)), name


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (0, 1), (2, 5), (5, 6), (3, 3)])
def test_rows_are_the_rows_of_the_library(make_checkpoint: CheckpointMaker, start: int, stop: int) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tensors()))
    rows = checkpoint.read_rows(HEAD, start, stop, torch.float64)
    assert torch.equal(rows, tensors()[HEAD][start:stop].double())


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (-1, 2), (4, 3), (7, 7)])
def test_rows_outside_the_tensor_are_refused(make_checkpoint: CheckpointMaker, start: int, stop: int) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tensors()))
    with pytest.raises(IndexError, match=rf"tensor 'dense\.weight' has 6 rows, asked for {start}:{stop}"):
        checkpoint.read_rows(HEAD, start, stop)


def test_reads_the_embedded_model(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    expected = load_file(tiny_llama / SINGLE)
    assert list(checkpoint.tensors) == [spec.name for spec in checkpoint.specs]
    assert set(checkpoint.tensors) == set(expected)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())


def test_every_dtype_name_is_the_library_s(tmp_path: Path) -> None:
    for name, dtype in DTYPES.items():
        save_file({"x": torch.zeros(2, dtype=torch.uint8).repeat(dtype.itemsize).view(dtype)}, tmp_path / name)
        assert read_header(tmp_path / name)["x"].dtype == dtype


def test_empty_tensor_may_share_its_place_with_the_next(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(raw_file({"full": entry(0, 8), "empty": entry(0, 0, [0])}, b"12345678"))
    assert read_header(path)["empty"].shape == (0,)
    assert load_file(path)["empty"].shape == (0,)


def test_without_index_only_the_single_file_is_read(make_checkpoint: CheckpointMaker) -> None:
    folder = make_checkpoint(tensors())
    save_file({"other": torch.ones(1)}, folder / "adapter.safetensors")
    assert "other" not in Checkpoint.open(folder).tensors


def test_unknown_tensor_suggests_the_nearest(make_checkpoint: CheckpointMaker) -> None:
    folder = make_checkpoint(tensors())
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder).read("dense.wieght")
    assert str(caught.value) == f"{folder}: no tensor 'dense.wieght' (did you mean 'dense.weight'?)"


def test_digest_follows_contents_not_place(make_checkpoint: CheckpointMaker) -> None:
    one, two = (Checkpoint.open(make_checkpoint(tensors(), shards=2, name=name)) for name in "ab")
    assert one.digest == two.digest
    assert one.files[FIRST] == hashlib.sha256((one.root / FIRST).read_bytes()).hexdigest()
    assert set(one.files) == {"config.json", INDEX, FIRST, SECOND}
    changed = {**tensors(), "scalar": torch.tensor(3.25)}
    assert Checkpoint.open(make_checkpoint(changed, shards=2, name="c")).digest != one.digest


# Folders that are not checkpoints


def test_missing_folder(tmp_path: Path) -> None:
    error = refusal(tmp_path / "nowhere")
    assert str(error) == f"{tmp_path}/nowhere: no such folder"
    assert error.hint == "give a local folder, or org/name[@revision] on the hub"


@pytest.mark.parametrize("source", ["../nowhere-at-all", "./nowhere-at-all", "nowhere-at-all", "a/b/c"])
def test_missing_relative_folder(source: str) -> None:
    assert str(refusal(source)) == f"{source}: no such folder"


def test_empty_folder(tmp_path: Path) -> None:
    expected = f"{tmp_path}: the folder is empty; a checkpoint holds config.json and *.safetensors"
    assert str(refusal(tmp_path)) == expected


def test_file_instead_of_folder(make_checkpoint: CheckpointMaker) -> None:
    file = make_checkpoint(tensors()) / SINGLE
    assert str(refusal(file)) == f"{file}: is a file; give the checkpoint folder that holds it"


def test_no_config(make_checkpoint: CheckpointMaker) -> None:
    folder = make_checkpoint(tensors())
    (folder / "config.json").unlink()
    expected = f"{folder}: no config.json; a checkpoint folder holds config.json and *.safetensors"
    assert str(refusal(folder)) == expected


def test_config_is_not_json(make_checkpoint: CheckpointMaker) -> None:
    folder = make_checkpoint(tensors())
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError) as reason:
        json.loads('{"model_type": ')
    assert str(refusal(folder)) == f"{folder}/config.json: not valid JSON ({reason.value})"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000], ids=["not text", "too deep"])
def test_config_is_garbage(make_checkpoint: CheckpointMaker, content: bytes) -> None:
    folder = make_checkpoint(tensors())
    (folder / "config.json").write_bytes(content)
    assert str(refusal(folder)).startswith(f"{folder}/config.json: not valid JSON (")


def test_config_is_a_list(make_checkpoint: CheckpointMaker) -> None:
    folder = make_checkpoint(tensors())
    (folder / "config.json").write_text("[1]")
    assert str(refusal(folder)) == f"{folder}/config.json: a JSON object is expected, found list"


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert str(refusal(tmp_path)) == f"{tmp_path}: no weights: neither {SINGLE} nor {INDEX}"


# Shards and their index


def test_missing_shard(make_checkpoint: CheckpointMaker) -> None:
    folder = make_checkpoint(tensors(), shards=2)
    (folder / SECOND).unlink()
    assert str(refusal(folder)) == f"{folder}: missing shard {SECOND} named in {INDEX}"
    (folder / FIRST).unlink()
    assert str(refusal(folder)) == f"{folder}: missing shards {FIRST}, {SECOND} named in {INDEX}"


@pytest.mark.parametrize("lost", [1, 12, 10_000])
def test_truncated_shard(make_checkpoint: CheckpointMaker, lost: int) -> None:
    folder = make_checkpoint({HEAD: torch.ones(64, 64), "b": torch.ones(64, 64)}, shards=2)
    shard = folder / FIRST
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - lost)
    error = refusal(folder)
    assert str(error) == f"{shard}: truncated: the header needs {size:,} bytes, the file has {size - lost:,}"
    assert error.hint == "fetch the shard again; nothing was written"


def test_index_names_a_tensor_that_is_not_there(make_checkpoint: CheckpointMaker) -> None:
    folder = make_checkpoint(tensors(), shards=2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= {"ghost": FIRST, HEAD: SECOND}  # one absent, one in the other shard
    (folder / INDEX).write_text(json.dumps(index))
    expected = f"{folder}: {INDEX} names 2 tensors that its shards do not hold: {HEAD}, ghost"
    assert str(refusal(folder)) == expected


@pytest.mark.parametrize("index", [{}, {"weight_map": [FIRST]}, {"weight_map": {"a": 1}}, {"weight_map": {"a": []}}])
def test_index_without_a_map(make_checkpoint: CheckpointMaker, index: object) -> None:
    folder = make_checkpoint(tensors(), shards=2)
    (folder / INDEX).write_text(json.dumps(index))
    assert str(refusal(folder)) == f"{folder}/{INDEX}: no weight_map"


def test_tensor_in_two_shards(make_checkpoint: CheckpointMaker) -> None:
    folder = make_checkpoint({"a": torch.ones(1), "b": torch.ones(1)}, shards=2)
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, folder / SECOND)
    assert str(refusal(folder)) == f"{folder}: tensor 'a' is in both {FIRST} and {SECOND}"


# Headers that a careful reader refuses


def too_short() -> tuple[bytes, str]:
    return b"1234567", "7 bytes is too short for a safetensors file (header length needs 8)"


def length_too_large() -> tuple[bytes, str]:
    data = (1 << 40).to_bytes(8, "little") + b"{}"
    return data, "wrong header: it claims 1,099,511,627,776 bytes, the file has 10"


def length_past_the_end() -> tuple[bytes, str]:
    return (3).to_bytes(8, "little") + b"{}", "wrong header: it claims 3 bytes, the file has 10"


def hole() -> tuple[bytes, str]:
    data = raw_file({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12))
    return data, f"wrong header: tensor 'b' begins at {len(data) - 4}, not {len(data) - 8}"


def hole_at_the_start() -> tuple[bytes, str]:
    data = raw_file({"a": entry(4, 8)}, bytes(8))
    return data, f"wrong header: tensor 'a' begins at {len(data) - 4}, not {len(data) - 8}"


def overlap() -> tuple[bytes, str]:
    data = raw_file({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12))
    return data, f"wrong header: tensor 'b' begins at {len(data) - 8}, not {len(data) - 4}"


def same_bytes_twice() -> tuple[bytes, str]:
    data = raw_file({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8))
    return data, f"wrong header: tensor 'b' begins at {len(data) - 8}, not {len(data)}"


def longer() -> tuple[bytes, str]:
    data = raw_file({"a": entry(0, 4)}, bytes(5))
    return data, f"longer than its header says: the header needs {len(data) - 1:,} bytes, the file has {len(data):,}"


def unknown_dtype() -> tuple[bytes, str]:
    return (
        raw_file({"a": entry(0, 4, [8], "F4")}, bytes(4)),
        f"tensor 'a' has dtype F4, known: {', '.join(DTYPES)}",
    )


@pytest.mark.parametrize(
    "damage",
    [
        too_short,
        length_too_large,
        length_past_the_end,
        hole,
        hole_at_the_start,
        overlap,
        same_bytes_twice,
        longer,
        unknown_dtype,
    ],
)
def test_wrong_header(make_checkpoint: CheckpointMaker, damage: Callable[[], tuple[bytes, str]]) -> None:
    file = make_checkpoint(tensors()) / SINGLE
    data, text = damage()
    file.write_bytes(data)
    assert str(refusal(file.parent)) == f"{file}: {text}"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{garbage", None),
        (b"\xff\xff", None),
        (b"[" * 100_000, None),
        (b"[1, 2]", None),
        (b'"text"', None),
        ({"a": 3}, None),
        ({"a": {"dtype": "F32", "shape": [1]}}, "'data_offsets'"),
        ({"a": {"shape": [1], "data_offsets": [0, 4]}}, "'dtype'"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, None),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, None),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}, None),
        ({"a": entry(0, 4, [2])}, "tensor 'a' spans 4 bytes, its shape needs 8"),
        ({"a": entry(0, 4, [-1, -1])}, "tensor 'a' has shape [-1, -1]"),
        ({"a": entry(0, 4, [1.5])}, "tensor 'a' has shape [1.5]"),
        ({"a": entry(0, 4, "1")}, "tensor 'a' has shape 1"),
    ],
)
def test_header_is_not_what_safetensors_defines(
    make_checkpoint: CheckpointMaker, header: object, reason: str | None
) -> None:
    file = make_checkpoint(tensors()) / SINGLE
    file.write_bytes(raw_file(header, bytes(4)))
    error = refusal(file.parent)
    prefix = f"{file}: wrong header: not the JSON that safetensors defines ("
    assert str(error) == f"{prefix}{reason})" if reason else str(error).startswith(prefix)
    assert error.hint == "fetch the file again"


def test_shard_cut_after_it_was_opened(make_checkpoint: CheckpointMaker) -> None:
    checkpoint = Checkpoint.open(make_checkpoint({"a": torch.ones(100)}))
    file, offset = checkpoint.root / SINGLE, checkpoint.info("a").offset
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 8)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("a")
    assert str(caught.value) == f"{file}: ended 8 bytes early while reading at offset {offset}"


# Pickled weights


def pickled(folder: Path, files: dict[str, dict[str, torch.Tensor]]) -> Path:
    (folder / "config.json").write_text("{}")
    for file, state in files.items():
        torch.save(state, folder / file)
    return folder


def test_pickle_is_refused_without_leave(tmp_path: Path) -> None:
    error = refusal(pickled(tmp_path, {"pytorch_model.bin": {HEAD: torch.ones(2, 2)}}))
    assert str(error) == f"{tmp_path}: weights are pickled (pytorch_model.bin), and a pickle can run code"
    assert error.hint == "convert them to safetensors, or pass --allow-pickle if you trust the source"


def test_pickle_is_read_with_leave(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in tensors().items() if name != "narrow"}
    state["turned"] = torch.arange(6.0).view(2, 3).T  # not contiguous
    names = list(state)
    files = {
        "pytorch_model-00001-of-00002.bin": {name: state[name] for name in names[:4]},
        "pytorch_model-00002-of-00002.bin": {name: state[name] for name in names[4:]},
    }
    checkpoint = Checkpoint.open(pickled(tmp_path, files), allow_pickle=True)
    assert set(checkpoint.tensors) == set(state)
    for name, tensor in state.items():
        assert torch.equal(checkpoint.read(name), tensor), name
        assert checkpoint.info(name).nbytes == tensor.nbytes
    assert torch.equal(checkpoint.read_rows(HEAD, 2, 5), state[HEAD][2:5])
    assert torch.equal(checkpoint.read_rows("turned", 1, 3), state["turned"][1:3])


def test_pickle_of_before_torch_1_6(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({HEAD: tensors()[HEAD]}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(Checkpoint.open(tmp_path, allow_pickle=True).read(HEAD), tensors()[HEAD])


def test_pickle_with_a_missing_shard(tmp_path: Path) -> None:
    folder = pickled(tmp_path, {"pytorch_model-00001-of-00002.bin": {"a": torch.ones(1)}})
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    text = "missing shard pytorch_model-00002-of-00002.bin named in pytorch_model.bin.index.json"
    assert str(refusal(folder, allow_pickle=True)) == f"{folder}: {text}"


class Evil:
    """Its pickle makes a folder when it is loaded carelessly."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_runs_code(tmp_path: Path, zipped: bool) -> None:
    (tmp_path / "config.json").write_text("{}")
    file, trace = tmp_path / "pytorch_model.bin", tmp_path / "trace"
    torch.save({"a": Evil(trace)}, file, _use_new_zipfile_serialization=zipped)
    text = str(refusal(tmp_path, allow_pickle=True))
    assert text.startswith(f"{file}: not a pickle of tensors (Weights only load failed")
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle"])
def test_pickle_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    text = str(refusal(tmp_path, allow_pickle=True))
    assert text.startswith(f"{tmp_path}/pytorch_model.bin: not a pickle of tensors (")


def test_pickle_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"step": 3}, tmp_path / "pytorch_model.bin")
    text = f"{tmp_path}/pytorch_model.bin: not a pickle of tensors ('step' is int)"
    assert str(refusal(tmp_path, allow_pickle=True)) == text


# Values, and the hub


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(make_checkpoint: CheckpointMaker, dtype: torch.dtype, bad: float) -> None:
    values = torch.ones(4, 4)
    values[1, 2] = values[3, 3] = bad
    checkpoint = Checkpoint.open(make_checkpoint({"a": values.to(dtype)}))
    with pytest.raises(MethodError) as caught:
        check_finite("a", checkpoint.read("a"))
    assert str(caught.value) == "tensor 'a' holds 2 NaN or infinite values"


def test_values_whose_sum_overflows_are_finite() -> None:
    check_finite("a", torch.full((4,), 3e38))
    check_finite("a", torch.full((4,), 60_000.0, dtype=torch.float16))
    check_finite("a", torch.full((4,), 1e300, dtype=torch.float64))
    check_finite("a", torch.full((4,), 255, dtype=torch.uint8))


@pytest.mark.parametrize("source", ["no-such-org/no-such-model", "no-such-org/no-such-model@v1"])
def test_hub_offline(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    error = refusal(source)
    start = f"{source}: no such folder, and the hub did not give it (LocalEntryNotFoundError: Cannot find"
    assert str(error).startswith(start)
    assert "\n" not in str(error)
    assert error.hint == "check the path or id; offline, download the model into the hub's cache first"


def test_hub_name_that_no_hub_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = str(refusal("a--b/c"))
    assert text.startswith("a--b/c: no such folder, and the hub did not give it (HFValidationError: ")


def test_hub_id_is_downloaded_without_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str | None, list[str]]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("org/model@main") == tmp_path
    resolve("org/model", allow_pickle=True)
    assert [(name, revision, "*.bin" in patterns) for name, revision, patterns in asked] == [
        ("org/model", "main", False),
        ("org/model", None, True),
    ]
