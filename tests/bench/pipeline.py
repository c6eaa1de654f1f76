"""What the pipeline itself costs: Prefect, MLflow and process starts, on the demo. `make bench-pipeline` calls this.

    python -m tests.bench.pipeline [--out FOLDER]

The demo runs once from nothing, then twice more with everything reused: alone, and beside `alignflow ui`. A stage's
work is the time within its `run`, less what it waits for MLflow there. Two work side by side: the pipeline's own is the
time in which none does.
Exits with 1 when the reused rerun beside the servers takes 15 s or more, or the own cost 2 % of an hour.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages import tracking
from stages.tracking.journal import Journal

ROOT = Path(__file__).resolve().parents[2]
ALIGNFLOW = [sys.executable, "-m", "flows.cli"]
RERUN_SECONDS, HOURLY_SHARE = 15.0, 0.02


def run_demo(environment: Mapping[str, str]) -> float:
    """Seconds of `alignflow run demo`."""
    began = time.monotonic()
    subprocess.run([*ALIGNFLOW, "run", "demo"], env=environment, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return time.monotonic() - began


def work_in(home: Path) -> list[dict[str, Any]]:
    """Of each stage that ran: its seconds of work, and those it waited for MLflow meanwhile."""
    os.environ["ALIGNFLOW_HOME"] = str(home)
    client = tracking.client()
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=1000)
    found = []
    for run in runs:
        metrics = run.data.metrics
        waited = metrics["usage/tracking_seconds"]
        found.append(
            {
                "stage": run.info.run_name,
                "work": metrics["usage/stage_seconds"] - waited,
                "end": (run.info.end_time or 0) / 1000,
                "waited": waited,
                "mlflow_run": ((run.info.end_time or 0) - run.info.start_time) / 1000,
            }
        )
    return found


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that lie in at least one of the spans (begin, end)."""
    seconds, last = 0.0, float("-inf")
    for begin, end in sorted(spans):
        seconds += max(0.0, end - max(begin, last))
        last = max(last, end)
    return seconds


def journal_seconds(points: int = 20_000) -> float:
    """Seconds that the training loop spends on logging one step of ten metrics, shipping aside."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal", "none")
        journal._closing.set()
        values = {f"train/metric {i}": 1.0 for i in range(10)}
        began = time.perf_counter()
        for step in range(points // 10):
            journal.add(values, step)
        return (time.perf_counter() - began) / (points / 10)


def beside_servers(environment: Mapping[str, str]) -> float:
    """Seconds of a rerun while `alignflow ui` serves MLflow and Prefect."""
    servers = subprocess.Popen(
        [*ALIGNFLOW, "ui"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert servers.stdout is not None
    try:
        for line in servers.stdout:
            if found := re.search(r"PREFECT_API_URL=(\S+)", line):
                return run_demo({**environment, "PREFECT_API_URL": found.group(1)})
        raise RuntimeError("alignflow ui named no address")
    finally:
        servers.send_signal(signal.SIGINT)
        servers.wait(30)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.pipeline", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        home = Path(folder) / "home"
        environment = {**os.environ, "ALIGNFLOW_HOME": str(home), "PYTHONPATH": str(ROOT)}
        environment.pop("PREFECT_API_URL", None)
        wall = run_demo(environment)
        stages = work_in(home)
        reruns = {"alone": run_demo(environment), "beside the servers": beside_servers(environment)}
    own = wall - covered((stage["end"] - stage["work"], stage["end"]) for stage in stages)
    logging = journal_seconds()
    hourly = (own + 3600 * logging) / 3600  # an hour's training with as many stages, at one step a second
    report = {
        "wall": wall,
        "stages": stages,
        "own": own,
        "own_share": own / wall,
        "own_share_of_an_hour": hourly,
        "seconds_per_logged_step": logging,
        "reruns": reruns,
    }
    (options.out / "pipeline.json").write_text(json.dumps(report, indent=1))
    work = sum(stage["work"] for stage in stages)
    print(
        f"demo: {wall:.0f} s; its {len(stages)} stages work {work:.0f} s, side by side {wall - own:.0f} s; "
        f"own {own:.0f} s ({own / wall:.0%})"
    )
    print(
        f"own in an hour-long run of as many stages: {hourly:.2%}; a logged step takes {logging * 1e6:.0f} microseconds"
    )
    print("all reused: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in reruns.items()))
    return int(reruns["beside the servers"] >= RERUN_SECONDS or hourly >= HOURLY_SHARE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
