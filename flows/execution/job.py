"""What a worker starts for a flow run: Prefect's own engine, in a process that dies with its worker.

    python -P -m flows.job

Prefect's engine alone outlives a worker that was killed, and trains on with nobody to stop it. It also runs whatever a
deployment names: here that is one of our flows, from this installation, or nothing.
"""

import importlib
import os
import runpy
from typing import Any
from uuid import UUID

from flows.execution import settings_files
from schemas.environment import SAFE_PATH, roots
from schemas.errors import StageError, refuse
from schemas.text import show
from stages.runtime.process import die_with_parent
from stages.runtime.workspace import PRIVATE

FLOWS = ("flows.pipeline.pipeline", "flows.pipeline.from_preset", "flows.retrain.retrain", "flows.stage.stage")
"""Entrypoints that a worker runs."""

HEARTBEAT_SECONDS = "30"  # the shortest that Prefect takes; a silent run is marked Crashed (deploy/automations.yaml)

RETRIES = "7"  # about four minutes in which the server may be away


def own_flow(deployment: Any) -> str:
    """The entrypoint of a deployment of one of our flows.

    Raises:
        StageError: there is no deployment, it names other code, or it has steps that fetch or run code.
    """
    fix = "deploy the flows that come with alignflow (alignflow deploy); start others on a worker of your own"
    if deployment is None:
        message = "a worker runs deployments only, and this run belongs to none."
        raise refuse("deployment", "none", message, fix, kind="access")
    field = f"deployments[{deployment.name}]"
    if deployment.entrypoint not in FLOWS:
        message = f"a worker runs {', '.join(FLOWS)} only."
        raise refuse(f"{field}.entrypoint", deployment.entrypoint, message, fix, kind="access")
    if deployment.pull_steps:
        shown = ", ".join(str(next(iter(step), "")) for step in deployment.pull_steps)
        message = "the flows are installed where the worker is: nothing is pulled or run before them."
        raise refuse(f"{field}.pull_steps", shown, message, fix, kind="access")
    return str(deployment.entrypoint)


def entrypoint(flow_run_id: UUID) -> str | None:
    """The entrypoint of a flow run; None where it is refused, and made Failed."""
    # Late: it takes a second, in which a death of the worker would go unnoticed.
    from prefect.client.orchestration import get_client
    from prefect.states import Failed

    with get_client(sync_client=True) as client:
        run = client.read_flow_run(flow_run_id)
        try:
            found = own_flow(client.read_deployment(run.deployment_id) if run.deployment_id else None)
        except StageError as error:
            show(f"error: {error}")
            client.set_flow_run_state(flow_run_id, Failed(message=str(error)), force=True)
            return None
        # Kept for as long as the run lasts: a deployment that is deleted meanwhile would make it one that a person has
        # started, who may name any path.
        os.environ["PREFECT__RUNTIME__DEPLOYMENT__ID"] = str(run.deployment_id)
        return found


def main() -> None:
    """Run the engine for the flow run that the environment names. Relative paths count from the first declared root."""
    die_with_parent()
    os.umask(PRIVATE)
    settings_files.leave_out()
    os.environ.update(SAFE_PATH)
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", HEARTBEAT_SECONDS)
    os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", RETRIES)
    named = entrypoint(UUID(os.environ["PREFECT__FLOW_RUN_ID"]))
    if named is None:
        return
    os.environ["PREFECT__FLOW_ENTRYPOINT"] = named  # the engine then reads no deployment, and no steps of one
    # Now, while no root is the working directory: the engine puts that first to where it imports the flow from.
    importlib.import_module(named.rpartition(".")[0])
    if folders := roots():
        os.chdir(folders[0])
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
