"""A crashed run that the server's automation has missed is started again, and no other."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.states import AwaitingRetry, Crashed

from flows.servers import automations

LONG = automations.AFTER + timedelta(seconds=10)


class Client:
    """A server with one crashed run."""

    def __init__(self, run: Any) -> None:
        self.run, self.changed = run, []

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None: ...

    def read_flow_runs(self, **_: object) -> list[Any]:
        return [self.run]

    def set_flow_run_state(self, flow_run_id: Any, state: Any, force: bool) -> None:
        self.changed.append((flow_run_id, state.name, force))


@pytest.mark.parametrize(
    ("ago", "starts", "deployment", "enabled", "again"),
    [
        (LONG, 1, "d", True, True),
        (timedelta(seconds=30), 1, "d", True, False),  # the automation may still come
        (timedelta(days=2), 1, "d", True, False),
        (LONG, 3, "d", True, False),  # three starts in all
        (LONG, 1, None, True, False),  # a person's own run
        (LONG, 1, "d", False, False),  # the operator has switched it off
    ],
)
def test_which_runs_are_started_again(
    ago: timedelta, starts: int, deployment: str | None, enabled: bool, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = Crashed(timestamp=datetime.now(UTC) - ago)
    client = Client(SimpleNamespace(id="r", state=state, run_count=starts, deployment_id=deployment))
    monkeypatch.setattr(automations, "read", lambda name: SimpleNamespace(enabled=enabled))
    monkeypatch.setattr(automations, "get_client", lambda sync_client: client)
    automations.start_crashed_again()
    assert client.changed == ([("r", AwaitingRetry().name, True)] if again else [])
