"""Kills a recipe's run at random points, again and again, each time followed by the same line until it is done.

    python benchmarks/recipes_killed.py

A recipe of five stages on examples/tiny-llama runs once undisturbed, which gives the time that a kill may fall in and the
digests of all outputs. Then, --kills times: a fresh workspace, SIGKILL to the whole process group at a random moment, the
same command again to its end. Every file must have the bytes of the undisturbed run. Twenty kills take five minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from _measure import note, save_json, table
from _ours import HERE, compress_command, fresh, work_folder

RECIPE = """version: 1
sources: {{base: {root}/examples/tiny-llama}}
stages:
  fine: {{use: quantize.rtn, from: base, with: {{bits: 8, format: dense}}}}
  small:
    use: quantize.gptq
    from: fine
    with: {{num_samples: 16, seq_len: 128}}
    matrix: {{bits: [3, 4]}}
  other: {{use: quantize.gptq, from: base, with: {{num_samples: 16, seq_len: 128}}}}
  scores:
    use: score.perplexity
    from: [base, small, other]
    with: {{texts: [{root}/weightworks/stream/builtin/verification.txt], seq_len: 128, max_tokens: 1024}}
"""


def contents(view: Path) -> dict[str, str]:
    """sha256 of every file of every output."""
    found = {}
    for stage in sorted(path for path in view.iterdir() if path.is_symlink()):
        for path in sorted(path for path in stage.rglob("*") if path.is_file()):
            found[f"{stage.name}/{path.relative_to(stage)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    rows, same = [], True
    with work_folder(None) as work:
        recipe = work / "r.yaml"
        recipe.write_text(RECIPE.format(root=HERE.parent))
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # for so small a model more are only waited for
        words = [str(compress_command()), "run", str(recipe), "-q", "--jobs", str(args.jobs), "--workspace"]
        start = time.perf_counter()
        subprocess.run([*words, str(work / "calm")], check=True, cwd=work)
        calm = time.perf_counter() - start
        expected = contents(work / "calm" / "r")
        note(f"undisturbed: {calm:.1f} s, {len(expected)} files")
        for number in range(args.kills):  # the table comes at the end, each result at once
            place = fresh(work / "killed")
            after = chance.uniform(0.5, calm)
            process = subprocess.Popen([*words, str(place)], cwd=work, start_new_session=True)
            time.sleep(after)
            alive = process.poll() is None
            if alive:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done = len(list((place / "cache").glob("*/record.json"))) if place.exists() else 0
            start = time.perf_counter()
            code = subprocess.run([*words, str(place)], check=False, cwd=work).returncode
            equal = code == 0 and contents(place / "r") == expected
            same = same and equal
            rest = time.perf_counter() - start
            rows.append(
                [
                    str(number + 1),
                    f"{after:.1f}",
                    "killed" if alive else "done",
                    str(done),
                    f"{rest:.1f}",
                    "yes" if equal else "NO",
                ]
            )
            note(" ".join(rows[-1]))
    table(f"Kills of a run of {calm:.1f} s", ["", "at s", "it was", "stages done", "rest s", "same bytes"], rows)
    save_json(args.json, {"undisturbed_seconds": calm, "rows": rows, "all_same": same})
    if not same:
        sys.exit("some runs ended in other bytes")


if __name__ == "__main__":
    main()
