"""Work pools on the Prefect server, made or brought up to date from the templates in `deploy/pools/`."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound

from schemas.errors import refuse

PROCESS_POOLS = ("cpu", "gpu")
"""Pools whose runs are processes of the worker's own machine. They share a template."""


def templates() -> dict[str, Path]:
    """Work pool -> the file of its base job template. All are named like their file, except `LOCAL`."""
    folder = Path(str(files("deploy"))) / "pools"
    by_name = {file.stem: file for file in sorted(folder.glob("*.json"))}
    process = by_name.pop("process")
    return dict.fromkeys(PROCESS_POOLS, process) | by_name


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
        return "created"
    if existing.type != kind(pool):
        fix = f"delete it (prefect work-pool delete {pool}), or rename one of the two"
        message = f"the work pool exists with the type {existing.type!r}; it should be {kind(pool)!r}."
        raise refuse("pool", pool, message, fix, kind="pool")
    if existing.base_job_template == template:
        return "unchanged"
    client.update_work_pool(pool, WorkPoolUpdate(base_job_template=template))
    return "updated"


def read(pool: str) -> dict[str, Any]:
    """A pool's base job template. Raises StageError when there is none."""
    if pool not in templates():
        fix = f"use {', '.join(templates())}, or add deploy/pools/{pool}.json"
        raise refuse("pool", pool, "no template has this name.", fix, kind="pool")
    return json.loads(templates()[pool].read_text())
