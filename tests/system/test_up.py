"""Servers, pools and workers by one command: twice, killed, deployed to, with passwords; what is said beforehand."""

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.results import announce
from flows.servers import address_file, checks, mlflow_prefect, pools, supervisor
from flows.servers.address_file import Addresses
from schemas.errors import EXIT_CODES, StageError
from tests.support import homes, live_servers
from tests.support.commands import alignflow
from tests.support.processes import below, left_after


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of servers in the environment."""
    for name in ("PREFECT_SERVER_API_AUTH_STRING", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_AUTH_CONFIG_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MLFLOW_FLASK_SERVER_SECRET_KEY", raising=False)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path))


# --- One command, a real machine --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, ready: Path) -> Path:
    return homes.furnish(tmp_path_factory.mktemp("up"), ready)


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[tuple["subprocess.Popen[str]", Addresses]]:
    with live_servers.up(home) as started:
        yield started


@pytest.fixture(scope="module")
def first_deploy(home: Path, running: tuple["subprocess.Popen[str]", Addresses]) -> str:
    """What `alignflow deploy` says the first time."""
    answer = alignflow("deploy", ALIGNFLOW_HOME=str(home))
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def deployed(home: Path, where: Addresses, **headers: str) -> dict[str, str]:
    """Kind and name -> id of the pools, deployments and automations on the server."""
    kinds, more = ("work_pools", "deployments", "automations"), {"json": {}, "headers": headers}
    answers = {kind: live_servers.ask(home, "POST", f"{where.prefect}/{kind}/filter", **more) for kind in kinds}
    return {f"{kind} {one['name']}": one["id"] for kind in kinds for one in answers[kind].raise_for_status().json()}


def let_in(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process's MLflow client in."""
    for name, value in live_servers.keys(home).items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
def test_a_second_one_says_where_the_first_is(
    home: Path, running: tuple["subprocess.Popen[str]", Addresses], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, where = running
    again = alignflow("up", ALIGNFLOW_HOME=str(home))
    assert again.returncode == 0, again.stderr
    for said in (where.mlflow, where.prefect.removesuffix("/api"), str(process.pid), "cpu, gpu"):
        assert said in again.stdout
    assert process.poll() is None
    other = alignflow("up", "--pool", "huge", ALIGNFLOW_HOME=str(home))
    assert other.returncode == EXIT_CODES["refused"] and "--pool = huge" in other.stderr
    monkeypatch.setenv("ALIGNFLOW_HOME", str(home))
    assert address_file.found() == where


@pytest.mark.slow
def test_deploying_twice_is_idempotent_and_a_worker_takes_a_run_up(
    home: Path, running: tuple["subprocess.Popen[str]", Addresses], first_deploy: str, tmp_path: Path
) -> None:
    _, where = running
    assert "stage/cpu on cpu" in first_deploy
    before = deployed(home, where)
    second = alignflow("deploy", ALIGNFLOW_HOME=str(home))
    assert second.returncode == 0, second.stderr
    assert deployed(home, where) == before and set(before) >= {"deployments pipeline", "automations alignflow zombies"}
    assert "created" not in second.stdout and "updated" not in second.stdout
    # through the worker, and from a host that shares nothing but the address
    ended = live_servers.run_stage(home)
    assert ended["state"] == "Completed", ended
    got = live_servers.fetch(
        ended["key"], tmp_path / "elsewhere", MLFLOW_TRACKING_URI=where.mlflow, **live_servers.keys(home)
    )
    assert got["location"].startswith("mlflow-artifacts:") and got["files"]
    assert got["folder"].startswith(str(tmp_path / "elsewhere"))


@pytest.mark.slow
def test_checks_name_pool_worker_and_experiment(
    home: Path,
    running: tuple["subprocess.Popen[str]", Addresses],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, where = running
    monkeypatch.setenv("MLFLOW_TRACKING_URI", where.mlflow)
    let_in(home, monkeypatch)
    known: dict[Any, Any] = {PREFECT_API_AUTH_STRING: live_servers.keys(home)["PREFECT_API_AUTH_STRING"]}
    with temporary_settings({**known, PREFECT_API_URL: where.prefect}):
        checks.check_servers()
        checks.check_pools(["cpu", "gpu"])
        assert not caplog.records
        with pytest.raises(StageError, match=r"pools = tpu: there is no such work pool; the server has cpu, .*gpu"):
            checks.check_pools(["cpu", "tpu"])
        spare = live_servers.ask(
            home, "POST", f"{where.prefect}/work_pools/", json={"name": "spare", "type": "process"}
        )
        spare.raise_for_status()
        checks.check_pools(["spare"])
        assert "no worker serves work pool spare" in caplog.text
        live_servers.ask(home, "DELETE", f"{where.prefect}/work_pools/spare").raise_for_status()
    from stages import tracking

    tracking.client().create_experiment("on this disk", artifact_location=str(home / "artifacts"))
    with pytest.raises(StageError, match="name = on this disk: this experiment keeps its artifacts in"):
        checks.check_experiment("on this disk", placed=True)
    checks.check_experiment("on this disk", placed=False)
    tracking.experiment("with the server")
    checks.check_experiment("with the server", placed=True)
    checks.check_experiment("not there yet", placed=True)
    with temporary_settings({PREFECT_API_URL: where.mlflow + "/api"}), pytest.raises(StageError, match="no Prefect"):
        checks.check_servers()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", where.prefect.removesuffix("/api"))
    with pytest.raises(StageError, match=r"MLFLOW_TRACKING_URI = .*MLflow"):
        checks.check_servers()


@pytest.mark.slow
def test_what_is_submitted_is_checked_as_a_run_from_here_is(
    home: Path,
    running: tuple["subprocess.Popen[str]", Addresses],
    first_deploy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, where = running
    own = f"{where.prefect}/work_pools/cpu"
    live_servers.ask(home, "PATCH", own, json={"is_paused": True}).raise_for_status()
    refused = alignflow("submit", "demo", "--set", "pools.sft=tpu", ALIGNFLOW_HOME=str(home))
    live_servers.ask(home, "PATCH", own, json={"is_paused": False}).raise_for_status()
    assert refused.returncode == EXIT_CODES["refused"] and "pools = tpu: there is no such work pool" in refused.stderr
    assert "work pool cpu is paused: its runs wait" in refused.stderr, "the pool of the pipeline itself"
    from stages import tracking

    monkeypatch.setenv("MLFLOW_TRACKING_URI", where.mlflow)
    let_in(home, monkeypatch)
    tracking.client().create_experiment("kept-here", artifact_location=str(tmp_path))
    refused = alignflow("submit", "demo", "--set", "name=kept-here", "--set", "pools.sft=gpu", ALIGNFLOW_HOME=str(home))
    assert refused.returncode == EXIT_CODES["refused"]
    assert "name = kept-here: this experiment keeps its artifacts in" in refused.stderr
    found = live_servers.ask(home, "POST", f"{where.prefect}/flow_runs/filter", json={}).raise_for_status().json()
    assert not [run for run in found if run["name"].startswith(("demo", "kept-here"))], "nothing was started"


@pytest.mark.slow
def test_a_run_finds_the_server_that_keeps_its_experiment(
    home: Path, running: tuple["subprocess.Popen[str]", Addresses], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, where = running
    answer = live_servers.ask(
        home, "POST", f"{where.mlflow}/api/2.0/mlflow/experiments/create", json={"name": "found-again"}
    )
    answer.raise_for_status()
    looked = alignflow("run", "demo", "--set", "name=found-again", "--dry-run", ALIGNFLOW_HOME=str(home))
    assert looked.returncode == 0 and "16 stages" in looked.stdout, looked.stderr


@pytest.mark.slow
def test_a_mistyped_pool_is_named_before_anything_is_deployed(
    home: Path, running: tuple["subprocess.Popen[str]", Addresses], tmp_path: Path
) -> None:
    file = tmp_path / "prefect.yaml"
    file.write_text("deployments: [{name: gpu, entrypoint: flows.stage.stage, work_pool: {name: gpuu}}]")
    refused = alignflow("deploy", "--file", file, ALIGNFLOW_HOME=str(home))
    assert refused.returncode == EXIT_CODES["refused"] and not refused.stdout
    assert "deployments[gpu].work_pool.name = gpuu" in refused.stderr and "'gpu'" in refused.stderr


@pytest.mark.slow
def test_what_dies_is_started_again_and_the_rest_goes_on(
    running: tuple["subprocess.Popen[str]", Addresses],
) -> None:
    """A server, its guard, and a worker, each by SIGKILL: the others stay, and everything answers again."""
    process, where = running
    before = {name: pid for pid, name in live_servers.guards(process).items()}
    workers = {f"worker {pool}{stages}" for pool in ("cpu", "gpu") for stages in ("", " stages")}
    assert set(before) == {"mlflow", "prefect", *workers}
    psutil.Process(before["mlflow"]).kill()
    psutil.Process(before["worker cpu"]).children()[0].kill()
    live_servers.until(lambda: not {before["mlflow"], before["worker cpu"]} & live_servers.guards(process).keys())
    live_servers.until(lambda: set(live_servers.guards(process).values()) == set(before))
    live_servers.until(lambda: httpx.get(f"{where.mlflow}/health", timeout=5).status_code == 200)
    after = {name: pid for pid, name in live_servers.guards(process).items()}
    assert {name for name in before if after[name] != before[name]} == {"mlflow", "worker cpu"}


@pytest.mark.slow
def test_a_killed_one_leaves_nothing_behind_and_the_next_has_everything(
    home: Path, running: tuple["subprocess.Popen[str]", Addresses]
) -> None:
    process, where = running
    kept = deployed(home, where)
    assert {"work_pools cpu", "work_pools gpu"} <= set(kept)
    made = live_servers.ask(home, "POST", f"{where.mlflow}/api/2.0/mlflow/experiments/create", json={"name": "kept"})
    made.raise_for_status()
    started = below(process)
    assert len(started) >= 8  # a guard and a process for each of MLflow, Prefect and two workers
    process.kill()
    assert left_after(started, 5) == []
    assert (home / "up.json").exists()
    with live_servers.up(home, "--pool", "cpu", **SECRETS) as (again, there):  # up: its worker was let in
        assert there.pid == again.pid
        assert deployed(home, there, Authorization=f"Basic {ADA}") == kept
        answer = live_servers.ask(
            home, "POST", f"{there.mlflow}/api/2.0/mlflow/experiments/search", json={"max_results": 10}
        )
        assert '"kept"' in answer.text
        whoever_has_no_password_is_refused(home, again, there)
    assert not (home / "up.json").exists()
    kept_files = [file for file in home.glob("*.json") if file.name != "passwords.json"]
    written = [file.read_bytes() for file in [*home.glob("logs/*"), *kept_files, *home.glob("*.ini")]]
    secrets = {**SECRETS, **live_servers.keys(home)}
    assert written and not any(secret.encode() in text for secret in secrets.values() for text in written)


SECRETS = {
    "PREFECT_SERVER_API_AUTH_STRING": "ada:correct horse battery",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "staple-of-the-stable",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "a long random text for cookies",
}
"""Passwords that an operator has set."""
ADA = base64.b64encode(SECRETS["PREFECT_SERVER_API_AUTH_STRING"].encode()).decode()


def whoever_has_no_password_is_refused(home: Path, process: "subprocess.Popen[str]", where: Addresses) -> None:
    """By servers with SECRETS; whoever has one is let in, and none is in a command line."""
    search = f"{where.mlflow}/api/2.0/mlflow/experiments/search"
    artifacts = f"{where.mlflow}/api/2.0/mlflow-artifacts/artifacts"
    asks = [("POST", f"{where.prefect}/work_pools/filter"), ("POST", search), ("GET", artifacts)]
    for method, url in asks:
        body = {"max_results": 1} if "search" in url else {} if method == "POST" else None
        assert live_servers.request(method, url, json=body).status_code == 401, url
        wrong = live_servers.request(method, url, json=body, auth=("admin", "password1234"))
        assert wrong.status_code == 401, url
    assert (
        live_servers.request(
            "POST", search, json={"max_results": 1}, auth=("admin", SECRETS["MLFLOW_AUTH_ADMIN_PASSWORD"])
        ).status_code
        == 200
    )
    headers = {"Authorization": f"Basic {ADA}"}
    allowed = live_servers.request("POST", f"{where.prefect}/work_pools/filter", json={}, headers=headers)
    assert allowed.status_code == 200
    check = "import json\nfrom flows.servers.address_file import adopt\nadopt()\nfrom flows.servers import checks\n"
    check += "from schemas.errors import StageError\ntry:\n checks.check_servers(); said = ''\n"
    check += "except StageError as error:\n said = str(error)\nprint(json.dumps(said))"
    let_in = {"PREFECT_API_AUTH_STRING": SECRETS["PREFECT_SERVER_API_AUTH_STRING"]}
    assert "PREFECT_API_AUTH_STRING" in live_servers.python(check, home)
    assert live_servers.python(check, home, **let_in) == "", "MLflow has a user of ours beside the admin"
    let_in |= {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "staple-of-the-desk"}
    assert "MLFLOW_TRACKING_USERNAME" in live_servers.python(check, home, **let_in)
    secrets = {**SECRETS, **live_servers.keys(home)}
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in below(process)]
    assert not any(secret.encode() in line for secret in secrets.values() for line in lines)


# --- What is refused before anything starts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, "MLFLOW_AUTH_ADMIN_PASSWORD"),
        ({"MLFLOW_AUTH_ADMIN_PASSWORD": "staple of stable"}, "PREFECT_SERVER_API_AUTH"),
        ({"MLFLOW_AUTH_ADMIN_PASSWORD": "staple-stab"}, "PASSWORD.*too short"),
        ({"MLFLOW_AUTH_ADMIN_PASSWORD": "password1234"}, "choose another"),
    ],
)
def test_others_are_let_in_with_passwords_alone(
    no_settings: None, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], missing: str
) -> None:
    from flows.servers import up

    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StageError, match=missing) as refused:
        up.to_start({}, "0.0.0.0", None, None)
    assert not any(value in str(refused.value) for name, value in given.items() if "PASSWORD" in name)


def test_an_open_host_is_a_message_and_not_a_server(tmp_path: Path) -> None:
    answer = alignflow("up", "--host", "0.0.0.0", ALIGNFLOW_HOME=str(tmp_path))
    assert answer.returncode == EXIT_CODES["refused"]
    assert "--host = 0.0.0.0: MLflow needs a password there." in answer.stderr and not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("10.1.2.3", False)],
)
def test_which_hosts_only_this_machine_reaches(host: str, alone: bool) -> None:
    assert mlflow_prefect.is_loopback(host) is alone


def test_servers_for_others_know_their_names(no_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    mlflow = mlflow_prefect.mlflow_server(5000, "0.0.0.0")
    hosts = mlflow.environment["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert {socket.gethostname(), f"{socket.gethostname()}:*", "127.0.0.1:*"} <= set(hosts)
    assert mlflow.url == "http://127.0.0.1:5000"
    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "mlflow.example")
    for server in (mlflow_prefect.mlflow_server(5000), mlflow_prefect.prefect_server(4200)):  # and still by our workers
        assert {"mlflow.example", "127.0.0.1:*"} <= set(server.environment["MLFLOW_SERVER_ALLOWED_HOSTS"].split(","))
    for host in ("0.0.0.0", "127.0.0.1"):  # its pages ask the server they come from
        assert mlflow_prefect.prefect_server(4200, host=host).environment["PREFECT_UI_API_URL"] == "/api"


def test_a_database_that_prefect_has_no_driver_for_is_named(no_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "postgresql://ada:hidden@db/prefect")
    with pytest.raises(
        StageError, match=r"PREFECT_SERVER_DATABASE_CONNECTION_URL = postgresql://db/.*asyncpg"
    ) as error:
        mlflow_prefect.prefect_server(4200)
    assert "hidden" not in str(error.value)


def test_a_server_that_is_set_and_away_is_named_in_seconds(tmp_path: Path) -> None:
    away = f"http://127.0.0.1:{live_servers.free_port()}"
    for variable, value in (("PREFECT_API_URL", f"{away}/api"), ("MLFLOW_TRACKING_URI", away)):
        answer = alignflow("up", ALIGNFLOW_HOME=str(tmp_path), **{variable: value})
        assert answer.returncode == EXIT_CODES["refused"]
        assert f"{variable} = {value}: there is no answer" in answer.stderr and "alignflow up" in answer.stderr
    answer = alignflow("deploy", ALIGNFLOW_HOME=str(tmp_path))
    assert answer.returncode == EXIT_CODES["refused"] and "no Prefect server is set" in answer.stderr


def test_an_address_without_api_is_named() -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200"}), pytest.raises(StageError, match="4200/api"):
        checks.check_servers()


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"cron": "61 3 * * 1"}, "61 3 \\* \\* 1"),
        ({"cron": "0 3 * *"}, "0 3 \\* \\*"),
        ({"cron": "0 3 * * 1", "timezone": "Europe/Berlim"}, "Europe/Berlim"),
        ({"cron": "{{ $NO_SUCH_CRON }}"}, "NO_SUCH_CRON, which is not set"),
    ],
)
def test_a_bad_schedule_is_named(tmp_path: Path, schedule: dict[str, str], said: str) -> None:
    file = tmp_path / "prefect.yaml"
    file.write_text(json.dumps({"deployments": [{"name": "weekly", "schedules": [schedule]}]}))
    with pytest.raises(StageError, match=r"deployments\[weekly\].schedules\[0\] = .*" + said):
        checks.check_schedules(file)


def test_good_schedules_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRON_OF_THIS_TEST", "30 4 * * MON-FRI")
    times = [{"cron": "{{ $CRON_OF_THIS_TEST }}", "timezone": "America/New_York"}, {"interval": 3600}]
    file = tmp_path / "prefect.yaml"
    file.write_text(json.dumps({"deployments": [{"name": "a", "schedules": times}, {"name": "b"}]}))
    checks.check_schedules(file)
    with pytest.raises(StageError, match="cannot be read"):
        checks.check_schedules(tmp_path / "none.yaml")


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(StageError, match="GPUs = 1: this machine has 0"):
        checks.check_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    checks.check_gpu(2)
    with pytest.raises(StageError, match="GPUs = 3: this machine has 2"):
        checks.check_gpu(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mlflow-port", "99999"], "'--mlflow-port'"),
        (["--mlflow-port", "4321", "--prefect-port", "4321"], "--prefect-port = 4321: it is MLflow's."),
        (["--pool", "cpu", "--pool", ""], "--pool = : the name is empty."),
    ],
)
def test_up_refuses_what_cannot_start(tmp_path: Path, options: list[str], message: str) -> None:
    answer = alignflow("up", *options, ALIGNFLOW_HOME=str(tmp_path / "home"))
    assert answer.returncode in (2, EXIT_CODES["refused"])
    assert message in answer.stderr and "Traceback" not in answer.stderr
    assert not (tmp_path / "home").exists(), "nothing was begun"


def test_addresses_count_only_while_somebody_holds_the_lock(no_settings: None) -> None:
    import fcntl

    where = Addresses(pid=1, mlflow="http://127.0.0.1:5000", prefect="http://127.0.0.1:4200/api")
    assert address_file.found() is None
    address_file.file().write_text(where.model_dump_json())
    address_file.lock_file().touch()
    assert address_file.found() is None
    with address_file.lock_file().open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert address_file.found() == where
    assert address_file.found() is None


def test_a_run_names_mlflow_where_it_is_or_would_be(no_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl
    import socket

    with socket.socket() as other:  # another home's server, say
        other.bind((supervisor.HOST, 0))
        other.listen()
        monkeypatch.setattr(supervisor, "MLFLOW_PORT", other.getsockname()[1])
        server, first = announce.mlflow_pages()
        assert server == "" and "prefix this with the MLflow address that it prints" in first
        where = Addresses(pid=1, mlflow="http://127.0.0.1:5017", prefect="http://127.0.0.1:4200/api")
        address_file.file().write_text(where.model_dump_json())
        with address_file.lock_file().open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert announce.mlflow_pages() == ("http://127.0.0.1:5017", "")
            monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:hidden@mlflow.example/")
            assert announce.mlflow_pages() == ("http://mlflow.example", "")
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
    server, first = announce.mlflow_pages()
    assert server == f"http://127.0.0.1:{supervisor.MLFLOW_PORT}" and "start `alignflow ui`" in first


def test_every_template_is_one() -> None:
    assert {"cpu", "gpu"} <= set(pools.templates())
    for pool in pools.templates():
        template = pools.read(pool)
        assert {"job_configuration", "variables"} == set(template)
    with pytest.raises(StageError, match="pool = tpu"):
        pools.read("tpu")
