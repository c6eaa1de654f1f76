"""`alignflow deploy`: work pools, deployments and automations on the Prefect server. Idempotent."""

import os
import subprocess
import sys
import tempfile
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

import yaml
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from flows.servers import automations, checks, pools
from schemas.environment import HOME, SAFE_PATH
from schemas.errors import refuse
from schemas.text import one_line, show
from stages.runtime import workspace


def deploy(prefect_file: Path | None = None) -> dict[str, dict[str, str]]:
    """Create what is missing on the Prefect server and update the rest; print what there is then, and return it: names
    of work pools, deployments and automations, each with what there is to say of it.

    Raises:
        StageError: no server is set or answers, a schedule is wrong, a pool is missing, or Prefect refuses something.
    """
    prefect_file = (prefect_file or Path(str(files("deploy"))) / "prefect.yaml").absolute()
    if not PREFECT_API_URL.value():
        fix = f"{checks.START}, then call this in another terminal; or set it to a server's address"
        raise refuse("PREFECT_API_URL", "", "no Prefect server is set.", fix, kind="server")
    checks.check_servers()
    checks.check_schedules(prefect_file)
    deployments = checks.deployments(prefect_file)
    with get_client(sync_client=True) as client:
        # A pool must be there or have a template.
        known = {*pools.templates(), *(pool.name for pool in client.read_work_pools())}
        for one in deployments:
            name = (one.get("work_pool") or {}).get("name")
            if name is not None and name not in known:
                field = f"deployments[{one.get('name')}].work_pool.name"
                near = get_close_matches(name, known, 1)
                others = f"use one of {', '.join(sorted(known))}, or create it first"
                fix = f"did you mean {near[0]!r}?" if near else others
                raise refuse(field, name, "there is no such work pool.", fix, kind="pool")
        there: dict[str, dict[str, str]] = {"work_pools": {}, "deployments": {}, "automations": {}}
        for pool in pools.templates():
            there["work_pools"][pool] = pools.apply(client, pool)
            show(f"work pool   {pool}: {there['work_pools'][pool]}")
    create_deployments(prefect_file)
    names = {str(one.get("name")) for one in deployments}
    with get_client(sync_client=True) as client:
        flows = {flow.id: flow.name for flow in client.read_flows()}
        for one in client.read_deployments():
            if one.name in names:
                times = "; ".join(str(schedule.schedule) for schedule in one.schedules if schedule.active)
                name = one_line(f"{flows[one.flow_id]}/{one.name}")
                there["deployments"][name] = f"on {one.work_pool_name} {times}".rstrip()
                show(f"deployment  {name} {there['deployments'][name]}")
    for name, note in automations.apply().items():
        there["automations"][name] = note or ""
        show(f"automation  {name}" + (f" ({note})" if note else ""))
    return there


def create_deployments(prefect_file: Path) -> None:
    """Let Prefect create or update all deployments of the file, without questions.

    Raises:
        StageError: Prefect refuses one, with what it says.
    """
    command = [sys.executable, "-P", "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file"]
    root = Path(str(files("deploy"))).parent  # entrypoints go by it
    environment = {
        **os.environ,
        **SAFE_PATH,
        HOME: str(workspace.home()),
        "PREFECT_API_URL": str(PREFECT_API_URL.value()),
        "NO_COLOR": "1",
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as read:
        # As we read it: Prefect would take `1e-3` for a text, and refuse it where a config wants a number.
        yaml.safe_dump(checks.prefect_file(prefect_file), read, sort_keys=False)
        read.flush()
        answer = subprocess.run([*command, read.name], cwd=root, env=environment, capture_output=True, text=True)
    if answer.returncode:
        tail = "\n".join((answer.stdout + answer.stderr).strip().splitlines()[-20:])
        fix = "fix what it reports, and deploy again"
        raise refuse("file", prefect_file, f"Prefect refuses it:\n{tail}\n", fix, kind="deploy")
