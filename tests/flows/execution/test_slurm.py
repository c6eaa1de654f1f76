"""Stages as Slurm jobs, on a real Slurm where Debian's slurm-wlm is installed; elsewhere the batch script alone."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from flows.execution import process as execution_process
from flows.execution.clusters import slurm
from schemas.errors import EXIT_CODES, Status
from schemas.stage import STAGES, Request, StageSpec
from stages import tracking
from tests.support.live_servers import free_port
from tests.support.processes import wait_for
from tests.support.scripted import FAKE

LAUNCHER = [sys.executable, "-P", "-m", "flows.slurm", "stage"]

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SwitchType=switch/none
MpiDefault=none
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=training Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def test_the_batch_script() -> None:
    options = slurm.parse(
        [
            *("stage", "--partition=a100", "--account=", "--gres=gpu:2", "--cpus=8", "--memory=64G", "--time=12:00:00"),
            *("--", "python", "-P", "-m", "stages", "sft", "/home/ask one/request.json"),
        ]
    )
    assert slurm.script(options, Path("/home/slurm.log")).splitlines() == [
        "#!/bin/bash",
        "#SBATCH --job-name=alignflow",
        "#SBATCH --output=/home/slurm.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --partition=a100",
        "#SBATCH --gres=gpu:2",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem=64G",
        "#SBATCH --time=12:00:00",
        "#SBATCH --signal=TERM@60",
        "#SBATCH --no-requeue",
        "exec srun --ntasks=1 --kill-on-bad-exit=1 --cpus-per-task=8 "
        "python -P -m stages sft '/home/ask one/request.json'",
    ]


def test_the_batch_script_of_several_nodes() -> None:
    options = slurm.parse(["stage", "--cpus=2", "--", "python", "request.json"])
    lines = slurm.script(options, Path("/log"), nodes=3).splitlines()
    assert {"#SBATCH --nodes=3", "#SBATCH --ntasks-per-node=1"} <= set(lines)
    assert lines[-1] == (
        "exec srun --ntasks=3 --kill-on-bad-exit=1 --cpus-per-task=2 "
        """bash -c 'PET_NODE_RANK=$SLURM_NODEID exec "$@"' stage python request.json"""
    )


@pytest.mark.parametrize("ends", [True, False])
def test_a_job_that_outlives_its_stage_is_cancelled(
    ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(slurm, "END_SECONDS", 0.1)
    job, asked = slurm.Job("7", tmp_path / "log", slurm.result_of(["x", f"{tmp_path}/request.json"])), []

    def command(arguments: list[str], **_: object) -> SimpleNamespace:
        asked.append(arguments[0])
        state = "CANCELLED" if ends and "scancel" in asked else "RUNNING"
        if len(asked) == 3:
            (tmp_path / "result.json").write_text("{}")
        return SimpleNamespace(stdout=f"JobState={state} ExitCode=0:0", stderr="")

    monkeypatch.setattr(subprocess, "run", command)
    assert slurm.follow(job, []) == EXIT_CODES["preempted"]
    assert asked.count("scancel") == 1 and asked.index("scancel") >= 3


@pytest.mark.parametrize(
    ("state", "code", "stopped", "status"),
    [
        ("COMPLETED", 0, False, "done"),
        ("FAILED", 65, False, "refused"),
        ("FAILED", 70, False, "diverged"),
        ("FAILED", 75, False, "preempted"),  # told at its time limit, or by a stop, it has saved
        ("FAILED", 1, False, "failed"),
        ("OUT_OF_MEMORY", 125, False, "failed"),
        ("TIMEOUT", 0, False, "preempted"),
        ("PREEMPTED", 1, False, "preempted"),
        ("NODE_FAIL", 1, False, "preempted"),
        ("FORGOTTEN", 0, False, "preempted"),
        ("CANCELLED", 70, True, "diverged"),
        ("FAILED", 143, False, "preempted"),  # SIGTERM came before the stage could take it
        ("FAILED", 1, True, "preempted"),  # as torchrun ends when it is stopped
    ],
)
def test_what_a_job_s_end_means(state: str, code: int, stopped: bool, status: Status) -> None:
    assert slurm.meaning(state, code, stopped) == EXIT_CODES[status]


# --- A real Slurm -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """munged, slurmctld and slurmd of this machine alone, without cgroups; ended afterwards."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"no Slurm here ({', '.join(missing) or 'not root'}): apt-get install slurm-wlm, and run as root")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    values = {"folder": folder, "host": socket.gethostname(), "user": getpass.getuser(), "cpus": os.cpu_count()}
    (folder / "slurm.conf").write_text(CONFIG.format(**values, ctld_port=free_port(), slurmd_port=free_port()))
    files = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", *files]
    processes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            with (folder / "daemons.log").open("wb") as log:
                for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
                    processes.append(subprocess.Popen(command, stdout=log, stderr=log, process_group=0))
                    if command is munge:
                        wait_for((folder / "munge.socket").exists, 30, (folder / "daemons.log").read_text)
            wait_for(lambda: "idle" in said("sinfo", "-h", "-o", "%T"), 60, lambda: "no node becomes idle")
            yield folder
        finally:
            for process in reversed(processes):
                process.terminate()
            for process in processes:
                process.wait(30)


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


@pytest.fixture
def launched(cluster: Path, ready_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose stages go to Slurm."""
    monkeypatch.setenv("ALIGNFLOW_LAUNCHER", " ".join([*LAUNCHER, "--partition=training", "--cpus=1", "--"]))
    monkeypatch.setattr(execution_process, "COMMAND", FAKE)
    monkeypatch.setitem(STAGES, "fake", StageSpec(1))
    execution_process.begin()
    return ready_home


def fake(**params: object) -> Request:
    return Request(stage="fake", version=1, params=params, name="fake", experiment="slurm")  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_stage_runs_as_a_job_and_says_how_it_goes(launched: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    result = execution_process.run_stage(fake(steps=2))
    assert result.status == "done" and result.metrics["eval/loss"] == 0.5
    assert "Slurm job" in caplog.text and "fake  2/2 steps" in caplog.text
    assert "State=COMPLETED" in said("scontrol", "show", "job", "-o")


@pytest.mark.slow
@pytest.mark.parametrize(("end", "status"), [("refuse", "refused"), ("bug", "failed")])
def test_how_a_stage_ends_comes_back(end: str, status: str, launched: Path) -> None:
    result = execution_process.run_stage(fake(steps=1, end=end))
    assert result.status == status and result.error is not None
    code = EXIT_CODES[result.status]
    assert f"ExitCode={code}:0" in said("scontrol", "show", "job", "-o").splitlines()[-1]


@pytest.mark.slow
def test_what_slurm_refuses_is_said(launched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNFLOW_LAUNCHER", " ".join([*LAUNCHER, "--partition=nowhere", "--"]))
    answer = subprocess.run([*LAUNCHER, "--partition=nowhere", "--", "true"], capture_output=True, text=True)
    assert answer.returncode == EXIT_CODES["refused"] and "nowhere" in answer.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_stopping_the_launcher_ends_the_job(how: signal.Signals, launched: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ended"
    script = tmp_path / "work.sh"
    script.write_text(
        f"#!/bin/bash\ntrap 'sleep 2; echo saved > {marker}; exit 75' TERM\n"
        "echo begun\nwhile true; do sleep 0.1; done\n"
    )
    command = [*LAUNCHER, "--partition=training", "--cpus=1", "--", "bash", str(script)]
    # A parent of its own, as a flow run is one: killed without a word, it takes the launcher along.
    parent = f"import subprocess; subprocess.run({command!r})"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", parent], stdout=log, stderr=log, start_new_session=True)
    wait_for(lambda: "begun" in (tmp_path / "log").read_text(), 60, lambda: "the job does not begin")
    if how is signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)
    wait_for(marker.exists, 30, (tmp_path / "log").read_text)
    wait_for(lambda: not said("squeue", "-h"), 30, lambda: said("squeue"))


@pytest.mark.slow
def test_two_ranks_train_in_a_job(
    cluster: Path, ready_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from schemas.config import SFTConfig
    from schemas.stage import Artifact, Placement
    from tests.support import models

    monkeypatch.setenv("ALIGNFLOW_LAUNCHER", " ".join([*LAUNCHER, f"--cpus={os.cpu_count()}", "--"]))
    execution_process.begin()
    folders = {
        "model": models.model_folder(tmp_path / "model"),
        "data": models.data_folder(tmp_path / "data", sft=models.rows(16, *models.ANSWERS)),
    }
    inputs = {name: Artifact(uri=str(folder), sha256=tracking.digest(folder)) for name, folder in folders.items()}
    params = SFTConfig(max_steps=3, batch_size=4, max_length=32).model_dump(mode="json")
    request = Request(
        stage="sft", version=STAGES["sft"].version, params=params, inputs=inputs, name="sft", experiment="slurm",
        placement=Placement(devices=2, threads=1),
    )  # fmt: skip
    result = execution_process.run_stage(request)
    assert result.status == "done", result.error
    run = tracking.client().get_run(str(result.run_id))
    assert run.data.metrics["train/loss"] > 0 and run.data.params["max_steps"] == "3"


# Last: on a busy machine Slurm may drain the node of a job that is slow to die.
@pytest.mark.slow
def test_a_job_that_somebody_cancels_comes_back_as_preempted(launched: Path, tmp_path: Path) -> None:
    # It takes no notice of SIGTERM, so that Slurm has to kill it, as at a time limit.
    command = [*LAUNCHER, "--partition=training", "--cpus=1", "--", "bash", "-c", "trap '' TERM; echo begun; sleep 300"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    wait_for(lambda: "begun" in (tmp_path / "log").read_text(), 60, lambda: "the job does not begin")
    assert said("squeue", "-h", "-o", "%i").split()
    for number in said("squeue", "-h", "-o", "%i").split():
        said("scancel", number)
    assert process.wait(300) == EXIT_CODES["preempted"]
    assert "ended as CANCELLED" in (tmp_path / "log").read_text()
