"""The fence of a worker: what it takes from the server, and what from its own template, whatever the server has."""

import asyncio
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessJobConfiguration
from prefect_docker.worker import DockerWorkerJobConfiguration

from flows import worker
from flows.execution import job
from flows.servers import pools
from schemas.errors import StageError

OURS = DeploymentResponse(id=uuid4(), name="cpu", flow_id=uuid4(), entrypoint="flows.stage.stage", labels={})


def prepared(kind: Any, pool: str, server: dict[str, Any], deployment: Any = OURS, **values: Any) -> Any:
    """What the fenced worker of a pool makes of a run, where the server has a template of its own."""
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9"}):  # nothing is asked; without it a server starts
        made = asyncio.run(worker.fenced(kind, pools.read(pool)).from_template_and_values(server, values))
    made.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="sft"), deployment)
    return made


def altered(pool: str) -> dict[str, Any]:
    """A pool's template on the server after somebody has opened it."""
    template = pools.read(pool)
    template["job_configuration"] |= {"command": "touch PWNED", "image": "evil", "volumes": ["/:/host"]}
    template["variables"]["properties"]["env"].pop("propertyNames")
    template["variables"]["properties"]["command"] = {"type": "string", "default": "touch PWNED"}
    return template


def test_a_template_that_was_altered_on_the_server_changes_nothing() -> None:
    made = prepared(ProcessJobConfiguration, "cpu", altered("cpu"))
    assert made._refusal is None and made.command == "python -P -m flows.job"
    made = prepared(DockerWorkerJobConfiguration, "docker", altered("docker"))
    assert (made._refusal, made.command, made.image) == (None, "python -P -m flows.job", "alignflow:latest")
    assert not any("/host" in volume for volume in made.volumes)


def test_variables_that_the_servers_schema_lets_pass_are_refused_by_the_worker() -> None:
    made = prepared(ProcessJobConfiguration, "cpu", altered("cpu"), env={"ALIGNFLOW_ROOTS": "/"})
    assert "job_variables.env" in str(made._refusal) and "ALIGNFLOW_ROOTS" in str(made._refusal)
    assert made.env.get("ALIGNFLOW_ROOTS") != "/"
    made = prepared(ProcessJobConfiguration, "cpu", altered("cpu"), command="touch PWNED")
    assert made._refusal is not None and made.command == "python -P -m flows.job"


def test_a_pools_default_on_the_server_counts_where_the_schema_allows_it() -> None:
    template = pools.read("slurm")
    template["variables"]["properties"]["partition"]["default"] = "a100"
    assert "--partition=a100 " in prepared(ProcessJobConfiguration, "slurm", template).command
    assert "--partition=b " in prepared(ProcessJobConfiguration, "slurm", template, partition="b").command
    template["variables"]["properties"]["partition"]["default"] = "a100 --uid=0"
    assert "partition" in str(prepared(ProcessJobConfiguration, "slurm", template)._refusal)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"entrypoint": "os.system"}, "entrypoint = os.system"),
        ({"entrypoint": "/tmp/flow.py:stage"}, "entrypoint"),
        ({"entrypoint": "flows.stage:stage"}, "entrypoint"),
        ({"entrypoint": None}, "entrypoint = null"),
        ({"pull_steps": [{"prefect.deployments.steps.run_shell_script": {"script": "id"}}]}, "run_shell_script"),
    ],
)
def test_code_that_is_not_ours_is_refused(changed: dict[str, Any], said: str) -> None:
    deployment = OURS.model_copy(update=changed)
    with pytest.raises(StageError, match=r"a worker runs|nothing is pulled") as refused:
        job.own_flow(deployment)
    assert said in str(refused.value)
    assert prepared(ProcessJobConfiguration, "cpu", pools.read("cpu"), deployment)._refusal is not None


def test_a_run_without_a_deployment_is_refused() -> None:
    with pytest.raises(StageError, match="deployments only"):
        job.own_flow(None)
    assert job.own_flow(OURS) == "flows.stage.stage"


def test_the_operators_template_takes_the_place_of_ours(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = pools.read("docker")
    own["job_configuration"]["image"] = "registry.example/alignflow:1"
    (home / "pools").mkdir()
    (home / "pools" / "docker.json").write_text(json.dumps(own))
    assert prepared(DockerWorkerJobConfiguration, "docker", {}).image == "registry.example/alignflow:1"
    env = own["variables"]["properties"]["env"]["default"]
    env |= {"ALIGNFLOW_ROOTS": "/data", "MLFLOW_TRACKING_PASSWORD": "{{ $MLFLOW_TRACKING_PASSWORD }}"}
    (home / "pools" / "docker.json").write_text(json.dumps(own))
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "of the worker")
    made = prepared(DockerWorkerJobConfiguration, "docker", pools.read("docker"), env={"NCCL_DEBUG": "INFO"})
    assert made._refusal is None and made.env["MLFLOW_TRACKING_PASSWORD"] == "of the worker"
    assert (made.env["ALIGNFLOW_ROOTS"], made.env["NCCL_DEBUG"]) == ("/data", "INFO")
    for changed in ({"ALIGNFLOW_ROOTS": "/inputs"}, {"MLFLOW_TRACKING_PASSWORD": "x"}):
        assert prepared(DockerWorkerJobConfiguration, "docker", {}, env=changed)._refusal is not None
    assert pools.like("mine", "process") == "cpu" and pools.like("mine", "docker") == "docker"
    with pytest.raises(StageError, match="of type ecs"):
        pools.like("mine", "ecs")
