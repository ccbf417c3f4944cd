"""A server on this machine that speaks as much of the Hugging Face hub's protocol as its client asks for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REPO = "org/Tiny-1B"
COMMIT = "a" * 40
STEP = 1 << 20


class Hub(ThreadingHTTPServer):
    """Serves the files of `folder` as the model `REPO`, at the branch main, the tag v1 and one commit."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.token: str | None = None
        """Without it the answer is 401."""
        self.gated = False
        self.sizes: dict[str, int] = {}
        """What is told in the place of the true size."""
        self.stop_at: int | None = None
        """So many bytes of a large file are sent, then nothing until `go_on` is set."""
        self.cut_at: int | None = None
        """So many bytes of a large file are sent once, then the connection is cut."""
        self.damaged = False
        self.stopped, self.go_on = threading.Event(), threading.Event()
        self.requests: list[tuple[str, str | None]] = []
        """Name and Range of each file that was asked for."""
        self.tokens: set[str | None] = set()
        self.sent = 0
        """Bytes of answers."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.requests}

    def listing(self) -> dict[str, Any]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {"id": REPO, "sha": COMMIT, "siblings": [self._sibling(path) for path in paths]}

    def _sibling(self, path: Path) -> dict[str, Any]:
        name, data = str(path.relative_to(self.folder)), path.read_bytes()
        size = self.sizes.get(name, len(data))
        row = {"rfilename": name, "size": size, "blobId": hashlib.sha1(data).hexdigest()}
        if path.suffix not in (".safetensors", ".bin", ".pth"):
            return row
        return row | {"lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}}


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the killed client
            super().handle()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, hub = self.path.partition("?")[0], self.server
        authorization = self.headers["Authorization"]
        hub.tokens.add(authorization)
        api, _, revision = path.removeprefix("/api/models/").partition("/revision/")
        if hub.token and authorization != f"Bearer {hub.token}":
            wrong = ("", "Invalid credentials in Authorization header")
            return self._refuse(401, *(wrong if authorization else ("RepoNotFound", "Repository not found")))
        if path.startswith("/api/models/"):
            if api != REPO:
                return self._refuse(404, "RepoNotFound")
            if revision not in ("", "main", "v1", COMMIT):
                return self._refuse(404, "RevisionNotFound")
            return self._send(200, json.dumps(hub.listing()).encode())
        if hub.gated:
            return self._refuse(403, "GatedRepo", "Access to this model is restricted")
        name = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
        if name == path or not (hub.folder / name).is_file():
            return self._refuse(404, "EntryNotFound")
        self._file(name)

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message})

    def _file(self, name: str) -> None:
        data, asked = (self.server.folder / name).read_bytes(), self.headers["Range"]
        self.server.requests.append((name, asked))
        if self.server.damaged and len(data) > STEP:
            data = bytes(len(data))
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206 if asked else 200, data[start:], headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(data), STEP):
            if start and self._is_end(start):
                return
            self.wfile.write(data[start : start + STEP])
            self.server.sent += len(data[start : start + STEP])

    def _is_end(self, sent: int) -> bool:
        hub = self.server
        if sent == hub.stop_at:
            hub.stopped.set()
            hub.go_on.wait(60)
        elif sent == hub.cut_at:
            hub.cut_at = None
        else:
            return False
        self.close_connection = True
        return True
