"""The commands that store a sparse checkpoint compactly, and bring it back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.render import emit, show, size
from weightworks.errors import UsageError

JSON = Annotated[bool, typer.Option("--json", help="the report as one JSON object on stdout")]
QUIET = Annotated[bool, typer.Option("-q", "--quiet", help="errors only")]


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a local folder, or org/name[@revision] on the hub")],
    sparse: Annotated[
        bool, typer.Option("--sparse", help="zeros as bits: a bitmask and the values that are kept")
    ] = False,
    output_dir: Annotated[
        Path | None, typer.Option("-o", "--output-dir", help="default: the model's name and -sparse, here")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing output folder")] = False,
    json: JSON = False,
    quiet: QUIET = False,
) -> int | None:
    """Write a checkpoint for storage; `compress densify` brings the very bytes back. Loaders do not read it."""
    if not sparse:
        raise UsageError("nothing to export to", hint="give --sparse")
    from weightworks.store.sparse import export as run

    target = output_dir or Path(f"{Path(model).resolve().name}-sparse")
    facts = run(model, target, overwrite=overwrite, say=(lambda line: None) if quiet else show)
    if not quiet:
        share = facts["bytes_out"] / facts["bytes_in"]
        show(
            f"{target}: {size(facts['bytes_out'])}, was {size(facts['bytes_in'])} ({share:.3f}x), decoded and compared"
        )
    if json:
        emit({"target": str(target), **facts})
    return 0


def densify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a folder that `compress export --sparse` wrote")],
    output_dir: Annotated[
        Path | None, typer.Option("-o", "--output-dir", help="default: the folder's name and -dense, here")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing output folder")] = False,
    json: JSON = False,
    quiet: QUIET = False,
) -> int | None:
    """Bring an exported checkpoint back, byte for byte."""
    from weightworks.store.sparse import densify as run

    target = output_dir or Path(f"{Path(model).resolve().name.removesuffix('-sparse')}-dense")
    facts = run(model, target, overwrite=overwrite, say=(lambda line: None) if quiet else show)
    if not quiet:
        show(f"{target}: {len(facts['files'])} files restored, each with the digest it had")
    if json:
        emit({"target": str(target), "files": facts["files"]})
    return 0
