"""A folder over HTTP on loopback, by ranges of bytes, from a server that fails as it is told."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Fault = int | str  # a status; or stall, reset, cut, short, wrong, whole: see Handler.answer


class RangeServer(ThreadingHTTPServer):
    """Serves `folder`; its url is `url`.

    once, always: by (method, ending of the name), the faults of the next requests of that kind, and
    of all further ones. asked: (method, name, (start, stop) or None) of all requests. delay:
    seconds that each answer takes. tag: the ETag of all. most: answers that were due at one time.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}/data"
        self.once: dict[tuple[str, str], list[Fault]] = {}
        self.always: dict[tuple[str, str], Fault] = {}
        self.asked: list[tuple[str, str, tuple[int, int] | None]] = []
        self.delay = 0.0
        self.tag = '"1"'
        self.most = self.due = 0
        self.lock = threading.Lock()
        self.ending = threading.Event()

    def ranges(self) -> list[tuple[int, int]]:
        """That were asked of shards, in order."""
        return [span for _, name, span in self.asked if span is not None and name.endswith(".tar")]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # of clients that went away


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RangeServer

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_GET(self) -> None:
        self.answer("GET")

    def answer(self, method: str) -> None:
        server, name = self.server, self.path.rpartition("/")[2]
        kind = (method, name.rpartition(".")[2])
        span = None
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            span = (int(first), int(last) + 1)
        with server.lock:
            server.asked.append((method, name, span))
            faults = server.once.get(kind, [])
            fault = faults.pop(0) if faults else server.always.get(kind, 200)
            server.due += 1
            server.most = max(server.most, server.due)
        time.sleep(server.delay)
        with server.lock:
            server.due -= 1
        path = server.folder / name
        if fault == 200 and not path.exists():
            fault = 404
        if isinstance(fault, int) and fault != 200:
            self.send(fault, b"<no>", method)
        elif fault == "stall":
            server.ending.wait(60)
            self.close_connection = True
        else:
            whole = path.read_bytes()
            data = whole if span is None else whole[slice(*span)]
            if fault in ("cut", "reset"):  # less than it says, and then an end, or a reset
                self.send(206, data, method, claimed=len(data))
                if fault == "reset":
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            elif fault == "short":  # less than was asked for
                self.send(206, data[: len(data) // 2], method)
            elif fault == "wrong":
                self.send(206, bytes([data[0] ^ 1]) + data[1:], method)
            elif fault == "whole":
                self.send(200, whole, method)
            else:
                self.send(200 if span is None else 206, data, method)

    def send(self, status: int, data: bytes, method: str, claimed: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if claimed is None else claimed))
        self.send_header("ETag", self.server.tag)
        self.end_headers()
        if method == "HEAD":
            return
        self.wfile.write(data if claimed is None else data[: claimed // 2])
        if claimed is not None:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(folder: str | Path) -> Iterator[RangeServer]:
    server = RangeServer(Path(folder))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ending.set()
        server.shutdown()
        server.server_close()
