"""What the server's automations have missed is made up for, and nothing else is touched."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from prefect.automations import Automation
from prefect.states import AwaitingRetry, Crashed, Paused, Pending, Running, State, Suspended

from flows.gate import approval
from flows.servers import automations

LONG = automations.AFTER + timedelta(seconds=10)
OF_RUNS = {automations.AUTOMATION, automations.STUCK, automations.ZOMBIES}
RESTARTED, DEAD = AwaitingRetry().name, Crashed().name


class Client:
    """A server with one run, that was heard of at some time."""

    def __init__(self, run: Any, heard: datetime | None = None) -> None:
        self.run, self.heard, self.changed = run, heard, []
        self.away = False

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None: ...

    def read_flow_runs(self, flow_run_filter: Any, **_: object) -> list[Any]:
        if self.away:
            raise httpx.ConnectError("away")
        wanted = flow_run_filter.state.type.any_
        return [self.run] if self.run.state.type in wanted else []

    def read_events(self, filter: Any, limit: int) -> Any:
        assert filter.resource.id == ["prefect.flow-run.r"]
        return SimpleNamespace(events=[1] if self.heard and self.heard >= filter.occurred.since else [])

    def set_flow_run_state(self, flow_run_id: Any, state: Any, force: bool) -> None:
        self.changed.append((flow_run_id, state.name, force))


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> dict[str, Automation]:
    """The automations that come with alignflow, as the server has them."""
    raw = yaml.safe_load(Path("deploy/automations.yaml").read_text(encoding="utf-8"))["automations"]
    found = {one["name"]: Automation(**one) for one in raw if one["name"] in OF_RUNS}
    assert found.keys() == OF_RUNS
    monkeypatch.setattr(automations, "read", found.get)
    return found


def looked(client: Client, monkeypatch: pytest.MonkeyPatch, watch: automations.RunWatch | None = None) -> list[Any]:
    """What a look has changed."""
    monkeypatch.setattr(automations, "get_client", lambda sync_client: client)
    (watch or automations.RunWatch())()
    return client.changed


def a_run(state: State[Any], starts: int = 1, deployment: str | None = "d") -> Any:
    return SimpleNamespace(id="r", state=state, run_count=starts, deployment_id=deployment)


def ago(minutes: float) -> datetime:
    return datetime.now(UTC) - timedelta(minutes=minutes)


@pytest.mark.parametrize(
    ("since", "starts", "deployment", "enabled", "again"),
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
    since: timedelta,
    starts: int,
    deployment: str | None,
    enabled: bool,
    again: bool,
    shipped: dict[str, Automation],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shipped[automations.AUTOMATION].enabled = enabled
    client = Client(a_run(Crashed(timestamp=datetime.now(UTC) - since), starts, deployment))
    assert looked(client, monkeypatch) == ([("r", RESTARTED, True)] if again else [])


@pytest.mark.parametrize(
    ("minutes", "deployment", "enabled", "dead"),
    [
        (12.5, "d", True, True),  # `alignflow stuck` waits for ten
        (11, "d", True, False),
        (12.5, None, True, False),
        (12.5, "d", False, False),
    ],
)
def test_a_run_whose_worker_died_before_it_began(
    minutes: float,
    deployment: str | None,
    enabled: bool,
    dead: bool,
    shipped: dict[str, Automation],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shipped[automations.STUCK].enabled = enabled
    client = Client(a_run(Pending(timestamp=ago(minutes)), 0, deployment))
    assert looked(client, monkeypatch) == ([("r", DEAD, True)] if dead else [])


@pytest.mark.parametrize(
    ("heard", "answering", "dead"),
    [
        (10, 10, True),  # `alignflow zombies` waits for 90 s
        (None, 10, True),
        (1, 10, False),
        (10, 1, False),  # the server was away: the run could not be heard
        (10, None, False),
    ],
)
def test_a_silent_run_is_dead_only_where_it_could_be_heard(
    heard: float | None,
    answering: float | None,
    dead: bool,
    shipped: dict[str, Automation],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = automations.RunWatch()
    watch._answering_since = None if answering is None else ago(answering)
    client = Client(a_run(Running(timestamp=ago(20))), None if heard is None else ago(heard))
    assert looked(client, monkeypatch, watch) == ([("r", DEAD, True)] if dead else [])


@pytest.mark.parametrize(
    ("minutes", "suspended", "deployment", "resumed"),
    [
        (1, True, "d", True),
        (-1, True, "d", False),  # there is time left
        (1, False, "d", False),  # its process lives, and sees for itself
        (1, True, None, False),
    ],
)
def test_a_retraining_that_nobody_has_approved_in_time_is_resumed_to_say_so(
    minutes: float,
    suspended: bool,
    deployment: str | None,
    resumed: bool,
    shipped: dict[str, Automation],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    message = f"assistant version 2 {automations.WAITS}{approval.iso(ago(minutes))}"
    client = Client(a_run((Suspended if suspended else Paused)(message=message), 1, deployment))
    assert looked(client, monkeypatch) == ([("r", "Resuming", True)] if resumed else [])


def test_while_the_server_is_away_nothing_happens_and_its_silence_is_forgotten(
    shipped: dict[str, Automation], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = automations.RunWatch()
    watch._answering_since = ago(60)
    client = Client(a_run(Running(timestamp=ago(20))))
    client.away = True
    assert looked(client, monkeypatch, watch) == [] and watch._answering_since is None
    client.away = False
    assert looked(client, monkeypatch, watch) == [] and watch._answering_since is not None
