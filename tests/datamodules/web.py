"""A web server for a folder that can be told to fail, and remembers what it was asked for."""

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


class Web(ThreadingHTTPServer):
    """Serves a folder at `url`.

    Attributes:
        faults: File name -> what goes wrong with the next requests for it, one entry each: "500", "cut" (half of the
            bytes, then the end), "hang" (half of the bytes, then silence), "page" (an HTML page instead of the file).
            The last entry stays.
        ranges: Answer requests for parts of files.
        asked: (method, file name, bytes sent) of every request.
    """

    daemon_threads = True

    def __init__(self, folder: Path, handler: "type[Handler]") -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.folder = folder
        self.faults: dict[str, list[str]] = {}
        self.ranges = True
        self.asked: list[tuple[str, str, int]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def count(self, name: str) -> int:
        return sum(method == "GET" and asked == name for method, asked, _ in self.asked)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is not worth a traceback."""


class Handler(BaseHTTPRequestHandler):
    server: Web

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = self.path.split("?")[0].lstrip("/")
        file = self.server.folder / path
        faults = self.server.faults.get(path, [])
        fault = (faults.pop(0) if len(faults) > 1 else faults[0]) if faults and with_body else ""
        if not file.is_file():
            self.log(path, 0)
            return self.send_error(404)
        if fault == "500":
            self.log(path, 0)
            return self.send_error(500)
        data = b"<!DOCTYPE html><html>Please log in</html>" if "page" in faults else file.read_bytes()
        total, wanted = len(data), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted and self.server.ranges:
            data = data[int(wanted[1]) : int(wanted[2]) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {wanted[1]}-{int(wanted[1]) + len(data) - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{file.stat().st_mtime_ns}"')
        self.end_headers()
        if with_body:
            self.wfile.write(data[: len(data) // 2] if fault in ("cut", "hang") else data)
            self.wfile.flush()
            if fault == "hang":
                time.sleep(30)
        self.log(path, len(data) if with_body else 0)
        return None

    def log(self, path: str, sent: int) -> None:
        self.server.asked.append((self.command, path, sent))

    def log_message(self, *_: object) -> None:
        pass


class HubHandler(Handler):
    """Makes the folder a data set of the hub, `some/mirror`, as far as `datasets` and its file system ask."""

    COMMIT = "0123456789" * 4

    def answer(self, with_body: bool) -> None:
        path = unquote(self.path.split("?")[0])
        if resolved := re.fullmatch(r"/datasets/some/mirror/resolve/\w+/(.*)", path):
            self.path = f"/{resolved[1]}"
            super().answer(with_body)
        elif re.fullmatch(r"/api/datasets/some/mirror(/revision/\w+)?", path):
            self.tell({"id": "some/mirror", "sha": self.COMMIT, "siblings": []})
        elif tree := re.fullmatch(r"/api/datasets/some/mirror/tree/\w+/?(.*)", path):
            files = sorted((self.server.folder / tree[1]).glob("*"))
            self.tell([self.entry(file) for file in files], 200 if files else 404)
        else:
            self.tell({"error": "not found"}, 404)

    def entry(self, file: Path) -> dict[str, Any]:
        kind = {"type": "directory", "size": 0} if file.is_dir() else {"type": "file", "size": file.stat().st_size}
        return {**kind, "oid": "0", "path": str(file.relative_to(self.server.folder))}

    def tell(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def send_error(self, code: int, *_: object) -> None:
        self.tell({}, code)

    def end_headers(self) -> None:
        self.send_header("X-Repo-Commit", self.COMMIT)
        super().end_headers()


@contextlib.contextmanager
def serving(folder: Path, handler: type[Handler] = Handler) -> Iterator[Web]:
    with Web(folder, handler) as web:
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield web
        finally:
            web.shutdown()
