"""Soups chosen and learned on held-out text, and alignment: what each is worth on text that had no part in it.

    python benchmarks/soups.py --models MODELS --data DATA [--only same experts align] [--learned block tensor]

MODELS holds tiny-llama, soup-code-a/b/c (fine-tuned from it on one task) and expert-math/code/drama/scripture (one each);
DATA the texts DOMAIN.val.txt and DOMAIN.test.txt. ``same``: the fine-tunes of one task, chosen on code.val.txt. ``experts``:
the experts, chosen on the beginnings of all four val texts. ``align``: an expert with its units in a random order is
averaged with another, as it is and with --align; and all experts with --align, whose units have not moved. Perplexities
are those of `compress evaluate`: of the first 12,000 tokens of a test text, of several texts the geometric mean.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from _measure import note, save_json, table
from _ours import HERE, fresh, work_folder
from merge import merge
from weightworks.plan.evaluate import evaluate
from weightworks.store.checkpoint import Checkpoint
from weightworks.store.dense import DenseView
from weightworks.store.permuted import PermutedView
from weightworks.stream.symmetry import find_symmetry, random_order

SAME = ("soup-code-a", "soup-code-b", "soup-code-c")
DOMAINS = ("scripture", "drama", "math", "code")
EXPERTS = tuple(f"expert-{domain}" for domain in DOMAINS)
TOKENS = 12_000
PART = 20_000  # characters of each val text that the experts are chosen by


class Bench:
    """Merges made in ``work`` and scored on ``data``."""

    def __init__(self, models: Path, data: Path, work: Path) -> None:
        self.models, self.data, self.work = models, data, work

    def score(self, model: Path, domains: Sequence[str]) -> list[float]:
        """Perplexities of the test texts, and their geometric mean last where there are several."""
        texts = [str(self.data / f"{domain}.test.txt") for domain in domains]
        found = evaluate([str(model)], texts, max_tokens=TOKENS)["models"][0]
        return [*found["perplexity"].values(), *([found["mean"]] if len(domains) > 1 else [])]

    def make(self, inputs: Sequence[Path], **options: Any) -> tuple[Path, dict[str, Any]]:
        """A soup, and its provenance."""
        outcome = merge(inputs, output_dir=fresh(self.work / "out"), overwrite=True, check="files", **options)
        assert outcome.provenance is not None
        return outcome.target, outcome.provenance

    def soups(self, names: Sequence[str], domains: Sequence[str], val: Path, learned: Sequence[str]) -> list[Any]:
        """Candidates, their plain average, and what the held-out text makes of them: (what, figures, on val)."""
        inputs = [self.models / name for name in names]
        note("greedy")
        folder, provenance = self.make(inputs, greedy=True, score=str(val))
        chosen = provenance["selection"]
        tried = chosen["candidates"]
        rows: list[Any] = [(path.name, self.score(path, domains), tried[str(path)]) for path in inputs]
        members = " + ".join(Path(member).name for member in chosen["members"])
        greedy = (f"greedy soup: {members}", self.score(folder, domains), chosen["perplexity"])
        folder, _ = self.make(inputs)
        uniform: Any = ["plain average", self.score(folder, domains), None]
        rows += [uniform, greedy]
        for per in learned:
            note(f"learned by {per}")
            folder, provenance = self.make(inputs, learned=per, score=str(val))
            uniform[2] = provenance["selection"]["uniform"]
            rows.append(
                (f"learned soup, weights by {per}", self.score(folder, domains), provenance["selection"]["perplexity"])
            )
        return rows

    def alignment(self) -> tuple[list[Any], list[Any]]:
        """Averages with a model whose units were moved, and what aligning finds in models whose units were not."""
        math, code = self.models / "expert-math", self.models / "expert-code"
        moved = fresh(self.work / "moved")
        move(code, moved)
        rows: list[Any] = [
            (one, self.score(folder, ["math", "code"]))
            for one, folder in (("expert-math", math), ("expert-code", code))
        ]
        rows.append(("expert-code, units moved", self.score(moved, ["math", "code"])))
        for what, inputs, options in (
            ("average of both", [math, code], {}),
            ("average of both, renormalised", [math, code], {"renormalise": "builtin"}),
            ("average of math and the moved one", [math, moved], {}),
            ("the same, renormalised", [math, moved], {"renormalise": "builtin"}),
            ("the same, aligned and renormalised", [math, moved], {"align": True, "renormalise": "builtin"}),
            ("the same, aligned", [math, moved], {"align": True}),
        ):
            note(what)
            folder, provenance = self.make(inputs, **options)
            rows.append((what, self.score(folder, ["math", "code"])))
        gains = [row["gain"] for row in provenance["alignment"]["models"][str(moved)]]
        found = [
            ("expert-code moved, to expert-math", len([gain for gain in gains if gain >= 1e-3]), len(gains), max(gains))
        ]
        note("all experts, aligned")
        _, provenance = self.make([self.models / name for name in EXPERTS], base=self.models / "tiny-llama", align=True)
        for name, parts in provenance["alignment"]["models"].items():
            gains = [row["gain"] for row in parts]
            found.append(
                (
                    f"{Path(name).name}, to its base",
                    len([gain for gain in gains if gain >= 1e-3]),
                    len(gains),
                    max(gains),
                )
            )
        return rows, found


def move(source: Path, target: Path) -> None:
    """A copy of a model with its units and heads in random orders: it computes the same."""
    checkpoint = Checkpoint.open(source)
    generator = torch.Generator().manual_seed(0)
    orders: dict[str, tuple[int, torch.Tensor]] = {}
    for family in find_symmetry(DenseView(checkpoint), checkpoint).families:
        orders |= family.orders(random_order(family.shape, generator), checkpoint)
    view = PermutedView(checkpoint, orders)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {name: view.read(name).contiguous() for name in checkpoint.tensors}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def figures(row: Any) -> list[str]:
    """A row of a table."""
    what, values, *val = row
    return [what, *(f"{value:.3f}" for value in values), *("" if value is None else f"{value:.3f}" for value in val)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = HERE.parent.parent / "shared"
    parser.add_argument("--models", type=Path, default=shared / "models")
    parser.add_argument("--data", type=Path, default=shared / "data")
    parser.add_argument("--only", nargs="+", choices=["same", "experts", "align"], default=["same", "experts", "align"])
    parser.add_argument(
        "--learned", nargs="+", choices=["model", "block", "tensor"], default=["model", "block", "tensor"]
    )
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    kept: dict[str, Any] = {}
    with work_folder(args.work) as work:
        bench = Bench(args.models, args.data, work)
        if "same" in args.only:
            kept["same"] = bench.soups(SAME, ["code"], args.data / "code.val.txt", args.learned)
            table("Fine-tunes of one task", ["", "code.test", "code.val"], list(map(figures, kept["same"])))
        if "experts" in args.only:
            val = work / "mixed.val.txt"
            val.write_text(
                "\n".join((args.data / f"{name}.val.txt").read_text(encoding="utf-8")[:PART] for name in DOMAINS)
            )
            base = ("tiny-llama", bench.score(args.models / "tiny-llama", DOMAINS), None)
            kept["experts"] = [base, *bench.soups(EXPERTS, DOMAINS, val, args.learned)]
            table("Experts", ["", *DOMAINS, "mean", "mixed val"], list(map(figures, kept["experts"])))
        if "align" in args.only:
            kept["align"], kept["found"] = bench.alignment()
            table("An expert with its units moved", ["", "math", "code", "mean"], list(map(figures, kept["align"])))
            found = [[what, f"{moved} of {parts}", f"{gain:.2e}"] for what, moved, parts, gain in kept["found"]]
            table("What aligning found", ["", "parts moved", "largest gain of cosine"], found)
    save_json(args.json, kept)


if __name__ == "__main__":
    main()
