"""Starting the two workers."""

import os
import sys
from pathlib import Path

from tests.bench.turns import Worker
from tests.bench.work import Work

ROOT = Path(__file__).resolve().parents[2]
PEER_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
PEER_PPO = ROOT / ".venv-bench" / "trl-ppo"
Side = Worker

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def environment(plan: Work) -> dict[str, str]:
    home = Path(plan.folder) / "home"
    places = {"PYTHONPATH": str(ROOT), "ALIGNFLOW_HOME": str(home), "HF_HOME": str(home / "hf")}
    return QUIET | places | {"OMP_NUM_THREADS": str(plan.threads)}


def ours(plan: Work, *arguments: str, shared_trunk: bool = False) -> Worker:
    """Our worker. `shared_trunk`: PPO's value head on the policy's trunk."""
    name = "shared" if shared_trunk else "ours"
    options = {"BENCH_SHARED_TRUNK": "1"} if shared_trunk else {}
    log = Path(plan.folder) / f"{name}.log"
    command = [sys.executable, "-m", "tests.bench.ours", plan.folder, *arguments]
    return Worker(command, environment(plan) | options, log)


def check_peer() -> None:
    """Raises SystemExit when TRL's environment is not there."""
    if not PEER_PYTHON.exists():
        raise SystemExit(f"{PEER_PYTHON} does not exist. Fix: make bench, or `make .venv-bench/ready`")


def peer(plan: Work, *arguments: str) -> Worker:
    """TRL's worker, in its own environment."""
    options = {"BENCH_TRL_PPO": str(PEER_PPO)} if plan.method == "ppo" else {}
    command = [PEER_PYTHON, "-m", "tests.bench.peer", plan.folder, *arguments]
    return Worker(
        command,
        environment(plan) | options | {"VIRTUAL_ENV": os.fspath(PEER_PYTHON.parents[1])},
        Path(plan.folder) / "peer.log",
    )
