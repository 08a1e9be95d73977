"""The commands about recipes: run, explain, schema, recipe, cache."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.render import duration, emit, show, size, table
from weightworks.errors import UsageError, nearest

RECIPE = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe file, such as recipes/quantize-4bit.yaml")]
WORKSPACE = Annotated[
    str, typer.Option("--workspace", help="where outputs are kept: a folder, or a URL such as s3://bucket/runs")
]
SETS = Annotated[
    list[str] | None, typer.Option("--set", metavar="STAGE.OPTION=VALUE", help="change the recipe, or vars.NAME=VALUE")
]
ONLY = Annotated[list[str] | None, typer.Option("--only", metavar="STAGE", help="only this stage and what it needs")]
MEMORY = Annotated[str | None, typer.Option("--max-memory", help="memory all stages together may take, such as 8GB")]
JSON = Annotated[bool, typer.Option("--json", help="the report as one JSON object on stdout")]
QUIET = Annotated[bool, typer.Option("-q", "--quiet", help="errors only")]
RUNS = "runs"
PRELOAD = ("weightworks.engine.preload", "weightworks.plan.stage")  # what worker processes have loaded from the start
DAY = 86400.0


def run(
    recipe: RECIPE,
    workspace: WORKSPACE = RUNS,
    set_: SETS = None,
    only: ONLY = None,
    jobs: Annotated[int, typer.Option("--jobs", help="independent stages at once", min=1)] = 1,
    executor: Annotated[str, typer.Option("--executor", help="local or ray")] = "local",
    address: Annotated[
        str | None, typer.Option("--ray-address", help="of a running cluster; default: a local one")
    ] = None,
    max_memory: MEMORY = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="as compress explain: say what would run")] = False,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="continue unfinished stages")] = True,
    strict: Annotated[bool, typer.Option("--strict", help="exit 3 if any stage needed a fallback")] = False,
    json: JSON = False,
    quiet: QUIET = False,
) -> int | None:
    """Run a recipe: what is cached and intact is found, the rest is made; ends with a report page."""
    if executor not in ("local", "ray"):
        raise UsageError(f"--executor {executor}: unknown executor ({nearest(executor, ('local', 'ray'))})")
    plan = make_plan(recipe, workspace, set_, only)
    if dry_run:
        return tell(plan, max_memory, json=json)
    started = time.monotonic()
    code = execute(plan, jobs, executor, address, max_memory, resume=resume, quiet=quiet)
    from weightworks.plan.account import account
    from weightworks.report.page import report_table

    report = account(plan, time.monotonic() - started)
    page = publish(plan, report)
    if not quiet:
        table(*report_table(report))
        show(f"report: {page}")
    if json:
        emit(report)
    if code == 0 and strict and any(stage.get("fallbacks") for stage in report["stages"]):
        show("error: done, but some stages needed fallbacks; they are in the report")
        return 3
    return code


def publish(plan: Any, report: dict[str, Any]) -> Path:
    """Write ``report.json`` and the page, unless they tell of the run that made these very outputs; returns the page."""
    page: Path = plan.workspace.view / "report.html"
    facts = page.with_name("report.json")
    ran = any(step.state != "cached" for step in plan.steps.values())
    if not ran and page.is_file() and made_of(facts) == told(report):
        return page
    from weightworks.report.page import report_page

    plan.workspace.make(page.parent)
    page.write_text(report_page(report), encoding="utf-8")
    facts.write_text(jsonlib.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if plan.workspace.remote is not None:
        for path in (page, facts):
            plan.workspace.remote.publish(path, f"{page.parent.name}/{path.name}")
    return page


def made_of(facts: Path) -> Any:
    """What a ``report.json`` tells of, None if it cannot be read."""
    try:
        return told(jsonlib.loads(facts.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def told(report: dict[str, Any]) -> Any:
    """What a report tells of: the recipe as written, and its outputs."""
    return report["recipe"], [stage["key"] for stage in report["stages"]]


def explain(
    recipe: RECIPE,
    workspace: WORKSPACE = RUNS,
    set_: SETS = None,
    only: ONLY = None,
    max_memory: MEMORY = None,
    json: JSON = False,
) -> int | None:
    """What would run and why, what is cached; time, peak memory, disk and output size of what would run."""
    return tell(make_plan(recipe, workspace, set_, only), max_memory, json=json)


def open_workspace(place: str, recipe: str = "recipe") -> Any:
    """The workspace at a folder or a URL."""
    from weightworks.plan.remote import Remote
    from weightworks.plan.workspace import Workspace
    from weightworks.store.sources import Digests, cache_folder

    remote = Remote(place) if "://" in place else None
    root = remote.mirror if remote is not None else Path(place)
    return Workspace(root, Digests(cache_folder() / "digests.json"), recipe, remote)


def make_plan(recipe: Path, workspace: str, sets: list[str] | None, only: list[str] | None) -> Any:
    """The plan of a recipe file as the options change it."""
    from weightworks.plan.recipe import load_recipe
    from weightworks.plan.run import Plan

    loaded = load_recipe(recipe, sets or [])
    if only:
        loaded = loaded.only(only)
    return Plan(loaded, open_workspace(workspace, loaded.name))


def execute(
    plan: Any, jobs: int, executor: str, address: str | None, max_memory: str | None, *, resume: bool, quiet: bool
) -> int:
    """Run what a plan has to run; returns the exit code."""
    from weightworks.engine.executor import Here, Processes
    from weightworks.plan.run import Runner
    from weightworks.report.progress import Progress

    progress = Progress(quiet=quiet)
    settings = {"resume": resume, **({"max_memory": max_memory} if max_memory else {})}
    chosen: Any
    if executor == "ray" and plan.to_run:
        from weightworks.engine.ray_executor import OnRay

        chosen = OnRay(address)
    else:
        chosen = Processes(jobs, preload=PRELOAD) if jobs > 1 and plan.to_run else Here()
    if chosen.slots != 1:
        from weightworks.engine.machine import speeds

        speeds()  # measured before workers could come to different figures, and so to different types
    return Runner(plan, chosen, progress, run=settings, limit=memory_limit(max_memory, plan)).run()


def memory_limit(max_memory: str | None, plan: Any) -> int:
    """Bytes that all stages together may take."""
    from weightworks.stage.settings import Settings

    limit = Settings.parse({"max_memory": max_memory}, where="compress run").memory_limit
    if limit is not None or not plan.to_run:
        return limit or 0
    from weightworks.engine.machine import free_memory

    return free_memory()


def tell(plan: Any, max_memory: str | None, *, json: bool) -> int:
    """What a plan will do."""
    plan.estimate({"max_memory": max_memory} if max_memory else {})
    steps = list(plan.steps.values())
    rows = []
    for step in steps:
        costs = step.costs
        row = [step.stage.name, step.stage.label, "cached" if step.state == "cached" else "run", step.reason]
        row += (
            [f"{duration(costs['seconds'])}", size(costs["peak_bytes"]), size(costs["disk_bytes"])]
            if costs
            else [""] * 3
        )
        rows.append([*row, size(costs["output_bytes"]) if costs else ""])
    table(["stage", "method", "state", "reason", "time", "peak memory", "disk", "output"], rows)
    todo = [step.costs for step in plan.to_run if step.costs]
    total = sum(costs["seconds"] for costs in todo)
    disk = sum(costs["output_bytes"] for costs in todo) + max(
        (c["disk_bytes"] - c["output_bytes"] for c in todo), default=0
    )
    show(
        f"{len(plan.to_run)} of {len(steps)} stages to run"
        + (
            f": about {duration(total)} one after the other, {size(disk)} of disk; scores are not estimated"
            if todo
            else ""
        )
    )
    if json:
        facts = [
            {
                "stage": step.stage.name,
                "method": step.stage.label,
                "state": step.state,
                "reason": step.reason,
                "key": step.key.digest,
                "estimate": dict(step.costs),
            }
            for step in steps
        ]
        emit({"recipe": plan.recipe.path, "workspace": str(plan.workspace.root), "stages": facts})
    return 0


def schema() -> int | None:
    """The JSON Schema of recipes on stdout, for editors and checkers."""
    from weightworks.plan.schema import schema as make

    emit(make())
    return 0


def show_lineage(root: Path, *, json: bool) -> None:
    """The stages behind an output, as a tree down to the sources."""
    from weightworks.plan.lineage import lineage

    found = lineage(root)
    for line in lineage_lines(found, list(found.stages)[-1]):
        show(line)
    if json:
        stages = [{"name": name, **stage} for name, stage in found.stages.items()]
        emit({"model": str(root), "sources": found.sources, "lineage": stages})


def lineage_lines(found: Any, name: str, role: str = "", indent: str = "") -> Iterator[str]:
    """A stage or source, and below it what it was made of."""
    from weightworks.plan.lineage import changed, values

    label = f"{role}: " if role else ""
    if name in found.sources:
        source = found.sources[name]
        yield f"{indent}{label}{source['model']}  (digest {source['digest'][:16]})"
        return
    stage = found.stages[name]
    given = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values(stage).items())
    yield f"{indent}{label}{name}  {stage['identity']['method']}: {given}"
    yield f"{indent}   stage {stage['stage'][:16]}, torch {stage['identity']['environment']['torch']}"
    yield from (f"{indent}   here it may differ: {text}" for text in changed(stage["identity"]))
    for kind, names in stage["from"].items():
        for one in names:
            yield from lineage_lines(found, one, "" if kind in ("model", "models") else kind, indent + "   ")


def recipe(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="an output folder")],
) -> int | None:
    """The recipe that makes an output again, on stdout."""
    from weightworks.plan.lineage import rebuild

    sys.stdout.write(rebuild(output))
    return 0


def cache(
    action: Annotated[
        str, typer.Argument(metavar="ls|rm|gc", help="list, remove some, remove what no recipe uses now")
    ],
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY...]", help="rm: keys, or beginnings of them")
    ] = None,
    workspace: WORKSPACE = RUNS,
    older_than: Annotated[
        float, typer.Option("--older-than", metavar="DAYS", help="gc: unused for so long", min=0)
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be removed")] = False,
    json: JSON = False,
) -> int | None:
    """What a workspace keeps, and ways to keep less of it."""
    place = open_workspace(workspace)
    entries = place.entries()
    now = time.time()
    if action == "ls":
        rows = [
            [
                entry["key"][:12],
                entry["stage"],
                entry["method"],
                size(entry["bytes"]),
                entry["state"],
                f"{(now - entry['used']) / DAY:.1f}",
            ]
            for entry in entries
        ]
        table(["key", "stage", "method", "size", "state", "days unused"], rows)
        show(f"{len(entries)} entries, {size(sum(entry['bytes'] for entry in entries))} in {place.cache}")
        if json:
            emit({"entries": entries})
        return 0
    if action == "rm":
        chosen = [entry for entry in entries if any(entry["key"].startswith(key) for key in keys or [])]
        for key in keys or []:
            if not any(entry["key"].startswith(key) for entry in entries):
                raise UsageError(f"cache rm: no entry {key}", hint="see: compress cache ls")
        if not keys:
            raise UsageError("cache rm: which? give keys, or beginnings of them", hint="see: compress cache ls")
    elif action == "gc":
        removable = [entry for entry in entries if entry["state"] in ("old", "unfinished")]
        chosen = [entry for entry in removable if now - entry["used"] >= older_than * DAY]
    else:
        raise UsageError(f"cache {action}: unknown action ({nearest(action, ('ls', 'rm', 'gc'))})")
    for entry in chosen:
        if not dry_run:
            place.remove(entry["key"])
        show(
            f"{'would remove' if dry_run else 'removed'} {entry['key'][:12]} {entry['stage']} ({size(entry['bytes'])})"
        )
    show(f"{size(sum(entry['bytes'] for entry in chosen))} in {len(chosen)} entries")
    if json:
        emit({"removed": [] if dry_run else chosen})
    return 0
