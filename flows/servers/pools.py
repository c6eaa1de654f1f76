"""Work pools on the Prefect server, made or brought up to date from the templates in `deploy/pools/`."""

import contextlib
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from flows.execution import gpu_slots
from schemas.errors import refuse
from stages.runtime import workspace

PROCESS_POOLS = ("cpu", "gpu")
"""Pools whose runs are processes of the worker's own machine. They share a template."""

STAGES_QUEUE = "stages"
"""Work queue of placed stages. A pipeline waits for its stages, so with one limit for both neither would end."""

CORES_PER_RUN = 4
GIB_PER_RUN = 4
"""A run of a model that fits a laptop takes 1 to 3 GiB; larger ones have a machine for themselves."""


def runs_at_once() -> int:
    """How many runs a worker of this machine takes up at a time, and how many stages train at a time without a GPU:
    by cores and memory, at least one, and at least one per GPU.
    """
    memory = [psutil.virtual_memory().total]  # the machine's, or what its container is given
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            memory.append(int(file.read_text()))
    by_room = min(len(os.sched_getaffinity(0)) // CORES_PER_RUN, int(min(memory) / 2**30 // GIB_PER_RUN))
    return max(1, by_room, len(gpu_slots.names()))


def templates() -> dict[str, Path]:
    """Work pool -> the file of its base job template. All are named like their file, except those of PROCESS_POOLS. A
    file of the same name in `pools/` of `home()`, which the operator has put there, takes the place of ours.
    """
    folders = (Path(str(files("deploy"))) / "pools", workspace.home() / "pools")
    by_name = {file.stem: file for folder in folders for file in sorted(folder.glob("*.json"))}
    process = by_name.pop("process")
    return dict.fromkeys(PROCESS_POOLS, process) | by_name


def like(pool: str, of_kind: str) -> str:
    """The pool with a template here that another pool of this kind of workers is fenced by: itself where it has one.

    Raises:
        StageError: no template here is for such workers.
    """
    if pool in templates():
        return pool
    if of_kind == "process":
        return PROCESS_POOLS[0]
    if of_kind not in templates():
        fix = f"put a template for it at {workspace.home() / 'pools' / f'{pool}.json'}"
        raise refuse("pool", pool, f"no template here is for pools of type {of_kind}.", fix, kind="pool")
    return of_kind


def kind(pool: str) -> str:
    """The type of a pool's workers. Slurm is reached from a process that submits a job and waits for it."""
    return pool if pool in ("docker", "kubernetes") else "process"


def apply(client: SyncPrefectClient, pool: str) -> Literal["created", "updated", "unchanged"]:
    """Create or update the pool from its template. Limits and pauses that somebody has set are kept.

    Raises:
        StageError: there is no template for the pool, or it exists with another type.
    """
    template = read(pool)
    try:
        existing = client.read_work_pool(pool)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=pool, type=kind(pool), base_job_template=template))
        add_queue(client, pool)
        return "created"
    if existing.type != kind(pool):
        fix = f"delete it (prefect work-pool delete {pool}), or rename one of the two"
        message = f"the work pool exists with the type {existing.type!r}; it should be {kind(pool)!r}."
        raise refuse("pool", pool, message, fix, kind="pool")
    add_queue(client, pool)
    if existing.base_job_template == template:
        return "unchanged"
    client.update_work_pool(pool, WorkPoolUpdate(base_job_template=template))
    return "updated"


def add_queue(client: SyncPrefectClient, pool: str) -> None:
    """Give a pool of local processes its queue of stages; idempotent."""
    if pool in PROCESS_POOLS:
        with contextlib.suppress(ObjectAlreadyExists):
            client.create_work_queue(STAGES_QUEUE, work_pool_name=pool)


def read(pool: str) -> dict[str, Any]:
    """A pool's base job template. What the operator adds to the default of `env` stands there for all runs: they may
    neither leave it out nor change it. Raises StageError when there is no template.
    """
    if pool not in templates():
        fix = f"use {', '.join(templates())}, or add deploy/pools/{pool}.json"
        raise refuse("pool", pool, "no template has this name.", fix, kind="pool")
    template = json.loads(templates()[pool].read_text())
    env = template["variables"].get("properties", {}).get("env", {})
    names: list[str] = env.get("propertyNames", {}).get("enum", [])
    for name, value in (env.get("default") or {}).items() if names else ():
        if name not in names or name in env.get("properties", {}):
            env.setdefault("properties", {})[name] = {"const": value}
            names += {name} - {*names}
    return template
