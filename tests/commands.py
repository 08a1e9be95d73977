"""The ``compress`` and ``merge`` commands in processes of its own that start warm, so that hundreds of runs take seconds, not minutes.

A server process imports everything and runs the command once on one thread; every run after that is a fork of it, with
its own signals, exit code, streams and memory. Threads do not survive a fork, hence the single one.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TINY_LLAMA = HERE.parent / "examples" / "tiny-llama"
SHORT_TEXT = HERE.parent / "weightworks" / "stream" / "builtin" / "calibration.txt"
# Calibration that is enough for a definite Hessian, and a second of work.
FEW = ("--dataset", str(SHORT_TEXT), "--num-samples", "16", "--seq-len", "64")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

Fault = Sequence[Any]  # a function of faults.py, its arguments, and perhaps a dict of keywords


@dataclass(frozen=True)
class Run:
    """What a command did: ``code`` is its exit code, or minus the signal that ended it."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object that stdout holds, and nothing else."""
        return json.loads(self.out)


class Started:
    """A command on its way."""

    def __init__(self, request: dict[str, Any], address: Path) -> None:
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(str(address))
        self.replies = self.connection.makefile("r")
        self.connection.sendall((json.dumps(request) + "\n").encode())
        self.pid = int(self.replies.readline())

    def send(self, number: int) -> None:
        """Send the process a signal."""
        os.kill(self.pid, number)

    def wait(self) -> Run:
        """Its end."""
        with self.connection, self.replies:
            return Run(**json.loads(self.replies.readline()))


class Commands:
    """Runs commands; made once a test session. ``folder`` is for sockets and streams, ``environment`` goes on top."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.address, self.numbers = folder, folder / "socket", itertools.count()
        self.server = subprocess.Popen(
            [sys.executable, __file__, str(self.address)],
            env={**os.environ, **ONE_THREAD, **environment},
            cwd=folder,
            stdin=subprocess.DEVNULL,
        )
        self._ready = False

    def start(
        self, *words: str | Path, cwd: Path | None = None, faults: Sequence[Fault] = (), program: str = "compress"
    ) -> Started:
        """Start ``compress words``, or another ``program``."""
        while not self._ready and not self.address.exists():  # it listens once it is warm
            assert self.server.poll() is None, "the server of warm processes failed; its error is above"
            time.sleep(0.02)
        self._ready = True
        number = next(self.numbers)
        streams = [str(self.folder / f"{number}.{name}") for name in ("out", "err")]
        request = {
            "program": program,
            "words": [str(word) for word in words],
            "cwd": str(cwd or self.folder),
            "faults": list(faults),
            "streams": streams,
        }
        return Started(request, self.address)

    def __call__(
        self, *words: str | Path, cwd: Path | None = None, faults: Sequence[Fault] = (), program: str = "compress"
    ) -> Run:
        """Run ``compress words``, or another ``program``, to its end."""
        return self.start(*words, cwd=cwd, faults=faults, program=program).wait()

    def stop(self) -> None:
        self.server.terminate()
        self.server.wait()


class Handler(socketserver.StreamRequestHandler):
    """One command: forked, awaited, told of. Runs in a fork of the server itself."""

    def handle(self) -> None:
        request = json.loads(self.rfile.readline())
        pid = os.fork()
        if pid == 0:
            os._exit(run(request))
        self.wfile.write(f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        streams = map(Path, request["streams"])
        texts = [
            stream.read_text() if stream.exists() else "" for stream in streams
        ]  # it may be killed before it began
        reply = {"code": os.waitstatus_to_exitcode(status), "out": texts[0], "err": texts[1]}
        self.wfile.write((json.dumps(reply) + "\n").encode())


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """Serves commands side by side."""

    max_children = 8


def run(request: dict[str, Any]) -> int:
    """The command in this process; returns its exit code."""
    import faults
    from cli import compress_app, merge_app

    main = {"compress": compress_app, "merge": merge_app}[request["program"]].main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, path in enumerate(request["streams"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(request["cwd"])
    for name, *arguments in request["faults"]:
        keywords = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
        getattr(faults, name)(*arguments, **keywords)
    sys.argv = [request["program"], *request["words"]]
    try:
        main()
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70  # a crash: no command ends with it on purpose
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def serve(address: Path) -> None:
    """Warm up, then listen at ``address``."""
    sys.argv = ["compress", "quantize", str(TINY_LLAMA), *FEW, "--bits", "8", "-q", "-o", "warm"]
    from cli.compress_app import main

    try:
        main()
    except SystemExit as leave:
        assert not leave.code, "the first run of all failed"  # noqa: PT017
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.collect()
    gc.freeze()  # what is there stays shared with all forks
    with Server(str(address.with_suffix(".new")), Handler) as server:
        address.with_suffix(".new").rename(address)
        server.serve_forever()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
