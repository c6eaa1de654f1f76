"""MLflow's users, in its own store: passwords that were changed, and a user of ours who is no admin."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.tracking import mlflow_server
from tests.support.forks import PYTHON


class Store:
    """Stands for MLflow's, of which this process imports nothing: it would read the environment for good."""

    def __init__(self) -> None:
        self.users: dict[str, tuple[str, bool]] = {}
        self.changes = 0

    def has_user(self, name: str) -> bool:
        return name in self.users

    def create_user(self, name: str, password: str, is_admin: bool) -> None:
        self.users[name], self.changes = (password, is_admin), self.changes + 1

    def authenticate_user(self, name: str, password: str) -> bool:
        return self.users[name][0] == password

    def update_user(self, name: str, password: str | None = None, is_admin: bool | None = None) -> None:
        before = self.users[name]
        self.users[name] = (password or before[0], before[1] if is_admin is None else is_admin)
        self.changes += 1

    def get_user(self, name: str) -> Any:
        return type("User", (), {"is_admin": self.users[name][1]})


def test_a_changed_password_takes_effect_and_an_unchanged_one_changes_nothing() -> None:
    store = Store()
    mlflow_server.provide(store, "admin", "the first one", is_admin=True)
    mlflow_server.provide(store, "admin", "the first one", is_admin=True)
    assert store.users == {"admin": ("the first one", True)} and store.changes == 1
    mlflow_server.provide(store, "admin", "the second one", is_admin=True)
    assert store.users == {"admin": ("the second one", True)}
    mlflow_server.provide(store, "admin", "the second one", is_admin=False)
    assert store.users == {"admin": ("the second one", False)}


def test_users_of_the_operators_own_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a login of ours nor an admin's password: MLflow's store, which may be of another kind, is not opened."""
    for name in ("ALIGNFLOW_LOGIN", "MLFLOW_AUTH_ADMIN_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "mlflow.server.auth", None)  # importing it is an error
    mlflow_server.provide_users()


ASK = """
import json
from stages.tracking import mlflow_server
mlflow_server.provide_users()
from mlflow.server.auth import auth_config
from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore
store = SqlAlchemyStore()
store.init_db(auth_config.database_uri)
roles = store.list_user_roles(store.get_user("alignflow").id)
print(json.dumps({
    "users": {user.username: user.is_admin for user in store.list_users()},
    "in": [store.authenticate_user("admin", "the first one"), store.authenticate_user("admin", "the second one")],
    "ours": store.authenticate_user("alignflow", "a password of ours"),
    "may": [[one.resource_type, one.resource_pattern, one.permission] for role in roles for one in role.permissions],
}))
"""


@pytest.mark.slow
def test_in_mlflows_own_store(tmp_path: Path) -> None:
    import json

    config = tmp_path / "auth.ini"
    config.write_text(
        f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = sqlite:///{tmp_path / 'auth.db'}\n"
        "admin_username = admin\n"
    )
    said = []
    for password in ("the first one", "the second one"):
        variables = {
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_AUTH_ADMIN_PASSWORD": password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "x",
            "ALIGNFLOW_LOGIN": "alignflow:a password of ours",
        }
        answer = subprocess.run(
            [*PYTHON, "-c", ASK], env={**os.environ, **variables}, capture_output=True, text=True, timeout=300
        )
        assert answer.returncode == 0, answer.stderr
        said.append(json.loads(answer.stdout.splitlines()[-1]))
    may = [[kind, "*", "MANAGE"] for kind in ("experiment", "registered_model", "prompt")]
    assert said[0]["in"] == [True, False] and said[1]["in"] == [False, True]
    for one in said:
        assert one["users"] == {"admin": True, "alignflow": False} and one["ours"]
        assert sorted(one["may"]) == sorted(may)
