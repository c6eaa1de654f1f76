"""Who gets in to the servers of `alignflow up`, over HTTP, websockets and from pages in a real browser; and what those
who are in cannot make a worker do.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from flows.servers import passwords
from flows.servers.address_file import Addresses
from tests.support import forks, homes, live_servers, web
from tests.system.test_ui import browsing

pytestmark = pytest.mark.slow

EVIL = {"Origin": "http://evil.example"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, ready: Path) -> Path:
    return homes.furnish(tmp_path_factory.mktemp("door"), ready)


@pytest.fixture(scope="module")
def where(home: Path) -> Iterator[Addresses]:
    with live_servers.forked_up(home, "--pool", "cpu", "--limit", "2") as addresses:
        yield addresses


def pages(where: Addresses) -> str:
    return where.prefect.removesuffix("/api")


# --- Without a password -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", [{}, EVIL, {"Origin": "http://127.0.0.1:8888"}])
def test_nobody_starts_a_run_without_the_password(where: Addresses, origin: dict[str, str]) -> None:
    refused = (401,) if not origin else (403,)
    for path in ("flows/", "deployments/", "deployments/x/create_flow_run", "flow_runs/", "work_pools/filter"):
        assert (
            live_servers.request("POST", f"{where.prefect}/{path}", json={"name": "x"}, headers=origin).status_code
            in refused
        )
    for path in ("experiments/create", "experiments/search", "registered-models/create"):
        url = f"{where.mlflow}/api/2.0/mlflow/{path}"
        assert live_servers.request("POST", url, json={"name": "x"}, headers=origin).status_code in refused


def test_a_foreign_page_gets_no_permission(where: Addresses) -> None:
    wanted = {**EVIL, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    for url in (f"{where.prefect}/flows/", f"{where.mlflow}/api/2.0/mlflow/experiments/create"):
        for origin in ("http://evil.example", "http://localhost:9999", "null"):
            answer = live_servers.request("OPTIONS", url, headers={**wanted, "Origin": origin})
            assert answer.status_code == 403
            assert not [name for name in answer.headers if name.startswith("access-control")]
    own = {**wanted, "Origin": pages(where)}
    answer = live_servers.request("OPTIONS", f"{where.prefect}/flows/", headers=own)
    assert answer.headers["access-control-allow-origin"] == pages(where)


@pytest.mark.parametrize("host", ["evil.example", "10.evil.example", "192.168.evil.example", "172.16.evil.example"])
def test_rebound_names_are_refused_with_the_password_too(home: Path, where: Addresses, host: str) -> None:
    for url in (f"{where.prefect}/flows/count", f"{where.mlflow}/api/2.0/mlflow/experiments/search?max_results=1"):
        method = "POST" if "count" in url else "GET"
        assert live_servers.ask(home, method, url).status_code == 200
        assert live_servers.ask(home, method, url, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("path", ["events/in", "events/out", "logs/out"])
def test_websockets_ask_for_the_password(home: Path, where: Addresses, path: str) -> None:
    url = f"{where.prefect.replace('http', 'ws', 1)}/{path}"
    word = passwords.Passwords.model_validate_json((home / "passwords.json").read_text()).prefect
    with pytest.raises(InvalidStatus) as refused:
        connect(url, origin="http://evil.example", subprotocols=["prefect"])  # type: ignore[arg-type, list-item]
    assert refused.value.response.status_code == 403

    def let_in(token: str | None) -> bool:
        with connect(url, subprotocols=["prefect"]) as socket:  # type: ignore[list-item]
            socket.send(json.dumps({"type": "auth", "token": token}))
            with contextlib.suppress(ConnectionClosed):
                return json.loads(socket.recv(timeout=live_servers.PATIENCE))["type"] == "auth_success"
        return False

    assert let_in(word)
    assert not let_in(None) and not let_in("") and not let_in(word[:-1])
    with contextlib.suppress(InvalidStatus), connect(url) as socket, pytest.raises(ConnectionClosed):
        socket.recv(timeout=live_servers.PATIENCE)  # an old client, which says nothing of itself


def routes_of_prefect(file: Path) -> None:
    """Write down method and path of all that Prefect's server answers."""
    from prefect.server.api.server import create_app

    def routes(app: Any, before: str = "") -> Iterator[tuple[str, str]]:
        for one in app.routes:
            if hasattr(one, "methods") and one.methods:
                yield from ((method, before + one.path) for method in one.methods)
            elif hasattr(one, "app") and hasattr(one.app, "routes"):
                yield from routes(one.app, before + one.path)

    file.write_text(json.dumps(sorted(set(routes(create_app())))))


def routes_of_mlflow(file: Path, settings: dict[str, str]) -> None:
    """The same of MLflow's."""
    os.environ.update(settings)
    from mlflow.server import app as flask
    from mlflow.server.auth import create_app

    app: Any = create_app()
    native = [(method, one.path) for one in app.routes for method in getattr(one, "methods", None) or ()]
    rules = [(method, rule.rule) for rule in flask.url_map.iter_rules() for method in rule.methods or ()]
    file.write_text(json.dumps(sorted({*rules, *native})))


OPEN = (
    r"/(api/)?(health|ready|version|docs|redoc|openapi\.json|ui-settings|static/.*|static-files/.*)"
    r"|/(docs/oauth2-redirect|api/docs|api/openapi\.json|alignflow/login)"
    r"|/(ajax-)?api/3\.0/mlflow/server-info"
)
"""What answers without a password: whether the server lives, what its interface is, and files of its pages."""


def test_every_route_of_both_servers_asks_for_the_password(where: Addresses, home: Path, tmp_path: Path) -> None:
    settings = {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path / 'routes.db'}",
        "MLFLOW_AUTH_CONFIG_PATH": str(home / "mlflow-auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of no use",
        "_MLFLOW_AUTH_ADMIN_BOOTSTRAPPED": "true",
        "_MLFLOW_SGI_NAME": "uvicorn",
    }
    assert forks.run(routes_of_prefect, tmp_path / "prefect") == 0
    assert forks.run(routes_of_mlflow, tmp_path / "mlflow", settings) == 0
    servers = {pages(where): "prefect", where.mlflow: "mlflow"}
    routes = {url: json.loads((tmp_path / name).read_text()) for url, name in servers.items()}
    wrong = ({}, {"Authorization": "Basic YWRtaW4yOnBhc3N3b3JkMTIzNA=="}, {"Authorization": "Bearer x"})
    count, let_in = 0, set()
    for server, named in routes.items():
        with httpx.Client(base_url=server, timeout=live_servers.PATIENCE) as client:
            for method, route in ((method, route) for method, route in named if method not in ("HEAD", "OPTIONS")):
                path = re.sub(r"\{[^}]*\}|<[^>]*>", "0", route)
                for headers in wrong:
                    status = client.request(method, path, headers=headers).status_code
                    count += 1
                    if status not in (401, 403) and not re.fullmatch(OPEN, path):
                        let_in.add((method, path, status))
    print(f"{count} requests over {count // len(wrong)} routes")
    assert let_in == set()
    assert count > 1200


# --- From pages in a browser ------------------------------------------------------------------------------------------

ATTACK = """async ([prefect, mlflow]) => {
  const said = {};
  const json = {method: "POST", headers: {"Content-Type": "application/json"}, body: '{"name": "from-a-page"}'};
  const plain = {method: "POST", mode: "no-cors", credentials: "include", body: '{"name": "from-a-page"}'};
  const urls = {prefect: prefect + "/flows/", mlflow: mlflow + "/api/2.0/mlflow/experiments/create"};
  for (const [name, url] of Object.entries(urls)) {
    for (const [how, options] of [["json", json], ["cookies", {...json, credentials: "include"}], ["plain", plain]]) {
      said[name + " " + how] = await fetch(url, options).then(answer => answer.type, () => "blocked");
    }
  }
  said.socket = await new Promise(done => {
    const socket = new WebSocket(prefect.replace("http", "ws") + "/events/in", "prefect");
    socket.onopen = () => done("open"); socket.onerror = () => done("blocked");
  });
  return said;
}"""


@pytest.fixture
def foreign() -> Iterator[str]:
    """The address of a page that is not ours."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<title>evil</title>")

        def log_message(self, format: str, *args: Any) -> None: ...

    with web.serving(Page) as url:
        yield f"{url}/"


def test_the_links_log_a_browser_in_and_another_page_gets_nothing_even_then(
    home: Path, where: Addresses, foreign: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(home))
    links = {name: passwords.link(name, url) for name, url in (("Prefect", pages(where)), ("MLflow", where.mlflow))}
    with browsing(tmp_path, foreign) as page:
        before = page.evaluate(ATTACK, [where.prefect, where.mlflow])
        page.goto(links["MLflow"])
        page.get_by_text("Model registry", exact=True).first.wait_for()  # not the menus of traces and prompts
        assert (
            page.evaluate("fetch('/ajax-api/2.0/mlflow/experiments/search?max_results=1').then(r => r.status)") == 200
        )
        assert "alignflow" not in page.evaluate("document.cookie"), "no script sees it"
        page.goto(links["Prefect"])
        page.wait_for_url(re.compile(r"/dashboard|/runs"))
        page.goto(f"{pages(where)}/work-pools")
        page.get_by_text("cpu", exact=True).first.wait_for()
        assert page.evaluate("location.hash") == ""
        page.goto(f"{pages(where)}/alignflow/login#alignflow:wrong")
        page.get_by_text("This link is not valid").wait_for()
        page.goto(foreign)
        after = page.evaluate(ATTACK, [where.prefect, where.mlflow])
    for said in (before, after):
        assert {said["prefect json"], said["prefect cookies"], said["mlflow json"], said["mlflow cookies"]} == {
            "blocked"
        }
        assert said["socket"] == "blocked"
    made = live_servers.ask(home, "POST", f"{where.prefect}/flows/filter", json={}).json()
    assert "from-a-page" not in [flow["name"] for flow in made]
    search = f"{where.mlflow}/api/2.0/mlflow/experiments/search"
    assert "from-a-page" not in live_servers.ask(home, "POST", search, json={"max_results": 100}).text


# --- With the password ------------------------------------------------------------------------------------------------


def test_a_worker_runs_nothing_but_our_flows_whatever_the_server_has(
    home: Path, where: Addresses, tmp_path: Path
) -> None:
    mark = tmp_path / "PWNED"

    def ask(method: str, path: str, **body: Any) -> Any:
        answer = live_servers.ask(home, method, f"{where.prefect}/{path}", json=body)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    flow = ask("POST", "flows/", name="x")["id"]
    base = {"flow_id": flow, "work_pool_name": "cpu", "entrypoint": "flows.stage.stage"}
    template = ask("GET", "work_pools/cpu")["base_job_template"]
    opened = json.loads(json.dumps(template))
    opened["job_configuration"]["command"] = "{{ command }}"
    opened["variables"]["properties"]["command"] = {"type": "string", "default": f"touch {mark}"}
    opened["variables"]["properties"]["env"] = {"type": "object", "default": {}}
    ask("PATCH", "work_pools/cpu", base_job_template=opened)
    script = {"prefect.deployments.steps.run_shell_script": {"script": f"touch {mark}"}}
    tries: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "steps": ({"pull_steps": [script]}, {}),
        "entrypoint": ({"entrypoint": "os.system"}, {}),
        "command": ({}, {"command": f"touch {mark}"}),
        "roots": ({}, {"env": {"ALIGNFLOW_ROOTS": "/"}}),
        "python": ({}, {"env": {"PYTHONPATH": str(tmp_path)}}),
    }
    runs = {}
    for name, (changed, chosen) in tries.items():
        deployment = ask("POST", "deployments/", **base | {"name": name} | changed)["id"]
        state = {"type": "SCHEDULED"}
        runs[name] = ask("POST", f"deployments/{deployment}/create_flow_run", state=state, job_variables=chosen)["id"]
    ask("PATCH", "work_pools/cpu", base_job_template=template)
    end = time.monotonic() + 180
    while left := [one for one in runs.values() if ask("GET", f"flow_runs/{one}")["state"]["type"] in LIVE]:
        assert time.monotonic() < end, left
        time.sleep(1)
    states = {name: ask("GET", f"flow_runs/{one}")["state"] for name, one in runs.items()}
    assert {name: state["type"] for name, state in states.items()} == dict.fromkeys(tries, "FAILED"), states
    assert "pull_steps" in states["steps"]["message"] and "ALIGNFLOW_ROOTS" in states["roots"]["message"]
    assert not mark.exists()


LIVE = {"SCHEDULED", "PENDING", "RUNNING"}
