"""What merges of experts of one base are worth: perplexity of every method that needs no data, with its defaults and tuned.

    python benchmarks/merging.py --models MODELS --data DATA [--methods ties dare ...] [--data-based] [--subsets] [--orders]

MODELS holds tiny-llama and expert-scripture/drama/math/code, fine-tuned from it on one domain each; DATA the texts
DOMAIN.val.txt and DOMAIN.test.txt. All four experts are merged, once with the defaults of a method and once with each setting
of its grid; the setting with the lowest mean on the val texts is scored on the test texts, beside the defaults. Methods of two
models merge each pair, those of one model each expert with the base: the best of them on the val texts is shown.
``--data-based`` adds RegMean and Fisher merging, with statistics of each expert on the val text of its domain.
``--subsets`` merges every selection of two or three experts with the defaults, ``--orders`` merges in every order
with OPCM. Figures are perplexities of the first 12,000 tokens of a text (val: 4,000) in windows of 256, and
their geometric mean over the four domains; prose, which no expert was trained on, stands beside it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _measure import note, save_json, table
from _ours import HERE, fresh, work_folder
from merge import merge
from weightworks.plan.evaluate import evaluate
from weightworks.plan.stats import run_stats
from weightworks.stage import catalog
from weightworks.stage.settings import Settings
from weightworks.stage.statistics import StatisticsOptions

BASE = "tiny-llama"
DOMAINS = ("scripture", "drama", "math", "code")
EXPERTS = tuple(f"expert-{domain}" for domain in DOMAINS)
TEST_TOKENS, VAL_TOKENS = 12_000, 4_000
WINDOW = 256  # tokens: what the models were trained on
GRID: dict[str, dict[str, list[Any]]] = {
    "task_arithmetic": {"scaling": [0.2, 0.3, 0.5, 0.6]},
    "ties": {"density": [0.2, 0.5, 1.0], "scaling": [0.7, 1.0, 1.5]},
    "dare": {"density": [0.5, 0.8], "scaling": [1.0, 1.5, 2.0]},
    "della": {"density": [0.7], "scaling": [0.7, 1.1, 1.5]},
    "breadcrumbs": {"density": [0.15, 0.5, 0.9], "scaling": [0.2, 0.4, 0.8]},
    "pcb": {"ratio": [0.1, 0.2, 0.5], "scaling": [[1.0], [1.5], [2.0]]},
    "opcm": {"alpha": [0.2, 0.5, 0.8]},
    "sce": {"select": [0.1, 0.5]},
    "ram": {"epsilon": [1e-4, 1e-3], "plus": [False, True]},
    "magmax": {"scaling": [0.3, 0.8]},
    "tsv": {"scaling": [0.5, 1.5]},
    "iso": {"scaling": [0.5, 1.5]},
    "slerp": {"t": [0.3, 0.7]},
    "nearswap": {"t": [1e-3, 1e-2]},
    "wise_ft": {"alpha": [0.3, 0.75]},
    "ema": {"mu": [0.25, 0.75]},
    "arcee_fusion": {"spread": [0.5]},
}
APART = {"passthrough", "fisher", "regmean"}  # a copy of one model; merges that want statistics of data
DATA_BASED: dict[str, tuple[str, dict[str, list[Any]]]] = {  # the statistics they want, and their grids
    "regmean": ("gram", {"off_diagonal": [0.5, 0.9, 1.0]}),
    "fisher": ("fisher", {}),
}


@dataclass(frozen=True)
class Row:
    """A model and what it is worth."""

    what: str
    setting: str
    values: list[float]  # by domain, their geometric mean, prose


class Bench:
    """Merges made in ``work`` and scored on ``data``."""

    def __init__(self, models: Path, data: Path, work: Path) -> None:
        self.models, self.data, self.work = models, data, work

    def test(self, folder: Path) -> list[float]:
        """Perplexities of the test texts by domain, their geometric mean, that of prose."""
        return [
            *self._scored(folder, "test", DOMAINS, TEST_TOKENS),
            self._scored(folder, "test", ("prose",), TEST_TOKENS)[0],
        ]

    def val(self, folder: Path) -> float:
        """The geometric mean over the val texts."""
        return self._scored(folder, "val", DOMAINS, VAL_TOKENS)[-1]

    def _scored(self, folder: Path, split: str, domains: Sequence[str], tokens: int) -> list[float]:
        texts = [str(self.data / f"{domain}.{split}.txt") for domain in domains]
        found = evaluate([str(folder)], texts, seq_len=WINDOW, max_tokens=tokens)["models"][0]
        return [*found["perplexity"].values(), found["mean"]]

    def merged(self, method: str, experts: Sequence[str], options: dict[str, Any], name: str = "out") -> Path:
        """What ``method`` makes of ``experts``."""
        note(f"{method} of {' '.join(experts)} {options or ''}")
        base = str(self.models / BASE) if based(method) else None
        models = [self.models / expert for expert in experts]
        return merge(
            models,
            method=method,
            base=base,
            output_dir=fresh(self.work / name),
            overwrite=True,
            check="files",
            **options,
        ).target

    def rows(self, method: str, grid: Sequence[dict[str, Any]]) -> Iterator[Row]:
        """The test figures of the defaults and, if another setting of ``grid`` is better on the val texts, of the best."""
        tries = list(itertools.product([{}, *grid], inputs(method)))
        values = [0.0]
        if len(tries) > 1:
            values = [self.val(self.merged(method, experts, options)) for options, experts in tries]
        by_default = min((number for number, (options, _) in enumerate(tries) if not options), key=values.__getitem__)
        best = min(range(len(tries)), key=values.__getitem__)
        for number in dict.fromkeys((by_default, best)):
            options, experts = tries[number]
            setting = ", ".join(f"{key} {told(value)}" for key, value in options.items()) or "defaults"
            if len(experts) < len(EXPERTS):
                setting = f"{' and '.join(map(short, experts))}: {setting}"
            yield Row(method, setting, self.test(self.merged(method, experts, options)))

    def with_statistics(self, method: str) -> Iterator[Row]:
        """As :meth:`rows`, of a merge that reads statistics of each expert on the val text of its domain."""
        kind, grid = DATA_BASED[method]
        files = [self._statistics(domain, kind) for domain in DOMAINS]
        tries = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        folders = {}
        for number, options in enumerate([{}, *tries]):
            folders[number] = self.merged(method, EXPERTS, {**options, "statistics": files}, f"out-{number}")
        values = [self.val(folder) for folder in folders.values()]
        best = min(folders, key=values.__getitem__)
        for number in dict.fromkeys((0, best)):
            setting = ", ".join(f"{key} {told(value)}" for key, value in tries[number - 1].items()) if number else ""
            yield Row(method, setting or "defaults", self.test(folders[number]))

    def _statistics(self, domain: str, kind: str) -> str:
        """The file of an expert's statistics, made."""
        target = self.work / f"{domain}-{kind}.safetensors"
        note(f"{kind} statistics of expert-{domain}")
        settings = Settings(dataset=str(self.data / f"{domain}.val.txt"), num_samples=128, seq_len=256, overwrite=True)
        run_stats(str(self.models / f"expert-{domain}"), StatisticsOptions(kind=kind), settings, output=target)
        return str(target)


def told(value: Any) -> str:
    """An option's value as a table shows it."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def short(expert: str) -> str:
    """``math`` for ``expert-math``."""
    return expert.removeprefix("expert-")


def based(method: str) -> bool:
    """Whether a method needs the base."""
    return catalog.find("merge", method).load().Method.BASE == "required"


def inputs(method: str) -> list[tuple[str, ...]]:
    """The selections of experts that a method merges: all, or as many as it takes."""
    most = catalog.find("merge", method).load().Method.MOST
    return [EXPERTS] if most is None else list(itertools.combinations(EXPERTS, most))


def grid_of(method: str) -> list[dict[str, Any]]:
    """Every setting that is tried beside the defaults."""
    grid = GRID.get(method, {})
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []


def subsets(bench: Bench, methods: Sequence[str]) -> list[list[str]]:
    """The mean over the domains of the merged experts, of every selection of two and three."""
    rows = []
    for count in (2, 3):
        for experts in itertools.combinations(EXPERTS, count):
            domains = [short(expert) for expert in experts]
            places = [DOMAINS.index(domain) for domain in domains]
            values = [bench.test(bench.models / BASE), *(bench.test(bench.merged(m, experts, {})) for m in methods)]
            means = [statistics.geometric_mean(found[place] for place in places) for found in values]
            rows.append([" ".join(domains), *(f"{mean:.2f}" for mean in means)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = HERE.parent.parent / "shared"
    known = sorted(entry.name for entry in catalog.methods("merge").values() if entry.name not in APART)
    parser.add_argument("--models", type=Path, default=shared / "models")
    parser.add_argument("--data", type=Path, default=shared / "data")
    parser.add_argument("--methods", nargs="*", choices=known, default=known, metavar="METHOD")
    parser.add_argument("--defaults", action="store_true", help="no grids")
    parser.add_argument("--data-based", action="store_true", help="RegMean and Fisher merging too")
    parser.add_argument("--subsets", action="store_true", help="every selection of two or three experts too")
    parser.add_argument("--orders", action="store_true", help="OPCM in every order too")
    parser.add_argument("--work", type=Path, help="keep the last output in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    kept: dict[str, Any] = {}
    with work_folder(args.work) as work:
        bench = Bench(args.models, args.data, work)
        rows = [Row(name, "", bench.test(bench.models / name)) for name in (BASE, *EXPERTS)]
        for method in args.methods:
            rows += bench.rows(method, [] if args.defaults else grid_of(method))
        for method in DATA_BASED if args.data_based else ():
            rows += bench.with_statistics(method)
        kept["methods"] = [vars(row) for row in rows]
        shown = [[row.what, row.setting, *(f"{value:.2f}" for value in row.values)] for row in rows]
        table("Perplexity on the test texts", ["", "setting", *DOMAINS, "mean", "prose"], shown)
        if args.subsets:
            several = [m for m in args.methods if catalog.find("merge", m).load().Method.MOST is None]
            kept["subsets"] = subsets(bench, several)
            table("Mean over the domains that were merged", ["", BASE, *several], kept["subsets"])
        if args.orders:
            orders = list(itertools.permutations(EXPERTS))
            means = [bench.test(bench.merged("opcm", order, {}))[len(DOMAINS)] for order in orders]
            kept["orders"] = {" ".join(map(short, order)): mean for order, mean in zip(orders, means, strict=True)}
            table("OPCM by order", ["", "mean"], [[order, f"{mean:.3f}"] for order, mean in kept["orders"].items()])
    save_json(args.json, kept)


if __name__ == "__main__":
    main()
