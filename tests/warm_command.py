"""The command in processes that begin as copies of one which has imported everything.

Importing torch and DeepSpeed takes longer than most runs of the tests. A server process imports
them once, computes nothing, has no threads, and forks for each command; the copy then runs the
command's own entry point with its own arguments, environment, folder, output and session.
"""

from __future__ import annotations

import array
import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_LARGEST = 1 << 20  # bytes of a message
_START = 120.0  # s, within which the server must have imported everything


class Started:
    """A command that runs; as much of subprocess.Popen as the tests use."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _server().ended(self.pid, 0.0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        if self.returncode is None:
            self.returncode = _server().ended(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(["axialtrain"], timeout)
        return self.returncode


def start(
    arguments: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    stdout: IO[bytes],
    stderr: IO[bytes],
) -> Started:
    """`axialtrain` with `arguments`, in a session of its own."""
    request = {"arguments": list(arguments), "cwd": str(cwd), "env": dict(env)}
    return Started(_server().start(request, [stdout.fileno(), stderr.fileno()]))


class _Server:
    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._ended: dict[int, int] = {}
        atexit.register(self.stop)

    def start(self, request: dict[str, Any], files: list[int]) -> int:
        socket.send_fds(self._socket, [json.dumps(request).encode()], files)
        while True:
            answer = self._answer(_START)
            assert answer is not None, f"no process in {_START} s"
            if "started" in answer:
                return int(answer["started"])

    def ended(self, pid: int, timeout: float) -> int | None:
        """The exit status of a process, as subprocess gives it; None where it still runs."""
        end = time.monotonic() + timeout
        while pid not in self._ended:
            if self._answer(max(0.0, end - time.monotonic())) is None:
                return None
        return self._ended.pop(pid)

    def _answer(self, timeout: float) -> dict[str, int] | None:
        if not select.select([self._socket], [], [], timeout)[0]:
            return None
        data = self._socket.recv(_LARGEST)
        if not data:
            raise RuntimeError(f"the server of warm_command ended: {self._process.wait(10)}")
        answer: dict[str, int] = json.loads(data)
        if "ended" in answer:
            self._ended[answer["ended"]] = answer["status"]
        return answer

    def stop(self) -> None:
        self._socket.close()  # at which it ends
        self._process.wait(10)


_servers: list[_Server] = []


def _server() -> _Server:
    if not _servers:
        _servers.append(_Server())
    return _servers[0]


def _serve(descriptor: int) -> None:
    """Fork for each request until the other side is gone."""
    import hydra  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401

    import axialtrain.cli
    import axialtrain.train.run  # noqa: F401 - and with it most of what a run imports

    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    with socket.socket(fileno=descriptor) as peer:
        while True:
            ready = select.select([peer, woken], [], [])[0]
            if woken in ready:
                os.read(woken, 512)
                _say_who_ended(peer)
            if peer not in ready:
                continue
            try:
                data, files, *_ = socket.recv_fds(peer, _LARGEST, 2)
            except ConnectionResetError:
                return
            if not data:
                return
            pid = os.fork()
            if pid == 0:
                peer.close()
                _become(json.loads(data), files)
            for file in files:
                os.close(file)
            peer.send(json.dumps({"started": pid}).encode())


def _say_who_ended(peer: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        status = os.waitstatus_to_exitcode(status)
        peer.send(json.dumps({"ended": pid, "status": status}).encode())


def _become(request: dict[str, Any], files: array.array[int]) -> None:
    """Run the command as a new process would, and end. Never returns."""
    status = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        for target, file in enumerate(files, start=1):
            os.dup2(file, target)
            os.close(file)
        sys.argv = ["axialtrain", *request["arguments"]]
        from axialtrain.cli import main

        status = main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python's end does
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
