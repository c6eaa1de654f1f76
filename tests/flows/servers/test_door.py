"""The door before the servers: names, origins and the login page, asked as uvicorn asks it."""

import asyncio
import base64
from typing import Any

import pytest

from flows.servers.door import Door
from flows.servers.mlflow_prefect import allowed_hosts

WORD = "alignflow:a long password"
BASIC = "Basic " + base64.b64encode(WORD.encode()).decode()
OWN = {"host": "127.0.0.1:5000"}


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", allowed_hosts("127.0.0.1"))
    monkeypatch.setenv("ALIGNFLOW_LOGIN", WORD)


def asked(
    keep: Any = "cookie", path: str = "/x", method: str = "POST", kind: str = "http", **headers: str
) -> list[dict[str, Any]]:
    """The messages that a request is answered with; the first one behind the door holds what reached it."""
    sent: list[dict[str, Any]] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        sent.append({"type": "inside", "headers": dict(scope["headers"])})

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "path": path, "method": method, "headers": raw, "server": ("127.0.0.1", 5000)}
    asyncio.run(Door(inner, keep)(scope, None, send))  # type: ignore[arg-type]
    return sent


def inside(**request: Any) -> bool:
    return asked(**request)[0]["type"] == "inside"


@pytest.mark.parametrize(
    ("host", "let_in"),
    [
        ("127.0.0.1:5000", True),
        ("localhost", True),
        ("LOCALHOST:8080", True),
        ("[::1]:5000", True),
        ("evil.example", False),
        ("10.evil.example", False),
        ("192.168.evil.example:5000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:5000", False),
        ("localhost:5000@evil.example", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_only_own_names_are_answered(host: str, let_in: bool, kind: str) -> None:
    assert inside(kind=kind, host=host) is let_in


@pytest.mark.parametrize(
    ("origin", "let_in"),
    [
        ("http://127.0.0.1:5000", True),
        ("https://127.0.0.1:5000", True),  # behind a proxy with TLS
        ("http://127.0.0.1:5001", False),
        ("http://localhost:5000", False),
        ("http://127.0.0.1", False),
        ("http://evil.example", False),
        ("http://127.0.0.1:5000.evil.example", False),
        ("http://evil@127.0.0.1:5000", False),
        ("null", False),
        ("", False),
    ],
)
@pytest.mark.parametrize(
    ("kind", "method"), [("http", "POST"), ("http", "GET"), ("http", "OPTIONS"), ("websocket", "")]
)
def test_only_own_pages_may_ask(origin: str, let_in: bool, kind: str, method: str) -> None:
    answer = asked(kind=kind, method=method, origin=origin, **OWN)
    assert (answer[0]["type"] == "inside") is let_in
    if not let_in:
        assert answer[0] == answer[0] | ({"status": 403} if kind == "http" else {"type": "websocket.close"})
        assert not [name for name, _ in answer[0].get("headers", []) if name.startswith(b"access-control")]


def test_an_origin_that_the_operator_names_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", "https://mlflow.example, https://b.example")
    assert inside(origin="https://b.example", **OWN) and not inside(origin="https://c.example", **OWN)


def test_the_login_page_gives_a_cookie_that_stands_for_the_password() -> None:
    page = asked(path="/alignflow/login", method="GET", **OWN)
    assert page[0]["status"] == 200 and WORD.encode() not in page[1]["body"] and BASIC.encode() not in page[1]["body"]
    wrong = asked(path="/alignflow/login", authorization=BASIC + "x", **OWN)
    assert wrong[0]["status"] == 401 and b"set-cookie" not in dict(wrong[0]["headers"])
    right = asked(path="/alignflow/login", authorization=BASIC, **OWN)
    cookie = dict(right[0]["headers"])[b"set-cookie"].decode()
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= {part.strip() for part in cookie.split(";")}
    value = cookie.split(";")[0]
    assert asked(cookie=f"a=b; {value}", **OWN)[0]["headers"][b"authorization"] == BASIC.encode()
    for bad in (value[:-1], f"{value}0", value.replace("5000", "5001"), "alignflow-5000="):
        assert b"authorization" not in asked(cookie=bad, **OWN)[0]["headers"]
    own = asked(cookie=value, authorization="Basic eDp5", **OWN)
    assert own[0]["headers"][b"authorization"] == b"Basic eDp5", "who says who they are is taken at their word"


@pytest.mark.parametrize(
    ("site", "dest", "logged_in"),
    [
        ("same-origin", "empty", True),
        ("none", "document", True),  # an address that was typed
        ("same-site", "document", True),  # a link of Prefect's pages, on another port
        ("same-site", "script", False),
        ("same-site", "image", False),
        ("same-site", "iframe", False),
        ("cross-site", "script", False),
    ],
)
def test_what_a_page_of_another_port_embeds_is_not_logged_in(site: str, dest: str, logged_in: bool) -> None:
    right = asked(path="/alignflow/login", authorization=BASIC, **OWN)
    cookie = dict(right[0]["headers"])[b"set-cookie"].decode().partition(";")[0]
    reached = asked(method="GET", cookie=cookie, sec_fetch_site=site, sec_fetch_dest=dest, **OWN)
    assert (b"authorization" in reached[0]["headers"]) is logged_in


def test_prefects_pages_keep_the_password_themselves() -> None:
    right = asked("storage", path="/alignflow/login", authorization=BASIC, **OWN)
    assert dict(right[0]["headers"])[b"x-keep"] == b"storage" and b"set-cookie" not in dict(right[0]["headers"])


def test_without_a_word_there_is_no_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGNFLOW_LOGIN")
    assert inside(path="/alignflow/login", authorization="", **OWN)
    assert inside(authorization="Bearer x", **OWN), "users of the operator's own may show who they are in another way"
    assert b"authorization" not in asked(cookie="alignflow-5000=", **OWN)[0]["headers"]


@pytest.mark.parametrize("given", ["Bearer x", "Basic", "Basic !", "Basic eA==", "x", "Digest eDp5", "Basic /w=="])
def test_what_holds_no_password_never_reaches_mlflow(given: str) -> None:
    assert asked(authorization=given, **OWN)[0]["status"] == 401
    assert inside(keep="storage", authorization=given, **OWN), "Prefect says so itself"
