"""A model hub on 127.0.0.1 that serves folders, for children that get it as HF_ENDPOINT."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """One repository: commits by hash, the hashes that names stand for, and its pull requests."""

    hub_id: str
    commits: dict[str, Path]
    names: dict[str, str]
    history: dict[str, list[str]] = field(default_factory=dict)  # newest first
    pull_requests: list[dict[str, Any]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str) -> tuple[dict[str, str], bytes] | None:
        """Headers and body for a path, or None where there is nothing."""
        if match := re.fullmatch(rf"/api/models/{self.hub_id}(/revision/(?P<name>.+))?", path):
            sha = self._commit(match["name"] or "main")
            return sha and _json({"id": self.hub_id, "sha": sha, "siblings": [
                {"rfilename": file.name} for file in sorted(self.commits[sha].iterdir())
            ]})  # fmt: skip
        if match := re.fullmatch(rf"/api/models/{self.hub_id}/tree/(?P<name>.+)", path):
            sha = self._commit(match["name"])
            return sha and _json([
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _hash(file.read_bytes())}
                for file in sorted(self.commits[sha].iterdir())
            ])  # fmt: skip
        if path == f"/api/models/{self.hub_id}/discussions":
            return _json({"count": len(self.pull_requests), "start": 0, "discussions": self.pull_requests})
        if match := re.fullmatch(rf"/api/models/{self.hub_id}/commits/(?P<name>.+)", path):
            date = "2023-01-01T00:00:00.000Z"
            return _json([
                {"id": sha, "title": "", "message": "", "date": date, "authors": []}
                for sha in self.history[match["name"]]
            ])  # fmt: skip
        if match := re.fullmatch(rf"/{self.hub_id}/resolve/(?P<name>[^/]+)/(?P<file>.+)", path):
            sha = self._commit(match["name"])
            file = sha and self.commits[sha] / match["file"]
            if file and file.is_file():
                body = file.read_bytes()
                return {"ETag": f'"{_hash(body)}"', "X-Repo-Commit": sha or ""}, body
        return None

    def _commit(self, name: str) -> Any:
        return name if name in self.commits else self.names.get(name)


def pull_request(number: int, **changes: Any) -> dict[str, Any]:
    """A pull request as the hub's bot opens it when it converts weights."""
    return {
        "title": "Adding `safetensors` variant of this model", "num": number, "status": "open",
        "author": {"name": "SFconvertbot"}, "createdAt": "2023-01-01T00:00:00.000Z",
        "repo": {"name": "org/model", "type": "model"}, "isPullRequest": True, **changes,
    }  # fmt: skip


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve the hub on a free port of 127.0.0.1."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            found = hub.answer(path)
            headers, body = found or ({"X-Error-Code": "EntryNotFound"}, b"")
            self.send_response(200 if found else 404)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()


def _json(content: Any) -> tuple[dict[str, str], bytes]:
    return {"Content-Type": "application/json"}, json.dumps(content).encode()


def _hash(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()
