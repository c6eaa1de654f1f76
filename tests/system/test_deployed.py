"""Deployed runs: real servers, and workers as on hosts that share nothing else; killed, cancelled, scheduled."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments import run_deployment
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling
from prefect.utilities.callables import parameter_schema

from flows.pipeline import pipeline
from flows.servers import automations, mlflow_prefect, pools, supervisor
from flows.stage import stage
from schemas.config import PipelineConfig
from schemas.stage import STAGES, Request
from stages import tracking
from tests.support import forked_servers, homes
from tests.support.processes import alive, below, left_after, wait_for

pytestmark = pytest.mark.slow


# --- Two hosts --------------------------------------------------------------------------------------------------------


@dataclass
class Host:
    """A machine with a worker: its own home, caches and working directory; it knows the servers' addresses."""

    pool: str
    folder: Path
    environment: dict[str, str]
    worker: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def home(self) -> Path:
        return self.folder / "alignflow"

    def start(self) -> None:
        """Start the worker; it is ready when the server has heard of it, which a run waits for anyway."""
        (self.folder / "cwd").mkdir(parents=True, exist_ok=True)
        own = {"HOME": "user", "ALIGNFLOW_HOME": "alignflow", "PREFECT_HOME": "prefect"}
        environment = os.environ | self.environment | {name: str(self.folder / at) for name, at in own.items()}
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        command = [sys.executable, "-m", "flows.worker", "--pool", self.pool, "--name", self.folder.name]
        with (self.folder / "log").open("ab") as log:
            self.worker = subprocess.Popen(
                [*command, "--install-policy", "never"],
                cwd=self.folder / "cwd",
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        """kill -9 of the worker; what it has started must be gone within 5 s."""
        assert self.worker is not None
        started = below(self.worker)
        self.worker.kill()
        self.worker.wait()
        assert left_after(started, 5) == []

    def stages(self) -> list[int]:
        """The processes of stages that run on this host, or that stand in for their forks."""
        started = below(self.worker) if self.worker else []
        return [pid for pid in alive(started) if b"/request.json\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@dataclass
class Plant:
    """Servers, deployments, and a host per pool."""

    prefect: SyncPrefectClient
    mlflow: str
    cpu: Host
    gpu: Host
    watch: automations.RunWatch = field(default_factory=automations.RunWatch)

    def submit(self, config: dict[str, Any]) -> UUID:
        """A run of the deployed pipeline, not waited for."""
        run = run_deployment("pipeline/pipeline", parameters={"config": config}, timeout=0)
        assert isinstance(run, FlowRun)
        return run.id

    def run(self, flow_run_id: UUID) -> FlowRun:
        return self.prefect.read_flow_run(flow_run_id)

    def ended(self, flow_run_id: UUID, seconds: float = 900) -> FlowRun:
        """The run in its final state; a crashed one is on its way to be started again."""
        looked = time.monotonic()

        def final() -> bool:
            nonlocal looked
            if time.monotonic() - looked > 30:  # as `alignflow up` does: an event is lost where the database is locked
                looked = time.monotonic()
                self.watch()
            state = self.run(flow_run_id).state
            return state is not None and state.is_final() and not state.is_crashed()

        wait_for(final, seconds, lambda: self.story())
        return self.run(flow_run_id)

    def story(self) -> str:
        """What became of all runs, and the workers' last words, for a failing test."""
        runs = [
            f"{run.name}: {run.state and (run.state.name, run.state.message)}" for run in self.prefect.read_flow_runs()
        ]
        logs = [(host.folder / "log").read_text()[-3000:] for host in (self.cpu, self.gpu)]
        return "\n".join([*runs, *logs])

    def states(self, flow_run_id: UUID) -> list[str]:
        """Names of the states that a run has been in."""
        return [state.name or "" for state in self.prefect.read_flow_run_states(flow_run_id)]

    def parts(self, flow_run_id: UUID, name: str) -> list[FlowRun]:
        """The stage runs that a pipeline run has started under a name, in their order."""
        tasks = {task.id for task in self.prefect.read_task_runs() if task.flow_run_id == flow_run_id}
        runs = [run for run in self.prefect.read_flow_runs() if run.parent_task_run_id in tasks and run.name == name]
        return sorted(runs, key=lambda run: run.expected_start_time or run.created)  # type: ignore[arg-type, return-value]


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory, ready: Path) -> Iterator[Plant]:
    """Servers as `alignflow up` starts them, everything deployed, and a worker for each pool on a host of its own."""
    folder = tmp_path_factory.mktemp("plant")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNFLOW_HOME", str(homes.furnish(folder / "server", ready)))
        mlflow = mlflow_prefect.mlflow_server(supervisor.port(None, 0, "port"))
        prefect = mlflow_prefect.prefect_server(supervisor.port(None, 0, "port"))
        with forked_servers.running(mlflow, prefect), temporary_settings({PREFECT_API_URL: f"{prefect.url}/api"}):
            patch.setenv("MLFLOW_TRACKING_URI", mlflow.url)
            shared = {
                "MLFLOW_TRACKING_URI": mlflow.url,
                "PREFECT_API_URL": f"{prefect.url}/api",
                "PREFECT_WORKER_QUERY_SECONDS": "2",
                "ALIGNFLOW_ROOTS": str(folder),
                "ALIGNFLOW_DEVICE_SLOTS": "1",  # what a machine with one GPU has
                "ALIGNFLOW_DEVICE_LOCKS": str(folder / "devices"),
            }
            hosts = [Host(pool, folder / f"host-{pool}", shared) for pool in pools.PROCESS_POOLS]
            with get_client(sync_client=True) as client:
                deploy(client)
                try:
                    for host in hosts:
                        host.start()
                    yield Plant(client, mlflow.url, hosts[0], hosts[1])
                finally:
                    for host in hosts:
                        if host.worker is not None:
                            host.worker.kill()
                            host.worker.wait()


def deploy(client: SyncPrefectClient) -> None:
    """Pools, deployments and automations."""
    for pool in pools.PROCESS_POOLS:
        pools.apply(client, pool)
    for flow, names in ((pipeline, {"pipeline": "cpu"}), (stage, {"cpu": "cpu", "gpu": "gpu"})):
        for name, pool in names.items():
            schema = parameter_schema(flow.fn).model_dump_for_openapi()
            entrypoint = f"{flow.fn.__module__}.{flow.fn.__name__}"
            flow_id = client.create_flow(flow)
            client.create_deployment(
                flow_id, name, entrypoint=entrypoint, work_pool_name=pool, parameter_openapi_schema=schema
            )
    assert automations.apply() == automations.apply()


def config(plant: Plant, name: str, sft: dict[str, Any]) -> dict[str, Any]:
    """A small pipeline whose stages run on the host `gpu`; its data lies on the host `cpu` alone."""
    file = plant.cpu.folder / "cwd" / "rows.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"prompt": f"write a note to the baker {n}", "response": f"good morning baker {n}"} for n in range(300))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "name": name,
        "model": {"scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32}},
        "data": {"sft": {"path": str(file), "kind": "sft", "max_length": 64}},
        "sft": sft,
        "align": {},
        "evaluate": {"judge": "rule", "limit": 10, "min_prompts": 10, "max_new_tokens": 4, "bootstrap": 100},
        "pools": {"validate": "gpu", "sft": "gpu"},
    }
    return PipelineConfig.model_validate(values).model_dump(mode="json")


def runs_of(name: str, label: str) -> list[Any]:
    """MLflow's runs of an experiment with a name."""
    client = tracking.client()
    found = client.get_experiment_by_name(name)
    return [] if found is None else client.search_runs([found.experiment_id], f"attributes.run_name = '{label}'")


LONG = {"max_steps": 100_000, "epochs": None, "batch_size": 8, "max_length": 64, "checkpoint_steps": 20}
TRAINED = {**LONG, "max_steps": 1500}


# --- What they show ---------------------------------------------------------------------------------------------------


def test_hosts_share_nothing_but_the_servers_and_kills_cost_nothing_that_was_done(plant: Plant) -> None:
    flow_run_id = plant.submit(config(plant, "placed", sft=TRAINED))

    def trained(steps: int) -> Callable[[], bool]:
        return lambda: len(points("placed")) >= steps

    # The stage's process alone: its run says so, and the pipeline starts it again.
    wait_for(trained(30), 300, plant.story)
    (process,) = plant.gpu.stages()
    os.kill(process, signal.SIGKILL)
    wait_for(lambda: len(plant.parts(flow_run_id, "sft")) == 2, 300, plant.story)
    first = plant.parts(flow_run_id, "sft")[0]
    assert first.state is not None and first.state.is_crashed() and "SIGKILL" in (first.state.message or "")
    done = len(points("placed"))

    # Both workers, with all that they run: nobody is left to say so but the server.
    wait_for(trained(done + 60), 300, plant.story)
    for host in (plant.cpu, plant.gpu):
        host.kill()
        host.start()
    ended = plant.ended(flow_run_id)
    assert ended.state is not None and ended.state.is_completed(), plant.story()
    assert {"Crashed", "AwaitingRetry"} <= {*plant.states(flow_run_id)}  # twice where a loaded machine falls silent
    # Nothing twice: one run of each stage, each step of the training once, though three processes trained.
    placed = dict.fromkeys(("data sft", "sft"), plant.gpu.home)
    beside = dict.fromkeys(("base", "eval base", "eval sft", "compare"), plant.cpu.home)
    for label, home in {**placed, **beside}.items():
        (run,) = runs_of("placed", label)
        assert run.info.status == "FINISHED" and run.data.tags["home"] == str(home), label
        assert run.data.tags["pipeline.run"] == str(flow_run_id)
        assert label not in placed or plant.parts(flow_run_id, label), "started through the pool"
    assert sorted(points("placed")) == list(range(1, 1501))
    # Nobody but the host `cpu` has the file: it went to the other by MLflow.
    assert "source rows.jsonl" in [run.info.run_name for run in runs_of("placed", "source rows.jsonl")]


def points(name: str) -> list[int]:
    """Steps of an experiment's SFT run that MLflow has a loss of, each as often as it has one."""
    found = runs_of(name, "sft")
    if not found:
        return []
    return [point.step for point in tracking.client().get_metric_history(found[0].info.run_id, "train/loss")]


def test_one_device_holds_one_stage_at_a_time(plant: Plant) -> None:
    (data,) = runs_of("placed", "data sft")
    data = tracking.find(data.data.tags["stage.key"])
    (base,) = runs_of("placed", "base")
    base = tracking.find(base.data.tags["stage.key"])
    assert data is not None and base is not None
    inputs = {"data": data.outputs["data"], "model": base.outputs["model"]}
    params = PipelineConfig.model_validate(config(plant, "turns", sft={**LONG, "max_steps": 150})).sft
    assert params is not None
    asked = []
    for seed in (1, 2):
        request = Request(
            stage="sft",
            version=STAGES["sft"].version,
            params=params.model_dump(mode="json", exclude_unset=False),
            inputs=inputs,
            seed=seed,
            name=f"turn {seed}",
            experiment="turns",
        )
        run = run_deployment("stage/gpu", parameters={"request": request.model_dump(mode="json")}, timeout=0)
        assert isinstance(run, FlowRun)
        asked.append(run.id)
    for flow_run_id in asked:
        state = plant.ended(flow_run_id).state
        assert state is not None and state.is_completed(), plant.story()
    times = sorted(
        (run.info.start_time, run.info.end_time) for seed in (1, 2) for run in runs_of("turns", f"turn {seed}")
    )
    assert len(times) == 2 and times[0][1] <= times[1][0]
    said = [line.message for line in plant.prefect.read_logs() if line.flow_run_id in asked]
    assert any("waiting for a device" in line for line in said)


def test_cancelling_stops_the_training_process(plant: Plant) -> None:
    flow_run_id = plant.submit(config(plant, "cancelled", sft=LONG))
    wait_for(lambda: points("cancelled"), 300, plant.story)
    (process,) = plant.gpu.stages()
    plant.prefect.set_flow_run_state(flow_run_id, Cancelling())
    assert left_after([process], 60) == []
    state = plant.ended(flow_run_id).state
    assert state is not None and state.is_cancelled()
    (stage_run,) = plant.parts(flow_run_id, "sft")
    state = plant.ended(stage_run.id).state
    assert state is not None and state.is_cancelled()


def test_a_scheduled_run_fires_at_its_time_and_finishes(plant: Plant) -> None:
    schedule = CronSchedule(cron="* * * * *", timezone="Europe/Berlin")
    flow_id = plant.prefect.create_flow(pipeline)
    deployment_id = plant.prefect.create_deployment(
        flow_id,
        "scheduled",
        entrypoint="flows.pipeline.pipeline",
        work_pool_name="cpu",
        parameters={"config": config(plant, "placed", sft=TRAINED)},
        schedules=[DeploymentScheduleCreate(schedule=schedule, active=True)],
        parameter_openapi_schema=parameter_schema(pipeline.fn).model_dump_for_openapi(),
    )

    def fired() -> list[FlowRun]:
        runs = [run for run in plant.prefect.read_flow_runs() if run.deployment_id == deployment_id]
        return [run for run in runs if run.state is not None and not run.state.is_scheduled()]

    wait_for(fired, 300, plant.story)
    plant.prefect.pause_deployment(deployment_id)
    (run, *_) = fired()
    ended = plant.ended(run.id)
    assert ended.state is not None and ended.state.is_completed(), plant.story()
    assert ended.auto_scheduled and ended.start_time is not None and ended.expected_start_time is not None
    late = (ended.start_time - ended.expected_start_time).total_seconds()
    # Prefect waits whole seconds, rounded, so that a run may start up to half a second and a request early.
    assert ended.expected_start_time.second == 0 and late > -1
