"""The commands that write a checkpoint in another container: sparse ones compactly and back, any as a GGUF file."""

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
    gguf: Annotated[
        str | None,
        typer.Option("--gguf", metavar="TYPE", help="one GGUF file: Q8_0, Q4_0, Q4_K, MXFP4, BF16 or F16"),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output-dir",
            help="default: the model's name and -sparse or -TYPE.gguf, here; --gguf takes a file too",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing output")] = False,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="discard what an earlier run has left unfinished")
    ] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="read .bin weights (--gguf)")] = False,
    json: JSON = False,
    quiet: QUIET = False,
) -> int | None:
    """Write a checkpoint for storage (`compress densify` brings the very bytes back) or as a GGUF file for llama.cpp."""
    if sparse == (gguf is not None):
        raise UsageError(
            "nothing to export to" if not sparse else "one export at a time", hint="give --sparse or --gguf TYPE"
        )
    say = (lambda line: None) if quiet else show
    if gguf is not None:
        from weightworks.store.ggufexport import export as write

        facts = write(
            model,
            gguf.upper(),
            output_dir,
            overwrite=overwrite,
            resume=not no_resume,
            allow_pickle=allow_pickle,
            say=say,
        )
        if not quiet:
            for remark in facts["remarks"]:
                show(f"note: {remark}")
            bits, error = facts["bits_a_weight"], facts["relative_error"]
            show(
                f"{facts['file']}: {size(facts['bytes_out'])}, {bits:.3g} bits a weight, relative error {error:.2g}, "
                "decoded and compared"
            )
        if json:
            emit(facts)
        return 0
    from weightworks.store.sparse import export as run

    target = output_dir or Path(f"{Path(model).resolve().name}-sparse")
    facts = run(model, target, overwrite=overwrite, resume=not no_resume, say=say)
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
