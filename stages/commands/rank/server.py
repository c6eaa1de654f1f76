"""The local page: an HTTP server on 127.0.0.1 for one person, who has its address.

The address carries a token behind `#`, which browsers do not send; the page's script sends it as a header with each
request, which a page of another origin cannot do unasked, and no answer here permits. What is asked without the token,
by another name of this machine (DNS rebinding) or from another origin is refused. The page itself holds no data.
"""

import base64
import hashlib
import hmac
import json
import re
import secrets
import sys
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from schemas import Strict
from schemas.errors import StageError, refuse
from stages.commands.rank.session import Session
from stages.commands.rank.verdicts import NOTE_CHARACTERS, Groups

PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
BODY_BYTES = 1 << 20
IDLE_SECONDS = 30


def _digest(element: str) -> str:
    """The page's only script or style, as a policy names it."""
    inline = re.search(f"<{element}>(.*?)</{element}>", PAGE, re.S)
    assert inline is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline[1].encode()).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src {_digest('script')}; style-src {_digest('style')}; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Judgement(Strict):
    """What the page sends of an item."""

    verdict: Groups | Literal["up", "down"] | None
    note: str = Field(default="", max_length=NOTE_CHARACTERS)
    seconds: float = Field(ge=0, le=1e6)


class Server(ThreadingHTTPServer):
    """Serves one session, until `finish` was asked for or it is shut down."""

    daemon_threads = True

    def __init__(self, session: Session, port: int, finish: Callable[[], list[str]]) -> None:
        """`finish` writes the rows and returns lines for people. Raises StageError where the port is taken."""
        try:
            super().__init__(("127.0.0.1", port), partial(_Handler, session, finish))
        except OSError as error:
            fix = "name a free port, or leave it out"
            raise refuse("--port", port, f"it cannot be used: {error.strerror}.", fix) from error
        self.token = secrets.token_urlsafe(32)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a page that was closed before it had its answer
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """The page's address, with the token."""
        return f"http://127.0.0.1:{self.server_port}/#{self.token}"


class _Handler(BaseHTTPRequestHandler):
    """A connection: `GET /` is the page, `GET /item[/N]` an item, `POST /item/N` a verdict, `POST /finish` the end."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    server: Server

    def __init__(self, session: Session, finish: Callable[[], list[str]], *connection: Any) -> None:
        self.session, self.finish_session = session, finish
        super().__init__(*connection)

    def version_string(self) -> str:
        return "alignflow"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for the person who ranks."""

    def do_GET(self) -> None:
        if self._stranger():
            return
        if self.path == "/":
            return self._answer(200, PAGE)
        number = self._number()
        if self._allowed() and number != -1:
            self._answer(200, self.session.view(self.session.next_open() if number is None else number))

    def do_POST(self) -> None:
        if self._stranger() or not self._allowed():
            return
        if self.path == "/finish":
            try:
                lines = self.finish_session()
            except (StageError, OSError) as error:
                return self._answer(507, f"The rows could not be written: {error}")
            self._answer(200, {"lines": lines})
            return self.server.shutdown()
        number = self._number()
        size = self.headers.get("Content-Length", "")
        if number == -1:
            return
        if number is None or not (size.isascii() and size.isdigit() and int(size) <= BODY_BYTES):
            return self._answer(400, "This is not a verdict.")
        body = self.rfile.read(int(size))
        try:
            told = Judgement.model_validate_json(body)
            self.session.judge(number, told.verdict, told.note, told.seconds)
        except (ValidationError, StageError) as error:
            return self._answer(400, str(error) if isinstance(error, StageError) else "This is not a verdict.")
        except OSError as error:
            return self._answer(
                507, f"This could not be saved: {error.strerror}. Fix: make room, then press Next again."
            )
        self._answer(200, self.session.view(self.session.next_open(number)))

    def _stranger(self) -> bool:
        """Refuse who asks by another name, or from a page of another origin; whether that was so."""
        hosts = [f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")]
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host in hosts and origin in (None, f"http://{host}"):
            return False
        self._answer(403, "Only its own page may use this server.")
        return True

    def _allowed(self) -> bool:
        """Whether the token was sent, compared in constant time; else refuse."""
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")
        if hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            return True
        self._answer(401, "This address is not valid any more. Fix: take the one that the command prints.")
        return False

    def _number(self) -> int | None:
        """The item that the path names; None where it names none, and -1, refused, where there is no such thing."""
        match = re.fullmatch(r"/item(?:/(\d{1,9}))?", self.path, re.ASCII)
        if match is not None and (match[1] is None or int(match[1]) < len(self.session.items)):
            return None if match[1] is None else int(match[1])
        self._answer(404, "There is nothing here.")
        return -1

    def _answer(self, status: int, content: str | dict[str, Any]) -> None:
        """Send a whole answer; after a refusal the connection is closed, since its request was perhaps not read."""
        page = content is PAGE
        text = content if isinstance(content, str) else json.dumps(content)
        kind = "text/html" if page else "text/plain" if isinstance(content, str) else "application/json"
        body = text.encode("utf-8")
        self.send_response(status)
        for name, value in {
            **HEADERS,
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
        }.items():
            self.send_header(name, value)
        if status != 200:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)
