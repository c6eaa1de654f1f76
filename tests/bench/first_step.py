"""From a process's start to the end of its first optimizer step: a whole stage of ours, MLflow and all, and TRL."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from schemas.stage import STAGES, Artifact, Request
from stages.tracking import digest
from tests.bench.ours import config_for
from tests.bench.sides import ROOT, environment, peer
from tests.bench.work import Work
from tests.support.journals import losses


def first_step(plan: Work, console: Console, rounds: int = 3) -> dict[str, Any]:
    """Seconds of both sides, in turns; SFT on the rows that were laid out for it."""
    found: dict[str, list[float]] = {"ours": [], "peer": []}
    of_a_stage(plan, -1)  # makes MLflow's database, which a user makes once
    for number in range(rounds):
        found["ours"].append(of_a_stage(plan, number))
        found["peer"].append(of_the_peer(plan))
    said = ", ".join(f"{name} {', '.join(f'{s:.1f}' for s in seconds)}" for name, seconds in found.items())
    console.print(f"seconds from the process's start to the end of its first optimizer step (SFT): {said}")
    return found


def of_a_stage(plan: Work, number: int) -> float:
    """`python -m stages sft`, until its journal holds the first step. The seed makes it another run each time."""
    folder = Path(plan.folder)
    data = folder / "data"
    inputs = {
        "data": Artifact(uri=str(data), sha256=digest(data)),
        "model": Artifact(uri=plan.model, sha256=digest(Path(plan.model))),
    }
    params = config_for(plan).model_dump(mode="json")
    request = Request(stage="sft", version=STAGES["sft"].version, params=params, inputs=inputs, seed=number + 1)
    (folder / "request.json").write_text(request.model_dump_json())
    settings = environment(plan)
    command = [sys.executable, "-m", "stages", "sft", str(folder / "request.json")]
    began = time.perf_counter()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=settings, cwd=ROOT, stderr=log)
        try:
            while not has_stepped(Path(settings["ALIGNFLOW_HOME"]) / "work" / request.key()):
                if process.poll() is not None:
                    raise RuntimeError((folder / "log").read_text()[-3000:])
                time.sleep(0.02)
            return time.perf_counter() - began
        finally:
            process.kill()
            process.wait()


def has_stepped(work: Path) -> bool:
    return bool(losses(work))


def of_the_peer(plan: Work) -> float:
    began = time.perf_counter()
    worker = peer(plan)
    try:
        worker.turn()
        worker.turn()
        return time.perf_counter() - began
    finally:
        worker.end()
