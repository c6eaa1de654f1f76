"""The work pools' templates, each rendered by the worker that will use it; and the deployments on a real server."""

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import docker
import jsonschema
import kubernetes_validate
import pytest
from docker.models.containers import _create_container_args  # type: ignore[attr-defined]
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessJobConfiguration
from prefect_docker.worker import DockerWorker, DockerWorkerJobConfiguration
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from flows.planning import config_file
from flows.planning.plan_checks import candidate
from flows.servers import checks, deploy, mlflow_prefect, pools, supervisor
from tests.conftest import ROOT
from tests.support import forked_servers, homes
from tests.system.test_deployed import wait_for

PREFECT_FILE = ROOT / "deploy" / "prefect.yaml"
KUBERNETES = "1.31"
EVERYWHERE = {"ALIGNFLOW_HOME": "/var/lib/alignflow", "ALIGNFLOW_ROOTS": "/inputs", "DO_NOT_TRACK": "1"}
"""What every container is told, whatever a deployment adds."""


def rendered(kind: Any, pool: str, **values: Any) -> Any:
    """A job as the pool's worker would start it."""
    with temporary_settings(
        {PREFECT_API_URL: "http://10.0.0.5:4200/api"}
    ):  # nothing is asked; without it a server starts
        configuration = asyncio.run(kind.from_template_and_values(pools.read(pool), values))
        configuration.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="sft"))
    return configuration


def refuses(pool: str, **values: Any) -> bool:
    """Whether the template's schema refuses job variables."""
    try:
        jsonschema.validate(values, pools.read(pool)["variables"])
    except jsonschema.ValidationError:
        return True
    return False


def violations(pod: dict[str, Any]) -> list[str]:
    """What a namespace that enforces Kubernetes' Pod Security Standard *restricted* would refuse the pod for.

    The rules are those of kubernetes.io/docs/concepts/security/pod-security-standards, baseline and restricted.
    """
    volume_types = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected"}
    whole = pod.get("securityContext", {})
    wrong = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    wrong += [
        f"volume {one['name']}"
        for one in pod.get("volumes", [])
        if not set(one) - {"name"} <= {*volume_types, "secret"}
    ]
    wrong += ["sysctls"] if whole.get("sysctls") else []
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        own = container.get("securityContext", {})
        capabilities = own.get("capabilities", {})
        both = {**whole, **own}
        rules = {
            "privileged": not own.get("privileged"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "capabilities.drop": "ALL" in capabilities.get("drop", []),
            "capabilities.add": set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
            "runAsNonRoot": both.get("runAsNonRoot") is True,
            "runAsUser": both.get("runAsUser") != 0,
            "seccompProfile": both.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "procMount": own.get("procMount", "Default") == "Default",
            "windowsOptions": not both.get("windowsOptions", {}).get("hostProcess"),
            "seLinuxOptions": not {"user", "role"} & set(both.get("seLinuxOptions", {})),
            "appArmorProfile": both.get("appArmorProfile", {}).get("type", "RuntimeDefault") != "Unconfined",
            "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
        }
        wrong += [rule for rule, kept in rules.items() if not kept]
    return wrong


def test_the_rules_of_the_restricted_profile_see_what_breaks_them() -> None:
    bare = {"hostPID": True, "containers": [{"name": "x"}], "volumes": [{"name": "root", "hostPath": {"path": "/"}}]}
    needed = ["allowPrivilegeEscalation", "capabilities.drop", "runAsNonRoot", "seccompProfile"]
    assert violations(bare) == ["hostPID", "volume root", *needed]
    open_again = {"privileged": True, "runAsUser": 0, "capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}
    broken = violations({"containers": [{"securityContext": open_again, "ports": [{"hostPort": 80}]}]})
    assert {"privileged", "runAsUser", "capabilities.add", "hostPort"} <= set(broken)


@pytest.mark.parametrize("pool", sorted(pools.templates()))
def test_every_variable_is_used_explained_and_has_a_valid_default(pool: str) -> None:
    template = pools.read(pool)
    properties = template["variables"]["properties"]
    used = json.dumps(template["job_configuration"])
    for name, about in properties.items():
        assert f"{{{{ {name} }}}}" in used and about["description"] and about["title"]
        jsonschema.validate({name: about["default"]}, template["variables"])
    assert used.count("{{ ") == sum(used.count(f"{{{{ {name} }}}}") for name in properties)


def test_a_process_runs_the_engine_that_dies_with_its_worker() -> None:
    assert rendered(ProcessJobConfiguration, "gpu").command == "python -P -m flows.job"
    job = rendered(ProcessJobConfiguration, "slurm", partition="a100", gres="gpu:2", time="1-00:00:00")
    assert job.command.startswith("python -P -m flows.slurm job --partition=a100 --account= --gres=gpu:2")
    assert refuses("slurm", gres="two gpus") and refuses("slurm", cpus=0) and refuses("slurm", time="; rm -r /")
    assert refuses("slurm", partition="a100 --uid=0") and refuses("slurm", account="$(id)")
    assert not refuses("slurm", gres="gpu:a100:4", time="02:00:00")


def test_a_container_gets_gpus_shared_memory_and_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://10.0.0.5:5000")
    job = rendered(
        DockerWorkerJobConfiguration,
        "docker",
        env={"OMP_NUM_THREADS": "4"},
    )
    with contextlib.closing(docker.DockerClient(base_url="tcp://127.0.0.1:9", version="1.45")) as client:
        settings = DockerWorker(work_pool_name="docker")._build_container_settings(client, job)
    asked = _create_container_args({**settings, "version": "1.45"})  # what the worker's library sends to the engine
    assert asked["command"] == "python -P -m flows.job" and asked["image"] == "alignflow:latest"
    told = {"MLFLOW_TRACKING_URI": "http://10.0.0.5:5000", "OMP_NUM_THREADS": "4"}
    assert (EVERYWHERE | told).items() <= asked["environment"].items()
    host = asked["host_config"]
    assert host["Init"] is True and host["ShmSize"] == 8 * 2**30
    (request,) = host["DeviceRequests"]
    assert request["Count"] == -1 and request["Capabilities"] == [["gpu"]]
    assert host["CapDrop"] == ["ALL"] and host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["ReadonlyRootfs"] is True and host["Tmpfs"] == {"/tmp": "mode=1777,exec"} and host["PidsLimit"] > 0
    # All containers see all GPUs; the locks by which each takes its own lie where all see them too.
    assert f"alignflow-devices:{asked['environment']['ALIGNFLOW_DEVICE_LOCKS']}" in host["Binds"]
    assert refuses("docker", shm_size="much") and refuses("docker", gpus=[{"count": -2}])
    assert not refuses("docker", gpus=[]) and not refuses("docker", gpus=[{"count": -1, "capabilities": [["gpu"]]}])


def test_a_kubernetes_job_is_valid_and_has_what_training_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    toleration = {"key": "pool", "operator": "Equal", "value": "training", "effect": "NoSchedule"}
    job = rendered(
        KubernetesWorkerJobConfiguration,
        "kubernetes",
        gpus=4,
        node_selector={"gpu": "a100"},
        tolerations=[toleration],
        env={"NCCL_DEBUG": "INFO"},
    )
    manifest = job.job_manifest
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert pod["nodeSelector"] == {"gpu": "a100"} and pod["tolerations"] == [toleration]
    (shm,) = (volume for volume in pod["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"]["medium"] == "Memory"
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert container["envFrom"] == [{"secretRef": {"name": "alignflow", "optional": True}}]
    told = {one["name"]: one["value"] for one in container["env"]}
    assert (EVERYWHERE | {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "NCCL_DEBUG": "INFO"}).items() <= told.items()
    assert violations(pod) == []
    assert pod["securityContext"]["fsGroup"] == 10001 and pod["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    written = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert written == {"/dev/shm", "/tmp", EVERYWHERE["ALIGNFLOW_HOME"]}
    assert container["args"] == ["python", "-P", "-m", "flows.job"]
    assert manifest["spec"]["backoffLimit"] == 0  # Prefect starts it again, not Kubernetes
    assert manifest["metadata"]["namespace"] == "default"


def test_a_kubernetes_job_of_defaults_is_valid_and_bad_values_are_refused() -> None:
    job = rendered(KubernetesWorkerJobConfiguration, "kubernetes")
    kubernetes_validate.validate(job.job_manifest, KUBERNETES, strict=True)
    assert refuses("kubernetes", gpus=-1) and refuses("kubernetes", gpus="two")
    assert refuses("kubernetes", gpu=2)  # mistyped: it would have got the default without a word


def test_what_a_run_may_choose_is_the_same_everywhere_and_harmless() -> None:
    allowed = []
    for pool in pools.templates():
        env = pools.read(pool)["variables"]["properties"]["env"]
        fixed = env.get("properties", {})
        assert fixed == {name: {"const": value} for name, value in env["default"].items()}
        allowed.append([name for name in env["propertyNames"]["enum"] if name not in fixed])
    assert all(names == allowed[0] for names in allowed)
    # Names that choose code, files, addresses or devices; a pattern, so that the next one is not forgotten.
    risky = r"^(ALIGNFLOW|PYTHON|LD_|DYLD|PREFECT|MLFLOW|HF_|GIT_|AWS_|SSL_|XDG_|CUDA_VISIBLE)|PATH|HOME|PROXY|FILE|DIR"
    assert not [name for name in allowed[0] if re.search(risky, name)]


FORBIDDEN: dict[str, list[dict[str, Any]]] = {
    "every": [
        {"env": {"ALIGNFLOW_ROOTS": "/"}},
        {"env": {"PYTHONPATH": "x"}},
        {"env": {"PATH": "x"}},
        {"env": {"LD_PRELOAD": "x"}},
        {"env": {"HOME": "x"}},
        {"env": {"BASH_ENV": "x"}},
        {"env": {"GIT_SSH_COMMAND": "x"}},
        {"env": {"HF_ENDPOINT": "x"}},
        {"env": {"MLFLOW_TRACKING_URI": "x"}},
        {"env": {"https_proxy": "x"}},
        {"env": {"PREFECT__FLOW_ENTRYPOINT": "x"}},
        {"env": {"CUDA_VISIBLE_DEVICES": "0"}},
        {"env": {"OMP_NUM_THREADS": "{{ $MLFLOW_TRACKING_PASSWORD }}"}},  # libgomp prints what it cannot read
        {"env.ALIGNFLOW_ROOTS": "/"},
        {"command": "touch PWNED"},
        {"working_dir": "/"},
    ],
    "docker": [
        {"image": "x"},
        {"image_pull_policy": "Always"},
        {"volumes": ["/:/host"]},
        {"networks": ["host"]},
        {"network_mode": "host"},
        {"privileged": True},
        {"labels": {"traefik.enable": "true"}},
    ],
    "kubernetes": [
        {"image": "x"},
        {"volumes": []},
        {"service_account_name": "admin"},
        {"namespace": "kube-system"},
        {"env_from": []},
        {"job_manifest": {}},
        {"labels": {"app": "mlflow"}},
    ],
    "slurm": [{"partition": "a --uid=0"}, {"account": "$(id)"}],
}


@pytest.mark.parametrize("pool", sorted(pools.templates()))
def test_what_a_run_may_not_choose_is_refused(pool: str) -> None:
    assert [values for values in [*FORBIDDEN["every"], *FORBIDDEN.get(pool, [])] if not refuses(pool, **values)] == []
    assert not refuses(pool, env={"OMP_NUM_THREADS": "4", "NCCL_DEBUG": None}, labels={"alignflow.team": "a"})


# --- On a server ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory, ready: Path) -> Iterator[SyncPrefectClient]:
    """A Prefect server with its scheduler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNFLOW_HOME", str(homes.furnish(tmp_path_factory.mktemp("prefect"), ready)))
        server = mlflow_prefect.prefect_server(supervisor.port(None, 0, "port"))
        address: dict[Any, Any] = {PREFECT_API_URL: f"{server.url}/api"}
        with forked_servers.running(server), temporary_settings(address), get_client(sync_client=True) as client:
            yield client


@pytest.mark.slow
def test_what_prefect_yaml_declares_is_deployed_and_its_schedule_makes_runs(
    prefect: SyncPrefectClient, forking: None, tmp_path: Path
) -> None:
    declared = checks.deployments(PREFECT_FILE)
    for one in declared:
        assert load_flow_from_entrypoint(one["entrypoint"]).name == one["entrypoint"].split(".")[1]
    (asked,) = (one["parameters"] for one in declared if one["name"] == "retrain")
    assert candidate(config_file.load(asked["source"], asked["overrides"]).config) == "dpo"  # it runs as it is shipped
    # As a user does it: their own file, with the schedule on, and a config as they write one elsewhere.
    file = tmp_path / "prefect.yaml"
    own = "entrypoint: flows.pipeline.pipeline\n    parameters: {config: {name: own, sft: {learning_rate: 1e-3}}}"
    text = PREFECT_FILE.read_text().replace("active: false", "active: true")
    file.write_text(text.replace("entrypoint: flows.pipeline.pipeline\n", f"{own}\n"))
    deploy.deploy(file)
    there = {one.name: one for one in prefect.read_deployments()}
    assert set(there) == {one["name"] for one in declared}
    (config,) = there["config"].parameters.values()
    assert config["sft"]["learning_rate"] == 0.001  # a text is refused by Prefect, before we could read it as a number
    for one in declared:
        assert there[one["name"]].work_pool_name == one["work_pool"]["name"]
        assert not there[one["name"]].pull_steps  # nothing of this machine's folders
    deploy.deploy(file)
    assert {one.name: one.id for one in prefect.read_deployments()} == {name: one.id for name, one in there.items()}
    assert {pool.name: pool.type for pool in prefect.read_work_pools()} == {
        pool: pools.kind(pool) for pool in pools.templates()
    }

    def scheduled() -> list[FlowRun]:
        return [run for run in prefect.read_flow_runs() if run.deployment_id == there["retrain"].id]

    # Newer versions of what the server stands on break its scheduler without a word.
    wait_for(scheduled, 120, lambda: "the scheduler creates no runs")
    assert all(run.auto_scheduled and run.expected_start_time.hour == 3 for run in scheduled())  # type: ignore[union-attr]
