"""Quality of every merge on trained experts of one base: perplexity on texts nobody selected on.

    python benchmarks/merging.py --models DIR --data DIR

DIR/base-like folders: ``--base tiny-llama`` and ``--experts expert-math ...`` below ``--models``; ``DOMAIN.test.txt`` and
``DOMAIN.val.txt`` below ``--data``. Every method merges the experts with its defaults and, where it has a number to choose,
with those of ``GRID``; the setting that is best on the val texts is reported on the test texts, beside the defaults.
Figures are perplexities of the first ``--max-tokens`` tokens of each text, windows of 256, and their geometric mean.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _measure import note, save_json, table

GRID: dict[str, dict[str, list[Any]]] = {
    "task_arithmetic": {"scaling": [0.25, 0.3, 0.4, 0.5]},
    "ties": {"density": [0.2, 0.5], "scaling": [1.0, 1.5]},
    "pcb": {"ratio": [0.05, 0.1, 0.2, 0.5], "scaling": [[1.0], [1.5]]},
    "dare": {"density": [0.8], "scaling": [1.0, 1.6]},
    "della": {"scaling": [1.0, 1.1]},
    "breadcrumbs": {"density": [0.5, 0.9], "scaling": [0.3, 0.5]},
    "opcm": {"alpha": [0.2, 0.5, 0.8]},
    "magmax": {"scaling": [0.5, 0.8]},
    "iso": {"scaling": [0.5, 1.0]},
    "tsv": {"scaling": [0.5, 1.0]},
    "sce": {"select": [0.5, 1.0]},
    "ram": {"epsilon": [1e-5, 1e-3]},
}
DATA_FREE = (
    "soup", "task_arithmetic", "ties", "dare", "della", "breadcrumbs", "pcb", "opcm", "model_stock", "multislerp", "karcher",
    "sce", "ram", "magmax", "tsv", "iso",
)  # fmt: skip


def settings(method: str) -> Iterator[dict[str, Any]]:
    """The defaults, then every point of the grid."""
    yield {}
    grid = GRID.get(method, {})
    for values in itertools.product(*grid.values()):
        if grid:
            yield dict(zip(grid, values, strict=True))


def scores(folder: str, texts: list[str], max_tokens: int) -> list[float]:
    """Perplexities of a model on each text, and their geometric mean last."""
    from compress import evaluate

    report = evaluate([folder], texts, seq_len=256, max_tokens=max_tokens)
    values = [metric["value"] for metric in report["models"][0]["metrics"].values()]
    return [*values, math.exp(sum(map(math.log, values)) / len(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", default="tiny-llama")
    parser.add_argument("--experts", nargs="+", default=[f"expert-{d}" for d in ("scripture", "drama", "math", "code")])
    parser.add_argument("--domains", nargs="+", default=["scripture", "drama", "math", "code"])
    parser.add_argument("--methods", nargs="+", default=list(DATA_FREE))
    parser.add_argument("--max-tokens", type=int, default=12000)
    parser.add_argument("--val-tokens", type=int, default=4000, help="tokens of each val text to select on")
    parser.add_argument("--no-grid", action="store_true", help="defaults only")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    from merge import merge
    from weightworks.stage import catalog

    tests = [str(args.data / f"{domain}.test.txt") for domain in args.domains]
    vals = [str(args.data / f"{domain}.val.txt") for domain in args.domains]
    base, experts = str(args.models / args.base), [str(args.models / name) for name in args.experts]
    rows, result = [], {}
    for name in (base, *experts):
        found = scores(name, tests, args.max_tokens)
        result[Path(name).name] = found
        rows.append([Path(name).name, "", *(f"{value:.2f}" for value in found)])
    with tempfile.TemporaryDirectory() as place:
        for method in args.methods:
            needs = catalog.find("merge", method).load().Method.BASE == "required"
            tried = []
            for number, options in enumerate([{}] if args.no_grid else settings(method)):
                note(f"{method} {options}")
                target = f"{place}/{method}-{number}"
                merge(experts, method=method, base=base if needs else None, output_dir=target, check="files", **options)
                tried.append((options, target))
            chosen = [("defaults", tried[0])]
            if len(tried) > 1:
                best = min(tried, key=lambda one: scores(one[1], vals, args.val_tokens)[-1])
                if best is not tried[0]:
                    chosen.append((", ".join(f"{key} {value}" for key, value in best[0].items()), best))
            for label, (_, target) in chosen:
                found = scores(target, tests, args.max_tokens)
                result[f"{method}: {label}"] = found
                rows.append([method, label, *(f"{value:.2f}" for value in found)])
    table("Perplexity", ["", "setting", *args.domains, "mean"], rows)
    save_json(args.json, result)


if __name__ == "__main__":
    main()
