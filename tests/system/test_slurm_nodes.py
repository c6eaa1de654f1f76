"""A stage on a Slurm of two nodes, which network namespaces make of this machine (tests/support/two_machines.sh).

It takes minutes, root, and Debian's packages of Slurm: `make two-machines` runs it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import EXIT_CODES
from tests.conftest import ROOT
from tests.support import homes, node_requests

TOOLS = ("apt-get", "dpkg", "ip", "nsenter", "unshare")

pytestmark = pytest.mark.skipif(
    "TWO_MACHINES" not in os.environ, reason="`make two-machines` runs it: minutes, as root"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Debian's Slurm unpacked."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"no two machines can be made here: {', '.join(missing) or 'not root'}")
    made = tmp_path_factory.mktemp("machines")
    (made / "archives" / "partial").mkdir(parents=True)
    options = ["-o", f"Dir::Cache::archives={made}/archives", "-o", "Debug::NoLocking=1", "--no-install-recommends"]
    command = ["apt-get", *options, "-y", "--download-only", "install", "slurm-wlm", "munge"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"Debian's packages of Slurm cannot be had: {done.stderr.strip()[-200:]}")
    for package in (made / "archives").glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, made / "packages"], check=True)
    shutil.rmtree(made / "packages" / "lib", ignore_errors=True)  # units, in place of the link /lib
    done = subprocess.run(
        ["bash", ROOT / "tests/support/two_machines.sh", made, "true"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return made


@pytest.mark.slow
def test_a_stage_on_two_slurm_nodes(folder: Path, ready: Path) -> None:
    given = node_requests.inputs(folder)
    alone, home = node_requests.ask(folder / "alone", given, devices=2), homes.furnish(folder / "home-alone", ready)
    command = [sys.executable, "-P", "-m", "stages", "align", str(alone)]
    subprocess.run(command, env=node_requests.environment(home), check=True, timeout=300)
    homes.furnish(folder / "home", ready)
    node_requests.ask(folder / "whole", given, nodes=2)
    for seed, name in enumerate(("killed", "pulled"), 1):
        node_requests.ask(folder / name, given, steps=100_000, seed=seed, nodes=2)
    driver = [sys.executable, "-m", "tests.support.slurm_nodes", folder]
    machines = ["bash", ROOT / "tests/support/two_machines.sh", folder, *driver]
    done = subprocess.run(machines, env=node_requests.environment(folder / "home"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    answers: dict[str, Any] = json.loads((folder / "answers.json").read_text())

    stopped, saved, whole, killed, pulled = (answers[n] for n in ("stopped", "saved", "whole", "killed", "pulled"))
    assert stopped["result"]["status"] == "preempted" and stopped["code"] == EXIT_CODES["preempted"], stopped["lines"]
    assert 0 < saved["step"] < node_requests.STEPS
    assert {"shard-0.safetensors", "shard-1.safetensors"} <= set(saved["files"])
    assert whole["code"] == 0, whole["lines"]
    assert whole["result"]["outputs"]["model"]["sha256"] == node_requests.result(alone).outputs["model"].sha256
    assert killed["code"] not in (0, EXIT_CODES["refused"]), killed["lines"]
    assert pulled["code"] == EXIT_CODES["preempted"], pulled["lines"]
    assert pulled["result"]["error"]["kind"] == "node_lost", pulled["lines"]
    assert "does not answer" in pulled["lines"] or "ended as CANCELLED" in pulled["lines"]
