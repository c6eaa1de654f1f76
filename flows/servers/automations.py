"""The automations of deploy/automations.yaml on the Prefect server: made, or brought up to date, by their names."""

import contextlib
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path

import httpx
import yaml
from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.exceptions import PrefectException
from prefect.states import AwaitingRetry

AUTOMATION = "alignflow reschedule"
AFTER = timedelta(minutes=2)
"""After so long the automation has had its chance."""
WITHIN = timedelta(days=1)
"""A run that crashed longer ago is history."""
STARTS = 3
"""Of one run, in all."""


def automations_file() -> Path:
    """The file that comes with alignflow."""
    return Path(str(files("deploy"))) / "automations.yaml"


def apply(path: Path | None = None) -> list[str]:
    """Create or update the automations of a file; their names. Idempotent."""
    names = []
    for raw in yaml.safe_load((path or automations_file()).read_text(encoding="utf-8"))["automations"]:
        wanted = Automation(**raw)
        existing = read(wanted.name)
        if existing is None:
            wanted.create()
        else:
            existing.model_copy(
                update={field: getattr(wanted, field) for field in Automation.model_fields if field != "id"}
            ).update()
        names.append(wanted.name)
    return names


def read(name: str) -> Automation | None:
    """The server's automation of that name."""
    try:
        return Automation.read(name=name)  # type: ignore[return-value]
    except ValueError:
        return None


def start_crashed_again() -> None:
    """Schedule crashed runs again that the automation has missed, where it is in force: an event is lost when a server
    dies with it, and a run that waits for its turn again may be taken for dead a second time. While the server is away
    nothing happens: the next call comes.
    """
    with contextlib.suppress(httpx.HTTPError, PrefectException, OSError):
        automation = read(AUTOMATION)
        if automation is None or not automation.enabled:
            return
        now = datetime.now(UTC)
        crashed = FlowRunFilter.model_validate({"state": {"type": {"any_": ["CRASHED"]}}})
        flows = FlowFilter.model_validate({"name": {"any_": ["pipeline", "retrain"]}})
        with get_client(sync_client=True) as client:
            for run in client.read_flow_runs(flow_filter=flows, flow_run_filter=crashed, limit=200):
                since = now - run.state.timestamp if run.state is not None else AFTER
                if run.deployment_id is not None and run.run_count < STARTS and AFTER < since < WITHIN:
                    message = "It crashed. Started again, it resumes where it was."
                    client.set_flow_run_state(run.id, AwaitingRetry(message=message), force=True)
