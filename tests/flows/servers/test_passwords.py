"""Passwords that are made: kept for their owner, sent to our own servers alone, and those of the environment first."""

import json
import stat
from pathlib import Path

import pytest

from flows.servers import address_file, mlflow_prefect, passwords
from flows.servers.address_file import Addresses
from schemas.errors import StageError

WHERE = Addresses(
    pid=1, mlflow="http://127.0.0.1:5000", prefect="http://127.0.0.1:4200/api", ours=["MLflow", "Prefect"]
)
OURS = ("PREFECT_SERVER_API_AUTH_STRING", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_AUTH_CONFIG_PATH")


@pytest.fixture
def bare(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, and nothing of servers in the environment."""
    for name in (*OURS, *passwords.CLIENTS, "PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return home


def test_they_are_made_once_for_their_owner_alone(bare: Path) -> None:
    assert passwords.kept() is None
    made = passwords.made()
    assert stat.S_IMODE(passwords.file().stat().st_mode) == 0o600  # before anything looks at it again
    assert made == passwords.made() == passwords.kept()
    words = {made.prefect.partition(":")[2], made.mlflow, made.mlflow_admin, made.mlflow_cookies}
    assert len(words) == 4 and min(map(len, words)) >= 32
    assert [file.name for file in bare.iterdir()] == ["passwords.json"]


def test_a_file_that_others_may_read_is_closed_and_a_broken_one_is_named(bare: Path) -> None:
    passwords.made()
    passwords.file().chmod(0o644)
    passwords.kept()
    assert stat.S_IMODE(passwords.file().stat().st_mode) == 0o600
    passwords.file().write_text("{")
    with pytest.raises(StageError, match="delete it"):
        passwords.made()


def test_no_other_server_is_sent_them(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = passwords.made()
    given: dict[str, str] = {}
    monkeypatch.setattr(address_file.os, "environ", given)
    given |= {"ALIGNFLOW_HOME": str(bare), "PREFECT_API_URL": "http://other/api", "MLFLOW_TRACKING_URI": WHERE.mlflow}
    address_file.let_in(WHERE)
    assert "PREFECT_API_AUTH_STRING" not in given
    assert (given["MLFLOW_TRACKING_USERNAME"], given["MLFLOW_TRACKING_PASSWORD"]) == ("alignflow", made.mlflow)
    given.pop("MLFLOW_TRACKING_PASSWORD")
    given |= {"MLFLOW_TRACKING_USERNAME": "ada", "PREFECT_API_URL": WHERE.prefect}
    address_file.let_in(WHERE)
    assert given["PREFECT_API_AUTH_STRING"] == made.prefect
    assert given["MLFLOW_TRACKING_USERNAME"] == "ada" and "MLFLOW_TRACKING_PASSWORD" not in given
    del given["PREFECT_API_AUTH_STRING"]
    address_file.let_in(WHERE.model_copy(update={"ours": []}))  # somebody else has started them
    assert "PREFECT_API_AUTH_STRING" not in given


def test_a_link_carries_a_made_password_in_its_fragment_and_never_one_of_the_environment(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = passwords.made()
    assert passwords.link("Prefect", "http://h:1") == f"http://h:1/alignflow/login#{made.prefect}"
    assert passwords.link("MLflow", "http://h:2") == f"http://h:2/alignflow/login#alignflow:{made.mlflow}"
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "ada:correct horse battery")
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "staple-of-the-stable")
    assert passwords.link("Prefect", "http://h:1") is None and passwords.link("MLflow", "http://h:2") is None
    assert passwords.for_clients() == {
        "PREFECT_API_AUTH_STRING": "ada:correct horse battery",
        "MLFLOW_TRACKING_USERNAME": "alignflow",
        "MLFLOW_TRACKING_PASSWORD": made.mlflow,
    }


@pytest.mark.parametrize(
    ("server", "name", "value", "said"),
    [
        ("MLflow", "MLFLOW_AUTH_ADMIN_PASSWORD", "elevenchars", "too short"),
        ("MLflow", "MLFLOW_AUTH_ADMIN_PASSWORD", "password1234", "publicly known"),
        ("Prefect", "PREFECT_SERVER_API_AUTH_STRING", "ada:elevenchars", "too short"),
        ("Prefect", "PREFECT_SERVER_API_AUTH_STRING", "a long one without a user", "user:password"),
        ("Prefect", "PREFECT_SERVER_API_AUTH_STRING", "", "user:password"),
    ],
)
def test_passwords_that_do_not_protect_are_refused_at_once(
    bare: Path, monkeypatch: pytest.MonkeyPatch, server: str, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StageError, match=said) as refused:
        mlflow_prefect.check_access(server, "127.0.0.1")
    assert not value or value not in str(refused.value)


def test_mlflows_config_gives_nobody_anything_by_default(bare: Path) -> None:
    assert "default_permission = NO_PERMISSIONS" in mlflow_prefect.auth_config().read_text()
    server = mlflow_prefect.mlflow_server(5000, made=passwords.made())
    assert json.loads(passwords.file().read_text())["mlflow"] in server.environment["ALIGNFLOW_LOGIN"]
    assert not any(word in " ".join(server.command) for word in passwords.made().model_dump().values())


def test_names_of_loopback_are_its_own_and_others_are_real_addresses() -> None:
    assert mlflow_prefect.allowed_hosts("127.0.0.1").split(",") == [
        *("127.0.0.1", "[[]::1]", "localhost", "127.0.0.1:*", "[[]::1]:*", "localhost:*")
    ]
    assert not any(
        name.startswith(("10.*", "192.168.*", "*")) for name in mlflow_prefect.allowed_hosts("0.0.0.0").split(",")
    )


def test_an_operators_own_users_of_mlflow_leave_prefects_password_in_place(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = passwords.made()
    monkeypatch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(bare / "own.ini"))
    assert passwords.login("MLflow") is None and passwords.login("Prefect") == made.prefect
    server = mlflow_prefect.mlflow_server(5000, made=made)
    assert server.environment["MLFLOW_AUTH_CONFIG_PATH"] == str(bare / "own.ini")
    assert "ALIGNFLOW_LOGIN" not in server.environment and "basic-auth" in server.command


def test_a_file_of_short_passwords_is_refused(bare: Path) -> None:
    passwords.made()
    short = json.loads(passwords.file().read_text()) | {"mlflow": "staple"}
    passwords.file().write_text(json.dumps(short))
    with pytest.raises(StageError, match=r"does not hold passwords\. Fix: delete it"):
        passwords.kept()
