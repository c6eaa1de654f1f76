"""A stage on several nodes of Kubernetes, as what the cluster has: a TrainJob, a JobSet, or an Indexed Job.

All say the same to the stage, in torchrun's own variables (PET_*). Their pods are like the one that asks for them.
"""

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["trainjob", "jobset", "job"]
Manifest = dict[str, Any]

PORT = 29500
RUNTIME = "torch-distributed"
"""The training runtime that comes with Kubeflow's Trainer; it sets all of PET_* by itself."""
INDEX = "batch.kubernetes.io/job-completion-index"
CONTAINER = "node"
"""Name of the stage's container; that of the runtime's too."""
SAVE_SECONDS = 600
"""How long pods that are stopped may take to save."""
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

    def env(self, torchrun: bool) -> list[Manifest]:
        """Variables of the container that asks, those of the stage, and torchrun's where nobody else sets them."""
        given = dict(self.environment)
        if torchrun:
            head = f"{self.name}-0.{self.name}" if torchrun == "job" else f"{self.name}-node-0-0.{self.name}"
            pet = {"NNODES": self.nodes, "NPROC_PER_NODE": self.devices, "MASTER_ADDR": head, "MASTER_PORT": PORT}
            given |= {f"PET_{name}": str(value) for name, value in pet.items()}
        own = [one for one in self.pod["spec"]["containers"][0].get("env", []) if one["name"] not in given]
        rank = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}
        ranks = [{"name": "PET_NODE_RANK", "valueFrom": rank}] if torchrun else []
        return own + [{"name": name, "value": value} for name, value in given.items()] + ranks
