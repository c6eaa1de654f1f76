"""What a sharded DPO does on the two nodes of two_machines.sh: `python -m tests.support.slurm_nodes FOLDER`, as JSON.

Stopped and started again, with a rank that is killed, with a cable that is pulled; each through `flows.slurm stage`.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.support import node_requests
from tests.support.processes import wait_for


def launch(request: Path, home: Path) -> subprocess.Popen[bytes]:
    """The launcher of a stage on both nodes, with its lines beside the request."""
    variables = node_requests.environment(home, PET_NNODES=2, PET_NPROC_PER_NODE=1, GLOO_SOCKET_IFNAME="eth0")
    command = [sys.executable, "-P", "-m", "flows.slurm", "stage", "--", sys.executable, "-P", "-m", "stages", "align"]
    with request.with_name("lines.log").open("ab") as log:
        return subprocess.Popen([*command, str(request)], env=variables, stdout=log, stderr=log)


def ended(request: Path, launcher: subprocess.Popen[bytes]) -> dict[str, Any]:
    """How the launcher ends, after how many seconds, and what the stage's result says."""
    began = time.monotonic()
    answer: dict[str, Any] = {"code": launcher.wait(300), "seconds": round(time.monotonic() - began, 1)}
    if request.with_name("result.json").exists():
        answer["result"] = json.loads(node_requests.result(request).model_dump_json())
    return answer | {"lines": request.with_name("lines.log").read_text()[-3000:]}


def ranks_of(node: str) -> list[str]:
    """Processes of a node that train."""
    pids = subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True).stdout.split()
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in pids}
    return [pid for pid, line in lines.items() if b"stages" in line and b"bash" not in line and b"-P" not in line]


def main(folder: Path) -> None:
    home, answers = folder / "home", dict[str, Any]()
    requests = {name: folder / name / "request.json" for name in ("whole", "killed", "pulled")}

    def training(name: str) -> subprocess.Popen[bytes]:
        launcher = launch(requests[name], home)
        saved = node_requests.checkpoints(home, requests[name])
        story = requests[name].with_name("lines.log").read_text
        wait_for(lambda: [*saved.glob("step-*")] or launcher.poll() is not None, 240, story)
        return launcher

    launcher = training("whole")
    launcher.terminate()
    answers["stopped"] = ended(requests["whole"], launcher)
    step, files = node_requests.newest(node_requests.checkpoints(home, requests["whole"]))
    answers["saved"] = {"step": step, "files": sorted(files)}
    answers["whole"] = ended(requests["whole"], launch(requests["whole"], home))

    launcher = training("killed")
    subprocess.run(["kill", "-KILL", *ranks_of("n2")], check=True)
    answers["killed"] = ended(requests["killed"], launcher)

    launcher = training("pulled")
    subprocess.run(["ip", "link", "set", "v2", "down"], check=True)
    answers["pulled"] = ended(requests["pulled"], launcher)
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
