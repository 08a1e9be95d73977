"""Writes gptq and gptq_v2 folders in every combination of options and has stock transformers load them.

    python benchmarks/reload_gptq.py --env READER

Stock transformers reads these formats through optimum and gptqmodel, whose requirements conflict with ours, so they get
an environment of their own: READER is made unless it exists (torch of our version first, then gptqmodel without its
demand of a newer one), and one fresh process of it, which has nothing of this project, loads every folder by
``AutoModelForCausalLM.from_pretrained``. Its logits are compared with those of the weights that our reader decodes, in
float32. The exit code is 1 if a folder does not load or differs by more than --tolerance. The same interpreter runs the
tests that are skipped without one:

    GPTQ_PYTHON=READER/bin/python python -m pytest tests/test_reload.py

GPTQModel compiles kernels at the first load of 4-bit folders: that takes a C++ compiler, and a minute.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from _measure import note, save_json, table
from _ours import HERE, work_folder
from weightworks.plan import stage, texts
from weightworks.stage.settings import Settings
from weightworks.testing.stored import Loaded, load_apart, stored_logits

MODEL = HERE.parent / "examples" / "tiny-llama"
BITS, FORMATS = (2, 3, 4, 8), ("gptq", "gptq_v2")
NEEDS = "import importlib.metadata as m, json; print(json.dumps(m.requires('gptqmodel')))"
TOLERANCE = 5e-3  # some kernels multiply in 16 bits
BUILD = "setuptools>=84.2.1,<85"  # what gptqmodel 7.7 is built with


def make_environment(folder: Path, gptqmodel: str) -> Path:
    """The interpreter of an environment with transformers, optimum and gptqmodel; made unless ``folder`` exists."""
    python = folder / "bin" / "python"
    if python.is_file():
        return python
    note(f"making {folder}")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet"]
    ours = [f"torch=={version('torch').partition('+')[0]}", f"transformers=={version('transformers')}"]
    subprocess.run([*pip, ours[0], "numpy", BUILD, "wheel"], check=True)
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", f"gptqmodel=={gptqmodel}"], check=True)
    needs = json.loads(subprocess.run([python, "-c", NEEDS], check=True, capture_output=True, text=True).stdout)
    plain = [need for need in needs if not need.startswith("torch>") and "extra ==" not in need]
    subprocess.run([*pip, *ours, "optimum", *plain], check=True)
    return python


def combinations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, method and options of every folder."""
    orders = {"rtn": {}, "static": {"act_order": "static"}, "dynamic": {"act_order": "dynamic"}}
    for format_ in FORMATS:
        for bits in BITS:
            for sym in (True, False):
                for order, extra in orders.items():
                    options = {"format": format_, "bits": bits, "sym": sym, "group_size": 64, **extra}
                    grid = "sym" if sym else "asym"
                    yield f"{format_} {bits} {grid} {order}", "gptq" if extra else "rtn", options
            for size in (-1, 32, 128):
                options = {"format": format_, "bits": bits, "group_size": size}
                yield f"{format_} {bits} sym g{size}", "rtn", options


def write_folders(model: Path, work: Path) -> dict[str, tuple[Path, bool]]:
    """Every folder, quantized with little calibration: what is compared is how it reads, not how good it is."""
    settings = Settings(num_samples=8, seq_len=128, dtype="float32")
    texts.PROBE_WINDOWS, texts.PROBE_LENGTH = 2, 64  # every run checks itself, too; here that may be brief
    written = {}
    for name, method, options in combinations():
        target = work / name.replace(" ", "-")
        stage.run_stage("quantize", method, str(model), options, settings, output_dir=target)
        written[target.name] = target, False
    return written


def print_results(loaded: dict[str, Loaded], differences: dict[str, float]) -> None:
    """One row a folder."""
    rows = []
    for name, found in loaded.items():
        cells = [f"{differences[name]:.1e}", found.kernel] if name in differences else ["does not load", found.error]
        rows.append([name, *cells])
    table("Stock transformers against the stored weights", ["folder", "largest difference of logits", "by"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, required=True, help="folder of the reader's environment; made if missing")
    parser.add_argument("--gptqmodel", default="7.7.0", help="version for a new environment (default 7.7.0)")
    parser.add_argument("--model", type=Path, default=MODEL, help="default: examples/tiny-llama")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="relative to the largest logit")
    parser.add_argument("--work", type=Path, help="keep the folders here")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    python = make_environment(args.env, args.gptqmodel)
    tokens = torch.randint(2048, (2, 64), generator=torch.Generator().manual_seed(0))
    copy = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    with work_folder(args.work) as work:
        note("writing folders")
        folders = write_folders(args.model, work)
        note(f"loading {len(folders)} folders with {python}")
        loaded, versions = load_apart(
            python, {name: (path, {"dequantize": no}) for name, (path, no) in folders.items()}, tokens, work
        )
        differences = {
            name: found.difference(stored_logits(copy, folders[name][0], tokens))
            for name, found in loaded.items()
            if found.logits is not None
        }
    print_results(loaded, differences)
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    good = [name for name, difference in differences.items() if difference <= args.tolerance]
    print(f"{len(good)} of {len(loaded)} folders load and agree")
    errors = {name: found.error for name, found in loaded.items() if found.error}
    save_json(args.json, {"versions": versions, "differences": differences, "errors": errors})
    sys.exit(len(good) < len(loaded))


if __name__ == "__main__":
    main()
