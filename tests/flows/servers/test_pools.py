"""How many runs a machine takes up, and in which queue what waits for what."""

import os
import subprocess
import sys
from importlib.resources import files
from types import SimpleNamespace

import psutil
import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient

from flows import pipeline, retrain
from flows.execution import gpu_slots
from flows.servers import pools
from flows.servers.address_file import Addresses
from flows.servers.up import workers_of
from tests.conftest import ROOT
from tests.flows.test_cli import shell_lines


@pytest.mark.parametrize(
    ("cores", "gib", "gpus", "runs"),
    [
        (2, 24, 0, 1),
        (16, 64, 0, 4),  # 16 cores / 4
        (64, 32, 0, 8),  # 32 GiB / 4
        (64, 3, 0, 1),
        (16, 64, 8, 8),  # each GPU has a run
    ],
)
def test_runs_at_once(cores: int, gib: int, gpus: int, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=gib * 2**30))
    monkeypatch.setattr(gpu_slots, "names", lambda: [str(number) for number in range(gpus)])
    assert pools.runs_at_once() == runs


def test_prefects_own_command_deploys_from_the_root_as_the_readme_says(prefect: SyncPrefectClient) -> None:
    (line,) = [line for line in shell_lines() if line.startswith("prefect ") and " deploy " in line]
    for pool in pools.templates():
        pools.apply(prefect, pool)
    command = [sys.executable, "-m", *line.split()]
    environment = os.environ | {"PREFECT_API_URL": str(prefect.api_url), "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    declared = yaml.safe_load((files("deploy") / "prefect.yaml").read_text())["deployments"]
    assert {one.name for one in prefect.read_deployments()} == {one["name"] for one in declared}


def test_a_run_that_waits_for_a_stage_does_not_take_its_worker() -> None:
    """With a limit of one, the worker that has the pipeline takes no stage, and another one does."""
    declared = yaml.safe_load((files("deploy") / "prefect.yaml").read_text())["deployments"]
    queues = {
        (one["entrypoint"], one["work_pool"]["name"]): one["work_pool"].get("work_queue_name", "default")
        for one in declared
        if one["work_pool"]["name"] in pools.PROCESS_POOLS
    }
    assert queues == {
        ("flows.pipeline.from_preset", "cpu"): "default",
        ("flows.pipeline.pipeline", "cpu"): "default",
        ("flows.retrain.retrain", "cpu"): "default",
        ("flows.stage.stage", "cpu"): "stages",
        ("flows.stage.stage", "gpu"): "stages",
    }
    where = Addresses(pid=1, mlflow="http://127.0.0.1:5000", prefect="http://127.0.0.1:4200/api")
    commands = [worker.command for worker in workers_of("gpu", where, 3)]
    assert [command[command.index("--work-queue") + 1] for command in commands] == ["default", "stages"]
    assert all(command[command.index("--limit") + 1] == "3" for command in commands)
    (slurm,) = workers_of("slurm", where, 3)
    assert "--limit" not in slurm.command and "--work-queue" not in slurm.command


def test_the_forms_explain_every_field() -> None:
    for one in (pipeline.from_preset, retrain.retrain):
        fields = one.parameters.properties
        assert fields and all(field.get("description") for field in fields.values()), fields
