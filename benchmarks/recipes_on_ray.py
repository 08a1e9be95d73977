"""A recipe in this process and on local Ray clusters of 1, 2, 4 workers: the same bytes, and how long each takes.

    python benchmarks/recipes_on_ray.py

Two recipes: six stages of GPTQ that do not need one another (stages spread), and one stage of rounding a larger model of
made-up weights with a search for the clipping (its tensors spread). One thread a task, so that keys and bytes are the
same everywhere. Seconds are of the run: the cluster is there, its workers are not, and each needs some seconds to import
torch and transformers. More workers than processors can only show what they cost.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from _measure import Usage, last_json, note, run, save_json, table
from _ours import HERE, compress_command, fresh, make_checkpoint, work_folder
from recipes_killed import contents

STAGES = """version: 1
sources: {{base: {root}/examples/tiny-llama}}
stages:
  small:
    use: quantize.gptq
    from: base
    with: {{num_samples: 64, seq_len: 256}}
    matrix: {{bits: [2, 3, 4], group_size: [64, 128]}}
"""
TENSORS = """version: 1
sources: {{base: {model}}}
stages:
  small: {{use: quantize.rtn, from: base, with: {{bits: 4, clip: on}}}}
"""
CLUSTER = """
import ray, sys
ray.init(num_cpus=int(sys.argv.pop(1)), include_dashboard=False, log_to_driver=False, logging_level="ERROR")
from cli.compress_app import main
main()
"""


def timed(recipe: Path, workspace: Path, workers: int | None) -> Usage:
    """Run a recipe on a cluster of so many workers, or here."""
    words: list[str | Path] = [compress_command()]
    if workers is not None:
        words = [sys.executable, "-c", CLUSTER, str(workers)]
    words += ["run", recipe, "--workspace", workspace, "-q", "--json"]
    return run([*words, *(["--executor", "ray"] if workers is not None else [])], env={"OMP_NUM_THREADS": "1"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=4, help="of the larger model")
    parser.add_argument("--hidden", type=int, default=1024, help="of the larger model, a multiple of 256")
    parser.add_argument("--work", type=Path, help="keep checkpoints and outputs in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    results = []
    with work_folder(args.work) as work:
        model = work / "model"
        if not model.exists():
            make_checkpoint(model, layers=args.layers, hidden=args.hidden)
        for name, text in (("stages", STAGES), ("tensors", TENSORS)):
            recipe = work / f"{name}.yaml"
            recipe.write_text(text.format(root=HERE.parent, model=model.resolve()))
            expected: dict[str, str] = {}
            for workers in (None, *args.workers):
                where = "here" if workers is None else f"{workers} workers"
                note(f"{name}: {where}")
                place = fresh(work / "runs")
                usage = timed(recipe, place, workers)
                made = contents(place / name)
                expected = expected or made
                seconds = last_json(usage.stdout.replace("\n", " "))["seconds"]
                results.append(
                    {"recipe": name, "where": where, "seconds": seconds, "files": len(made), "same": made == expected}
                )
    rows = [
        [f"{row['recipe']}, {row['where']}", f"{row['seconds']:.1f}", str(row["files"]), "yes" if row["same"] else "NO"]
        for row in results
    ]
    title = f"Recipes on Ray, one thread a task, {len(os.sched_getaffinity(0))} processors"
    table(title, ["", "s", "files", "same bytes as here"], rows)
    save_json(args.json, {"processors": len(os.sched_getaffinity(0)), "runs": results})
    if not all(row["same"] for row in results):
        sys.exit("bytes differ")


if __name__ == "__main__":
    main()
