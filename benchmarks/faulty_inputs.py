"""What this project, llm-compressor and mergekit do with sixteen faulty inputs.

    python benchmarks/faulty_inputs.py [--mergekit PEER/bin/python] [--llmcompressor PEER/bin/python] [--json FILE]

A small Llama of random weights is broken in one way after the other, and each tool is asked to quantize it to 4 bits by rounding,
or to average it with the whole one. Told of each: the exit code, whether the last lines name the file, tensor or option at
fault, how many lines there are, and what lies at the target afterwards. "silent" is exit code 0 and an output that is wrong.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from _measure import Usage, note, run, save_json, table
from _ours import work_folder

HERE = Path(__file__).resolve().parent
MAKE = "import sys; from pathlib import Path; from weightworks.testing.tiny import make_model; make_model(Path(sys.argv[1]))"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Fault:
    """A way to break a checkpoint; ``names`` are words of which a good message has one."""

    name: str
    breaks: Callable[[Path], None]
    names: tuple[str, ...]


def header(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The header of the weights, and the bytes after it."""
    raw = (folder / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def write(folder: Path, found: Mapping[str, Any], payload: bytes) -> None:
    text = json.dumps(found).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + payload)


def fill(value: bytes) -> Callable[[Path], None]:
    """Put a bfloat16 ``value`` at the start of a weight."""

    def breaks(folder: Path) -> None:
        found, payload = header(folder)
        start = found[SICK]["data_offsets"][0]
        write(folder, found, payload[:start] + value + payload[start + 2 :])

    return breaks


PEERS = {"quantize": "llm-compressor", "merge": "mergekit"}
SICK = "model.layers.0.mlp.up_proj.weight"


def without(folder: Path) -> None:
    """One tensor is not in the header; its bytes are given to no other."""
    found, payload = header(folder)
    first = found.pop(SICK)["data_offsets"]
    length, kept = first[1] - first[0], payload[: first[0]] + payload[first[1] :]
    for name, facts in found.items():
        if name != "__metadata__" and facts["data_offsets"][0] >= first[1]:
            facts["data_offsets"] = [offset - length for offset in facts["data_offsets"]]
    write(folder, found, kept)


def turned(folder: Path) -> None:
    found, payload = header(folder)
    found[SICK]["shape"].reverse()
    write(folder, found, payload)


def indexed(shard: str, *names: str) -> Callable[[Path], None]:
    """An index beside the weights that says all tensors, and ``names``, are in ``shard``."""

    def breaks(folder: Path) -> None:
        found, _ = header(folder)
        mapped = {name: shard for name in (*found, *names) if name != "__metadata__"}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": mapped}))

    return breaks


def config(**changes: Any) -> Callable[[Path], None]:
    def breaks(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return breaks


def cut(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: len(raw) // 2])


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


FAULTS = (
    Fault("no such folder", shutil.rmtree, ("broken",)),
    Fault("an empty folder", emptied, ("broken", "config.json")),
    Fault("no config.json", lambda folder: (folder / "config.json").unlink(), ("config.json",)),
    Fault(
        "config.json cut short", lambda folder: (folder / "config.json").write_text('{"model_type": '), ("config.json",)
    ),
    Fault("an unknown model type", config(model_type="no_such_model"), ("no_such_model",)),
    Fault("no weights", lambda folder: (folder / WEIGHTS).unlink(), ("broken", WEIGHTS)),
    Fault("weights cut short", cut, (WEIGHTS,)),
    Fault("weights that are noise", lambda folder: (folder / WEIGHTS).write_bytes(bytes(range(256)) * 99), (WEIGHTS,)),
    Fault("an index of a missing shard", indexed("lost.safetensors"), ("lost.safetensors",)),
    Fault("an index of a missing tensor", indexed(WEIGHTS, "model.lost.weight"), ("model.lost.weight", "lost")),
    Fault("an index that points out", indexed("../../outside.safetensors"), ("outside.safetensors",)),
    Fault("a weight that is missing", without, (SICK,)),
    Fault("a weight of another shape", turned, (SICK,)),
    Fault("one NaN", fill(b"\xc0\x7f"), (SICK,)),
    Fault("one infinity", fill(b"\x80\x7f"), (SICK,)),
    Fault("more blocks in config.json than there are", config(num_hidden_layers=3), ("layers.2",)),
)


def ours(job: str, whole: Path, broken: Path, out: Path) -> list[str | Path]:
    program = "from cli.umbrella import main; main()"
    words = ["compress", "quantize", broken, "--method", "rtn", "--group-size", "32"]
    if job == "merge":
        words = ["merge", "soup", whole, broken]
    return [sys.executable, "-c", program, *words, "-q", "-o", out]


def peer(python: Path, job: str, whole: Path, broken: Path, out: Path) -> list[str | Path]:
    if job == "quantize":
        script = HERE / "peers" / "llmcompressor_gptq.py"
        return [python, script, broken, out, "none", "--method", "rtn", "--group-size", "32"]
    file = out.parent / "merge.yaml"
    models = "".join(f"  - model: {path}\n    parameters: {{weight: 1.0}}\n" for path in (whole, broken))
    file.write_text(f"merge_method: linear\nmodels:\n{models}dtype: bfloat16\n")
    return [python.parent / "mergekit-yaml", file, out]


def judged(usage: Usage, fault: Fault, out: Path) -> dict[str, Any]:
    """What is told of a run."""
    lines = [line for line in usage.stderr.strip().splitlines() if line.strip()]
    end = "\n".join(lines[-8:])
    left = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    silent = usage.exit_code == 0 and WEIGHTS in left
    return {
        "exit": usage.exit_code,
        "named": usage.exit_code != 0 and any(name in end for name in fault.names),
        "lines": len(lines),
        "left": left,
        "silent": silent,
        "said": lines[-1] if lines else "",
    }


def told(found: Mapping[str, Any]) -> list[str]:
    verdict = "silent" if found["silent"] else f"exit {found['exit']}"
    return [verdict, "yes" if found["named"] else "no", str(found["lines"]), str(len(found["left"]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, metavar="PYTHON", help="the Python of mergekit's environment")
    parser.add_argument(
        "--llmcompressor", type=Path, metavar="PYTHON", help="the Python of llm-compressor's environment"
    )
    parser.add_argument("--work", type=Path, help="keep everything in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    result: dict[str, Any] = {}
    with work_folder(args.work) as work:
        whole = work / "whole"
        run([sys.executable, "-c", MAKE, whole])
        for job, python in (("quantize", args.llmcompressor), ("merge", args.mergekit)):
            sides = {"weightworks": ours} | ({PEERS[job]: partial(peer, python)} if python else {})
            rows = []
            for fault in FAULTS:
                cells = [fault.name]
                for side, command in sides.items():
                    broken, out = work / "broken", work / "out"
                    for folder in (broken, out):
                        shutil.rmtree(folder, ignore_errors=True)
                    shutil.copytree(whole, broken)
                    fault.breaks(broken)
                    note(f"{job}: {fault.name}: {side}")
                    found = judged(run(command(job, whole, broken, out), check=False), fault, out)
                    result[f"{job} | {fault.name} | {side}"] = found
                    cells += told(found)
                rows.append(cells)
            head = ["", *["outcome", "named", "lines", "files left"] * len(sides)]
            names = "weightworks" + (
                f", then {'llm-compressor' if job == 'quantize' else 'mergekit'}" if python else ""
            )
            table(f"{job}: {names}", head, rows)
    save_json(args.json, result)


if __name__ == "__main__":
    main()
