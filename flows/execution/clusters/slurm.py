"""Stages as Slurm jobs. The worker of pool `slurm` runs where sbatch is; the stages run where Slurm puts them.

    python -P -m flows.slurm job --partition=gpu --gres=gpu:1          the flow run, here; for each stage it calls
    python -P -m flows.slurm stage --partition=gpu ... -- COMMAND

which submits the command, passes its lines on, and ends with its exit code. One that is stopped, or whose parent
dies, lets the job save and end. The home (ALIGNFLOW_HOME) must be where all machines see it. Of a stage on several
nodes (PET_NNODES) each is one task, which torchrun's variables tell where the others are.

Plain sbatch and squeue, not submitit: that sends pickles and needs Slurm's accounting database.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.execution import job
from schemas.environment import HOME, LAUNCHER, PARENT
from schemas.errors import EXIT_CODES
from stages.runtime.process import die_with_parent
from stages.runtime.workspace import SAY_SECONDS

POLL_SECONDS = 1.0
SAVE_SECONDS = 60
"""So long before its time limit a job is told to save and end."""
END_SECONDS = 10.0
"""So long a job may run on when its stage has written a result; then it is cancelled. A node that is gone keeps a job
for minutes. After as long again nobody waits for it here."""
HEAD = 'export PET_MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
PORT = "export PET_MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))"  # another one for each job of a node
RANK = 'PET_NODE_RANK=$SLURM_NODEID exec "$@"'
OPTIONS = {"partition": "partition", "account": "account", "gres": "gres", "cpus": "cpus-per-task", "memory": "mem"}
OPTIONS |= {"time": "time"}
RUNNING = {"CONFIGURING", "COMPLETING", "PENDING", "RUNNING", "REQUEUED", "RESIZING", "STAGE_OUT", "SUSPENDED"}
WAITING = RUNNING - {"COMPLETING", "RUNNING"}
STOPPED = {"CANCELLED", "FORGOTTEN", "NODE_FAIL", "PREEMPTED", "TIMEOUT"}
"""States of a job that was ended from outside, or may have been: the stage resumes when it is started again."""
OWN_CODES = {EXIT_CODES["refused"], EXIT_CODES["diverged"], EXIT_CODES["preempted"]}
"""Exit codes by which a stage says itself why it stopped."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, and as `command` what stands behind `--`."""
    parser = argparse.ArgumentParser(prog="python -m flows.slurm", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("mode", choices=["job", "stage"])
    for name, option in OPTIONS.items():
        parser.add_argument(f"--{name}", default="", help=f"sbatch's --{option}; empty for Slurm's default")
    end = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:end], argparse.Namespace(command=argv[end + 1 :]))


def asked(options: argparse.Namespace) -> dict[str, str]:
    """The options that say something."""
    return {name: value for name in OPTIONS if (value := getattr(options, name))}


def script(options: argparse.Namespace, log: Path, nodes: int = 1) -> str:
    """The batch script: a task on each node, which becomes torchrun by itself where there are several ranks."""
    lines = ["#!/bin/bash", "#SBATCH --job-name=alignflow", f"#SBATCH --output={log}", "#SBATCH --open-mode=append"]
    lines += [f"#SBATCH --{OPTIONS[name]}={value}" for name, value in asked(options).items()]
    lines += [f"#SBATCH --nodes={nodes}", "#SBATCH --ntasks-per-node=1"] if nodes > 1 else []
    lines += [f"#SBATCH --signal=TERM@{SAVE_SECONDS}", "#SBATCH --no-requeue"]
    step = ["srun", f"--ntasks={nodes}", "--kill-on-bad-exit=1"]
    step += [f"--cpus-per-task={options.cpus}"] if options.cpus else []  # srun takes no notice of the job's own
    command = options.command
    if nodes > 1:
        lines += [HEAD, PORT]
        command = ["bash", "-c", RANK, "stage", *command]
    return "\n".join([*lines, f"exec {shlex.join([*step, *command])}", ""])


@dataclass
class Job:
    """A submitted job and the file that its lines go to."""

    number: str
    log: Path
    result: Path | None = None
    """What the stage writes when it is at its end."""
    written: float | None = None
    """When that was first seen, in seconds of the monotonic clock."""
    cancelled: bool = False
    read: int = 0

    def state(self) -> tuple[str, int]:
        """The job's state and exit code. Slurm's controller may be away for a while: then the state is RUNNING. Some
        minutes after a job's end the controller knows nothing of it: then it is FORGOTTEN.
        """
        answer = subprocess.run(["scontrol", "show", "job", self.number, "-o"], capture_output=True, text=True)
        state = re.search(r"JobState=(\w+).*? ExitCode=(\d+):(\d+)", answer.stdout)
        if state is None:
            return ("FORGOTTEN" if "Invalid job id" in answer.stderr else "RUNNING"), 0
        return state[1], int(state[2]) or (128 + int(state[3]) if int(state[3]) else 0)

    def end(self) -> None:
        """Have the job save and end, once. Slurm sends SIGTERM, and SIGKILL after its KillWait (30 s by default), also
        when nobody is left here.
        """
        if not self.cancelled:
            self.cancelled = True
            subprocess.run(["scancel", self.number], check=False)

    def outlives_stage(self) -> float:
        """For how many seconds it has run on since its stage was seen to be at its end."""
        if self.written is None and self.result is not None and self.result.exists():
            self.written = time.monotonic()
        return 0.0 if self.written is None else time.monotonic() - self.written

    def pass_on(self) -> None:
        """Print what the job has printed since the last call."""
        if not self.log.exists():
            return
        with self.log.open("rb") as file:
            file.seek(self.read)
            new = file.read()
        self.read += len(new)
        sys.stdout.buffer.write(new)
        sys.stdout.flush()


def submit(options: argparse.Namespace, log: Path) -> Job:
    """Hand the command to Slurm. Ends this process, with what sbatch says, when it refuses."""
    environment = {name: value for name, value in os.environ.items() if name != PARENT}  # slurmd starts it
    result = result_of(options.command)
    if result is not None:
        result.unlink(missing_ok=True)  # of an earlier try
    answer = subprocess.run(
        ["sbatch", "--parsable"],
        input=script(options, log, int(os.environ.get("PET_NNODES") or 1)),
        env=environment,
        capture_output=True,
        text=True,
    )
    if answer.returncode:
        print(f"error: Slurm takes no job ({asked(options)}): {answer.stderr.strip()}", file=sys.stderr)
        sys.exit(EXIT_CODES["refused"])
    number = answer.stdout.strip().partition(";")[0]
    print(f"Slurm job {number} ({', '.join(f'{k} {v}' for k, v in asked(options).items()) or 'defaults'})", flush=True)
    return Job(number, log, result)


def result_of(command: Sequence[str]) -> Path | None:
    """The file that a stage's command writes at its end; None of another command."""
    return Path(command[-1]).with_name("result.json") if command[-1].endswith("request.json") else None


def follow(submitted: Job, stopping: list[int]) -> int:
    """Pass the job's lines on until it ends; the stage's exit code."""
    said = time.monotonic()
    while True:
        state, code = submitted.state()
        submitted.pass_on()
        if state in WAITING and time.monotonic() - said > SAY_SECONDS:  # a job in the queue is not one that hangs
            said = time.monotonic()
            print(f"Slurm job {submitted.number} is {state}", flush=True)
        if state not in RUNNING:
            break
        late = submitted.outlives_stage()
        if stopping or late > END_SECONDS:
            submitted.end()
        if late > 2 * END_SECONDS:
            print(f"Slurm job {submitted.number} is {state} still: a node of it does not answer", flush=True)
            return EXIT_CODES["preempted"]
        time.sleep(POLL_SECONDS)
    print(f"Slurm job {submitted.number} ended as {state}", flush=True)
    return meaning(state, code, bool(stopping))


def meaning(state: str, code: int, stopped: bool) -> int:
    """The stage's exit code by its job's state and code. Death by SIGTERM is a stop from outside, as is all that comes
    after one, unless the stage says otherwise.
    """
    if state == "COMPLETED" or code in OWN_CODES:
        return code
    if state in STOPPED or stopped or code == 128 + signal.SIGTERM:
        return EXIT_CODES["preempted"]
    return EXIT_CODES["failed"]


def run_stage(options: argparse.Namespace) -> int:
    """Submit the command and wait for it."""
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, frame: stopping.append(signum))
    if not die_with_parent(signal.SIGTERM):  # a death of the parent ends the job too
        return EXIT_CODES["preempted"]
    with tempfile.NamedTemporaryFile(dir=os.environ.get(HOME), prefix="slurm-", suffix=".log") as log:
        submitted = submit(options, Path(log.name))
        if stopping:
            submitted.end()
        return follow(submitted, stopping)


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    if options.mode == "stage":
        return run_stage(options)
    # The flow run is here, and sends its stages to Slurm.
    own = [f"--{name}={value}" for name, value in asked(options).items()]
    os.environ[LAUNCHER] = shlex.join([sys.executable, "-P", "-m", "flows.slurm", "stage", *own, "--"])
    job.main()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
