"""Hostile input searched by coverage: ``python tests/fuzzing.py TARGET... [--inputs 20000]``; wants ``pip install atheris``.

Every target runs in a process of its own (libFuzzer ends its process). Half of the inputs are changed as data (JSON values,
headers, words of YAML), half as bytes. The first input that breaks a promise ends the run; its bytes are in ``--keep``.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
PACKAGES = ["weightworks", "compress"]


def search(name: str, inputs: int, seed: int, home: Path, keep: Path) -> None:
    """Fuzz one target in this process."""
    import atheris

    with atheris.instrument_imports(include=PACKAGES):
        from hostile import Workshop, spoiled

        workshop = Workshop(home / "home")
    target = workshop.targets[name]
    corpus = home / "corpus"
    corpus.mkdir()
    for number, data in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(data)

    def mutated(data: bytes, most: int, number: int) -> bytes:
        chance = random.Random(number)
        if chance.random() < 0.5:
            return atheris.Mutate(data, most)
        start = data if chance.random() < 0.7 and data else chance.choice(target.seeds)
        return spoiled(start, target.kind, chance)[:most]

    words = [
        f"-runs={inputs}",
        f"-seed={seed}",
        "-max_len=20000",
        "-rss_limit_mb=4096",
        "-timeout=30",
        "-len_control=0",
    ]
    words += [f"-artifact_prefix={keep}/{name}-", "-print_final_stats=1", "-verbosity=1", str(corpus)]
    atheris.Setup([sys.argv[0], *words], lambda data: workshop(name, data), custom_mutator=mutated)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="all if none is named")
    parser.add_argument("--inputs", type=int, default=10_000, help="a target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.keep.mkdir(exist_ok=True)
    if args.here:
        search(args.targets[0], args.inputs, args.seed, args.here, args.keep)
        return
    from hostile import Workshop

    names = args.targets or [word[4:] for word in dir(Workshop) if word.startswith("_of_")]
    total, broken = 0, []
    for name in names:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as home:
            words = [sys.executable, __file__, name, "--inputs", str(args.inputs), "--seed", str(args.seed)]
            words += ["--keep", str(args.keep), "--here", home]
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        ran = re.findall(r"(?:stat::number_of_executed_units:|Done) (\d+)", done.stderr)
        count = max(map(int, ran), default=0)
        total += count
        found = re.findall(r"cov: (\d+)", done.stderr)
        print(f"{name:18} {count:>8,} inputs  coverage {found[-1] if found else '?':>5}  "
              f"{time.perf_counter() - start:6.1f} s  {'held' if done.returncode == 0 else 'BROKEN'}", flush=True)  # fmt: skip
        if done.returncode:
            broken.append(name)
            lines = (done.stdout + done.stderr).split("=== Uncaught Python exception: ===")[-1].splitlines()
            print("\n".join(lines[:40]), flush=True)
    print(f"{total:,} inputs in all")
    sys.exit(f"broken: {', '.join(broken)}" if broken else 0)


if __name__ == "__main__":
    main()
