"""A recipe of twelve stages over several models: run cold, run again, run with one option changed.

    python benchmarks/recipe_of_twelve.py

Wants the folder `shared` beside the repository: its models tiny-llama (base), expert-code, expert-drama (fine-tunes of it)
and tiny-opt, and its texts. Without it, it says so and ends. Quantizes by four ways and in chains, scores by perplexity,
divergence and an offline task of lm-eval. The second run must find everything and read no weight; the third changes the
bits of one stage and must run that one and what reads it, nothing else.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from _measure import Usage, last_json, note, run, save_json, table
from _ours import HERE, compress_command, fresh, work_folder
from recipes_killed import contents

SHARED = HERE.parent.parent / "shared"
RECIPE = """version: 1
sources:
  base: {shared}/models/tiny-llama
  code: {shared}/models/expert-code
  drama: {shared}/models/expert-drama
  opt: {shared}/models/tiny-opt
stages:
  rounded: {{use: quantize.rtn, from: base, with: {{bits: 4}}}}
  small: {{use: quantize.gptq, from: base, with: {{bits: 4, dataset: {text}, num_samples: 64, seq_len: 256}}}}
  smaller: {{use: quantize.gptq, from: base, with: {{bits: 3, dataset: {text}, num_samples: 64, seq_len: 256}}}}
  code8: {{use: quantize.rtn, from: code, with: {{bits: 8, format: dense}}}}
  code4: {{use: quantize.gptq, from: code8, with: {{bits: 4, dataset: {text}, num_samples: 64, seq_len: 256}}}}
  drama4: {{use: quantize.gptq, from: drama, with: {{bits: 4, dataset: {text}, num_samples: 64, seq_len: 256}}}}
  opt-rounded: {{use: quantize.rtn, from: opt, with: {{bits: 4}}}}
  opt4: {{use: quantize.gptq, from: opt, with: {{bits: 4, dataset: {text}, num_samples: 64, seq_len: 256}}}}
  llamas:
    use: score.perplexity
    from: [base, rounded, small, smaller, code, code4, drama, drama4]
    with: {{texts: ["{shared}/data/prose.test.txt", "{shared}/data/code.test.txt"], seq_len: 256, max_tokens: 8192}}
  opts:
    use: score.perplexity
    from: [opt, opt-rounded, opt4]
    with: {{texts: ["{shared}/data/prose.test.txt"], seq_len: 256, max_tokens: 8192}}
  drift:
    use: score.divergence
    from: [base, rounded, small, smaller]
    with: {{texts: ["{shared}/data/prose.test.txt"], seq_len: 256, max_tokens: 8192}}
  cloze:
    use: score.harness
    from: [base, small, code4]
    with: {{tasks: [local_cloze], include_path: "{shared}/tasks", limit: 100}}
report: [llamas, drift, cloze]
"""
CHANGED, DOWNSTREAM = "code4.bits=3", {"code4", "llamas", "cloze"}


def states(usage: Usage) -> dict[str, str]:
    """What became of each stage."""
    report: dict[str, Any] = last_json(usage.stdout.replace("\n", " "))
    return {stage["name"]: stage["state"] for stage in report["stages"] if stage["state"] != "source"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--work", type=Path, help="keep recipe and outputs in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("extra", nargs="*", help="further words for compress run, after --")
    args = parser.parse_args()
    if not args.shared.is_dir():
        sys.exit(f"there is no folder {args.shared}: nothing was measured")
    rows, results, faults = [], [], []
    with work_folder(args.work) as work:
        recipe, place = work / "twelve.yaml", fresh(work / "runs")
        shared = args.shared.resolve()
        recipe.write_text(RECIPE.format(shared=shared, text=shared / "data" / "calibration.txt"))
        words: list[str | Path] = [compress_command(), "run", recipe, "--workspace", place, "-q", "--json", *args.extra]
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # for so small models more only wait
        before: dict[str, str] = {}
        for name, more, expected in (
            ("cold", [], None),
            ("warm", [], set()),
            (f"--set {CHANGED}", ["--set", CHANGED], DOWNSTREAM),
            ("as it was", [], set()),
        ):
            note(name)
            usage = run([*words, *more], env=threads)
            found = states(usage)
            ran = {stage for stage, state in found.items() if state == "ran"}
            if ran != (set(found) if expected is None else expected):
                faults.append(f"{name}: ran {sorted(ran)}")
            if not more and before and contents(place / "twelve") != before:
                faults.append(f"{name}: other bytes")
            before = before or contents(place / "twelve")
            made = ", ".join(sorted(ran)) if 0 < len(ran) < len(found) else str(len(ran))
            costs = [f"{usage.wall_seconds:.2f}", f"{usage.cpu_seconds:.2f}", f"{usage.peak_bytes / 1e6:.0f}"]
            rows.append([name, *costs, str(len(found) - len(ran)), made])
            results.append({"run": name, "ran": sorted(ran), "stages": len(found), **usage.figures()})
    table("A recipe of twelve stages", ["run", "wall s", "CPU s", "peak MB", "found", "made"], rows)
    save_json(args.json, {"runs": results})
    if faults:
        sys.exit("; ".join(faults))


if __name__ == "__main__":
    main()
