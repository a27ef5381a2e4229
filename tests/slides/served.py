"""A web server for tests: serves a directory in parts, counts what it gives, and fails on demand."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

# What a request gets instead of its bytes: a status, "stall" (nothing), "cut" (half of them), "whole" (no parts).
Fault = int | str | None


class Served:
    """What is served and what was asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self.url = root, ""
        self.asked: list[tuple[str, int, int]] = []
        """Every answered request for bytes: path, start, end."""
        self.fault: Callable[[int], Fault] = lambda number: None
        """What goes wrong with the request of a number, counted from 0."""
        self.absent = 404
        """How files that are not there are answered."""
        self.number = 0
        self.ended = threading.Event()

    @property
    def sent_bytes(self) -> int:
        return sum(end - start for _, start, end in self.asked)


@contextmanager
def serve(root: Path) -> Iterator[Served]:
    served = Served(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            file = root / unquote(self.path.partition("?")[0]).lstrip("/")
            fault = served.fault(served.number)
            served.number += 1
            if fault == "stall":
                served.ended.wait(60)
                self.close_connection = True
                return
            if isinstance(fault, int) or not file.is_file():
                self.send_response(fault if isinstance(fault, int) else served.absent)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = file.read_bytes()
            asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            start, end = 0, len(content)
            if asked and fault != "whole":
                first, last = asked.groups()
                start = int(first) if first else max(0, len(content) - int(last))
                end = min(int(last) + 1, len(content)) if first and last else len(content)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            if not body:
                return
            served.asked.append((self.path, start, end))
            if fault == "cut":
                end = (start + end) // 2
                self.close_connection = True
            self.wfile.write(content[start:end])

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exception(), ConnectionError):  # the client has enough
                super().handle_error(request, client_address)

    server = Server(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield served
    finally:
        served.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
