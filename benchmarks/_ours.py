"""How the benchmarks call this project: the command line, the calibration tokens, the made-up checkpoints."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from _measure import Usage, last_json, note, run

HERE = Path(__file__).resolve().parent
PEER_HELP = (
    "Python of an environment that holds the peer, made with: python3.11 -m venv PEER && "
    "PEER/bin/pip install torch==2.13.0 && PEER/bin/pip install llmcompressor==0.14.0"
)
WRITE_TOKENS = """
import json, sys
from pathlib import Path
from safetensors.torch import save_file
from weightworks.stream.calibration import load_windows
dataset, model, out, windows, seq_len, seed = sys.argv[1:]
found = load_windows(dataset, Path(model), num_samples=int(windows), seq_len=int(seq_len), seed=int(seed))
save_file({"tokens": found.tokens}, out)
print(json.dumps({"shape": list(found.tokens.shape)}))
"""


@dataclass(frozen=True)
class Settings:
    """What to make of the weights; symmetric integers on both sides."""

    method: str
    bits: int
    group_size: int


@dataclass(frozen=True)
class Windows:
    """The calibration tokens: ``count`` windows of ``seq_len`` from ``text``, ``builtin`` or a file."""

    text: str
    count: int
    seq_len: int
    seed: int = 0


def compress_command() -> Path:
    """The ``compress`` script of the environment that runs this benchmark."""
    # The script beside the interpreter, links unresolved: a virtual environment's python is a link out of it.
    beside = Path(sys.executable).parent / "compress"
    if not beside.is_file():
        sys.exit(f"{beside} does not exist; install the project here: {sys.executable} -m pip install -e .")
    return beside


def quantize_command(
    model: Path, out: Path, settings: Settings, windows: Windows, *, extra: Sequence[str] = ()
) -> list[str | Path]:
    """``compress quantize`` with everything said. ``rtn`` reads no calibration, so it gets no options for it."""
    grid = ["--method", settings.method, "--bits", str(settings.bits), "--group-size", str(settings.group_size)]
    if settings.method != "rtn":
        grid += ["--dataset", windows.text, "--num-samples", str(windows.count)]
        grid += ["--seq-len", str(windows.seq_len), "--seed", str(windows.seed)]
    return [compress_command(), "quantize", model, *grid, "-o", out, "--overwrite", *extra]


def peer_command(python: Path, model: Path, out: Path, tokens: Path, settings: Settings) -> list[str | Path]:
    """The peer on the same tokens, in its own environment."""
    script = HERE / "peers" / "llmcompressor_gptq.py"
    grid = ["--method", settings.method, "--bits", str(settings.bits), "--group-size", str(settings.group_size)]
    return [python, script, model, out, tokens, *grid]


def write_tokens(model: Path, out: Path, windows: Windows) -> None:
    """Write the very windows that our command would calibrate with to the safetensors file ``out``."""
    text = windows.text if windows.text == "builtin" else str(Path(windows.text).resolve())
    numbers = [str(number) for number in (windows.count, windows.seq_len, windows.seed)]
    words: list[str | Path] = [sys.executable, "-c", WRITE_TOKENS, text, model.resolve(), out.resolve(), *numbers]
    found = last_json(run(words, cwd=HERE.parent).stdout)["shape"]
    if found != [windows.count, windows.seq_len]:
        wanted = f"{windows.count} of {windows.seq_len}"
        sys.exit(f"{windows.text} gives {found[0]} windows of {found[1]} tokens, not {wanted}; use a longer text")


def make_checkpoint(out: Path, *, layers: int, hidden: int, extra: Sequence[str] = ()) -> None:
    """A made-up checkpoint with Llama-3.2-1B's proportions."""
    note(f"making a checkpoint: {layers} layers, hidden {hidden}")
    options = ["--layers", str(layers), "--hidden", str(hidden), *extra]
    run([sys.executable, HERE / "make_checkpoint.py", out, *options])


@contextmanager
def work_folder(wanted: Path | None) -> Iterator[Path]:
    """``wanted``, made if needed and kept; or a temporary folder, removed at the end."""
    if wanted:
        wanted.mkdir(parents=True, exist_ok=True)
        yield wanted
    else:
        temporary = Path(tempfile.mkdtemp(prefix="benchmark-"))
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def fresh(folder: Path) -> Path:
    """``folder`` with nothing there."""
    if folder.exists():
        shutil.rmtree(folder)
    return folder


def cost_cells(usage: Usage) -> list[str]:
    """Wall, CPU and peak as table cells."""
    return [f"{usage.wall_seconds:.1f}", f"{usage.cpu_seconds:.1f}", f"{usage.peak_bytes / 1e9:.2f}"]
