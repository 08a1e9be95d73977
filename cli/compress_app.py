"""The ``compress`` command. Only the command that was typed is given its options, so help stays quick."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import recipes, stages, storing
from cli.common import guarded, spell, version
from cli.params import JSON, MODEL, QUIET, command, parameters
from cli.render import emit, pairs, show, table
from cli.scores import show_scores
from cli.select import select
from cli.sparsify import sparsify, sparsify_parameters
from cli.stats import stats, stats_parameters
from weightworks.errors import UsageError
from weightworks.stage import catalog


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="folders or hub ids")],
    perplexity: Annotated[
        list[str] | None,
        typer.Option("--perplexity", metavar="TEXT", help="perplexity on a text file; may be repeated"),
    ] = None,
    divergence: Annotated[
        list[str] | None,
        typer.Option(
            "--divergence",
            metavar="TEXT",
            help="KL from the baseline and equal top tokens on a text file; may be repeated",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", metavar="A,B", help="tasks of lm-eval; the whole model is in memory")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="model the others are compared with; default: the first")
    ] = None,
    seq_len: Annotated[int, typer.Option("--seq-len", help="tokens a window; capped by the model", min=2)] = 2048,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="score only so many tokens of each text", min=2)
    ] = None,
    include_path: Annotated[
        str | None, typer.Option("--include-path", metavar="DIR", help="folder of task YAML files of your own")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", help="examples in a task's prompt; default: as the task says", min=0)
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="ask only so many questions of each task", min=1)] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="texts a forward pass in tasks, the same for all models", min=1)
    ] = 8,
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="longest input of tasks in tokens; capped by the model", min=2)
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="dtype of all models in tasks (float32|bfloat16|float16)")
    ] = "float32",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda")] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="seed of the choice of examples in prompts", min=0)] = 0,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", help="memory scores may take, such as 8GB; default: what is free")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run code that comes with the model")
    ] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="read .bin weights")] = False,
    json: JSON = False,
    quiet: QUIET = False,
) -> int | None:
    """Perplexity, divergence from the original, and tasks of lm-eval, with paired differences to a baseline."""
    if not (perplexity or divergence or tasks):
        raise UsageError("nothing to score", hint="give --perplexity TEXT, --divergence TEXT or --tasks NAMES")

    from weightworks.plan.evaluate import evaluate as run

    texts = list(perplexity or [])
    with redirect_stderr(StringIO()) if quiet else nullcontext():  # the bars of lm-eval
        report = run(
            models,
            texts,
            divergence=list(divergence or []),
            tasks=[name.strip() for words in tasks or [] for name in words.split(",") if name.strip()],
            include_path=include_path,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            max_length=max_length,
            dtype=dtype,
            baseline=baseline,
            seq_len=seq_len,
            max_tokens=max_tokens,
            device=device,
            seed=seed,
            max_memory=max_memory,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            say=(lambda line: None) if quiet else show,
        )
    if not quiet:
        show_scores(report, texts)
    if json:
        emit(report)
    return 0


def inspect(
    model: MODEL,
    tensors: Annotated[bool, typer.Option("--tensors", help="every tensor, not only groups")] = False,
    sparsity: Annotated[bool, typer.Option("--sparsity", help="read all weights and count zeros")] = False,
    lineage: Annotated[bool, typer.Option("--lineage", help="only the stages it came through, to the source")] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="read .bin weights")] = False,
    json: JSON = False,
) -> int | None:
    """What a checkpoint holds: tensors, dtypes, bits, sparsity, size, and the stages it came through."""
    from weightworks.store.inspection import inspect as run

    if lineage:
        recipes.show_lineage(Path(model), json=json)
        return 0
    facts = run(model, sparsity=sparsity, allow_pickle=allow_pickle)
    if json:
        emit(facts)
        return 0
    pairs(
        {
            key: facts[key]
            for key in (
                "model",
                "adapters",
                "remarks",
                "architecture",
                "parameters",
                "bytes",
                "bits_a_parameter",
                "format",
                "files",
            )
            if facts.get(key)
        }
    )
    head = ["tensors", "count", "shape", "stored as", "bits", "bytes", *(["zeros"] if sparsity else [])]
    rows = facts["tensors"] if tensors else facts["groups"]
    table(
        head,
        [
            [row[key] for key in ("name", "count", "shape", "stored", "bits", "bytes")]
            + ([f"{row['zeros']:.2%}"] if sparsity else [])
            for row in rows
        ],
    )
    for stage in facts["lineage"]:
        show(f"  made by {stage['method']} {stage['options']} from {stage['source']}")
    return 0


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="a checkpoint")],
    b: Annotated[str, typer.Argument(metavar="B", help="another")],
    all_: Annotated[bool, typer.Option("--all", help="list equal tensors too")] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="read .bin weights")] = False,
    json: JSON = False,
) -> int | None:
    """Compare two checkpoints tensor by tensor, packed weights decoded, a few rows in memory at a time."""
    from weightworks.store.comparison import compare

    report = compare(a, b, allow_pickle=allow_pickle)
    if json:
        emit(report)
        return 0
    rows = [row for row in report["tensors"] if all_ or row["state"] != "equal"]
    if rows:
        table(
            ["tensor", "state", "max |d|", "mean |d|", "relative", "cosine"],
            [
                [row["name"], row["state"], *(row.get(key, "") for key in ("max", "mean", "relative", "cosine"))]
                for row in rows
            ],
        )
    show(", ".join(f"{count} {state}" for state, count in report["counts"].items()))
    return 0


def verify(
    model: MODEL,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run code that comes with the model")
    ] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="read .bin weights")] = False,
    json: JSON = False,
    quiet: QUIET = False,
) -> int | None:
    """The checks of "done" again, on any folder: files, values, a load by stock transformers, equal perplexity."""
    from weightworks.plan.verify import verify as run

    checks = run(model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    if not quiet:
        for check in checks:
            show(f"  {'ok' if check['ok'] else 'FAILED':<6}  {check['check']}: {check['seen']}")
    if json:
        emit({"model": model, "ok": all(check["ok"] for check in checks), "checks": checks})
    return 0 if all(check["ok"] for check in checks) else 4


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="a method")] = None, json: JSON = False
) -> int | None:
    """Every method, its paper and its options."""
    from cli.describe import tell

    tell(name, json=json)
    return 0


COMMANDS: dict[str, Callable[..., int | None]] = {
    "quantize": stages.quantize, "prune": stages.prune, "recover": stages.recover, "select": select, "evaluate": evaluate,
    "inspect": inspect, "diff": diff, "verify": verify, "export": storing.export, "densify": storing.densify, "stats": stats,
    "sparsify": sparsify,
    "methods": methods, "run": recipes.run, "explain": recipes.explain, "schema": recipes.schema, "recipe": recipes.recipe,
    "cache": recipes.cache,
}  # fmt: skip


OPTIONED = {*catalog.SHELVES, "stats", "sparsify"}  # commands whose options are declared by option classes


def build(typed: str | None) -> typer.Typer:
    """The application; only the command ``typed`` gets the options of its methods."""
    app = typer.Typer(
        name="compress",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        help="Make checkpoints smaller and chain the steps: verified, resumable, larger than memory.",
    )

    @app.callback()
    def root(
        show_version: Annotated[
            bool, typer.Option("--version", callback=version, is_eager=True, help="print the version and leave")
        ] = False,
    ) -> None:
        pass

    for name, function in COMMANDS.items():
        extra = stage_parameters(name) if name == typed and name in OPTIONED else []
        app.command(name)(command(function, extra, guarded(function)))
    return app


def stage_parameters(kind: str) -> list[Any]:
    """Options of all methods of a kind (or of stats or sparsify), and those common to every run."""
    from weightworks.stage.settings import Settings

    if kind == "stats":
        return stats_parameters()
    if kind == "sparsify":
        return sparsify_parameters()
    classes = {entry.name: entry.load().Options for entry in catalog.methods(kind).values()}
    return [*parameters(classes, "Method"), *parameters({"": Settings}, "Run")]


def main() -> None:
    """Entry point of ``compress``."""
    sys.argv[1:] = spell(sys.argv[1:])
    typed = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    build(typed)()
