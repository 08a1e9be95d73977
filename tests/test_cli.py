"""The command line: help, spelling, exit codes, JSON, every command; and the same from Python."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import FEW, Commands, Fault
from conftest import REPOSITORY
from safetensors.torch import load_file, save_file

import compress as front_door
import weightworks
from compress import quantize
from compress.quantize import gptq
from weightworks.errors import DegradedError, UsageError
from weightworks.plan.evaluate import evaluate
from weightworks.store.sources import file_digest

COMMANDS = ("quantize", "evaluate", "inspect", "diff", "verify", "methods")
HEAVY = ("torch", "numpy", "scipy", "transformers", "safetensors")


def cold(*words: str) -> tuple[int, list[str], str]:
    """``compress words`` in a fresh interpreter: exit code, heavy libraries it loaded, what it said on stderr."""
    program = (
        "import json, sys\n"
        f"sys.argv = ['compress', *{list(words)!r}]\n"
        "from cli.compress_app import main\n"
        "code = 0\n"
        "try: main()\n"
        "except SystemExit as leave: code = leave.code or 0\n"
        # A library that stands by, to be loaded on first use, has none of its own modules yet.
        "loaded = {name.partition('.')[0] for name in sys.modules if '.' in name}\n"
        f"print('\\n' + json.dumps([code, sorted(loaded & set({HEAVY!r}))]))\n"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    code, loaded = json.loads(process.stdout.splitlines()[-1])
    return code, loaded, process.stderr


@pytest.mark.parametrize(
    ("leave", "code", "err"), [("0", 0, ""), ("None", 0, ""), ("130", 130, ""), ("'no'", 1, "no\n")]
)
def test_a_program_ends_with_its_code_and_does_what_libraries_asked_for(leave: str, code: int, err: str) -> None:
    program = (
        "import atexit, sys\n"
        "from cli.program import run\n"
        "atexit.register(print, 'asked for')\n"
        "def main():\n"
        "    print('said')\n"
        f"    sys.exit({leave})\n"
        "run(main)\n"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (code, "said\nasked for\n", err)


# Help and usage errors.


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--help",), 0),
        (("--version",), 0),
        (("quantize", "--help"), 0),
        (("methods", "gptq"), 0),
        (("quantize", "model", "--bits", "5"), 2),
        (("quantize", "model", "--method", "gtpq"), 2),
        (("quantize", "model", "--bitts", "4"), 2),
        (("quantize", "model", "--max-memory", "much"), 2),
    ],
)
def test_quick_answers_load_no_heavy_library(words: Sequence[str], code: int) -> None:
    assert cold(*words)[:2] == (code, [])


def test_help_names_every_command(compress: Commands) -> None:
    run = compress("--help")
    assert (run.code, run.err) == (0, "")
    assert [name for name in COMMANDS if not re.search(rf"^  {name} +[A-Z]", run.out, re.MULTILINE)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(compress: Commands, command: str) -> None:
    run = compress(command, "--help")
    assert run.code == 0
    assert run.out.startswith(f"Usage: compress {command} [OPTIONS]")
    assert "--json" in run.out


def test_help_of_quantize_says_what_the_options_mean(compress: Commands) -> None:
    text = " ".join(compress("quantize", "--help").out.split())
    for said in (
        "--bits <int> bits a weight [awq, gptq, higgs, rtn] (2|3|4|8); default: 4",
        "--group-size <int> input columns that share a scale; -1: the whole row [awq, gptq, higgs, rtn]; default: 128",
        "--sym / --asym grid symmetric about zero",
        "--act-order <str>",
        "--damp-percent <float>",
        "[gptq]",  # an option that not every method has
        "--nsamples, --num-samples <int> windows of text; default: 128 to calibrate, to train as many as the steps take",
        "--seq-len <int> tokens a window; capped by the model; default: 2048",
        "-o, --output-dir",
        "--resume / --no-resume",
    ):
        assert said in text
    assert "default: --" not in text


def test_no_command_at_all_shows_the_help(compress: Commands) -> None:
    run = compress()
    assert run.code == 2
    assert "Commands:" in run.out + run.err


def test_version(compress: Commands) -> None:
    run = compress("--version")
    assert (run.code, run.out, run.err) == (0, f"weightworks {weightworks.__version__}\n", "")


def test_umbrella_command() -> None:
    def run(*words: str) -> tuple[int, str, str]:
        program = f"import sys; sys.argv = ['weightworks', *{list(words)!r}]; from cli.umbrella import main; main()"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    assert run("compress", "--version") == (0, f"weightworks {weightworks.__version__}\n", "")
    assert run("--version") == (0, f"weightworks {weightworks.__version__}\n", "")
    assert run()[0] == 0
    assert run("comprss")[0] == 2
    assert "did you mean 'compress'?" in run("comprss")[2]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("quantise", "m"), "No such command 'quantise'. Did you mean 'quantize'?"),
        (("quantize",), "Missing argument 'MODEL'."),
        (("quantize", "m", "--methd", "gptq"), "No such option: --methd (Possible options: --method"),
        (("quantize", "m", "--method", "gtpq"), "unknown method 'gtpq' for quantize (did you mean 'gptq'?)"),
        (("quantize", "m", "--bits", "5"), "quantize.gptq: option 'bits' = 5: input should be 2, 3, 4 or 8"),
        (("quantize", "m", "--bits", "four"), "Invalid value for '--bits'"),
        (("quantize", "m", "--method", "rtn", "--damp-percent", "0.1"), "quantize.rtn has no option 'damp_percent'"),
        (("quantize", "m", "--scheme", "W4A16", "--bits", "3"), "scheme W4A16 means bits = 4, but bits = 3 was given"),
        (("quantize", "m", "--num-samples", "0"), "option 'num_samples' = 0: input should be greater than or equal"),
        (("evaluate", "m"), "nothing to score"),
        (("methods", "gtpq"), "unknown method 'gtpq' (did you mean 'gptq'?)"),
    ],
)
def test_usage_errors(compress: Commands, words: Sequence[str], text: str) -> None:
    run = compress(*words)
    assert (run.code, run.out) == (2, "")
    assert text in run.err


def test_all_wrong_values_are_said_at_once(compress: Commands) -> None:
    run = compress("quantize", "m", "--bits", "5", "--seq-len", "1", "--max-memory", "much", "--damp-percent", "2")
    assert run.code == 2
    assert run.err.splitlines() == [
        "error: quantize.gptq: option 'bits' = 5: input should be 2, 3, 4 or 8; "
        "quantize.gptq: option 'damp_percent' = 2.0: input should be less than or equal to 1; "
        "quantize.gptq: option 'seq_len' = 1: input should be greater than or equal to 2; "
        "quantize.gptq: option 'max_memory' = 'much': must be a size such as 800MB, 8GB or 16GiB",
        "  hint: see: compress methods gptq, compress quantize --help",
    ]


def test_underscores_and_aliases_mean_the_same(compress: Commands, tiny_llama: Path, tmp_path: Path) -> None:
    spelled = [
        ["--num-samples", "16", "--seq-len", "64", "--group-size", "64", "--output-dir", "out"],
        ["--nsamples", "16", "--seq_len", "64", "--group_size=64", "-o", "out"],
        ["--num_samples=16", "--seq-len=64", "--group-size=64", "--output_dir=out"],
    ]
    runs = [
        compress("quantize", tiny_llama, "--dry-run", "--max-memory", "2GB", *words, cwd=tmp_path) for words in spelled
    ]
    said = {re.sub(r"about .*", "", run.err) for run in runs}
    assert {run.code for run in runs} == {0}
    assert len(said) == 1
    assert "16 windows of 64 tokens" in said.pop()


def test_an_underscore_in_a_value_stays(compress: Commands, tiny_llama: Path, tmp_path: Path) -> None:
    run = compress("quantize", tiny_llama, "--method=rtn", "--dry-run", "--output_dir=a_b", "--json", cwd=tmp_path)
    assert run.json["target"] == str(tmp_path / "a_b")


def test_default_output_names_model_and_work(compress: Commands, tiny_llama: Path, tmp_path: Path) -> None:
    def target(*words: str) -> str:
        return Path(
            compress("quantize", tiny_llama, "--method", "rtn", "--dry-run", "--json", *words, cwd=tmp_path).json[
                "target"
            ]
        ).name

    assert target() == "tiny-llama-rtn-w4g128"
    assert target("--bits", "8", "--group-size", "-1") == "tiny-llama-rtn-w8"
    assert target("--asym", "--group-size", "64") == "tiny-llama-rtn-w4g64-asym"


# Streams and exit codes of a run.


def test_a_run_says_what_it_does_on_stderr_only(compress: Commands, tiny_llama: Path, tmp_path: Path) -> None:
    run = compress("quantize", tiny_llama, "--method", "rtn", "-o", "out", cwd=tmp_path)
    assert (run.code, run.out) == (0, "")
    lines = run.err.splitlines()
    assert lines[0] == f"quantize {tiny_llama}"
    for said in ("  bits +4", "  group size +128", "tensor 42/42", "  written ", "  perplexity ", "  verified "):
        assert any(re.match(said, line) for line in lines), said
    assert (tmp_path / "out" / "provenance.json").is_file()
    log = (tmp_path / "out.run.log").read_text()
    assert "tensor 42/42" in log
    assert not (tmp_path / "out.partial").exists()


def test_quiet_says_nothing_and_json_is_one_object(compress: Commands, tiny_llama: Path, tmp_path: Path) -> None:
    quiet = compress("quantize", tiny_llama, "--method", "rtn", "-q", "-o", "out", cwd=tmp_path)
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    again = compress("quantize", tiny_llama, "--method", "rtn", "-q", "--json", "-o", "out", cwd=tmp_path)
    assert (again.code, again.err) == (0, "")
    assert again.json["cached"] is True
    assert again.json["target"] == str(tmp_path / "out")
    assert set(again.json) >= {"seconds", "stage", "identity", "files", "report", "fallbacks", "quality", "checks"}
    failed = compress("quantize", tmp_path / "nowhere", "--json")
    assert failed.code == 1
    assert failed.json == {
        "error": f"{tmp_path}/nowhere: no such folder",
        "hint": "give a local folder, or org/name[@revision] on the hub",
        "exit_code": 1,
    }
    wrong = compress("quantize", tiny_llama, "--bits", "5", "--json")
    assert (wrong.code, wrong.json["exit_code"]) == (2, 2)


@pytest.mark.parametrize("words", [("methods",), ("methods", "gptq"), ("methods", "quantize.rtn")])
def test_methods_as_json(compress: Commands, words: Sequence[str]) -> None:
    run = compress(*words, "--json")
    assert (run.code, run.err) == (0, "")
    assert isinstance(run.json, dict)


def test_methods(compress: Commands) -> None:
    listed = compress("methods")
    assert (listed.code, listed.out) == (0, "")
    assert re.search(r"quantize\.gptq +GPTQ: round column by column", listed.err)
    assert "quantize.rtn " in listed.err
    one = compress("methods", "gptq")
    assert one.code == 0
    for said in (
        "quantize.gptq (version ",
        "paper: Frantar et al. 2022",
        "bits ",
        "2|3|4|8",
        "damp_percent ",
        "> 0, <= 1",
    ):
        assert said in one.err
    described = compress("methods", "gptq", "--json").json
    assert described["method"] == "quantize.gptq"
    assert {row["option"] for row in described["options"]} == set(gptq.Options.model_fields)
    assert all(row["meaning"] for row in described["options"])


def test_strict_turns_a_fallback_into_exit_code_3(compress: Commands, tiny_llama: Path, tmp_path: Path) -> None:
    words = ("quantize", tiny_llama, *FEW, "--ignore", "*.[1-5].*", "-o", "out")
    run = compress(*words, "--strict", "--json", cwd=tmp_path, faults=[["forced_fallback"]])
    assert run.code == 3
    assert "error: " + str(tmp_path / "out") + ": done, but the method could not be applied as asked" in run.err
    said = (
        "model.layers.0.mlp.down_proj.weight: not positive definite at any damping, rounded without error compensation"
    )
    assert f"  fallback: {said}" in run.err
    assert said in run.json["fallbacks"]  # one object, although the run fell short
    assert len(run.json["fallbacks"]) == 7
    assert f"- {said}" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["fallbacks"] == run.json["fallbacks"]
    assert compress(*words, "-q", cwd=tmp_path).code == 0  # published, and not strict: fine
    assert compress(*words, "-q", "--strict", cwd=tmp_path).code == 3


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (["flipped_byte"], "read back differs from what was written"),
        (["worse_reload"], "the saved folder has perplexity "),
    ],
)
def test_failed_verification(compress: Commands, tiny_llama: Path, tmp_path: Path, fault: Fault, text: str) -> None:
    words = ("quantize", tiny_llama, "--method", "rtn", "-o", "out")
    run = compress(*words, "--json", cwd=tmp_path, faults=[fault])
    staging = tmp_path / "out.partial"
    assert run.code == 4
    assert text in run.err
    assert str(staging) in run.err  # left, and named
    assert run.json["exit_code"] == 4
    assert (staging / "model.safetensors").is_file()
    assert not (tmp_path / "out").exists()
    assert text in (tmp_path / "out.run.log").read_text()


def test_damaged_staging_does_not_pass_on_a_second_try(compress: Commands, tiny_llama: Path, tmp_path: Path) -> None:
    words = ("quantize", tiny_llama, "--method", "rtn", "-o", "out")
    assert compress(*words, cwd=tmp_path, faults=[["flipped_byte"]]).code == 4
    assert compress(*words, cwd=tmp_path).code == 4  # the journal says all is written, the disk says otherwise
    assert not (tmp_path / "out").exists()
    assert compress(*words, "--no-resume", cwd=tmp_path).code == 0


# The other commands.


def test_inspect(compress: Commands, quantized: Path, tiny_llama: Path) -> None:
    run = compress("inspect", quantized)
    assert (run.code, run.out) == (0, "")
    assert "compressed-tensors, 4 bits, groups of 128, symmetric" in run.err
    assert re.search(r"model\.layers\.\*\.mlp\.down_proj\.weight +6 +256x768 +4-bit codes +4\.1", run.err)
    assert "made by quantize.gptq bits 4, group_size 128" in run.err
    facts = compress("inspect", quantized, "--json").json
    assert facts["parameters"] == "5,246,208"
    assert facts["lineage"][0]["source"] == str(tiny_llama)
    assert len(facts["tensors"]) == 56
    assert facts["bytes"] == f"{sum(row['bytes'] for row in facts['tensors']):,}"
    dense = compress("inspect", tiny_llama, "--tensors", "--sparsity")
    assert "model.layers.5.self_attn.q_proj.weight" in dense.err
    assert re.search(r"  format +dense\n", dense.err)
    assert re.search(r"model\.norm\.weight +1 +256 +BF16 +16 +512 +0\.00%", dense.err)


def test_diff(compress: Commands, quantized: Path, tiny_llama: Path) -> None:
    run = compress("diff", tiny_llama, quantized)
    assert (run.code, run.out) == (0, "")
    assert run.err.endswith("14 equal, 42 differs\n")
    assert "model.norm.weight" not in run.err
    assert "model.norm.weight" in compress("diff", tiny_llama, quantized, "--all").err
    rows = {row["name"]: row for row in compress("diff", tiny_llama, quantized, "--json").json["tensors"]}
    row = rows["model.layers.0.mlp.down_proj.weight"]
    assert row["state"] == "differs"
    assert 0.9 < row["cosine"] < 1
    assert rows["model.embed_tokens.weight"] == {
        "name": "model.embed_tokens.weight",
        "state": "equal",
        "max": 0.0,
        "mean": 0.0,
        "relative": 0.0,
        "cosine": pytest.approx(1.0),
    }


def copy(source: Path, target: Path) -> Path:
    """A copy of a checkpoint folder that may be changed; what is not changed is linked."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).hardlink_to(path)
    return target


def rewrite(folder: Path, change: Any) -> None:
    """Let ``change`` edit the tensors of a one-file checkpoint."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def replace(path: Path, content: bytes) -> None:
    path.unlink()  # it is a link to a file that others read
    path.write_bytes(content)


def failed_checks(compress: Commands, folder: Path) -> dict[str, str]:
    """What ``compress verify`` finds wrong, by check; its exit code must say so."""
    run = compress("verify", folder, "--json")
    wrong = {check["check"]: check["seen"] for check in run.json["checks"] if not check["ok"]}
    assert run.json["ok"] == (not wrong)
    assert run.code == (4 if wrong else 0), run.err
    assert run.err.count("FAILED") == len(wrong)
    return wrong


def test_verify_of_a_sound_folder(compress: Commands, quantized: Path, tiny_llama: Path) -> None:
    run = compress("verify", quantized)
    assert (run.code, run.out) == (0, "")
    assert [line.split(":")[0].split(maxsplit=1) for line in run.err.splitlines()] == [
        ["ok", name] for name in ("files", "values", "tensors", "replay", "stock transformers", "perplexity")
    ]
    assert failed_checks(compress, tiny_llama) == {}  # also of a folder we did not make


def test_verify_names_a_deleted_tensor(compress: Commands, quantized: Path, tmp_path: Path) -> None:
    folder = copy(quantized, tmp_path / "model")
    rewrite(folder, lambda tensors: tensors.pop("model.layers.3.input_layernorm.weight"))
    wrong = failed_checks(compress, folder)
    assert "model.safetensors: content differs" in wrong["files"]
    assert "model.layers.3.input_layernorm.weight" in wrong["tensors"]


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_shape"])
def test_verify_names_a_deleted_part(compress: Commands, quantized: Path, tmp_path: Path, suffix: str) -> None:
    folder = copy(quantized, tmp_path / "model")
    rewrite(folder, lambda tensors: tensors.pop(f"model.layers.3.mlp.up_proj.{suffix}"))
    assert "model.layers.3.mlp.up_proj.weight" in failed_checks(compress, folder)["tensors"]


def test_verify_names_a_truncated_shard(compress: Commands, quantized: Path, tmp_path: Path) -> None:
    folder = copy(quantized, tmp_path / "model")
    replace(folder / "model.safetensors", (quantized / "model.safetensors").read_bytes()[:-7])
    assert "model.safetensors: truncated: the header needs" in failed_checks(compress, folder)["files"]


def test_verify_names_the_file_of_a_flipped_byte(compress: Commands, quantized: Path, tmp_path: Path) -> None:
    folder = copy(quantized, tmp_path / "model")
    data = bytearray((quantized / "model.safetensors").read_bytes())
    data[-100] ^= 1
    replace(folder / "model.safetensors", data)
    assert failed_checks(compress, folder)["files"] == "model.safetensors: content differs from the provenance"


def test_verify_names_a_changed_sidecar(compress: Commands, quantized: Path, tmp_path: Path) -> None:
    folder = copy(quantized, tmp_path / "model")
    replace(folder / "generation_config.json", b"{}\n")
    (folder / "tokenizer_config.json").unlink()
    seen = failed_checks(compress, folder)["files"]
    assert "generation_config.json: content differs" in seen
    assert "tokenizer_config.json: missing" in seen


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.up_proj.weight_scale"])
def test_verify_names_a_tensor_with_nan(compress: Commands, quantized: Path, tmp_path: Path, name: str) -> None:
    folder = copy(quantized, tmp_path / "model")
    rewrite(folder, lambda tensors: tensors[name].view(-1)[3:5].fill_(torch.nan))
    assert failed_checks(compress, folder)["values"] == f"tensor '{name}' holds 2 NaN or infinite values"


def test_verify_of_no_folder_is_an_error(compress: Commands, tmp_path: Path) -> None:
    assert compress("verify", tmp_path / "nowhere").code == 1


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two small texts."""
    folder = tmp_path_factory.mktemp("texts")
    paths = folder / "one.txt", folder / "two.txt"
    paths[0].write_text((REPOSITORY / "weightworks" / "errors.py").read_text())
    paths[1].write_text((REPOSITORY / "weightworks" / "options.py").read_text())
    return paths


def test_evaluate(compress: Commands, quantized: Path, tiny_llama: Path, texts: tuple[Path, Path]) -> None:
    words = ["evaluate", tiny_llama, quantized, "--seq-len", "64", "--max-tokens", "640"]
    words += [word for text in texts for word in ("--perplexity", text)]
    run = compress(*words, "--json")
    assert run.code == 0
    assert re.search(r"model +size +one\.txt +two\.txt +geometric mean +against baseline\n", run.err)
    assert re.search(r" [+-]\d+\.\d\d% ± \d+\.\d\d%\n", run.err)
    report = run.json
    dense, packed = report["models"]
    assert report["baseline"] == dense["model"] == str(tiny_llama)
    assert (dense["change"], dense["error"]) == (0.0, 0.0)
    assert packed["change"] == pytest.approx(packed["mean"] / dense["mean"] - 1)
    assert dense["tokens"] == {str(text): 630 for text in texts}
    assert packed["bytes"] < dense["bytes"] / 2
    other = compress(*words, "--baseline", quantized, "-q", "--json")
    assert other.err == ""
    changes = {row["model"]: row["change"] for row in other.json["models"]}
    assert changes[str(quantized)] == 0.0
    assert changes[str(tiny_llama)] == pytest.approx(1 / (1 + packed["change"]) - 1)


def test_evaluate_says_the_window_it_used(compress: Commands, tiny_llama: Path, texts: tuple[Path, Path]) -> None:
    run = compress("evaluate", tiny_llama, "--perplexity", texts[0], "--json")
    assert run.json["seq_len"] == 512  # 2048 were asked for, the model takes no more
    assert "windows of 512 tokens" in run.err


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "no such file"),
        (b"", "0 tokens is shorter than one window"),
        (b"\xff\xfe\x00", "cannot be read as UTF-8"),
    ],
)
def test_evaluate_on_bad_text(
    compress: Commands, tiny_llama: Path, tmp_path: Path, content: bytes | None, text: str
) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    run = compress("evaluate", tiny_llama, "--perplexity", tmp_path / "text.txt")
    assert run.code == 1
    assert text in run.err


# The same from Python.


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the processes of the command have it: threads are part of what bytes may depend on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_python_api(compress: Commands, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        compress("quantize", tiny_llama, "--method", "rtn", "--bits", "8", "-o", "command/out", cwd=tmp_path).code == 0
    )
    outcome = quantize(tiny_llama, method="rtn", bits=8, output_dir="function/out")
    again = front_door.quantize(str(tiny_llama), method="rtn", bits=8, output_dir=Path("function/out"))
    assert outcome.target == tmp_path / "function" / "out"
    assert (outcome.cached, again.cached, outcome.fallbacks) == (False, True, [])
    made = {path.name: file_digest(path) for path in (tmp_path / "function" / "out").iterdir()}
    assert made == {path.name: file_digest(path) for path in (tmp_path / "command" / "out").iterdir()}


def test_python_api_dry_run(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = quantize(tiny_llama, num_samples=4, seq_len=32, dry_run=True)
    assert outcome.target == tmp_path / "tiny-llama-gptq-w4g128"
    assert outcome.provenance is None
    assert outcome.estimate is not None
    assert list(tmp_path.iterdir()) == []


def test_python_api_refuses_all_at_once(tiny_llama: Path) -> None:
    with pytest.raises(UsageError) as caught:
        quantize(tiny_llama, bit=4, bits="4", num_sampels=8, seq_len=1)
    assert str(caught.value).split("; ") == [
        "quantize.gptq has no option 'bit' (did you mean 'bits'?)",
        "quantize.gptq has no option 'num_sampels' (did you mean 'num_samples'?)",
        "quantize.gptq: option 'bits' = '4': input should be 2, 3, 4 or 8",
        "quantize.gptq: option 'seq_len' = 1: input should be greater than or equal to 2",
    ]
    with pytest.raises(UsageError, match=r"unknown method 'gtpq' for quantize \(did you mean 'gptq'\?\)"):
        quantize(tiny_llama, method="gtpq")


@pytest.mark.usefixtures("one_thread")
def test_python_api_strict(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DegradedError, match="the method could not be applied as asked in 7 cases"):
        quantize(
            tiny_llama, num_samples=1, seq_len=32, ignore=["*.[1-5].*"], strict=True, output_dir=tmp_path / "out"
        )  # 32 tokens say nothing of 256 inputs
    assert (tmp_path / "out" / "config.json").is_file()


def test_front_doors_open_late() -> None:
    program = (
        "import sys\n"
        "from compress import quantize\n"
        "import compress.quantize.rtn\n"
        "assert compress.quantize is quantize and callable(quantize) and compress.quantize.rtn.Options\n"
        "assert set(dir(compress)) >= {'quantize', 'evaluate'}\n"
        "try: compress.nothing\n"
        "except AttributeError as error: assert str(error) == \"module 'compress' has no attribute 'nothing'\"\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    light = "import sys\nfrom compress import quantize\nassert not [m for m in sys.modules if m.startswith('torch')]"
    subprocess.run([sys.executable, "-c", light], check=True, env={**os.environ})
    assert front_door.evaluate is evaluate
