"""What stands before both servers in their own processes: names, origins, and the page that logs a browser in.

MLflow trusts pages of any port of this machine, and Prefect those of any site. Here only a server's own pages may ask
it anything, and only by a name that is its own, so that no other page and no rebound name (DNS rebinding) reaches it,
not even with a password that the browser remembers.

    python -P -m flows.servers.door server start ...     Prefect's server; the options are those of `prefect`
    mlflow server --uvicorn-opts "--http flows.servers.door:Mlflow"
"""

import base64
import fnmatch
import hashlib
import hmac
import os
import re
import runpy
import sys
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from functools import partial
from typing import Any, Literal
from urllib.parse import urlsplit

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from flows.execution import settings_files
from flows.servers.passwords import LOGIN
from schemas import environment

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]

SCRIPT = """
const words = decodeURIComponent(location.hash.slice(1)), basic = btoa(words);
history.replaceState(null, "", location.pathname);
fetch(location.pathname, {method: "POST", headers: {Authorization: "Basic " + basic}}).then(answer => {
  if (!answer.ok) { document.body.textContent = "This link is not valid (any more). Fix: take the one that alignflow up, or alignflow ui, prints."; return; }
  const prefect = answer.headers.get("X-Keep") == "storage";
  if (prefect) localStorage.setItem("prefect-password", basic);
  location.replace(prefect ? "/" : "/#/experiments?workflowType=machine_learning");  // MLflow's "/" opens on traces
});
"""  # noqa: E501
PAGE = f'<!doctype html><meta charset="utf-8"><title>alignflow</title><body>Logging in ...<script>{SCRIPT}</script>'
POLICY = (
    "default-src 'none'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
)


class Door:
    """An ASGI application before another one."""

    def __init__(self, app: Any, keep: Literal["cookie", "storage"]) -> None:
        """`keep`: where a browser keeps that it is logged in. Prefect's pages look into their storage; for MLflow it
        is a cookie, which no script sees and no other site sends.
        """
        self.app, self.keep = app, keep
        self.hosts = split(os.environ.get("MLFLOW_SERVER_ALLOWED_HOSTS", ""))
        own = "PREFECT_SERVER_CORS_ALLOWED_ORIGINS" if keep == "storage" else "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"
        self.origins = split(os.environ.get(own, ""))
        word = environment.login()
        self.basic = b"Basic " + base64.b64encode(word.encode()) if word else None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        problem = self.problem(headers)
        if problem:
            return await refuse(scope, send, problem)
        if scope["type"] == "http" and scope["path"] == LOGIN and self.basic:
            return await self.log_in(scope, headers, send)
        # MLflow ends with an error of its own where it finds no user and password in what it is given.
        # With users of the operator's own (no login of ours), how they show who they are is the operator's matter.
        if self.keep == "cookie" and self.basic and not readable(headers.get(b"authorization")):
            return await answer(send, 401, "Only user and password are taken here, as Basic.")
        wanted = self.keep == "cookie" and self.basic and b"authorization" not in headers and by_own_page(headers)
        if wanted:
            ours = f"{cookie_name(scope)}={self.token()}".encode()
            cookies = headers.get(b"cookie", "").split(";")
            if any(hmac.compare_digest(one.strip().encode(), ours) for one in cookies):
                scope = {**scope, "headers": [*scope["headers"], (b"authorization", self.basic)]}
        await self.app(scope, receive, send)

    def problem(self, headers: dict[bytes, str]) -> str | None:
        """Why nobody but a page of a stranger would ask so; None where that is not so."""
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        # The form first: a pattern's `*` would match anything.
        known = re.fullmatch(r"([\w.-]+|\[[\da-fA-F:.]+\])(:\d+)?", host) is not None
        if self.hosts and not (known and any(fnmatch.fnmatchcase(host.lower(), name.lower()) for name in self.hosts)):
            return "This server does not go by that name. Fix: add it to MLFLOW_SERVER_ALLOWED_HOSTS."
        if origin is None or origin in self.origins or "*" in self.origins:
            return None
        own = urlsplit(origin)
        if own.scheme in ("http", "https") and own.netloc == host:
            return None
        return "Pages of another origin may not use this server."

    async def log_in(self, scope: Message, headers: dict[bytes, str], send: Send) -> None:
        """The login page, and what its script asks."""
        if scope["method"] in ("GET", "HEAD"):
            return await answer(send, 200, PAGE, [(b"content-security-policy", POLICY.encode())])
        given = headers.get(b"authorization", "").encode("latin-1")
        if scope["method"] != "POST" or not hmac.compare_digest(given, self.basic or b""):
            return await answer(send, 401, "This is not the password.")
        more = [(b"x-keep", self.keep.encode())]
        if self.keep == "cookie":
            value = f"{cookie_name(scope)}={self.token()}; Path=/; HttpOnly; SameSite=Strict"
            more.append((b"set-cookie", value.encode()))
        await answer(send, 200, "", more)

    def token(self) -> str:
        """What the cookie holds: proof of the password, and not the password."""
        return hmac.new(self.basic or b"", b"alignflow browser", "sha256").hexdigest()


def by_own_page(headers: dict[bytes, str]) -> bool:
    """Whether a page of this server asks, or a person who typed an address or followed a link. A page of another port
    of this machine is of the same site: what it embeds (scripts, pictures) is asked for with our cookie, and without an
    origin.
    """
    site = headers.get(b"sec-fetch-site", "none")  # of no browser, or an old one: as before
    return site in ("none", "same-origin") or b"origin" in headers or headers.get(b"sec-fetch-dest") == "document"


def readable(authorization: str | None) -> bool:
    """Whether an Authorization header, where there is one, holds user and password."""
    scheme, _, words = (authorization or "Basic Og==").partition(" ")
    try:
        return scheme.lower() == "basic" and ":" in base64.b64decode(words, validate=True).decode()
    except ValueError:
        return False


def split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def cookie_name(scope: Message) -> str:
    """A name per port: browsers send cookies to all ports of a host."""
    return f"alignflow-{(scope.get('server') or ('', 0))[1]}"


async def refuse(scope: Message, send: Send, problem: str) -> None:
    """Answer with 403 and why; a websocket is closed before it is one."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": problem})
    else:
        await answer(send, 403, problem)


async def answer(send: Send, status: int, text: str, more: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Send a whole answer that nobody keeps."""
    kind = b"text/html; charset=utf-8" if text.startswith("<") else b"text/plain; charset=utf-8"
    headers = [(b"content-type", kind), (b"cache-control", b"no-store"), (b"referrer-policy", b"no-referrer"), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


class Mlflow(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol, which puts the door before the application: MLflow starts uvicorn itself, with options."""

    keep: Literal["cookie", "storage"] = "cookie"

    def __init__(self, config: Any, *others: Any, **named: Any) -> None:
        if not isinstance(config.loaded_app, Door):
            config.loaded_app = Door(config.loaded_app, self.keep)  # websockets take it from there too
        super().__init__(config, *others, **named)  # pyright: ignore[reportCallIssue]


class Prefect(Mlflow):
    """The same for Prefect's server."""

    keep = "storage"


def main(options: list[str]) -> None:
    """Run Prefect's command line; its server starts with the door."""
    settings_files.leave_out()
    uvicorn.run = partial(uvicorn.run, http=Prefect)
    sys.argv = ["prefect", *options]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
