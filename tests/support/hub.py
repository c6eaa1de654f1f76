"""A server that answers what huggingface_hub asks to push a folder, and keeps what it was sent."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support import web

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """What the server knows and was told."""

    url: str = ""
    who: dict[str, Any] = field(
        default_factory=lambda: {"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}, "orgs": []}
    )
    repos: dict[str, bool] = field(default_factory=dict)
    """Name -> whether it is private."""
    present: list[str] = field(default_factory=list)
    """Files of every repository before the push."""
    files: dict[str, bytes] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    status: dict[str, int] = field(default_factory=dict)
    """The end of a path -> the status that it is answered with."""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def answer(self, body: Any, status: int = 200, **headers: str) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def handle_any(self) -> None:
            path = self.path.partition("?")[0]
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.asked.append(f"{self.command} {path}")
            hub.tokens.add(self.headers.get("Authorization", ""))
            name = "/".join(path.split("/")[3:5])
            if status := next((code for end, code in hub.status.items() if path.endswith(end)), None):
                self.answer({"error": "no"}, status)
            elif path == "/api/whoami-v2":
                self.answer(hub.who)
            elif path == "/api/repos/create":
                asked = json.loads(body)
                whole = (
                    f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
                )
                private = asked["visibility"] == "private" if "visibility" in asked else asked["private"]
                hub.repos.setdefault(whole, private)
                self.answer({"url": f"{hub.url}/{whole}", "name": whole, "id": "1"})
            elif path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                files = json.loads(body)["files"]
                self.answer(
                    {
                        "files": [
                            {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                            for f in files
                        ]
                    }
                )
            elif "/commit/" in path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    if line["key"] == "deletedFile":
                        hub.deleted.append(line["value"]["path"])
                self.answer({"success": True, "commitOid": COMMIT, "commitUrl": f"{hub.url}/{name}/commit/{COMMIT}"})
            elif "/tree/" in path:
                self.answer([{"type": "file", "path": p, "size": 1, "oid": "0" * 40} for p in hub.present])
            elif name in hub.repos:
                files = [{"rfilename": path} for path in hub.present]
                self.answer({"id": name, "private": hub.repos[name], "siblings": files, "sha": "0" * 40, "tags": []})
            else:
                self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

        do_GET = do_POST = handle_any

    return Handler


@contextmanager
def serving() -> Iterator[Hub]:
    """The server, until the block is left."""
    hub = Hub()
    with web.serving(_handler(hub)) as hub.url:
        yield hub
