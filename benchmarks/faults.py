"""Every command that writes, and the shipped recipes, under faults: killed, full disks, little memory, interrupted and the like.

    python benchmarks/faults.py [--kills 200] [--only killed,full] [--commands quantize,merge]

On a small model of random weights. Each command runs once undisturbed, for its time and its bytes. Then, for each fault:
the target must be absent or whole, the message must be a sentence, and the same command again, undisturbed, must end with the
same bytes. Commands run in warm processes (those of the tests), so that a run takes a second. Full and read-only disks are
small tmpfs and want the right to mount; without it they are left out, and that is said.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from _measure import note, save_json, table
from _ours import HERE, fresh, work_folder

TESTS = HERE.parent / "tests"
sys.path[:0] = [str(HERE.parent), str(TESTS)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from commands import Commands, Run  # noqa: E402

TEXT = str(HERE.parent / "weightworks" / "stream" / "builtin" / "calibration.txt")
FEW = ("--dataset", TEXT, "--num-samples", "8", "--seq-len", "64")
RECIPES = (
    "quantize-4bit",
    "bits-by-method",
    "merge-experts",
    "sparse-soup",
    "merge-continually",
    "prune-quantize-merge",
)
ON_DISK = ["small_disk", 1 << 40]  # the estimate believes that there is room


@dataclass(frozen=True)
class Command:
    """A command line that writes ``target``; ``{work}`` stands for the folder of the inputs."""

    name: str
    words: tuple[str, ...]
    target: str = "out"
    program: str = "compress"


COMMANDS = [
    Command("quantize gptq", ("quantize", "{work}/model", *FEW, "--bits", "4", "--group-size", "32", "-o", "out")),
    Command("quantize rtn", ("quantize", "{work}/model", "--method", "rtn", "--group-size", "32", "-o", "out")),
    Command("prune sparsegpt", ("prune", "{work}/model", *FEW, "--pattern", "2:4", "-o", "out")),
    Command(
        "prune structured",
        ("prune", "{work}/model", "--method", "structured", *FEW, "--sparsity", "0.25", "--round-to", "8", "-o", "out"),
    ),
    Command(
        "recover perp",
        (
            "recover",
            "{work}/sparse",
            "--teacher",
            "{work}/model",
            *FEW,
            "--steps",
            "6",
            "--batch-size",
            "2",
            "-o",
            "out",
        ),
    ),
    Command("stats", ("stats", "{work}/model", *FEW, "-o", "out")),
    Command("export", ("export", "{work}/sparse", "--sparse", "-o", "out")),
    Command("densify", ("densify", "{work}/compact", "-o", "out")),
    Command("merge soup", ("soup", "{work}/model", "{work}/other", "-o", "out"), program="merge"),
    Command(
        "merge ties",
        ("ties", "--base", "{work}/model", "{work}/other", "{work}/third", "-o", "out"),
        program="merge",
    ),
    Command(
        "extract-lora", ("extract-lora", "{work}/model", "{work}/other", "--rank", "4", "-o", "out"), program="merge"
    ),
]


@dataclass
class Tally:
    """What came of one fault."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def broken(self, text: str) -> None:
        """A promise was not kept; said at once, and again at the end."""
        note(f"BROKEN {text}")
        self.faults.append(text)


def contents(path: Path) -> dict[str, str]:
    """sha256 of the files of a target, which may be one file."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return {str(one.relative_to(path.parent)): hashlib.sha256(one.read_bytes()).hexdigest() for one in files}


def recipe_contents(view: Path) -> dict[str, str]:
    """The same of all outputs of a recipe, by stage."""
    if not view.is_dir():
        return {}
    stages = sorted(path for path in view.iterdir() if path.is_symlink())
    return {f"{stage.name}/{name}": digest for stage in stages for name, digest in contents(stage.resolve()).items()}


class Bench:
    """The commands, what each gives undisturbed, and the checks after a fault."""

    def __init__(self, work: Path, chance: random.Random) -> None:
        self.work, self.chance = work, chance
        self.commands = Commands(fresh_folder(work / "streams"), {"XDG_CACHE_HOME": str(work / "cache")})
        self.tallies: dict[str, Tally] = {}
        self.number = 0
        self.mounted = self._can_mount()

    def prepare(self) -> None:
        """The inputs: a model, two others like it, a pruned one and its export."""
        from weightworks.testing.tiny import make_model

        make_model(self.work / "model", blocks=2, width=64)
        for name, bits in (("other", "4"), ("third", "3")):
            words = ("quantize", "model", "--method", "rtn", "--bits", bits, "--group-size", "32", "--format", "dense")
            self._sound(*words, "-o", name)
        self._sound("prune", "model", "--method", "magnitude", "--sparsity", "0.5", "-o", "sparse")
        self._sound("export", "sparse", "--sparse", "-o", "compact")

    def _sound(self, *words: str) -> None:
        run = self.commands(*words, cwd=self.work)
        assert run.code == 0, run.err

    def _can_mount(self) -> bool:
        place = fresh_folder(self.work / "mount")
        done = subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], capture_output=True, check=False)
        if done.returncode == 0:
            subprocess.run(["umount", str(place)], check=True)
        return done.returncode == 0

    def words(self, command: Command) -> list[str]:
        return [word.replace("{work}", str(self.work)) for word in command.words]

    def place(self) -> Path:
        """A fresh folder to run in."""
        self.number += 1
        return fresh_folder(self.work / "places" / str(self.number))

    def run(self, command: Command, place: Path, faults: list[list[object]] | None = None) -> Run:
        return self.commands(*self.words(command), cwd=place, program=command.program, faults=faults or [])

    def undisturbed(self, command: Command) -> tuple[float, dict[str, str]]:
        place = self.place()
        start = time.perf_counter()
        run = self.run(command, place)
        seconds = time.perf_counter() - start
        if run.code:
            sys.exit(f"{command.name} fails undisturbed: {run.err}")
        found = contents(place / command.target)
        shutil.rmtree(place)
        return seconds, found

    def check(
        self, fault: str, command: Command, place: Path, expected: dict[str, str], run: Run, *, extra: str = ""
    ) -> None:
        """The promises after a fault, and the same command again; then the folder goes."""
        tally = self.tallies.setdefault(fault, Tally())
        target = place / command.target
        whole = target.exists() and contents(target) == expected
        tally.outcomes[
            f"{'killed' if run.code == -9 else f'code {run.code}'}, {'whole' if whole else 'nothing'} there"
        ] += 1
        said = run.err[-300:].replace("\n", " | ")
        if target.exists() and not whole:
            tally.broken(f"{command.name}: half a target {extra} {said}")
        if "Traceback" in run.err or run.code in (70, -6, -11) or (run.code == 1 and "error: " not in run.err):
            tally.broken(f"{command.name}: no sentence {extra} (code {run.code}) {said}")
        again = self.run(command, place)
        if again.code or contents(target) != expected:
            tally.broken(f"{command.name}: again: code {again.code} {extra} {again.err[-300:]}")
        left = sorted(
            path.name for path in place.iterdir() if path.name not in (command.target, f"{command.target}.run.log")
        )
        if left:
            tally.broken(f"{command.name}: left behind {left} {extra}")
        shutil.rmtree(place, ignore_errors=True)


def fresh_folder(folder: Path) -> Path:
    fresh(folder).mkdir(parents=True)
    return folder


@contextmanager
def tmpfs(place: Path, size: int) -> Iterator[Callable[[str], None]]:
    """A disk of ``size`` bytes at ``place``; the context is a function that changes its options."""

    def mount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)

    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def killed(bench: Bench, command: Command, seconds: float, expected: dict[str, str], times: int) -> None:
    """SIGKILL at random moments of the run."""
    for _ in range(times):
        place, after = bench.place(), bench.chance.uniform(0.0, seconds)
        started = bench.commands.start(*bench.words(command), cwd=place, program=command.program)
        time.sleep(after)
        if (place / command.target).exists() is False:
            started.send(signal.SIGKILL)
        bench.check("kill -9", command, place, expected, started.wait(), extra=f"after {after:.2f} s")


def interrupted(bench: Bench, command: Command, seconds: float, expected: dict[str, str], times: int) -> None:
    """Ctrl-C, and again while the first is answered."""
    for _ in range(times):
        place, after = bench.place(), bench.chance.uniform(0.1, seconds)
        started = bench.commands.start(*bench.words(command), cwd=place, program=command.program)
        time.sleep(after)
        for _ in range(2):
            try:
                started.send(signal.SIGINT)
            except ProcessLookupError:
                break
            time.sleep(bench.chance.uniform(0.0, 0.05))
        bench.check("Ctrl-C twice", command, place, expected, started.wait(), extra=f"after {after:.2f} s")


def full(bench: Bench, command: Command, seconds: float, expected: dict[str, str], times: int) -> None:
    """A disk too small for the output, by amounts from nothing to almost enough; then made larger."""
    if not bench.mounted:
        return
    place = bench.place()
    assert bench.run(command, place).code == 0
    needed = sum(one.stat().st_size for one in place.rglob("*") if one.is_file())
    shutil.rmtree(place)
    for number in range(times):
        place = bench.place()
        size = max(1, needed * number // times // 4096) * 4096
        with tmpfs(place, size) as change:
            run = bench.run(command, place, [ON_DISK])
            change("size=400m")
            bench.check("full disk", command, place, expected, run, extra=f"{size:,} bytes of {needed:,}")


def failing(bench: Bench, command: Command, seconds: float, expected: dict[str, str], times: int) -> None:
    """No space left at one call: of writing, reserving or synchronising; all of them in turn if ``times`` is enough."""
    for call in ("pwrite", "posix_fallocate", "fsync", "fdatasync"):
        report = bench.work / "calls"
        place = bench.place()
        bench.run(command, place, [["count_calls", f"os:{call}", str(report)]])
        shutil.rmtree(place)
        count = int(report.read_text())
        for number in sorted({1 + count * k // times for k in range(times)} if count else []):
            place = bench.place()
            run = bench.run(command, place, [["no_space", f"os:{call}", min(number, count)]])
            bench.check(f"ENOSPC at {call}", command, place, expected, run, extra=f"call {number} of {count}")


def read_only(bench: Bench, command: Command, seconds: float, expected: dict[str, str], times: int) -> None:
    """A disk that cannot be written; then it can."""
    if not bench.mounted:
        return
    place = bench.place()
    with tmpfs(place, 400_000_000) as change:
        change("ro")
        run = bench.run(command, place)
        change("rw")
        bench.check("read-only", command, place, expected, run)


def vanishing(bench: Bench, command: Command, seconds: float, expected: dict[str, str], times: int) -> None:
    """The folder of the output, or the staging folder in it, is removed at a random moment."""
    for number in range(times):
        place, after = bench.place(), bench.chance.uniform(0.0, seconds)
        started = bench.commands.start(*bench.words(command), cwd=place, program=command.program)
        time.sleep(after)
        gone = place if number % 2 else place / f"{command.target}.partial"
        shutil.rmtree(gone, ignore_errors=True)
        run = started.wait()
        place.mkdir(exist_ok=True)
        for left in place.glob(f"{command.target}.*"):
            if left.name.endswith(".partial"):
                shutil.rmtree(left)
        target = place / command.target
        if target.exists() and contents(target) != expected and number % 2:  # it was removed while it was complete
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        bench.check("vanishing folder", command, place, expected, run, extra=f"{gone.name} after {after:.2f} s")


def little_memory(bench: Bench, command: Command, seconds: float, expected: dict[str, str], times: int) -> None:
    """The address space may grow by so many megabytes (RLIMIT_AS), and no more."""
    for more in [1, 4, 16, 32, 64, 96, 128, 256][:: max(1, 8 // times)]:
        place = bench.place()
        run = bench.run(command, place, [["little_memory", more * 1_000_000]])
        bench.check("little memory", command, place, expected, run, extra=f"{more} MB more")


def twice(bench: Bench, command: Command, seconds: float, expected: dict[str, str], times: int) -> None:
    """Two of the same at once, the second a little later."""
    for _ in range(times):
        place = bench.place()
        first = bench.commands.start(*bench.words(command), cwd=place, program=command.program)
        time.sleep(bench.chance.uniform(0.0, seconds / 2))
        second = bench.commands.start(*bench.words(command), cwd=place, program=command.program)
        runs = first.wait(), second.wait()
        if all(run.code for run in runs):
            bench.tallies.setdefault("two at once", Tally()).broken(f"{command.name}: neither came through")
        for run in runs[1:]:
            bench.tallies.setdefault("two at once", Tally()).outcomes[f"the second: code {run.code}"] += 1
        bench.check("two at once", command, place, expected, runs[0], extra=runs[1].err[-200:])


def clocks(bench: Bench, command: Command, seconds: float, expected: dict[str, str], times: int) -> None:
    """The clock is set 30 years ahead, and back, while the command runs."""
    for jump in (10**9, -(10**9)):
        place = bench.place()
        bench.check(
            "clock set", command, place, expected, bench.run(command, place, [["clock", jump]]), extra=f"{jump} s"
        )


def changing(bench: Bench, command: Command, seconds: float, expected: dict[str, str], times: int) -> None:
    """A weight of the input is changed at a random moment; afterwards it is as it was."""
    words = bench.words(command)
    source = next(Path(word) for word in words if word.startswith(str(bench.work)) and Path(word).is_dir())
    weights = [path for path in source.iterdir() if path.suffix == ".safetensors"]
    file = max(weights, key=lambda path: path.stat().st_size)
    data = file.read_bytes()
    for _ in range(times):
        place, after = bench.place(), bench.chance.uniform(0.0, seconds)
        started = bench.commands.start(*words, cwd=place, program=command.program)
        time.sleep(after)
        spoiled = bytearray(data)
        spoiled[-bench.chance.randrange(2, 2000) * 2] ^= 1  # a last bit of a weight
        file.write_bytes(spoiled)
        run = started.wait()
        target, tally = place / command.target, bench.tallies.setdefault("changing source", Tally())
        if (
            run.code == 0 and contents(target) != expected
        ):  # it was changed before it was read: then all is of the new content
            again = bench.place()
            bench.run(command, again)
            if contents(again / command.target) != contents(target):
                tally.broken(f"{command.name}: made of two contents, after {after:.2f} s")
            tally.outcomes["code 0, whole there, of the new content"] += 1
            shutil.rmtree(again)
            file.write_bytes(data)
            shutil.rmtree(place)
            continue
        file.write_bytes(data)
        bench.check("changing source", command, place, expected, run, extra=f"after {after:.2f} s")


FAULTS: dict[str, tuple[Callable[[Bench, Command, float, dict[str, str], int], None], int]] = {
    "killed": (killed, 0), "interrupted": (interrupted, 3), "full": (full, 10), "failing": (failing, 4),
    "read-only": (read_only, 1), "vanishing": (vanishing, 4), "memory": (little_memory, 4), "twice": (twice, 2),
    "clocks": (clocks, 1), "changing": (changing, 4),
}  # fmt: skip


def recipes(bench: Bench, kills: int) -> None:
    """The shipped recipes on the small model: killed at random moments, then the same line to the end."""
    tally = bench.tallies.setdefault("kill -9 of recipes", Tally())
    for name in RECIPES:
        recipe = HERE.parent / "recipes" / f"{name}.yaml"
        words = ("run", str(recipe), "-q", "--set", f"vars.model={bench.work / 'model'}", "--workspace")
        calm = bench.work / "runs" / name
        start = time.perf_counter()
        run = bench.commands(*words, str(calm), cwd=HERE.parent)
        seconds = time.perf_counter() - start
        if run.code:
            tally.broken(f"{name} fails undisturbed: {run.err[-500:]}")
            continue
        expected = recipe_contents(calm / name)
        note(f"recipe {name}: {seconds:.1f} s, {len(expected)} files")
        for _ in range(kills):
            place, after = bench.work / "runs" / "killed", bench.chance.uniform(0.0, seconds)
            fresh(place)
            started = bench.commands.start(*words, str(place), cwd=HERE.parent)
            time.sleep(after)
            try:
                started.send(signal.SIGKILL)
            except ProcessLookupError:
                pass
            code = started.wait().code
            done = len(list(place.glob("cache/*/record.json")))
            tally.outcomes[f"{'killed' if code == -9 else f'code {code}'}"] += 1
            half = {k: v for k, v in recipe_contents(place / name).items() if expected.get(k) != v}
            again = bench.commands(*words, str(place), cwd=HERE.parent)
            if half or again.code or recipe_contents(place / name) != expected:
                tally.broken(
                    f"{name}: killed after {after:.1f} s with {done} done: code {again.code} {again.err[-300:]}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of commands, in all")
    parser.add_argument("--recipe-kills", type=int, default=4, help="of each recipe")
    parser.add_argument("--only", help=f"of: {', '.join(FAULTS)}, recipes")
    parser.add_argument("--commands", help="those whose name holds one of these words")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else [*FAULTS, "recipes"]
    chosen = [
        one for one in COMMANDS if not args.commands or any(word in one.name for word in args.commands.split(","))
    ]
    with work_folder(args.work) as work:
        bench = Bench(work, random.Random(args.seed))
        try:
            bench.prepare()
            calm = {one.name: bench.undisturbed(one) for one in chosen if set(wanted) & set(FAULTS)}
            speeds = {name: 1 / seconds for name, (seconds, _) in calm.items()}
            for command in chosen if calm else []:
                seconds, expected = calm[command.name]
                kills = max(5, round(args.kills * speeds[command.name] / sum(speeds.values())))  # quick ones take more
                note(f"{command.name}: {seconds:.2f} s, {len(expected)} files")
                for name in [fault for fault in FAULTS if fault in wanted]:
                    function, times = FAULTS[name]
                    function(bench, command, seconds, expected, times or kills)
            if "recipes" in wanted:
                recipes(bench, args.recipe_kills)
        finally:
            bench.commands.stop()
    rows = []
    for fault, tally in bench.tallies.items():
        became = "; ".join(f"{count} {what}" for what, count in tally.outcomes.most_common())
        rows.append([fault, str(tally.outcomes.total()), became, str(len(tally.faults))])
    table("Faults", ["fault", "runs", "what became of it", "broken promises"], rows)
    broken = [f"{fault}: {text}" for fault, tally in bench.tallies.items() for text in tally.faults]
    save_json(
        args.json, {"faults": {k: {"outcomes": t.outcomes, "broken": t.faults} for k, t in bench.tallies.items()}}
    )
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
