"""A Hugging Face hub on loopback: one repository, served from a directory as the real one does it, with its faults."""

import hashlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "c0ffee" + "0" * 34


class Hub:
    """Within `with`: `endpoint` is its address, `asked` the (method, path) of every request so far.

    `fault(method, path)` is asked at each request: an HTTP status to answer with, and the hub's own code for it; a
    number of bytes after which the connection breaks; or None.
    """

    def __init__(self, repository: str, directory: Path) -> None:
        self.repository, self.directory = repository, directory
        self.asked: list[tuple[str, str]] = []
        self.fault: Callable[[str, str], tuple[int, str] | int | None] = lambda method, path: None
        self.bytes_a_second: float | None = None
        self.size_said: dict[str, int] = {}  # of files about which it lies
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self) -> dict[str, Path]:
        return {str(p.relative_to(self.directory)): p for p in sorted(self.directory.rglob("*")) if p.is_file()}

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        self.asked.append((request.command, path))
        fault = self.fault(request.command, path)
        api, files = f"/api/models/{self.repository}", f"/{self.repository}/resolve/"
        if isinstance(fault, tuple):
            self.send(request, b"", {"X-Error-Code": fault[1], "X-Error-Message": "as the test wants it"}, fault[0])
        elif path.startswith(f"{api}/tree/"):
            tree = [self.described(name, file) for name, file in self.files().items()]
            self.send(request, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif path == api or path in (f"{api}/revision/{revision}" for revision in ("main", "v1", COMMIT)):
            siblings = [{"rfilename": name, "size": self.size(name)} for name in self.files()]
            info = {"id": self.repository, "modelId": self.repository, "sha": COMMIT, "siblings": siblings}
            self.send(request, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif path.startswith(api):
            self.send(request, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no revision"}, 404)
        elif path.startswith(files) and (name := path.removeprefix(files).partition("/")[2]) in self.files():
            self.send_file(request, name, fault)
        else:
            self.send(request, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no repository"}, 401)

    def size(self, name: str) -> int:
        return self.size_said.get(name, self.files()[name].stat().st_size)

    def described(self, name: str, file: Path) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "path": name, "size": self.size(name), "oid": self.hash(file)[:40]}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": self.hash(file), "size": self.size(name), "pointerSize": 134}
        return entry

    def hash(self, file: Path) -> str:
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def send_file(self, request: BaseHTTPRequestHandler, name: str, fault: int | None) -> None:
        data, start = self.files()[name].read_bytes(), 0
        headers = {"ETag": f'"{self.hash(self.files()[name])}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if name.endswith(".safetensors"):
            headers |= {"X-Linked-Size": str(self.size(name)), "X-Linked-ETag": headers["ETag"]}
        if asked := request.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send(request, data[start:], headers, 206 if asked else 200, fault)

    def send(
        self,
        request: BaseHTTPRequestHandler,
        body: bytes,
        headers: dict[str, str],
        status: int = 200,
        break_after: int | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        try:
            if break_after is not None:
                body = body[:break_after]
            step = max(1, int((self.bytes_a_second or 1e9) / 100))
            for start in range(0, len(body), step):
                request.wfile.write(body[start : start + step])
                if self.bytes_a_second:
                    time.sleep(0.01)
        except OSError:  # the other side was killed
            request.close_connection = True
        if break_after is not None:
            request.close_connection = True
