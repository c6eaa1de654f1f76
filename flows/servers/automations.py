"""The automations of deploy/automations.yaml on the Prefect server: made, or brought up to date, by their names."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import yaml
from prefect.automations import Automation
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.events.filters import EventFilter
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import AwaitingRetry, Crashed, Scheduled

AUTOMATION, STUCK, ZOMBIES = "alignflow reschedule", "alignflow stuck", "alignflow zombies"
AFTER = timedelta(minutes=2)
"""After so long the automation has had its chance."""
WITHIN = timedelta(days=1)
"""A run that crashed longer ago is history."""
STARTS = 3
"""Of one run, in all."""
WAITS = "waits for approval until "
"""How the message of a suspended run ends, before the time in ISO 8601."""


def apply(path: Path | None = None) -> dict[str, str]:
    """Create or update the automations of a file, by default of the one that comes with alignflow. Name -> why it was
    not made: the block or the deployment that it names does not exist; empty where it was. Idempotent.
    """
    notes: dict[str, str] = {}
    path = path or Path(str(files("deploy"))) / "automations.yaml"
    with get_client(sync_client=True) as client:
        for raw in yaml.safe_load(path.read_text(encoding="utf-8"))["automations"]:
            try:
                actions = [resolved(client, action) for action in raw["actions"]]
            except ObjectNotFound:
                named = [action.get("block") or action.get("deployment") for action in raw["actions"]]
                what = "block" if "block" in raw["actions"][0] else "deployment"
                notes[raw["name"]] = f"not made: there is no {what} {', '.join(map(str, named))}"
                continue
            wanted = Automation(**{**raw, "actions": actions})
            existing = read(wanted.name)
            if existing is None:
                wanted.create()
            else:
                existing.model_copy(
                    update={field: getattr(wanted, field) for field in Automation.model_fields if field != "id"}
                ).update()
            notes[wanted.name] = ""
    return notes


def resolved(client: SyncPrefectClient, action: dict[str, Any]) -> dict[str, Any]:
    """An action with the ids of what the file calls `block: TYPE/NAME` or `deployment: FLOW/NAME`.

    Raises:
        ObjectNotFound: the server does not have it.
    """
    rest = {name: value for name, value in action.items() if name not in ("block", "deployment")}
    if "block" in action:
        kind, _, name = action["block"].partition("/")
        found = client.read_block_document_by_name(name, kind, include_secrets=False)
        return rest | {"block_document_id": found.id}
    if "deployment" in action:
        return rest | {"source": "selected", "deployment_id": client.read_deployment_by_name(action["deployment"]).id}
    return rest


def read(name: str) -> Automation | None:
    """The server's automation of that name."""
    try:
        return Automation.read(name=name)  # type: ignore[return-value]
    except ValueError:
        return None


class RunWatch:
    """Does what the automations have missed, where they are in force: an event is lost when a server dies with it.

    A run that is Pending, or silent, for longer than its automation waits becomes Crashed, and a crashed one is
    scheduled again. So is a suspended one whose time to be approved is up, to say so. To be called every half minute or
    so; while the server is away nothing happens.
    """

    def __init__(self) -> None:
        self._answering_since: datetime | None = None

    def __call__(self) -> None:
        """Look once."""
        now = datetime.now(UTC)
        try:
            with get_client(sync_client=True) as client:
                self._mark_dead(client, now)
                start_crashed_again(client, now)
                resume_late(client, now)
        except (httpx.HTTPError, PrefectException, OSError):
            self._answering_since = None
        else:
            self._answering_since = self._answering_since or now

    def _mark_dead(self, client: SyncPrefectClient, now: datetime) -> None:
        """Runs that are Pending or silent for too long."""
        waits = {state: patience(name) for state, name in (("PENDING", STUCK), ("RUNNING", ZOMBIES))}
        for run in runs_in(client, [state for state, wait in waits.items() if wait], ["pipeline", "retrain", "stage"]):
            wait = waits[run.state.type.value]
            if wait is None or now - run.state.timestamp < wait:
                continue
            if run.state.is_running():
                # It sends an event every 30 s while it lives; before the server answered, none could arrive.
                answering = now - (self._answering_since or now)
                recent = {"occurred": {"since": now - wait}, "resource": {"id": [f"prefect.flow-run.{run.id}"]}}
                sent = EventFilter.model_validate(recent)
                if answering < wait or client.read_events(filter=sent, limit=1).events:
                    continue
            minutes = (now - run.state.timestamp).total_seconds() / 60
            message = f"{run.state.name} for {minutes:.0f} minutes and not heard of, so what ran it has died."
            client.set_flow_run_state(run.id, Crashed(message=message), force=True)


def patience(name: str) -> timedelta | None:
    """How long a run is waited for: as long as the automation of that name does, and a while; None where it is off."""
    automation = read(name)
    if automation is None or not automation.enabled:
        return None
    return getattr(automation.trigger, "within", timedelta()) + AFTER


def runs_in(client: SyncPrefectClient, states: Sequence[str], flows: Sequence[str]) -> Iterator[Any]:
    """The runs of deployments of these flows that are in these states."""
    if not states:
        return
    within = FlowRunFilter.model_validate({"state": {"type": {"any_": list(states)}}})
    of = FlowFilter.model_validate({"name": {"any_": list(flows)}})
    for run in client.read_flow_runs(flow_filter=of, flow_run_filter=within, limit=200):
        if run.deployment_id is not None and run.state is not None:
            yield run


def start_crashed_again(client: SyncPrefectClient, now: datetime) -> None:
    """Schedule crashed runs again that the automation has missed: a run that waits for its turn again may be taken for
    dead a second time."""
    automation = read(AUTOMATION)
    if automation is None or not automation.enabled:
        return
    for run in runs_in(client, ["CRASHED"], ["pipeline", "retrain"]):
        if run.run_count < STARTS and AFTER < now - run.state.timestamp < WITHIN:
            message = "It crashed. Started again, it resumes where it was."
            client.set_flow_run_state(run.id, AwaitingRetry(message=message), force=True)


def starts_again(run: Any) -> bool:
    """Whether a run has crashed and is going to be started again: by the automation at once, or by `RunWatch` after a
    while."""
    if not run.state.is_crashed() or run.run_count >= STARTS:
        return False
    wait = patience(AUTOMATION)
    return wait is not None and datetime.now(UTC) - run.state.timestamp < wait + AFTER


def resume_late(client: SyncPrefectClient, now: datetime) -> None:
    """Schedule the runs again that nobody has approved in time: they end as rejected."""
    for run in runs_in(client, ["PAUSED"], ["retrain"]):
        _, waits, until = (run.state.message or "").rpartition(WAITS)
        if waits and run.state.name == "Suspended" and now > datetime.fromisoformat(until):
            late = Scheduled(name="Resuming", message="Nobody has approved it in time.")
            client.set_flow_run_state(run.id, late, force=True)
