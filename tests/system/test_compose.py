"""The compose file as far as it can be judged without Docker: the specification's schema, and what it promises."""

import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

FILE = ROOT / "deploy" / "compose.yaml"
SERVERS = {"postgres", "store", "prefect", "mlflow"}
ONCE = {"bucket", "deploy"}
MEMORY = {"SERVER", "WORKER", "POSTGRES", "STORE"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def test_it_fits_the_schema_of_the_specification() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    answer = subprocess.run([*check, str(FILE)], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_it_publishes_on_this_host_alone(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 2 and all(port.startswith("127.0.0.1:") for port in ports)


def test_it_holds_no_secret_and_asks_for_all_of_them(compose: dict[str, Any]) -> None:
    secret = re.compile("PASSWORD|SECRET|AUTH_STRING|CONNECTION_URL|STORE_URI")
    values = [
        (name, str(value))
        for service in compose["services"].values()
        for name, value in service.get("environment", {}).items()
        if secret.search(name)
    ]
    assert len(values) > 8
    assert [name for name, value in values if "${" not in value] == []
    text = FILE.read_text()
    told = set(re.findall(r"[A-Z0-9_]+", re.search(r"for name in ([A-Z0-9_ ]+);", text)[1]))  # type: ignore[index]
    assert set(re.findall(r"\$\{(\w+):\?", text)) == told
    others = {"ALIGNFLOW_IMAGE", "POSTGRES_IMAGE", "STORE_IMAGE"} | {f"{one}_MEMORY" for one in MEMORY}
    assert set(re.findall(r"\$\{(\w+)", text)) == told | others


def test_no_service_gains_rights_or_writes_beside_its_volumes_or_takes_all_memory(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["cap_drop"] == ["ALL"] and "cap_add" not in service and not service.get("privileged"), name
        assert service["security_opt"] == ["no-new-privileges:true"] and service["read_only"] is True, name
        assert any(folder.startswith("/tmp:") for folder in service["tmpfs"]), name
        assert re.fullmatch(r"\$\{\w+_MEMORY:-\d+g\}", service["mem_limit"]) and service["pids_limit"] > 0, name
        written = [volume.split(":")[1] for volume in service.get("volumes", []) if not volume.endswith(":ro")]
        home = service.get("environment", {}).get("ALIGNFLOW_HOME", "/tmp")
        assert home.startswith("/tmp") or home in written, name


def test_what_it_names_is_there_and_servers_say_how_they_are(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == SERVERS | ONCE | {"worker", "worker-gpu"}
    assert {name for name, service in services.items() if "healthcheck" in service} == SERVERS
    for service in services.values():
        for name, needs in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if name in ONCE else "service_healthy"
            assert needs["condition"] == wanted and name in services
        for config in service.get("configs", []):
            assert config["source"] in compose["configs"]
        for volume in service.get("volumes", []):
            assert volume.startswith("./") or volume.partition(":")[0] in compose["volumes"]


def test_servers_stand_behind_the_door_and_clients_are_no_admin(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert services["prefect"]["command"][:4] == ["python", "-P", "-m", "flows.servers.door"]
    mlflow = services["mlflow"]["command"]
    assert mlflow[:4] == ["python", "-P", "-m", "stages.tracking.mlflow_server"]
    assert any(option.startswith("--http flows.servers.door:Mlflow") for option in mlflow)
    for name, port in (("prefect", 4200), ("mlflow", 5000)):
        assert services[name]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")[0] == f"{name}:{port}"
        assert services[name]["environment"]["ALIGNFLOW_LOGIN"]
    user = services["worker"]["environment"]["MLFLOW_TRACKING_USERNAME"]
    assert services["mlflow"]["environment"]["ALIGNFLOW_LOGIN"] == f"{user}:${{MLFLOW_PASSWORD}}" and user != "admin"


def test_foreign_images_are_named_by_digest() -> None:
    named = re.findall(r"\$\{(?:POSTGRES|STORE)_IMAGE:-(\S+)\}", FILE.read_text())
    (base,) = re.findall(r"^ARG BASE=(.*)", (FILE.parent / "Dockerfile").read_text(), re.M)
    assert len(named) == 2
    for image in (*named, base):
        assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", image), image
