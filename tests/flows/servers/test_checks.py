"""What a server's refusal is called, before anything starts."""

import httpx
import pytest

from flows.servers import checks
from schemas.errors import StageError
from stages import tracking

DOOR = "This server does not go by that name. Fix: add it to MLFLOW_SERVER_ALLOWED_HOSTS."


@pytest.mark.parametrize("server", ["prefect", "mlflow"])
@pytest.mark.parametrize("text", [DOOR, "Invalid Host header - possible DNS rebinding attack detected"])
def test_a_name_that_a_server_does_not_go_by_is_named(monkeypatch: pytest.MonkeyPatch, server: str, text: str) -> None:
    """The door turns it away before health is asked, MLflow by itself after that."""
    monkeypatch.setattr(checks, "ask", lambda *given, **named: httpx.Response(403, text=text))
    with pytest.raises(StageError, match=r"MLFLOW_SERVER_ALLOWED_HOSTS hold box\.lan:4200"):
        getattr(checks, f"check_{server}")("http://box.lan:4200/api")


def test_mlflow_that_asks_for_a_password_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever call meets it first; asked again it would say the same."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import UNAUTHENTICATED

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        raise MlflowException("API request failed with error code 401 != 200", error_code=UNAUTHENTICATED)

    with pytest.raises(StageError, match="MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD = ada, ") as refused:
        tracking.retrying(call)
    assert refused.value.problem.kind == "access" and len(calls) == 1


def test_a_password_that_is_refused_condemns_no_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    from schemas.stage import Artifact
    from stages.tracking import store

    def refuse(uri: str) -> str:
        raise tracking.not_let_in()

    monkeypatch.setattr(store, "location_of", refuse)
    with pytest.raises(StageError, match="MLflow refuses them"):
        store.intact(Artifact(uri="runs:/0/data", sha256="0" * 64))
