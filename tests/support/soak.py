"""Queue many runs on `alignflow up`, kill one of its processes every minute, and say what was lost.

`python -m tests.support.soak --runs 50 --minutes 60` (the defaults) prints a line per kill and one JSON object at the
end. Exit code 1 where a run was lost: one that has not completed though it was started fewer than three times, or whose
finished stages are not all found again afterwards.
"""

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from flows.servers.automations import STARTS
from tests.support.live_servers import ask, up
from tests.support.processes import below

COMMAND = [sys.executable, "-P", "-m", "flows.cli"]
SUBMIT = """
import sys
from flows.servers import address_file
address_file.adopt()
from flows.planning.config_file import load
from flows.submit import submit
for file in sys.argv[1:]:
    print(submit(load(file, here=False).config)[1], flush=True)
"""
"""What `alignflow submit` does, for many configs in one process."""
_FINAL = {"COMPLETED", "FAILED", "CANCELLED"}


def configs(folder: Path, runs: int) -> list[Path]:
    """Small pipelines of five stages; each has a seed, and so results, of its own."""
    rows = ({"prompt": f"write a note to the baker {n}", "response": f"good morning baker {n}"} for n in range(400))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {"max_steps": 40, "batch_size": 8, "max_length": 64, "checkpoint_steps": 10}
    files = []
    for seed in range(runs):
        config = {
            "name": f"soak-{seed}",
            "seed": seed,
            "model": {"scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32}},
            "data": {"sft": {"path": "rows.jsonl", "kind": "sft", "max_length": 64}},
            "sft": training,
            "align": {},
            "evaluate": {"judge": "rule", "limit": 20, "min_prompts": 10, "max_new_tokens": 4, "baselines": None},
        }
        files.append(folder / f"soak-{seed}.yaml")
        files[-1].write_text(yaml.safe_dump(config))
    return files


def kind(process: psutil.Process) -> str:
    """What a process is, in a word or two: the module that it runs."""
    line = process.cmdline()
    modules = [line[place + 1] for place, word in enumerate(line[:-1]) if word == "-m"]
    return modules[-1] if modules else Path(line[0]).name if line else "starting"


def states(home: Path, prefect: str) -> dict[str, dict[str, Any]]:
    """Run's name -> its state and how often it was started."""
    wanted = {"flow_runs": {"name": {"like_": "soak-"}}, "flows": {"name": {"any_": ["pipeline"]}}, "limit": 200}
    answer = ask(home, "POST", f"{prefect}/api/flow_runs/filter", json=wanted)
    answer.raise_for_status()
    return {
        run["name"]: {"state": run["state_type"], "starts": run["run_count"], "message": run["state"]["message"]}
        for run in answer.json()
    }


@contextlib.contextmanager
def home_and_configs(runs: int) -> Iterator[tuple[Path, list[Path]]]:
    """A temporary folder: the home in it, and the configs."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        yield folder / "home", configs(folder, runs)


def found_again(file: Path, environment: dict[str, str]) -> bool:
    """Whether every stage of a config is reused."""
    plan = [*COMMAND, "run", str(file), "--dry-run"]
    said = subprocess.run(plan, env=environment, cwd=file.parent, capture_output=True, text=True, timeout=300)
    counts = re.search(r"(\d+) stages: (\d+) reused", said.stdout)
    return counts is not None and counts[1] == counts[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=60, help="how long processes are killed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    killed: Counter[str] = Counter()
    peak, away = 0, 0
    with (
        home_and_configs(options.runs) as (home, files),
        up(home, "--pool", "cpu", "--limit", "2", ALIGNFLOW_ROOTS=str(home.parent)) as (process, at),
    ):
        environment = {**os.environ, "ALIGNFLOW_HOME": str(home)}
        subprocess.run([*COMMAND, "deploy"], env=environment, cwd=files[0].parent, check=True)
        subprocess.run([sys.executable, "-P", "-c", SUBMIT, *files], env=environment, cwd=files[0].parent, check=True)
        began = time.monotonic()
        runs: dict[str, dict[str, Any]] = {}
        while True:
            ended = sum(run["state"] in _FINAL or run["starts"] >= STARTS for run in runs.values())
            over = time.monotonic() - began > options.minutes * 60
            if over and (ended == options.runs or time.monotonic() - began > options.minutes * 180):
                break
            time.sleep(60)
            if process.poll() is not None:
                raise RuntimeError(f"alignflow up has ended with {process.returncode}")
            tree = [psutil.Process(pid) for pid in below(process)]
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max(peak, sum(one.memory_info().rss for one in tree))
            name = "nothing"
            if not over:
                victim = draw.choice(tree)
                with contextlib.suppress(psutil.NoSuchProcess):
                    name = kind(victim)
                    victim.kill()
                    killed[name] += 1
            try:
                runs = states(home, at.prefect.removesuffix("/api"))
            except OSError:
                away += 1
            except Exception as error:  # a server that was just killed says many things
                print(f"asked in vain: {error}", flush=True)
                away += 1
            counts = Counter(run["state"] for run in runs.values())
            print(f"{(time.monotonic() - began) / 60:5.1f} min  killed {name}  {dict(counts)}", flush=True)
        again = sum(found_again(file, environment) for file in files if runs[file.stem]["state"] == "COMPLETED")
    completed = sum(run["state"] == "COMPLETED" for run in runs.values())
    for name, run in runs.items():
        if run["state"] != "COMPLETED":
            print(f"{name}: {run}")
    spent = sum(run["state"] != "COMPLETED" and run["starts"] >= STARTS for run in runs.values())
    figures = {
        "runs": options.runs,
        "completed": completed,
        "started three times in vain": spent,
        "lost": options.runs - completed - spent,
        "found again": again,
        "starts": dict(Counter(run["starts"] for run in runs.values())),
        "killed": dict(killed.most_common()),
        "kills": killed.total(),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "peak GiB": round(peak / 2**30, 2),
    }
    print(json.dumps(figures))
    return int(completed + spent < options.runs or again < completed)


if __name__ == "__main__":
    sys.exit(main())
