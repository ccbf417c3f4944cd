"""A pull from a hub: the real client against a server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.tiny import make_tiny_llama

SHA = "a" * 40
TOKEN = "hf_secretsecret"
WEIGHTS = "model.safetensors"
HALF = 50_000


class Hub(ThreadingHTTPServer):
    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.token: str | None = None
        self.hang = threading.Event()
        """Until it is set, the weights stop in the middle."""
        self.half_sent = threading.Event()
        self.fetched: set[str] = set()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the killed client
            super().handle()

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
            return self._send(401, b"{}", {"X-Error-Code": "GatedRepo"})
        if path.startswith("/api/models/org/tiny"):
            return self._api(path)
        prefix = f"/org/tiny/resolve/{SHA}/"
        file = self.server.folder / path.removeprefix(prefix)
        if not path.startswith(prefix) or not file.is_file():
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        self._file(file)

    def _api(self, path: str) -> None:
        files = sorted(self.server.folder.iterdir())
        if "/tree/" in path:
            rows = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)} for f in files]
            return self._send(200, json.dumps(rows).encode())
        if "/revision/" in path and not path.endswith((SHA, "main")):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        info = {"id": "org/tiny", "sha": SHA, "siblings": [{"rfilename": f.name} for f in files]}
        self._send(200, json.dumps(info).encode())

    def _file(self, file: Path) -> None:
        data, wanted = file.read_bytes(), self.headers["Range"]
        headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if self.command == "GET":
            self.server.fetched.add(file.name)
        if wanted:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self._send(206, data[start:], headers)
        self._send(200, data, headers, hang=file.name == WEIGHTS)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, *, hang: bool = False) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if hang and not self.server.hang.is_set():
            self.wfile.write(data[:HALF])
            self.wfile.flush()
            self.server.half_sent.set()
            self.server.hang.wait(60)
            self.close_connection = True
            return
        self.wfile.write(data)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = make_tiny_llama(tmp_path / "published", hidden_size=128, intermediate_size=256)
    (folder / "modeling.py").write_text("raise SystemExit('never run')")
    (folder / "pytorch_model.bin").write_bytes(b"not needed")
    with Hub(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.hang.set()
        server.shutdown()


def spawn(hub: Hub, home: Path, source: str = "org/tiny", token: str | None = None) -> subprocess.Popen[str]:
    code = "import sys; from service.cli import main; sys.exit(main(sys.argv[1:]))"
    cache = {"HF_HOME": str(home / "cache"), "HF_HUB_DISABLE_XET": "1"}
    endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
    env = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"} | endpoint | cache
    command = [sys.executable, "-c", code, "pull", source, "--home", str(home)]
    env |= {} if token is None else {"HF_TOKEN": token}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_after_a_killed_download_finished_files_are_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    first = spawn(hub, tmp_path)
    assert hub.half_sent.wait(60)
    partial = tmp_path / "models" / ".tiny.download"
    done = [partial / ".cache/huggingface/download" / f"{name}.metadata" for name in ("config.json", "tokenizer.json")]
    while not all(path.exists() and path.stat().st_size for path in done):
        assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (tmp_path / "models" / "tiny").exists()
    hub.fetched.clear()
    hub.hang.set()
    second = spawn(hub, tmp_path)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert not hub.fetched & {"config.json", "tokenizer.json"}
    assert WEIGHTS in hub.fetched
    folder = tmp_path / "models" / "tiny"
    assert (folder / WEIGHTS).read_bytes() == (hub.folder / WEIGHTS).read_bytes()
    assert not hub.fetched & {"modeling.py", "pytorch_model.bin"}
    assert not partial.exists()


def test_a_gated_model_needs_the_token_which_is_never_printed(hub: Hub, tmp_path: Path) -> None:
    hub.hang.set()
    hub.token = TOKEN
    for token in (None, "hf_wrongwrong"):
        refused = spawn(hub, tmp_path, token=token)
        _, errors = refused.communicate(timeout=60)
        assert refused.returncode == 2
        assert "org/tiny is gated" in errors
        assert "hf_wrong" not in errors
    taken = spawn(hub, tmp_path, token=TOKEN)
    output, errors = taken.communicate(timeout=60)
    assert taken.returncode == 0, errors
    assert TOKEN not in output + errors


def test_an_unknown_model_and_revision_are_each_said_in_one_line(hub: Hub, tmp_path: Path) -> None:
    for source, said in (("org/none", "the hub has no model org/none"), ("org/tiny@v9", "no such revision")):
        process = spawn(hub, tmp_path, source)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert said in errors
        assert len(errors.strip().splitlines()) == 1
