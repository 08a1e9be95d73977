"""What this machine can do: product speed by dtype, measured once and remembered, and free memory."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from weightworks.errors import UsageError
from weightworks.store.sources import cache_folder

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
KERNELS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")  # variables that choose kernels
WORTH = 1.5  # how much faster a 16-bit product must be than float32 to be used: noise must not decide


def speeds() -> dict[str, float]:
    """Operations a second (2 m n k a product) of a matrix product in float32, bfloat16 and float16 on the CPU."""
    chosen = "".join(f" {name}={os.environ[name]}" for name in KERNELS if name in os.environ)
    key = f"{_processor()} x{torch.get_num_threads()} torch {torch.__version__}{chosen}"
    path = cache_folder() / "machine.json"
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    if key not in known:
        known[key] = {name: _measure(getattr(torch, name)) for name in ("float32", "bfloat16", "float16")}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(known, indent=1))
            temporary.replace(path)
        except OSError:
            pass  # a read-only home costs a second of measuring each run, nothing else
    return known[key]


def compute_dtype(wanted: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of calibration passes: as told, or float32 unless the checkpoint's own is much faster here."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if stored not in (torch.bfloat16, torch.float16):
        return torch.float32
    if device.type != "cpu":
        return stored
    measured = speeds()
    return stored if measured[str(stored).removeprefix("torch.")] > WORTH * measured["float32"] else torch.float32


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors too small to be divided among threads are worked on by one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def pick_device(wanted: str) -> torch.device:
    """The device of ``--device``; auto takes a GPU if there is one."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", wanted)
    if not found:
        raise UsageError(f"--device {wanted}: unknown device", hint="known: auto, cpu, cuda, cuda:N")
    if wanted != "cpu" and int(found.group(1) or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {wanted}: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(wanted)


def free_memory() -> int:
    """Bytes this process may still take: the least of the machine's free memory and what its control groups leave.

    Cached file pages count against a group until they are wanted; they are as good as free.
    """
    free = int(psutil.virtual_memory().available)
    for group, limit, used in _control_groups():
        try:
            bound = int((group / limit).read_text())  # "max" where there is none
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = sum(int(stat.get(key, 0)) for key in ("inactive_file", "active_file"))
            free = min(free, max(0, bound - int((group / used).read_text()) + cached))
        except (OSError, ValueError):
            continue
    return free


def resident() -> int:
    """Bytes of memory this process holds."""
    return psutil.Process().memory_info().rss


def _control_groups() -> Iterator[tuple[Path, str, str]]:
    """Folders of the control groups that bound this process, innermost first, and their files of limit and use."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            kind, limit, used = CGROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            kind, limit, used = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = kind / path.strip("/")
        yield from ((group, limit, used) for group in (folder, *folder.parents) if group.is_relative_to(kind))


def _measure(dtype: torch.dtype) -> float:
    x, w = torch.randn(512, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    torch.nn.functional.linear(x[:64], w)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = max(best, 2 * x.shape[0] * w.numel() / (time.perf_counter() - start))
    return best


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip() + (" +bf16" if "avx512_bf16" in _flags() else "")
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _flags() -> str:
    return next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
