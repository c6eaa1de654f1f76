"""Who may ask the local page's server, and what it answers."""

import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from stages.commands.rank.server import BODY_BYTES, Server
from tests.support.ranking import FRUIT, TREE, session, told, write


class Page(Server):
    """A server on a free port, and what it saved."""

    def __init__(self, folder: Path) -> None:
        self.person = session(write(folder / "rows.jsonl", [FRUIT, TREE]))
        self.finished = 0
        super().__init__(self.person, 0, self.count)

    def count(self) -> list[str]:
        self.finished += 1
        return ["wrote"]

    def ask(
        self, method: str, path: str, body: object = None, **headers: str | None
    ) -> tuple[int, str, dict[str, str]]:
        """Status, text and headers of an answer; by default its own page asks, with the token."""
        own = {"Host": f"127.0.0.1:{self.server_port}", "Authorization": f"Bearer {self.token}"}
        given = {**own, **{name.capitalize(): value for name, value in headers.items()}}
        text = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        with closing(http.client.HTTPConnection("127.0.0.1", self.server_port, timeout=10)) as connection:
            connection.request(method, path, text, {name: value for name, value in given.items() if value is not None})
            answer = connection.getresponse()
            read = answer.read().decode()
        return answer.status, read, {name.lower(): value for name, value in answer.getheaders()}


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with Page(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


GOOD = {"verdict": [[2], [0, 1]], "note": "", "seconds": 1.5}


def test_the_page_saves_and_goes_on(page: Page) -> None:
    first = json.loads(page.ask("GET", "/item")[1])
    assert (first["number"], first["states"]) == (0, "..") and sorted(first["answers"]) == sorted(FRUIT["responses"])
    status, text, _ = page.ask("POST", "/item/0", GOOD, origin=f"http://127.0.0.1:{page.server_port}")
    assert status == 200 and json.loads(text)["number"] == 1 and json.loads(text)["states"] == "j."
    (saved,) = told(page.person)
    assert saved.verdict == [[saved.shown[2]], [saved.shown[0], saved.shown[1]]] and saved.seconds == 1.5
    assert json.loads(page.ask("GET", "/item/0")[1])["verdict"] == GOOD["verdict"]
    assert json.loads(page.ask("POST", "/item/1", {"verdict": None, "seconds": 0})[1])["number"] is None
    assert json.loads(page.ask("POST", "/finish", {})[1]) == {"lines": ["wrote"]} and page.finished == 1


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": None}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Bearer é"}, 401),
        ({"authorization": "TOKEN"}, 401),  # the token alone, without its scheme
        ({"host": "evil.example"}, 403),  # a name that was bound to this machine
        ({"host": "127.0.0.1"}, 403),
        ({"host": "127.0.0.1:1"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"origin": "https://127.0.0.1:PORT"}, 403),
        ({"origin": "http://localhost:PORT"}, 403),  # another origin than 127.0.0.1
    ],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/item"), ("POST", "/item/0"), ("POST", "/finish")])
def test_strangers_are_refused(page: Page, headers: dict[str, str | None], status: int, method: str, path: str) -> None:
    known = {"PORT": str(page.server_port), "TOKEN": page.token}
    filled = {
        name: value and re.sub("PORT|TOKEN", lambda match: known[match[0]], value) for name, value in headers.items()
    }
    answered, text, got = page.ask(method, path, GOOD if method == "POST" else None, **filled)
    assert answered == status and "An apple." not in text and page.token not in text
    assert not [name for name in got if name.startswith("access-control")]
    assert told(page.person) == [] and page.finished == 0


def test_a_preflight_of_another_page_gets_no_permission(page: Page) -> None:
    status, _, headers = page.ask("OPTIONS", "/item/0", origin="http://evil.example")
    assert status == 501 and not [name for name in headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/item/0", {**GOOD, "verdict": [[0]]}, 400),
        ("/item/0", {**GOOD, "verdict": "up"}, 400),
        ("/item/0", {**GOOD, "note": "n" * 4001}, 400),
        ("/item/0", {**GOOD, "seconds": -1}, 400),
        ("/item/0", {**GOOD, "more": 1}, 400),
        ("/item/0", b"[" * 100_000, 400),
        ("/item/0", None, 400),
        ("/item/2", GOOD, 404),
        ("/item/-1", GOOD, 404),
        ("/item", GOOD, 400),
        ("/../etc/passwd", GOOD, 404),
    ],
)
def test_what_is_no_verdict_is_refused(page: Page, path: str, body: Any, status: int) -> None:
    assert page.ask("POST", path, body)[0] == status
    assert told(page.person) == []


@pytest.mark.parametrize("length", [str(BODY_BYTES + 1), "9" * 30, "-1", "²"])
def test_a_body_of_any_length_is_not_waited_for(page: Page, length: str) -> None:
    answered, _, headers = page.ask(
        "POST", "/item/0", None, **{"content-length": length.encode("utf-8").decode("latin-1")}
    )
    assert answered == 400 and headers["connection"] == "close"


def test_a_full_disk_is_said_and_nothing_is_lost(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(verdict: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(page.person.verdicts, "add", full)
        status, text, _ = page.ask("POST", "/item/0", GOOD)
        assert (status, text) == (
            507,
            "This could not be saved: No space left on device. Fix: make room, then press Next again.",
        )
    assert json.loads(page.ask("GET", "/item")[1])["number"] == 0
    assert page.ask("POST", "/item/0", GOOD)[0] == 200


def test_the_page_is_one_file_that_holds_no_data_and_fetches_nothing(page: Page) -> None:
    status, text, headers = page.ask("GET", "/", authorization=None)
    assert status == 200 and "An apple." not in text and page.token not in text
    assert not re.search(r"https?:|src=|href=|@import|url\(|innerHTML|insertAdjacent|document\.write|eval\(", text)
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'" and "unsafe" not in headers["content-security-policy"]
    assert headers["cache-control"] == "no-store" and headers["x-content-type-options"] == "nosniff"


def test_it_listens_on_this_machine_alone_and_each_time_with_another_token(page: Page, tmp_path: Path) -> None:
    assert (
        page.server_address[0] == "127.0.0.1" and page.address == f"http://127.0.0.1:{page.server_port}/#{page.token}"
    )
    (tmp_path / "more").mkdir()
    with Page(tmp_path / "more") as other:
        assert other.token != page.token and len(other.token) == 43  # 32 bytes in base64


def test_who_says_nothing_holds_nobody_up(page: Page) -> None:
    with socket.create_connection(("127.0.0.1", page.server_port)) as silent:
        silent.sendall(b"POST /item/0 HTTP/1.1\r\n")
        assert page.ask("GET", "/item")[0] == 200
