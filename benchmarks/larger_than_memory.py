"""Quantizes a checkpoint several times larger than the memory the process may have, or merges several.

    sudo python benchmarks/larger_than_memory.py --limit 1GiB --times 4
    python benchmarks/larger_than_memory.py --times 4 -- --max-memory 1GiB     what follows -- goes to compress quantize
    sudo python benchmarks/larger_than_memory.py --merge ties --models 8 --limit 512MiB --times 10     a base and 8 models

As root the limit is that of a control group of its own (version 2: memory.max without swap; version 1:
memory.limit_in_bytes): it covers page cache and children, and the kernel kills what goes beyond. Otherwise it is
RLIMIT_DATA, which bounds the heap and private mappings of each process, whether touched or not, and leaves page cache
out. The output says which. The checkpoint has Llama-3.2-1B's proportions at --hidden, and as many layers as it takes.
It is made before the limit holds.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from _measure import Usage, folder_bytes, note, parse_bytes, run, save_json, table
from _ours import Settings, Windows, fresh, make_checkpoint, quantize_command, work_folder
from weightworks.stage import catalog

CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Fence:
    """How the limit is set: a shell prefix that enters it, and what can be read of it afterwards."""

    kind: str
    prefix: str
    peak: Callable[[], int | None]
    watch: Callable[[int], None] | None = None


@contextmanager
def cgroup(limit: int) -> Iterator[Fence]:
    """A cgroup v2 with ``memory.max``; raises OSError where there is none to be had."""
    if "memory" not in (CGROUPS / "cgroup.controllers").read_text().split():
        raise OSError("cgroup v2 without the memory controller")
    group = CGROUPS / f"larger-than-memory-{os.getpid()}"
    if "memory" not in (CGROUPS / "cgroup.subtree_control").read_text().split():
        (CGROUPS / "cgroup.subtree_control").write_text("+memory")
    group.mkdir()
    try:
        (group / "memory.max").write_text(str(limit))
        with suppress(FileNotFoundError):  # a kernel without swap accounting
            (group / "memory.swap.max").write_text("0")
        peak = group / "memory.peak"  # since Linux 5.19
        yield Fence(
            kind="cgroup v2 memory.max, no swap",
            prefix=f"echo $$ > {group}/cgroup.procs",
            peak=lambda: int(peak.read_text()) if peak.exists() else None,
        )
    finally:
        group.rmdir()


@contextmanager
def cgroup_v1(limit: int) -> Iterator[Fence]:
    """A cgroup v1 with ``memory.limit_in_bytes``; raises OSError where there is none to be had."""
    group = CGROUPS / "memory" / f"larger-than-memory-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield Fence(
            kind="cgroup v1 memory.limit_in_bytes",
            prefix=f"echo $$ > {group}/cgroup.procs",
            peak=lambda: int((group / "memory.max_usage_in_bytes").read_text()),
        )
    finally:
        group.rmdir()


@contextmanager
def data_limit(limit: int) -> Iterator[Fence]:
    """RLIMIT_DATA; the kernel keeps no peak of it, so the process is sampled."""
    peaks = [0]

    def sample(pid: int) -> None:
        status = Path(f"/proc/{pid}/status")
        with suppress(OSError, ProcessLookupError):  # it has ended
            while True:
                found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmData")]
                if not found:  # a zombie has no memory
                    return
                peaks[0] = max(peaks[0], int(found[0]) * 1024)
                time.sleep(0.02)

    yield Fence(
        kind="RLIMIT_DATA (a process's heap and private mappings)",
        prefix=f"ulimit -d {limit // 1024}",
        peak=lambda: peaks[0],
        watch=lambda pid: threading.Thread(target=sample, args=(pid,), daemon=True).start(),
    )


@contextmanager
def fence(limit: int) -> Iterator[Fence]:
    """The cgroup if there is one to be had, else RLIMIT_DATA."""
    with ExitStack() as stack:
        for kind in (cgroup, cgroup_v1, data_limit):
            try:
                made = stack.enter_context(kind(limit))
                break
            except OSError as error:
                note(f"no {kind.__name__} ({error})")
        yield made


def layers_for(wanted: int, hidden: int) -> int:
    """Layers until the checkpoint has ``wanted`` bytes; a layer has 14.5 hidden^2 weights."""
    embedding, layer = 2 * 32000 * hidden, 2 * 14.5 * hidden**2  # bytes in bf16, in make_checkpoint's proportions
    return max(1, math.ceil((wanted - embedding) / layer))


def merge_command(method: str, folders: list[Path], out: Path, extra: list[str]) -> list[str | Path]:
    """Merge ``folders``; the first is the base, or a model like the others where there is none."""
    base, *models = folders
    based = catalog.find("merge", method).load().Method.BASE == "required"
    inputs: list[str | Path] = [*models, "--base", base] if based else [*folders]
    program = "from cli.program import merge; merge()"
    return [sys.executable, "-c", program, method.replace("_", "-"), *inputs, "-o", out, "-q", *extra]


def run_inside(limit: int, command: list[str | Path]) -> tuple[Usage, str, int | None]:
    """Run ``command`` under ``limit``: what it cost, the kind of limit, the peak that counts against it."""
    with fence(limit) as made:
        # The shell enters the limit, then becomes the command, so nothing runs outside.
        words = ["sh", "-c", f'{made.prefix} && exec "$@"', "sh", *command]
        usage = run(words, check=False, watch=made.watch)
        return usage, made.kind, made.peak()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=parse_bytes, default=parse_bytes("1GiB"), metavar="SIZE")
    parser.add_argument("--times", type=float, default=4, help="size of the checkpoint in limits (default 4)")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--merge", metavar="METHOD", help="merge models by this method; --times is of all together")
    parser.add_argument("--models", type=int, default=8, help="merge: how many, beside a base (default 8)")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--work", type=Path, help="keep checkpoint and output in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("extra", nargs="*", help="after --: more options for compress quantize, or merge")
    args = parser.parse_args()
    count = args.models + 1 if args.merge else 1
    layers = layers_for(int(args.limit * args.times / count), args.hidden)
    with work_folder(args.work) as work:
        models, out = [work / f"model-{layers}x{args.hidden}-{number}" for number in range(count)], fresh(work / "out")
        for number, model in enumerate(models):
            if not model.exists():
                make_checkpoint(model, layers=layers, hidden=args.hidden, extra=["--seed", str(number)])
        size = sum(map(folder_bytes, models))
        if args.merge:
            command = merge_command(args.merge, models, out, args.extra)
        else:
            settings = Settings(args.method, args.bits, args.group_size)
            windows = Windows("builtin", args.num_samples, args.seq_len)
            command = quantize_command(models[0], out, settings, windows, extra=args.extra)
        note(f"{size / 2**30:.2f} GiB under {args.limit / 2**30:.2f} GiB")
        usage, kind, peak = run_inside(args.limit, command)
        made = folder_bytes(out) if out.is_dir() else 0
    done = usage.exit_code == 0 and made > 0
    result = "done" if done else f"failed, exit code {usage.exit_code}" + (" (killed)" if usage.exit_code == -9 else "")
    sizes = {
        "limit": args.limit,
        "inputs": size,
        "peak against the limit": peak,
        "peak resident": usage.peak_bytes,
        "output": made,
    }
    rows = [
        *([name, f"{n / 2**30:.2f} GiB", f"{n / args.limit:.2f}"] for name, n in sizes.items() if n is not None),
        ["CPU s", f"{usage.cpu_seconds:.0f}", ""],
        ["wall s", f"{usage.wall_seconds:.0f}", ""],
        ["result", result, ""],
    ]
    what = f"{args.merge} of {count - 1} and a base" if args.merge else args.method
    table(f"{what}, {layers} layers of hidden {args.hidden}, limit by {kind}", ["", "", "of limit"], rows)
    figures = {"limit_kind": kind, "limit_bytes": args.limit, "checkpoint_bytes": size, "limit_peak_bytes": peak}
    save_json(args.json, {**figures, "output_bytes": made, "layers": layers, "result": result, **usage.figures()})
    if not done:
        sys.exit("\n".join(usage.stderr.strip().splitlines()[-15:]))


if __name__ == "__main__":
    main()
