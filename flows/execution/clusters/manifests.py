"""A stage on several nodes of Kubernetes, as what the cluster has: a TrainJob, a JobSet, or an Indexed Job.

All say the same to the stage, in torchrun's own variables (PET_*). Their pods are like the one that asks for them.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

Manifest = dict[str, Any]

PORT = 29500
RUNTIME = "torch-distributed"
"""The training runtime that comes with Kubeflow's Trainer; it sets all of PET_* by itself."""
INDEX = "batch.kubernetes.io/job-completion-index"
CONTAINER = "node"
"""Name of the stage's container; that of the runtime's too."""
SAVE_SECONDS, RANKS_SECONDS = 600, 580
"""How long pods that are stopped may take to save, and their torchrun's ranks."""
KEPT = ("securityContext", "tolerations", "nodeSelector", "affinity", "imagePullSecrets")
"""What a node's pod has of the one that asks, beside image, volumes and variables."""
USUAL = {"dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler", "enableServiceLinks": True}
USUAL |= {"hostUsers": True, "hostNetwork": False, "hostPID": False, "hostIPC": False, "shareProcessNamespace": False}
"""What a pod has that says nothing of it."""
ALSO_KEPT = (*USUAL, "runtimeClassName", "priorityClassName", "hostAliases", "dnsConfig", "topologySpreadConstraints")
"""The same, where the pod is ours: a TrainJob takes none of these."""
OF_CONTAINER = ("image", "imagePullPolicy", "envFrom", "securityContext", "workingDir")
KEPT_SECONDS = 3600
"""How long an object stays that nobody removes."""


@dataclass(frozen=True)
class Asked:
    """What is asked of the cluster."""

    name: str
    nodes: int
    devices: int
    """GPUs of each node, and ranks."""
    command: list[str]
    pod: Manifest
    """The pod that asks, as the API server gives it."""
    environment: dict[str, str] = field(default_factory=dict)
    gpus: bool = True
    queue: str = ""
    """Kueue's queue, which starts all pods or none."""

    @property
    def metadata(self) -> Manifest:
        """Name and labels; it goes when the pod that asks is removed."""
        own = self.pod["metadata"]
        owner = {"apiVersion": "v1", "kind": "Pod", "name": own["name"], "uid": own["uid"]}
        labels = {"kueue.x-k8s.io/queue-name": self.queue} if self.queue else {}
        return {"name": self.name, "labels": labels, "ownerReferences": [owner]}

    @property
    def resources(self) -> Manifest:
        """GPUs beside what the container that asks has of memory and processors."""
        own = copy.deepcopy(self.pod["spec"]["containers"][0].get("resources", {}))
        gpus = {"nvidia.com/gpu": str(self.devices)} if self.gpus else {}
        return {"requests": own.get("requests", {}) | gpus, "limits": own.get("limits", {}) | gpus}

    def env(self, head: str = "") -> list[Manifest]:
        """Variables of the container that asks and of the stage; with `head`, the first node's host, torchrun's too."""
        pet = {"NNODES": self.nodes, "NPROC_PER_NODE": self.devices, "MASTER_ADDR": head, "MASTER_PORT": PORT}
        given = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(RANKS_SECONDS)} | self.environment
        given |= {f"PET_{name}": str(value) for name, value in pet.items()} if head else {}
        rank = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}
        own = [one for one in self.pod["spec"]["containers"][0].get("env", []) if one["name"] not in given]
        own += [{"name": name, "value": value} for name, value in given.items()]
        return own + ([{"name": "PET_NODE_RANK", "valueFrom": rank}] if head else [])

    def mounted(self) -> tuple[list[Manifest], list[Manifest]]:
        """Volumes and mounts of the pod that asks, without its own key to the API server."""
        spec = self.pod["spec"]
        volumes = [one for one in spec.get("volumes", []) if not one["name"].startswith("kube-api-access")]
        names = {one["name"] for one in volumes}
        return volumes, [one for one in spec["containers"][0].get("volumeMounts", []) if one["name"] in names]

    def spec(self, head: str) -> Manifest:
        """The pod of a node."""
        own, container = self.pod["spec"], self.pod["spec"]["containers"][0]
        volumes, mounts = self.mounted()
        kept = {name: own[name] for name in KEPT + ALSO_KEPT if name in own}
        one = {name: container[name] for name in OF_CONTAINER if name in container}
        one |= {"name": CONTAINER, "command": self.command, "env": self.env(head), "resources": self.resources}
        return kept | {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": SAVE_SECONDS,
            "containers": [one | {"volumeMounts": mounts}],
            "volumes": volumes,
        }

    def left_out(self, kind: str) -> list[str]:
        """What the pod that asks has, and an object of this kind cannot give its pods."""
        own, container = self.pod["spec"], self.pod["spec"]["containers"][0]
        lost = ["initContainers"] if own.get("initContainers") else []
        if kind == "trainjob":
            asked = {name: own[name] for name in ALSO_KEPT if own.get(name) not in (None, "", [], {})}
            lost += [name for name, value in asked.items() if value != USUAL.get(name)]
            lost += [name for name in ("envFrom", "workingDir") if container.get(name)]
        return lost

    def job(self, head: str) -> Manifest:
        """An Indexed Job's spec: one pod for each node, and one that fails ends all."""
        fails = {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [0]}}
        return {
            "completionMode": "Indexed",
            "completions": self.nodes,
            "parallelism": self.nodes,
            "backoffLimit": 0,
            "podFailurePolicy": {"rules": [fails]},
            "template": {"spec": self.spec(head)},
        }


def indexed_job(asked: Asked) -> list[Manifest]:
    """What every cluster has: an Indexed Job, and a service without an address, by which its pods have names."""
    job: Manifest = asked.job(f"{asked.name}-0.{asked.name}") | {"ttlSecondsAfterFinished": KEPT_SECONDS}
    job["template"]["spec"]["subdomain"] = asked.name
    reached = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": asked.name}}
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": asked.metadata, "spec": reached},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": asked.metadata, "spec": job},
    ]


def jobset(asked: Asked) -> list[Manifest]:
    """A JobSet, which brings a service of its own."""
    job = asked.job(f"{asked.name}-node-0-0.{asked.name}")
    spec = {
        "failurePolicy": {"maxRestarts": 0},  # the flow starts it again
        "ttlSecondsAfterFinished": KEPT_SECONDS,
        "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
    }
    return [{"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": asked.metadata, "spec": spec}]


def trainjob(asked: Asked) -> list[Manifest]:
    """A TrainJob of Kubeflow's Trainer 2.3. It has no time to live: it goes with the pod that asks. Whether pods
    get a key to the API server is its runtime's.
    """
    volumes, mounts = asked.mounted()
    pod = {name: asked.pod["spec"][name] for name in KEPT if name in asked.pod["spec"]}
    fenced = asked.pod["spec"]["containers"][0].get("securityContext", {})
    container = {"name": CONTAINER, "volumeMounts": mounts, "securityContext": fenced}
    pod |= {"volumes": volumes, "terminationGracePeriodSeconds": SAVE_SECONDS, "containers": [container]}
    job = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    trainer = {
        "image": asked.pod["spec"]["containers"][0]["image"],
        "command": asked.command,
        "env": asked.env(),
        "numNodes": asked.nodes,
        "numProcPerNode": asked.devices,
        "resourcesPerNode": asked.resources,
    }
    patch = {
        "manager": "alignflow.dev/launcher",
        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}},
    }
    spec = {"runtimeRef": {"name": RUNTIME}, "trainer": trainer, "runtimePatches": [patch]}
    return [
        {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": asked.metadata, "spec": spec}
    ]


MANIFESTS = {"trainjob": trainjob, "jobset": jobset, "job": indexed_job}
"""What makes the objects of each kind; the last one is the one to be followed."""
