"""Input nobody would write in good faith: what reads each kind of file, sound examples of it, and how they are spoiled.

A target puts bytes where its kind of file belongs and has them read, all in a folder of its own. What it promises is the
same for all: an end within seconds, our errors or none, nothing written, started or connected to outside the folder.
``test_hostile.py`` draws from them, ``fuzzing.py`` searches them by coverage.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from weightworks.errors import WeightworksError

SECONDS = 20  # an input that takes longer hangs
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, float("inf"), float("nan"), "", " ", "x",
    "..", "../outside", "/etc/passwd", "/dev/zero", "a/b", "\0", "\ud800", "a" * 300, "a" * 5000, "${x}", "re:(a+)+$", "(a+)+$", "*",
    "__class__", "!!python/object/apply:os.system [id]", "float16", "lora", [], {}, [[]], [None], [{}], {"a": {}}, {"": 1},
    [1, 2], [0, 0], [-1, 1], ["a", "a"],
]  # fmt: skip
FORBIDDEN = {
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "socket.connect",
    "socket.bind", "os.symlink", "os.link",
}  # fmt: skip
CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "shutil.rmtree", "shutil.move"}

WITHIN = {"os.remove", "os.rmdir"}  # by rmtree beneath a folder that was looked at when it began


class Broken(BaseException):
    """A promise was broken; no handler of ours may swallow it."""


class Watch:
    """While it is on, this process writes nothing outside ``home``, starts nothing and connects to nothing."""

    def __init__(self) -> None:
        self.home: str | None = None
        sys.addaudithook(self)

    def __call__(self, event: str, values: tuple[Any, ...]) -> None:
        if self.home is None:
            return
        if event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.inside(values[0], event)
        elif event in CHANGES and not (event in WITHIN and values[1] >= 0):
            self.inside(values[0], event)
            if event == "os.rename":
                self.inside(values[1], event)
        elif event in FORBIDDEN:
            raise Broken(f"{event} {values!r}"[:300])

    def inside(self, path: Any, event: str) -> None:
        home, self.home = self.home, None  # what follows asks the disk
        try:
            found = os.path.realpath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else home
            if home is not None and found != "/dev/null" and not str(found).startswith(home):
                raise Broken(f"{event} outside: {path!r}")
        finally:
            self.home = home


WATCH = Watch()


@contextmanager
def promised(home: Path) -> Iterator[None]:
    """What is read in here ends in time, with our errors or none, and stays within ``home``."""

    def late(number: int, frame: Any) -> None:
        raise Broken(f"hangs: {SECONDS} s and no end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    WATCH.home = os.path.realpath(home)
    try:
        with suppress(WeightworksError):
            yield
    finally:
        WATCH.home = None
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Target:
    """A kind of file: ``read`` takes its bytes, ``seeds`` are sound ones, ``kind`` says how they can be taken apart."""

    read: Callable[[bytes], object]
    seeds: list[bytes]
    kind: str = "json"  # json, lines, header, text or bytes


class Workshop:
    """The targets, around one small checkpoint in ``home``."""

    def __init__(self, home: Path) -> None:
        from weightworks.testing.tiny import make_model

        self.home = home
        self.model = make_model(home / "model", blocks=1, width=16)
        self.sound = {path.name: path.read_bytes() for path in self.model.iterdir()}
        self.names = list(json.loads(self.sound["model.safetensors"][8 : 8 + self._length()]))[1:]
        self.targets = {name[4:]: getattr(self, name)() for name in dir(self) if name.startswith("_of_")}
        for target in self.targets.values():  # libraries load, caches fill
            for seed in target.seeds:
                with suppress(WeightworksError):
                    target.read(seed)

    def __call__(self, name: str, data: bytes) -> None:
        """Have the target ``name`` read ``data``; raises whatever is not promised."""
        with promised(self.home):
            self.targets[name].read(data)

    def _length(self) -> int:
        return int.from_bytes(self.sound["model.safetensors"][:8], "little")

    def _folder(self, name: str, *without: str) -> Path:
        folder = self.home / name
        if not folder.exists():
            folder.mkdir()
            for file, data in self.sound.items():
                if file not in without:
                    (folder / file).write_bytes(data)
        return folder

    def _of_header(self) -> Target:
        from weightworks.store.tensorfile import read_header, read_metadata

        path = self.home / "some.safetensors"

        def read(data: bytes) -> None:
            path.write_bytes(data)
            read_metadata(path)
            for info in read_header(path).values():
                json.dumps(info.name, ensure_ascii=False).encode()

        small = {"a": torch.ones(2, 3), "b.c": torch.zeros(4, dtype=torch.bfloat16), "e": torch.zeros(0)}
        return Target(read, [save(small, {"format": "pt"}), save({}), save({"x": torch.tensor(1)})], "header")

    def _of_index(self) -> Target:
        from weightworks.store.checkpoint import INDEX, Checkpoint

        folder = self._folder("indexed", "model.safetensors")
        shard = "model-00001-of-00001.safetensors"
        (folder / shard).write_bytes(self.sound["model.safetensors"])

        def read(data: bytes) -> None:
            (folder / INDEX).write_bytes(data)
            checkpoint = Checkpoint.open(folder)
            assert all((folder / info.shard).parent == folder for info in checkpoint.tensors.values())

        weights = dict.fromkeys(self.names, shard)
        return Target(read, [json.dumps({"metadata": {"total_size": 9}, "weight_map": weights}).encode()])

    def _of_config(self) -> Target:
        from weightworks.store.checkpoint import Checkpoint
        from weightworks.store.dense import DenseView
        from weightworks.store.inspection import inspect
        from weightworks.stream.skeleton import build

        folder = self._folder("configured")
        pack = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": True}}}}  # fmt: skip
        gptq = {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": True, "desc_act": False}

        def read(data: bytes) -> None:
            (folder / "config.json").write_bytes(data)
            inspect(str(folder))
            build(DenseView(Checkpoint.open(folder)))

        plain = json.loads(self.sound["config.json"])
        seeds = [plain, {**plain, "quantization_config": pack}, {**plain, "quantization_config": gptq}]
        return Target(read, [json.dumps(seed).encode() for seed in seeds])

    def _of_tokenizer(self) -> Target:
        from weightworks.store.tokenizerfile import Vocabulary, extended
        from weightworks.stream.calibration import encode_all, load_tokenizer

        folder = self._folder("tokenized")

        def read(data: bytes) -> None:
            (folder / "tokenizer.json").write_bytes(data)
            found = Vocabulary.read(folder)
            assert found is not None
            with suppress(WeightworksError):
                extended(found, {"new": found.length}, {"new": found})
            encode_all(load_tokenizer(folder), ["Some text, some more.\n"])

        vocabulary = {"a": 0, "b": 1, "ab": 2, "<s>": 3}
        added = [{"id": 3, "content": "<s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}]  # fmt: skip
        models = [
            {"type": "BPE", "vocab": vocabulary, "merges": ["a b"]},
            {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]]},
            {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"},
            {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0], ["b", -2.0]]},
        ]
        split = {"type": "Split", "pattern": {"Regex": "\\w+"}, "behavior": "Isolated", "invert": False}
        shell = {"version": "1.0", "added_tokens": added, "normalizer": {"type": "NFC"}, "pre_tokenizer": split}
        return Target(read, [json.dumps({**shell, "model": model}).encode() for model in models])

    def _of_recipe(self) -> Target:
        from weightworks.plan.recipe import load_recipe

        path = self.home / "recipe.yaml"

        def read(data: bytes) -> None:
            path.write_bytes(data)
            load_recipe(path)

        recipes = [path.read_bytes() for path in sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))]
        return Target(read, recipes, "text")

    def _of_mergekit(self) -> Target:
        from weightworks.plan.mergekit import read as configuration

        path = self.home / "merge.yaml"

        def read(data: bytes) -> None:
            path.write_bytes(data)
            configuration(path)

        model = str(self.model)
        seeds = [
            f"merge_method: ties\nbase_model: {model}\nmodels:\n- model: {model}\n  parameters: {{density: [0.1, 0.5], weight: 1}}\nparameters: {{normalize: true}}\ndtype: float32\n",
            f"merge_method: slerp\nbase_model: {model}\nslices:\n- sources:\n  - {{model: {model}, layer_range: [0, 1]}}\n  - {{model: {model}, layer_range: [0, 1]}}\nparameters:\n  t:\n  - {{filter: self_attn, value: [0, 0.5, 1]}}\n  - value: 0.5\ntokenizer_source: union\n",
        ]
        return Target(read, [seed.encode() for seed in seeds], "text")

    def _of_provenance(self) -> Target:
        from weightworks.plan.lineage import rebuild
        from weightworks.store.inspection import inspect
        from weightworks.store.manifest import PROVENANCE, changed_files, read_provenance

        folder = self._folder("proven")

        def read(data: bytes) -> None:
            (folder / PROVENANCE).write_bytes(data)
            inspect(str(folder))
            found = read_provenance(folder)
            if found:
                changed_files(folder, found)
                rebuild(folder)

        identity = {"method": "quantize.rtn", "method_version": 1, "options": {"bits": 4}, "seed": 0, "input": "ab", "environment": {"torch": "2"}, "max_shard_size": 5}  # fmt: skip
        source = {"name": "model", "files": {"config.json": "ab"}, "made_by": None}
        made = {"stage": "cd", "identity": identity, "source": source, "calibration": {"dataset": "builtin", "windows_requested": 1, "seq_len": 8, "dtype": "float32"}}  # fmt: skip
        merged = {"stage": "ef", "identity": {**identity, "method": "merge.soup", "input": {"models": ["a", "b"], "base": "c"}}, "source": {"models": [{"name": "m", "made_by": made}, source], "base": source}}  # fmt: skip
        files = {"files": {"config.json": "0" * 64, "tokenizer.json": "1"}, "tensors": {"input": 12}}
        return Target(read, [json.dumps({**files, **one}).encode() for one in (made, merged)])

    def _of_adapter_config(self) -> Target:
        from weightworks.store.adapters import CONFIG, WEIGHTS
        from weightworks.store.checkpoint import Checkpoint

        folder = self.home / "adapter"
        folder.mkdir()
        a, b = torch.ones(2, 16), torch.ones(16, 2)
        places = [f"base_model.model.model.layers.0.self_attn.{x}_proj.lora_" for x in "qo"]
        (folder / WEIGHTS).write_bytes(
            save({f"{p}{k}.weight": t.clone() for p in places for k, t in (("A", a), ("B", b))})
        )

        def read(data: bytes) -> None:
            (folder / CONFIG).write_bytes(data)
            checkpoint = Checkpoint.open(f"{self.model}+{folder}")
            checkpoint.read("model.layers.0.self_attn.q_proj.weight")

        plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "model"}
        rich = {**plain, "rank_pattern": {"layers.0.self_attn.q_proj": 2, "^model.*o_proj": 2}, "alpha_pattern": {"q_proj|v_proj": 8}, "use_rslora": True}  # fmt: skip
        return Target(read, [json.dumps(one).encode() for one in (plain, rich)])

    def _of_adapter_weights(self) -> Target:
        from weightworks.store.adapters import CONFIG, WEIGHTS
        from weightworks.store.checkpoint import Checkpoint

        folder = self.home / "adapter2"
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))

        def read(data: bytes) -> None:
            (folder / WEIGHTS).write_bytes(data)
            checkpoint = Checkpoint.open(f"{self.model}+{folder}")
            for name in self.names:
                checkpoint.read(name)

        place = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
        pair = {f"{place}A.weight": torch.ones(2, 16), f"{place}B.weight": torch.ones(16, 2)}
        whole = {"base_model.model.model.norm.modules_to_save.weight": torch.ones(16)}
        return Target(read, [save(pair), save({**pair, **whole})], "header")

    def _of_jsonl(self) -> Target:
        from weightworks.stream.calibration import encode_all, load_tokenizer, read_texts
        from weightworks.stream.examples import Maker, are_examples, read_rows

        path, tokenizer, maker = self.home / "rows.jsonl", load_tokenizer(self.model), Maker(self.model)

        def read(data: bytes) -> None:
            path.write_bytes(data)
            rows = read_rows(str(path))
            are_examples(rows)
            for row in rows:
                maker.usable(row, 64)
            encode_all(tokenizer, read_texts(str(path)))

        rows = [
            {"text": "some words"}, "plain", {"instruction": "do", "input": "x", "output": "done"},
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        ]  # fmt: skip
        return Target(
            read, [b"\n".join(json.dumps(row).encode() for row in rows), json.dumps(rows[0]).encode()], "lines"
        )

    def _of_text(self) -> Target:
        from weightworks.stream.calibration import encode_all, load_tokenizer, read_texts

        path, tokenizer = self.home / "some.txt", load_tokenizer(self.model)

        def read(data: bytes) -> None:
            path.write_bytes(data)
            encode_all(tokenizer, read_texts(str(path)))

        return Target(read, ["Words, wörds: 字\n\nmore".encode(), b""], "bytes")

    def _of_parquet(self) -> Target:
        import io

        import pyarrow as pa
        import pyarrow.parquet as pq

        from weightworks.stream.calibration import read_texts
        from weightworks.stream.examples import read_rows

        path = self.home / "rows.parquet"

        def read(data: bytes) -> None:
            path.write_bytes(data)
            read_rows(str(path))
            read_texts(str(path))

        seeds = []
        for compression in ("snappy", "none"):
            out = io.BytesIO()
            table = pa.table(
                {"text": ["some", "words", None], "messages": [[{"role": "user", "content": "hi"}], [], None]}
            )
            pq.write_table(table, out, compression=compression)
            seeds.append(out.getvalue())
        return Target(read, seeds, "bytes")

    def _of_gguf(self) -> Target:
        from weightworks.store.ggml import TYPES
        from weightworks.store.gguffile import GgufSpec, decoded, opening, read_gguf
        from weightworks.store.inspection import inspect

        path = self.home / "some.gguf"

        def read(data: bytes) -> None:
            path.write_bytes(data)
            inspect(str(path))
            file = read_gguf(path)
            for tensor in file.tensors.values():
                for part in decoded(file, tensor):
                    part.sum()

        specs = [GgufSpec("a", (2, 64), TYPES["Q8_0"]), GgufSpec("b.weight", (3,), TYPES["F32"])]
        facts = {"llama.block_count": 1, "tokenizer.ggml.tokens": ["a", "b"], "x": [1, 2], "y": 0.5, "z": True}
        whole = opening("llama", facts, specs) + bytes(sum(spec.room for spec in specs))
        return Target(read, [whole, opening("gpt2", {}, [])], "bytes")

    def _of_masks(self) -> Target:
        from weightworks.store.checkpoint import MASKS, Checkpoint
        from weightworks.store.dense import DenseView
        from weightworks.store.masks import check_masks, pack_bits

        folder = self._folder("masked")
        name = "model.layers.0.self_attn.q_proj.weight"

        def read(data: bytes) -> None:
            (folder / MASKS).write_bytes(data)
            check_masks(DenseView(Checkpoint.open(folder)))

        return Target(read, [save({f"{name}.mask": pack_bits(torch.ones(16, 16, dtype=torch.bool))})], "header")

    def _of_factors(self) -> Target:
        from weightworks.store.checkpoint import FACTORS, Checkpoint
        from weightworks.store.dense import DenseView
        from weightworks.store.factors import Factors, check_factors

        folder = self._folder("factored")
        name = "model.layers.0.self_attn.q_proj.weight"
        mask = torch.tensor([True, True, False, False]).repeat(16, 4)
        eye = torch.eye(4, dtype=torch.bfloat16).repeat(4, 1, 1)
        seed = Factors(eye, mask.bfloat16(), mask, eye).tensors(name)

        def read(data: bytes) -> None:
            (folder / FACTORS).write_bytes(data)
            check_factors(DenseView(Checkpoint.open(folder)))

        return Target(read, [save({key: value.contiguous().clone() for key, value in seed.items()})], "header")

    def _of_statistics(self) -> Target:
        from weightworks.store.statistics import ENTRY, Statistics, read_facts

        path = self.home / "statistics.safetensors"

        def read(data: bytes) -> None:
            path.write_bytes(data)
            read_facts(path)
            found = Statistics.open(path)
            for name in found.names:
                found.shape(name)
                found.read(name)

        facts = {"kind": "gram", "model": "m", "identity": {}, "tokens": 3}
        data = save({"gram.model.q": torch.ones(6)}, {ENTRY: json.dumps(facts)})
        fisher = save({"fisher.model.q": torch.ones(2, 3)}, {ENTRY: json.dumps({**facts, "kind": "fisher"})})
        return Target(read, [data, fisher], "header")

    def _of_sparse_manifest(self) -> Target:
        from weightworks.store.sparse import MANIFEST, densify, export

        source, folder, target = self._folder("whole"), self.home / "compact", self.home / "restored"
        export(str(source), folder)

        def read(data: bytes) -> None:
            (folder / MANIFEST).write_bytes(data)
            try:
                densify(str(folder), target)
            finally:
                for path in (target, self.home / "restored.partial"):
                    shutil.rmtree(path, ignore_errors=True)

        return Target(read, [(folder / MANIFEST).read_bytes()])

    def _of_sparse_file(self) -> Target:
        """The exported weights, with a manifest that vouches for whatever they are."""
        import hashlib

        from weightworks.store.sparse import MANIFEST, PREFIX, densify, export

        source, folder, target = (
            self._folder("whole2", "model.safetensors"),
            self.home / "compact2",
            self.home / "restored2",
        )
        (source / "model.safetensors").write_bytes(save({"w": torch.eye(8), "n": torch.ones(3)}))
        export(str(source), folder)
        name = f"{PREFIX}model.safetensors"
        manifest = json.loads((folder / MANIFEST).read_bytes())

        def read(data: bytes) -> None:
            (folder / name).write_bytes(data)
            manifest["sparse"][name] = hashlib.sha256(data).hexdigest()
            (folder / MANIFEST).write_text(json.dumps(manifest))
            try:
                densify(str(folder), target)
            finally:
                for path in (target, self.home / "restored2.partial"):
                    shutil.rmtree(path, ignore_errors=True)

        return Target(read, [(folder / name).read_bytes()], "header")

    def _of_journal(self) -> Target:
        from weightworks.store.journal import JOURNAL
        from weightworks.store.tensorfile import TensorSpec
        from weightworks.store.writer import CheckpointWriter

        target, staging = self.home / "made", self.home / "made.partial"
        specs, identity = [TensorSpec("a", (2, 2), torch.float32)], {"method": "x", "options": {"bits": 4}}
        writer = CheckpointWriter(target, specs, identity)
        writer.put("a", torch.ones(2, 2))
        writer.done("first", {"rows": []})
        writer.close()
        before = {path.name: path.read_bytes() for path in staging.iterdir()}

        def read(data: bytes) -> None:
            for name, content in before.items():
                (staging / name).write_bytes(data if name == JOURNAL else content)
            CheckpointWriter(target, specs, identity).close()

        return Target(read, [before[JOURNAL]], "lines")

    def _of_history(self) -> Target:
        from compress.rates import read_history

        path = self.home / "trainer_state.json"

        def read(data: bytes) -> None:
            path.write_bytes(data)
            read_history(str(path))

        state = {"log_history": [{"step": 1, "learning_rate": 1e-3}, {"step": 5, "learning_rate": 1e-4}, {"loss": 1}]}
        return Target(read, [json.dumps(state).encode(), b"[0.1, 0.2]"])

    def _of_model_remembered(self) -> Target:
        """What was remembered of digests."""
        from weightworks.store.sources import Digests

        path = self.home / "digests.json"

        def read(data: bytes) -> None:
            path.write_bytes(data)
            Digests(path).file(self.model / "config.json")

        file = str((self.model / "config.json").resolve())
        return Target(read, [json.dumps({file: [1, 2, 3, "ab"]}).encode()])


def spoiled(data: bytes, kind: str, chance: random.Random) -> bytes:
    """``data`` with a few values exchanged for nasty ones, or a few bytes changed where it cannot be taken apart."""
    if chance.random() < 0.85:
        with suppress(ValueError, RecursionError, UnicodeError):
            if kind == "json":
                return _text(_changed(json.loads(data), chance))
            if kind == "lines":
                lines = [line for line in data.splitlines() if line.strip()]
                place = chance.randrange(len(lines))
                lines[place] = _text(_changed(json.loads(lines[place]), chance))
                return b"\n".join(lines) + b"\n"
            if kind == "header":
                return _reheaded(data, chance)
            if kind == "text":
                return _retyped(data, chance)
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(len(changed) + 1)
        action = chance.randrange(4)
        if action == 0:
            del changed[place : place + chance.choice((1, 4, 1000))]
        elif action == 1:
            changed[place:place] = chance.randbytes(chance.choice((1, 2, 8)))
        elif action == 2:
            changed[place : place + 1] = chance.randbytes(1)
        else:
            changed[place:place] = changed[: chance.choice((1, 16, 300))]
    return bytes(changed)


def _text(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=chance_free(value)).encode("utf-8", "surrogatepass")


def chance_free(value: Any) -> bool:
    """Whether escapes are written: half of all documents, by what they hold."""
    return len(str(value)) % 2 == 0


def _changed(value: Any, chance: random.Random) -> Any:
    """``value`` with one to three of its nodes replaced, dropped, renamed or doubled."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        value = _once(value, chance)
    return value


def _once(value: Any, chance: random.Random) -> Any:
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        action = chance.randrange(12)
        if action == 0:
            return {k: v for k, v in value.items() if k != key}
        if action == 1:
            name = chance.choice([n for n in NASTY if isinstance(n, str)])
            return {name if k == key else k: v for k, v in value.items()}
        if action == 2:
            return {**value, chance.choice(list(value)): value[key]}
        return {**value, key: _once(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.9:
        place = chance.randrange(len(value))
        if chance.randrange(8) == 0:
            return value[:place] + value[place + 1 :]
        return [*value[:place], _once(value[place], chance), *value[place + 1 :]]
    if chance.randrange(60) == 0:
        deep: Any = 1
        for _ in range(3000 if chance.random() < 0.1 else 60):
            deep = [deep]
        return deep
    if isinstance(value, int) and chance.random() < 0.3:
        return value + chance.choice((-1, 1, 2, 10**6))
    return chance.choice(NASTY)


def _reheaded(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file with another header before the same tensors; its length mostly right."""
    length = int.from_bytes(data[:8], "little")
    header = _text(_changed(json.loads(data[8 : 8 + length]), chance))
    claimed = len(header) + (chance.choice((-1, 1, 2**40)) if chance.random() < 0.05 else 0)
    return claimed.to_bytes(8, "little") + header + data[8 + length :]


def _retyped(data: bytes, chance: random.Random) -> bytes:
    """YAML with a word exchanged, a line moved, or something that YAML can do and a recipe may not."""
    lines = data.decode().split("\n")
    place = chance.randrange(len(lines))
    action = chance.randrange(6)
    if action == 0:
        lines.insert(chance.randrange(len(lines)), lines.pop(place))
    elif action == 1:
        lines[place] = " " * chance.randrange(8) + lines[place].strip()
    elif action == 2:
        lines.insert(place, chance.choice(YAML))
    else:
        words = lines[place].split(" ")
        new = chance.choice([*NASTY, *YAML])
        words[chance.randrange(len(words))] = new if isinstance(new, str) else json.dumps(new)
        lines[place] = " ".join(words)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


YAML = [
    "&a", "*a", "<<: *a", "!!python/object/apply:os.system ['id']", "!!binary aGk=", "!!set {a}", "? [a, b]", "- - - -", "%YAML 1.1",
    "---", "...", "{a: b", "[", "| 9", "\t", "a: &a [*a, *a]", "2001-01-01", "0x_", "1e999", ".nan", "!!float x", "\"\\U00110000\"",
    "stages: {}", "extends: recipe.yaml", "extends: ../../../etc/passwd", "matrix: {bits: [1,2,3,4,5,6,7,8]}", "from: [a, a]", "$${", "${vars}",
]  # fmt: skip
