"""A cache folder of its own for every test, and a hub on this machine."""

import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

COMMIT = "a" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder that the code under test uses; no data folder is named."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ACCEL_GPT2_CACHE", str(folder))
    monkeypatch.delenv("ACCEL_GPT2_DATA", raising=False)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for data files."""
    path = tmp_path / "pets"
    path.mkdir()
    return path


@pytest.fixture
def hub() -> Iterator[Callable[[str, Mapping[str, bytes]], str]]:
    """A function that serves files as one data set of a hub and returns the hub's address.

    It answers the requests that huggingface_hub and datasets make, so that their real clients run.
    """
    servers: list[http.server.ThreadingHTTPServer] = []

    def serve(repo_id: str, files: Mapping[str, bytes]) -> str:
        handler = type("Handler", (_HubHandler,), {"repo_id": repo_id, "files": files})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


class _HubHandler(http.server.BaseHTTPRequestHandler):
    repo_id: str
    files: Mapping[str, bytes]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        api, resolve = f"/api/datasets/{self.repo_id}", f"/datasets/{self.repo_id}/resolve/"
        if path in (api, f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self.files]
            self._json(200, {"id": self.repo_id, "sha": COMMIT, "siblings": siblings})
        elif path == f"{api}/tree/{COMMIT}":
            self._json(200, [self._entry(name) for name in self.files])
        elif path.startswith(resolve):
            content = self.files.get(path[len(resolve) :].partition("/")[2])
            missing = {"X-Error-Code": "EntryNotFound"} if content is None else {}
            headers = {"ETag": f'"{_sha1(content or b"")}"', "X-Repo-Commit": COMMIT, **missing}
            self._send(404 if content is None else 200, content or b"", headers)
        elif path.startswith(api):
            self._json(404, {}, {"X-Error-Code": "EntryNotFound"})
        else:
            self._json(404, {}, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _entry(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        return {"type": "file", "path": name, "oid": _sha1(content), "size": len(content)}

    def _json(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        headers = {"Content-Type": "application/json", **(headers or {})}
        self._send(status, json.dumps(body).encode(), headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test output clean."""


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
