"""`alignflow submit`: start the deployed pipeline. A worker runs it; this process does not wait."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL

from flows import pipeline
from flows.planning.allowed_paths import paths_of_config
from flows.results import history
from flows.servers import checks
from schemas.config import PipelineConfig
from schemas.errors import refuse
from stages import tracking

DEPLOYMENT = "pipeline/config"


def submit(config: PipelineConfig, overrides: Sequence[str] = ()) -> tuple[str, str]:
    """Start a run of the deployed pipeline; returns its id and Prefect's page of it. Its tags are the overrides.

    Warns of pools that no worker serves, the pipeline's own among them.

    Raises:
        StageError: no server is set or answers, a pool is missing, the pools' workers could not reach the experiment's
            artifacts, or nothing is deployed.
    """
    if not PREFECT_API_URL.value():
        raise refuse("PREFECT_API_URL", "", "no Prefect server is set.", checks.START, kind="server")
    checks.check_servers()
    pools = list(config.pools.values())
    with get_client(sync_client=True) as client, contextlib.suppress(ObjectNotFound):
        own = client.read_deployment_by_name(DEPLOYMENT).work_pool_name  # which the deployed pipeline itself waits on
        pools = [own, *pools] if own else pools
    checks.check_pools(pools)
    if tracking.tracking_uri().startswith("http"):  # else the worker alone knows where MLflow is
        checks.check_experiment(config.name, placed=bool(config.pools))
    try:
        parameters, name = {"config": absolute(config)}, history.run_name(config.name, overrides)
        marks = [*pipeline.tags_of(config), *overrides]
        run = run_deployment(DEPLOYMENT, parameters=parameters, flow_run_name=name, timeout=0, tags=marks)
    except ObjectNotFound as error:
        fix = "deploy it first: alignflow deploy"
        raise refuse("deployment", DEPLOYMENT, "there is no such deployment.", fix, kind="deploy") from error
    assert isinstance(run, FlowRun)  # a coroutine only where there is a loop
    pages = str(PREFECT_UI_URL.value() or str(PREFECT_API_URL.value()).removesuffix("/api"))
    return str(run.id), f"{pages}/runs/flow-run/{run.id}"


def absolute(config: PipelineConfig) -> dict[str, Any]:
    """The config as JSON; relative paths of files on this machine become absolute."""
    values = config.model_dump(mode="json")
    for field, value, path in paths_of_config(config):
        if path is not None and value == path and Path(path).expanduser().exists():
            *way, last = field.split(".")
            place: Any = values
            for key in way:
                place = place[int(key) if isinstance(place, list) else key]
            place[last] = str(Path(path).expanduser().absolute())
    return values
