"""Stages as objects of Kubernetes: what is asked for, and a server that stands in for the API server."""

import argparse
import json
import os
import shlex
import signal
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import kubernetes_validate
import pytest

from flows.execution import process
from flows.execution.clusters import kubernetes, manifests, slurm
from flows.kubernetes import variables as of_template
from schemas.errors import EXIT_CODES, Status
from schemas.stage import Placement, Request
from stages.runtime import process as process_of
from tests.support.web import serving

POD: dict[str, Any] = {
    "metadata": {"name": "worker", "uid": "u-1"},
    "spec": {
        "nodeName": "a",
        "dnsPolicy": "ClusterFirst",
        "runtimeClassName": "nvidia",
        "securityContext": {"runAsNonRoot": True, "runAsUser": 10001},
        "containers": [
            {
                "name": "worker",
                "image": "alignflow:1",
                "env": [
                    {"name": "MLFLOW_TRACKING_URI", "value": "http://m"},
                    {"name": "OMP_NUM_THREADS", "value": "9"},
                ],
                "resources": {"limits": {"memory": "8Gi"}},
                "securityContext": {"allowPrivilegeEscalation": False},
                "workingDir": "/srv",
                "volumeMounts": [
                    {"name": "home", "mountPath": "/var/lib/alignflow"},
                    {"name": "kube-api-access-x", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"},
                ],
            }
        ],
        "volumes": [
            {"name": "home", "persistentVolumeClaim": {"claimName": "home"}},
            {"name": "kube-api-access-x", "emptyDir": {}},
        ],
    },
}
COMMAND = ["python", "-P", "-m", "stages", "align", "/var/lib/alignflow/request.json"]


def made(kind: str) -> list[dict[str, Any]]:
    asked = manifests.Asked("align-7", 4, 8, COMMAND, POD, {"OMP_NUM_THREADS": "1"}, queue="gpu")
    return manifests.MANIFESTS[kind](asked)


def variables(pod: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}


def test_an_indexed_job_is_valid_and_its_pods_find_each_other() -> None:
    service, job = made("job")
    for one in (service, job):
        kubernetes_validate.validate(one, "1.31", strict=True)
    pod = job["spec"]["template"]["spec"]
    # A pod's host name is the job's name with its index, below the service that its subdomain names.
    assert pod["subdomain"] == service["metadata"]["name"] == "align-7"
    assert service["spec"]["selector"] == {"job-name": "align-7"} and service["spec"]["clusterIP"] == "None"
    env = variables(pod)
    assert env["PET_MASTER_ADDR"] == "align-7-0.align-7" and env["PET_NNODES"] == "4" and env["OMP_NUM_THREADS"] == "1"
    assert (job["spec"]["completions"], job["spec"]["parallelism"], job["spec"]["backoffLimit"]) == (4, 4, 0)
    assert pod["containers"][0]["resources"]["limits"] == {"memory": "8Gi", "nvidia.com/gpu": "8"}
    assert [one["name"] for one in pod["volumes"]] == ["home"] and "nodeName" not in pod
    assert (pod["runtimeClassName"], pod["containers"][0]["workingDir"]) == ("nvidia", "/srv")
    # torchrun kills its ranks before the kubelet kills the pod, or they would not be waited for
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]


def test_a_jobset_holds_a_valid_job() -> None:
    (jobset,) = made("jobset")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **replicated["template"]}
    kubernetes_validate.validate(job, "1.31", strict=True)
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["spec"]["failurePolicy"] == {"maxRestarts": 0}
    # JobSet names its pods <set>-<job>-<replica>-<index>.<set>
    head = variables(job["spec"]["template"]["spec"])["PET_MASTER_ADDR"]
    assert head == f"align-7-{replicated['name']}-0-0.align-7"


def test_a_trainjob_leaves_torchrun_to_its_runtime() -> None:
    (trainjob,) = made("trainjob")
    trainer = trainjob["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["command"]) == (4, 8, COMMAND)
    assert not [one for one in trainer["env"] if one["name"].startswith("PET_")]
    assert trainjob["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gpu"}
    (patch,) = trainjob["spec"]["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert [one["name"] for one in pod["containers"][0]["volumeMounts"]] == ["home"]
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
    kubernetes_validate.validate(whole, "1.31", strict=True)


def test_what_the_pods_would_lack_is_named() -> None:
    own = json.loads(json.dumps(POD))
    own["spec"] |= {"initContainers": [{"name": "first"}], "hostNetwork": False, "schedulerName": "own"}
    own["spec"] |= {"hostUsers": False, "enableServiceLinks": False, "hostPID": True, "tolerations": []}
    own["spec"]["containers"][0]["envFrom"] = [{"secretRef": {"name": "alignflow"}}]
    asked = manifests.Asked("a", 2, 1, COMMAND, own)
    assert asked.left_out("job") == ["initContainers"] == manifests.Asked("a", 2, 1, COMMAND, own).left_out("jobset")
    fenced = ["enableServiceLinks", "hostUsers", "hostPID"]
    lost = ["initContainers", "schedulerName", *fenced, "runtimeClassName", "envFrom", "workingDir"]
    assert asked.spec("head").items() >= {name: own["spec"][name] for name in fenced}.items()
    assert asked.left_out("trainjob") == lost


# --- A server that stands in for the API server -----------------------------------------------------------------------


class Cluster:
    """What the server has, and how its first pod ends: after three looks, with an exit code."""

    def __init__(self) -> None:
        self.groups: list[str] = []
        self.objects: dict[str, Any] = {}
        self.made: list[str] = []
        self.looks = 0
        self.code: int | None = 0
        self.status: dict[str, Any] = {}
        self.refuses, self.loses, self.stops_at, self.keeps = " ", " ", 0, False
        self.busy, self.disrupted, self.pod = 0, False, POD
        self.lost_answer, self.conflicts = False, 0

    def answer(self, method: str, path: str, query: str, body: Any) -> tuple[int, Any]:
        if self.busy:
            self.busy -= 1
            return 429 if self.busy % 2 else 503, {"message": "too many"}
        if method == "POST" and self.conflicts:
            self.conflicts -= 1
            return 409, {"reason": "Conflict", "message": "the quota has been modified"}
        if method == "POST" and f"{path}/{body['metadata']['name']}" in self.objects:
            return 409, {"reason": "AlreadyExists", "message": "already exists"}
        if method == "POST":
            if path.endswith(self.refuses):
                return 403, {"message": "no rights"}
            self.made.append(path.rpartition("/")[2])
            self.objects[f"{path}/{body['metadata']['name']}"] = body
            return (504, {}) if self.lost_answer else (201, body)
        if method == "DELETE" and self.keeps:
            return 500, {}
        if method == "DELETE":
            return 200, self.objects.pop(path, {})
        if path == "/apis":
            return 200, {"groups": [{"name": name} for name in self.groups]}
        if path.endswith("/pods/worker"):
            return 200, self.pod
        if path.endswith("/log"):
            lines = [f"2026-01-01T00:00:0{i}.5+02:00 step {i}\rLoading\u2028more" for i in range(min(self.looks, 3))]
            return 200, "\n".join(lines)
        if path.endswith("/pods"):
            self.looks += 1
            if self.looks == self.stops_at:
                signal.raise_signal(signal.SIGTERM)
            ended = self.looks > 3 and self.code is not None
            state = {"terminated": {"exitCode": self.code}} if ended else {"running": {}}
            told = [{"type": "DisruptionTarget", "status": "True"}] if self.disrupted else []
            other = {"metadata": {"name": "p1", "labels": {manifests.INDEX: "1"}}, "status": {"conditions": told}}
            first = {"metadata": {"name": "p0", "labels": {manifests.INDEX: "0"}}}
            return 200, {"items": [other, first | {"status": {"containerStatuses": [{"state": state}]}}]}
        if path in self.objects and self.loses not in path:
            return 200, self.objects[path] | {"status": self.status if self.looks > 2 else {}}
        return 404, {}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cluster, kubernetes.Api]]:
    own = Cluster()

    class Handler(BaseHTTPRequestHandler):
        def any(self) -> None:
            assert self.headers["Authorization"] == "Bearer secret"
            size = int(self.headers.get("Content-Length") or 0)
            path, _, query = self.path.partition("?")
            status, answer = own.answer(self.command, path, query, json.loads(self.rfile.read(size) or "null"))
            content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = any

        def log_message(self, format: str, *args: object) -> None: ...

    (tmp_path / "token").write_text("secret")
    monkeypatch.setattr(kubernetes, "ACCOUNT", tmp_path)
    monkeypatch.setattr(kubernetes, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(kubernetes, "START_SECONDS", 0.5)
    for name, value in {"HOSTNAME": "worker", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}.items():
        monkeypatch.setenv(name, value)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with serving(Handler) as url, httpx.Client() as client:
        yield own, kubernetes.Api(url, "ml", client)
    for number, handler in before.items():
        signal.signal(number, handler)


def run(api: kubernetes.Api, kind: str = "auto", variables: str = "") -> int:
    given = {"kind": kind, "queue": "", "gpus": "no", "variables": variables, "command": COMMAND}
    return kubernetes.run_stage(argparse.Namespace(**given), api)


@pytest.mark.parametrize(
    ("groups", "kinds"),
    [
        ([], ["services", "jobs"]),
        (["jobset.x-k8s.io"], ["jobsets"]),
        (["jobset.x-k8s.io", "trainer.kubeflow.org"], ["jobsets"]),  # a Trainer without its runtime is none
    ],
)
def test_what_the_cluster_has_is_made(
    groups: list[str], kinds: list[str], cluster: tuple[Cluster, kubernetes.Api]
) -> None:
    own, api = cluster
    own.groups = groups
    assert run(api) == 0
    assert own.made == kinds and own.objects == {}


@pytest.mark.parametrize(
    ("code", "status"), [(0, "done"), (65, "refused"), (75, "preempted"), (143, "preempted"), (137, "failed")]
)
def test_a_stage_is_followed_and_ends_as_its_first_pod_does(
    code: int, status: Status, cluster: tuple[Cluster, kubernetes.Api], capfd: pytest.CaptureFixture[str]
) -> None:
    own, api = cluster
    own.code = code
    assert run(api, "jobset") == EXIT_CODES[status]
    assert own.made == ["jobsets"] and own.objects == {}
    lines = [line for line in capfd.readouterr().out.split("\n") if line.startswith("step")]
    assert lines == [f"step {i}\rLoading\u2028more" for i in (0, 1, 2)]  # each once, whatever it holds


def test_a_quota_that_others_change_is_asked_again(cluster: tuple[Cluster, kubernetes.Api]) -> None:
    """It is a 409 too, and nothing was made."""
    own, api = cluster
    own.conflicts = 2
    assert run(api, "job") == 0 and own.made == ["services", "jobs"]


def test_another_pod_that_fails_ends_it(cluster: tuple[Cluster, kubernetes.Api]) -> None:
    own, api = cluster
    own.code, own.status = None, {"conditions": [{"type": "Failed", "status": "True"}]}
    assert run(api, "job") == EXIT_CODES["failed"] and own.objects == {}


def test_where_another_pod_fails_the_first_one_may_still_save(cluster: tuple[Cluster, kubernetes.Api]) -> None:
    """FailureTarget stands from its third look on; at the fourth the first pod has saved and ended."""
    own, api = cluster
    own.code, own.status = EXIT_CODES["preempted"], {"conditions": [{"type": "FailureTarget", "status": "True"}]}
    assert run(api, "job") == EXIT_CODES["preempted"] and own.looks == 4


@pytest.mark.parametrize("code", [None, 137])
def test_a_pod_that_is_preempted_is_a_stop(code: int | None, cluster: tuple[Cluster, kubernetes.Api]) -> None:
    own, api = cluster
    own.code, own.disrupted, own.status = code, True, {"conditions": [{"type": "Failed", "status": "True"}]}
    if code is not None:
        own.status = {}
    assert run(api, "job") == EXIT_CODES["preempted"]


def test_an_api_server_that_is_busy_is_asked_again(cluster: tuple[Cluster, kubernetes.Api]) -> None:
    own, api = cluster
    own.busy, own.lost_answer = 3, True  # then what was made is found to be there
    assert run(api, "jobset") == 0 and own.objects == {} and own.made == ["jobsets"]


def test_one_that_stays_busy_or_away_is_an_error(
    cluster: tuple[Cluster, kubernetes.Api], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, api = cluster
    own.busy = 10**6
    assert run(api) == EXIT_CODES["failed"]
    said = capfd.readouterr().err
    assert "has not answered for 0.5 s (" in said and "too many" in said and "Fix: see that it is there" in said
    api.url, api.patience = "http://127.0.0.1:1", 0.05
    assert run(api) == EXIT_CODES["failed"] and "ConnectError" in capfd.readouterr().err


def test_variables_of_the_job_template_reach_the_pods(
    cluster: tuple[Cluster, kubernetes.Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, api = cluster
    for name, value in {"NCCL_DEBUG": "INFO", "PET_NNODES": "2", "SECRET": "s"}.items():
        monkeypatch.setenv(name, value)
    job, launched = [], []
    monkeypatch.setattr(kubernetes.job, "main", lambda: job.append(os.environ["ALIGNFLOW_LAUNCHER"]))
    monkeypatch.setenv("ALIGNFLOW_LAUNCHER", "")
    assert kubernetes.main(["job"], of_template) == 0
    (told,) = [word for word in shlex.split(job[0]) if word.startswith("--variables=")]
    remove = kubernetes.Stage.remove
    monkeypatch.setattr(kubernetes.Stage, "remove", lambda self: (launched.extend(self.made), remove(self)))
    assert run(api, "job", told.removeprefix("--variables=")) == 0
    env = {one["name"]: one.get("value") for one in launched[1]["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["NCCL_DEBUG"] == "INFO" and "SECRET" not in env


def test_what_a_trainjob_would_drop_is_refused(
    cluster: tuple[Cluster, kubernetes.Api], capfd: pytest.CaptureFixture[str]
) -> None:
    own, api = cluster
    assert run(api, "trainjob") == EXIT_CODES["refused"] and own.made == []
    assert "runtimeClassName, workingDir, which the pods of a trainjob would not get" in capfd.readouterr().err


def test_a_launcher_whose_parent_has_died_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNFLOW_PARENT", str(os.getpid()))  # whose child this process is not
    monkeypatch.setattr(process_of.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(prctl=lambda *_: 0))
    monkeypatch.setattr(kubernetes, "connected", lambda: 1 / 0)
    monkeypatch.setattr(slurm, "submit", lambda *_: 1 / 0)
    for launcher in (kubernetes, slurm):
        assert launcher.main(["stage", "--", "true"]) == EXIT_CODES["preempted"]


def test_an_object_that_somebody_removes_is_a_stop(cluster: tuple[Cluster, kubernetes.Api]) -> None:
    own, api = cluster
    own.code, own.loses = None, "/jobsets/"
    assert run(api, "jobset") == EXIT_CODES["preempted"] and own.objects == {}


def test_a_stop_removes_all(cluster: tuple[Cluster, kubernetes.Api]) -> None:
    own, api = cluster
    own.code, own.stops_at = None, 3
    assert run(api, "job") == EXIT_CODES["preempted"]
    assert own.made == ["services", "jobs"] and own.objects == {}


def test_what_cannot_be_removed_is_said(
    cluster: tuple[Cluster, kubernetes.Api], capfd: pytest.CaptureFixture[str]
) -> None:
    own, api = cluster
    own.keeps = True
    assert run(api, "jobset") == 0
    assert "JobSet alignflow-" in (said := capfd.readouterr().err) and "Fix: kubectl delete jobset alignflow-" in said


def test_who_may_not_look_is_told_at_once(
    cluster: tuple[Cluster, kubernetes.Api], capfd: pytest.CaptureFixture[str]
) -> None:
    own, api = cluster
    answer = own.answer

    def denied(method: str, path: str, query: str, body: Any) -> tuple[int, Any]:
        return (403, {"message": "pods is forbidden"}) if path.endswith("/pods") else answer(method, path, query, body)

    own.answer = denied  # type: ignore[method-assign]
    assert run(api, "job") == EXIT_CODES["refused"] and own.objects == {}
    assert "pods is forbidden" in (said := capfd.readouterr().err) and "Fix: " in said


def test_a_launcher_is_told_of_the_devices_of_one_node_too(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(stage="validate", version=1, params={}, placement=Placement(devices=8))
    assert not [name for name in process.environment(request) if name.startswith("PET_")]
    monkeypatch.setenv("ALIGNFLOW_LAUNCHER", "srun")
    values = process.environment(request)
    assert (values["PET_NNODES"], values["PET_NPROC_PER_NODE"]) == ("1", "8")


def test_what_kubernetes_refuses_is_said(
    cluster: tuple[Cluster, kubernetes.Api], capfd: pytest.CaptureFixture[str]
) -> None:
    own, api = cluster
    own.refuses = "/jobs"
    assert run(api, "job") == EXIT_CODES["refused"]
    assert "no rights" in capfd.readouterr().err
    assert own.made == ["services"] and own.objects == {}
