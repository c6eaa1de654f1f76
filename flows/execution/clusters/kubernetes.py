"""Stages on several nodes of Kubernetes. The worker of pool `nodes` is a pod of the cluster; the stages are others.

    python -P -m flows.kubernetes job           the flow run, here; for each stage it calls
    python -P -m flows.kubernetes stage ... -- COMMAND

which makes a TrainJob, a JobSet or an Indexed Job of the command, whichever the cluster has, passes the lines of the
first node on, ends with its exit code, and removes what it has made. It asks the API server with the account of its
own pod, which needs the rights of deploy/README.md. The home (ALIGNFLOW_HOME) must be a volume that all pods mount.
"""

import argparse
import contextlib
import os
import re
import shlex
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import httpx

from flows.execution import job
from flows.execution.clusters.manifests import CONTAINER, INDEX, MANIFESTS, RUNTIME, Asked, Manifest
from flows.execution.clusters.slurm import OWN_CODES
from schemas.environment import HOME, KEEP_WORK, LAUNCHER, RANK_MINUTES
from schemas.errors import EXIT_CODES
from schemas.text import show
from stages.runtime.process import die_with_parent
from stages.runtime.workspace import SAY_SECONDS

POLL_SECONDS = 2.0
START_SECONDS = 60.0
"""How long an API server that is away or busy is waited for before there is a stage to be followed."""
REMOVALS = 3
"""How often it is tried to remove an object."""
DENIED = {401, 403}
RIGHTS = "Fix: let the worker of pool `nodes` be a pod whose account has the rights of deploy/README.md, GPU work pools"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\S+")
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PASSED = (HOME, KEEP_WORK, RANK_MINUTES, "MKL_NUM_THREADS", "OMP_NUM_THREADS")
PASSED += ("PYTHONUNBUFFERED", "TOKENIZERS_PARALLELISM")
"""Variables of a stage that its pods get from here, beside those of the job template; the others are those of the
worker's pod."""
LABELS = {"job": "job-name={}", "jobset": "jobset.sigs.k8s.io/jobset-name={}"}
LABELS["trainjob"] = LABELS["jobset"]
PLURALS = {"TrainJob": "trainjobs", "JobSet": "jobsets", "Job": "jobs", "Service": "services"}


class Api:
    """The API server, as this pod's account sees it."""

    def __init__(self, url: str, namespace: str, client: httpx.Client) -> None:
        self.url, self.namespace, self.client = url, namespace, client
        self.patience = START_SECONDS
        """How long a question is asked again while the server is away (no answer) or busy (`is_busy`)."""

    def ask(self, method: str, path: str, timeout: float = 30.0, **given: Any) -> httpx.Response:
        """An answer, whatever it says. The account's token is read each time: it is renewed."""
        end = time.monotonic() + self.patience
        while True:
            headers = {"Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}"}
            late = time.monotonic() + POLL_SECONDS > end
            try:
                answer = self.client.request(method, f"{self.url}{path}", headers=headers, timeout=timeout, **given)
                if late or not is_busy(answer):
                    return answer
            except httpx.TransportError:
                if late:
                    raise
            time.sleep(POLL_SECONDS)

    def get(self, path: str, **query: str) -> Manifest | None:
        """An object; None where there is none. Raises httpx.HTTPError."""
        answer = self.ask("GET", path, params=query)
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
        return answer.json()

    def place(self, manifest: Manifest, name: str = "") -> str:
        """Where an object is, or those of its kind are."""
        version = manifest["apiVersion"]
        root = "/api" if version == "v1" else "/apis"
        kinds = f"{root}/{version}/namespaces/{self.namespace}/{PLURALS[manifest['kind']]}"
        return f"{kinds}/{name}" if name else kinds

    def pods(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods"

    def kind(self) -> str:
        """The kind of objects that this cluster has, the best first."""
        groups = {one["name"] for one in (self.get("/apis") or {}).get("groups", [])}
        if "trainer.kubeflow.org" in groups:
            runtimes = "/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes"
            if self.ask("GET", f"{runtimes}/{RUNTIME}").status_code == 200:
                return "trainjob"
        return "jobset" if "jobset.x-k8s.io" in groups else "job"


def is_there(answer: httpx.Response) -> bool:
    """Whether an object was not made since there is one of its name."""
    with contextlib.suppress(ValueError):
        return answer.status_code == 409 and answer.json().get("reason") == "AlreadyExists"
    return False


def is_busy(answer: httpx.Response) -> bool:
    """Whether to ask again: too many questions, a fault of the server, or a quota that others change at this moment."""
    return (answer.status_code in (409, 429) and not is_there(answer)) or answer.status_code >= 500


def connected() -> Api:
    """The API server of the cluster that this process is a pod of."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    client = httpx.Client(verify=str(ACCOUNT / "ca.crt"))
    return Api(f"https://{host}:{port}", (ACCOUNT / "namespace").read_text().strip(), client)


@dataclass
class Stage:
    """The objects of a stage, and how far its lines were read."""

    api: Api
    kind: str
    made: list[Manifest] = field(default_factory=list)
    read: str = ""
    """Time of the last line that was passed on."""
    denied: bool = False
    """Whether it was said that no lines can be read."""
    disrupted: bool = False
    """Whether one of the pods was preempted, evicted or drained: its node or its place was needed otherwise."""

    def make(self, manifests: Sequence[Manifest]) -> None:
        """Make the objects. Raises httpx.HTTPError where the API server refuses one."""
        for one in manifests:
            self.made.append(one)  # first: it may be made although no answer comes
            answer = self.api.ask("POST", self.api.place(one), json=one)
            if not is_there(answer):  # it was made although no answer came
                answer.raise_for_status()
        self.api.patience = 0.0  # from now on `follow` waits, and `remove` must not

    def remove(self) -> None:
        """Remove all that was made: its pods are told to save and end."""
        for one in self.made:
            kind, name, why = one["kind"], one["metadata"]["name"], ""
            for _ in range(REMOVALS):
                try:
                    body = {"propagationPolicy": "Background"}
                    answer = self.api.ask("DELETE", self.api.place(one, name), timeout=POLL_SECONDS, json=body)
                except httpx.HTTPError as error:
                    why = type(error).__name__
                    continue
                why = "" if answer.is_success or answer.status_code == 404 else str(answer.status_code)
                if not why:
                    break
            if why:
                show(f"error: {kind} {name} may run on ({why}). Fix: kubectl delete {kind.lower()} {name}", sys.stderr)

    def first_pod(self, name: str) -> Manifest | None:
        """The pod of the first node, once there is one. Whether one of all pods was disrupted is noted."""
        pods = (self.api.get(self.api.pods(), labelSelector=LABELS[self.kind].format(name)) or {}).get("items", [])
        self.disrupted = self.disrupted or any("DisruptionTarget" in conditions(pod) for pod in pods)
        return next((pod for pod in pods if pod["metadata"].get("labels", {}).get(INDEX) == "0"), None)

    def pass_on(self, pod: Manifest) -> None:
        """Print what the pod has printed since the last call. Each line comes with its time, in order."""
        since = {}
        if self.read:  # the node's own time zone is in it
            since = {"sinceTime": f"{datetime.fromisoformat(self.read).astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"}
        query = {"container": CONTAINER, "timestamps": "true", **since}
        answer = self.api.ask("GET", f"{self.api.pods()}/{pod['metadata']['name']}/log", params=query)
        if answer.status_code in DENIED and not self.denied:
            self.denied = True
            show(
                "warning: the lines of the stage cannot be read. Fix: give the account `get` of `pods/log`", sys.stderr
            )
        for line in answer.text.split("\n") if answer.is_success else ():  # a line may hold other ends of lines
            at, _, text = line.partition(" ")
            if TIME.fullmatch(at) and at > self.read:
                self.read = at
                print(text, flush=True)

    def look(self, name: str) -> int | None:
        """Pass lines on; the stage's exit code once it has ended."""
        last = self.made[-1]
        now = self.api.get(self.api.place(last, name))
        pod = self.first_pod(name)
        if pod is not None:
            self.pass_on(pod)
            for one in pod.get("status", {}).get("containerStatuses", []):
                if "terminated" in one.get("state", {}):
                    return self.meaning(int(one["state"]["terminated"]["exitCode"]))
        if now is None:
            show(f"{last['kind']} {name} was removed")
            return EXIT_CODES["preempted"]
        ends = conditions(now)
        if "Failed" in ends:  # not at FailureTarget: until all pods have ended the first one may still save
            return self.meaning(EXIT_CODES["failed"])
        return 0 if ends & {"Complete", "Completed"} else None

    def meaning(self, code: int) -> int:
        """The stage's exit code by its container's. Death by SIGTERM is a stop from outside, and any is where a pod was
        disrupted, unless the stage says otherwise.
        """
        if code in OWN_CODES | {0}:
            return code
        stopped = self.disrupted or code == 128 + signal.SIGTERM
        return EXIT_CODES["preempted"] if stopped else EXIT_CODES["failed"]

    def follow(self, name: str) -> int:
        """Look on until the stage ends. An API server that is away is waited for, but not one that refuses."""
        said = time.monotonic()
        while True:
            try:
                code = self.look(name)
                if code is not None:
                    return code
            except httpx.HTTPError as error:
                if is_denied(error):
                    raise
                if time.monotonic() - said > SAY_SECONDS:
                    said = time.monotonic()
                    show(f"the API server does not answer ({type(error).__name__}); waiting for it")
            time.sleep(POLL_SECONDS)


def conditions(of: Manifest) -> set[str]:
    """The conditions that hold of an object."""
    return {one["type"] for one in of.get("status", {}).get("conditions", []) if one["status"] == "True"}


def is_denied(error: httpx.HTTPError) -> bool:
    """Whether the account lacks a right."""
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code in DENIED


class Stopped(Exception):
    """A signal has come: at once, whatever was waited for, since little time is left to remove what was made."""


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """End by SIGTERM or SIGINT, once."""
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)
    raise Stopped


def run_stage(options: argparse.Namespace, api: Api) -> int:
    """Make the objects of the command, wait for its end, and leave nothing."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    stage = Stage(api, options.kind)
    try:
        return followed(options, stage)
    except Stopped:
        return EXIT_CODES["preempted"]
    except httpx.HTTPError as error:
        said = error.response if isinstance(error, httpx.HTTPStatusError) else None
        busy = said is None or said.status_code == 429 or said.status_code >= 500
        what = f"{type(error).__name__}: {error}" if said is None else f"{said.status_code} {said.text[:500]}"
        if busy:
            fix = "Fix: see that it is there (kubectl get --raw /readyz), then start the run again: it resumes"
            show(f"error: Kubernetes has not answered for {START_SECONDS:g} s ({what}). {fix}", sys.stderr)
            return EXIT_CODES["failed"]
        fix = RIGHTS if is_denied(error) else "Fix: give the job template another `kind`, or correct what it says"
        show(f"error: Kubernetes refuses: {what} {fix}", sys.stderr)
        return EXIT_CODES["refused"]
    finally:
        api.patience = 0.0
        stage.remove()


def followed(options: argparse.Namespace, stage: Stage) -> int:
    """The stage's exit code. Raises httpx.HTTPError where the API server is away, or refuses."""
    api = stage.api
    pod = api.get(f"{api.pods()}/{os.environ['HOSTNAME']}")
    if pod is None:
        message = f"error: there is no pod {os.environ['HOSTNAME']}: the worker of this pool has to be one. {RIGHTS}"
        show(message, sys.stderr)
        return EXIT_CODES["refused"]
    if stage.kind == "auto":
        stage.kind = api.kind()
    passed = [*PASSED, *(name for name in options.variables.split(",") if not name.startswith("PET_"))]
    asked = Asked(
        name=f"alignflow-{uuid.uuid4().hex[:10]}",
        nodes=int(os.environ.get("PET_NNODES") or 1),
        devices=int(os.environ.get("PET_NPROC_PER_NODE") or 1),
        command=options.command,
        pod=pod,
        environment={name: os.environ[name] for name in passed if name in os.environ},
        gpus=options.gpus == "yes",
        queue=options.queue,
    )
    if lost := asked.left_out(stage.kind):
        message = f"the worker's pod has {', '.join(lost)}, which the pods of a {stage.kind} would not get"
        other = "or let the pool's `kind` be jobset or job" if stage.kind == "trainjob" else "or put it into the image"
        show(f"error: {message}. Fix: leave it out of the worker's pod, {other}", sys.stderr)
        return EXIT_CODES["refused"]
    stage.make(MANIFESTS[stage.kind](asked))
    show(f"{stage.made[-1]['kind']} {asked.name} with {asked.nodes} pods")
    return stage.follow(asked.name)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, and as `command` what stands behind `--`."""
    parser = argparse.ArgumentParser(prog="python -m flows.kubernetes")
    parser.add_argument("mode", choices=["job", "stage"])
    parser.add_argument(
        "--kind", choices=["auto", *MANIFESTS], default="auto", help="what is made; auto: what is there"
    )
    parser.add_argument("--queue", default="", help="Kueue's queue")
    parser.add_argument(
        "--variables", default="", help="names of variables that the pods get from here, separated by commas"
    )
    parser.add_argument("--gpus", choices=["yes", "no"], default="yes", help="whether each rank gets a GPU")
    end = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:end], argparse.Namespace(command=argv[end + 1 :]))


def main(argv: Sequence[str], template: Callable[[], Iterable[str]] = tuple) -> int:
    """template: gives the names of the variables that the job template may set."""
    options = parse(argv)
    if options.mode == "stage":
        if not die_with_parent(signal.SIGTERM):  # a death of the parent ends the pods too
            return EXIT_CODES["preempted"]
        try:
            api = connected()
        except (KeyError, OSError) as error:
            show(f"error: this is no pod of a cluster ({error}). {RIGHTS}", sys.stderr)
            return EXIT_CODES["refused"]
        return run_stage(options, api)
    own = [f"--kind={options.kind}", f"--queue={options.queue}", f"--gpus={options.gpus}"]
    own.append(f"--variables={','.join(name for name in template() if name in os.environ)}")
    os.environ[LAUNCHER] = shlex.join([sys.executable, "-P", "-m", "flows.kubernetes", "stage", *own, "--"])
    job.main()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
