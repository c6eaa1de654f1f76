"""Stages as forks of a flow's warm process: what they have in common with others, and who dies with whom."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.execution import process, warm
from schemas.config import SFTConfig
from schemas.environment import PARENT, WARM
from schemas.stage import STAGES, Artifact, Placement, Request, Result
from stages import tracking
from stages.runtime import workspace
from tests.support import homes
from tests.support.models import PAIRS, data_folder, model_folder, rows
from tests.support.processes import alive, wait_for
from tests.support.scripted import ALONE, fake_request


def state_of(file: Path, asked: Request) -> dict[str, Any]:
    assert process.run_stage(asked).status == "done"
    return json.loads(file.read_text())


def test_a_fork_is_as_a_process_of_its_own(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same folder, variables, arguments, permissions and threads, also where those of the warm process differ."""
    monkeypatch.setattr(process, "COMMAND", ALONE)
    monkeypatch.setenv("FAKE_HEAVY", "torch")
    (tmp_path / "other").mkdir()
    with contextlib.ExitStack() as around:
        for name, threads in (("alone", 2), ("fork", 1), ("later", 2)):
            asked = fake_request(steps=0, state=str(tmp_path / name))
            asked = asked.model_copy(update={"placement": Placement(threads=threads)})
            monkeypatch.setenv("FAKE_WORD", name if name == "fork" else "same")
            monkeypatch.setenv("OMP_NUM_THREADS", "2,1")  # of nested teams; the placement's number counts
            monkeypatch.chdir(tmp_path if name == "fork" else tmp_path / "other")
            if name == "fork":
                around.enter_context(warm.warm())
            state_of(tmp_path / name, asked)
    alone, fork, later = (json.loads((tmp_path / name).read_text()) for name in ("alone", "fork", "later"))
    assert fork["parent"] == later["parent"] != os.getpid() == alone["parent"]
    assert later["group"] != later["own"] and later["group"] != later["parent"]  # its stand-in's
    for state in (alone, later):
        for name in ("parent", "own", "group"):
            del state[name]
        values = state["environment"]  # libraries add some of their own
        state["environment"] = {name: values.get(name) for name in process.environment(asked) if name != PARENT}
        state["arguments"] = state["arguments"][:1]  # the request's file is another
    assert alone == later and (alone["threads"], fork["threads"], alone["umask"]) == (2, 1, 0o077)


@pytest.mark.parametrize("victim", ["stand-in", "fork", "warm process"])
def test_each_dies_with_the_other(victim: str, forked: Path) -> None:
    """Nothing of the stage is left, whoever is killed, and the flow is told; the next one starts as ever."""
    asked = fake_request(steps=1000, sleep=0.05)
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(process.run_stage(asked)))
    thread.start()
    wait_for((workspace.work_folder(asked.key()) / "checkpoints" / "count").exists)
    (stand_in,) = process._processes
    (server,) = [one for one in psutil.Process().children() if one.pid != stand_in.pid and one.children()]
    (fork,) = server.children()
    os.kill({"stand-in": stand_in.pid, "fork": fork.pid, "warm process": server.pid}[victim], signal.SIGKILL)
    thread.join(30)
    wait_for(lambda: not alive([fork.pid, stand_in.pid]), seconds=5)
    assert results[0].error is not None and "was killed by SIGKILL" in results[0].error.message
    assert process.run_stage(fake_request(steps=1)).status == "done"


def test_a_stopped_flow_lets_its_forks_save(fake: Path) -> None:
    """Ctrl-C: SIGTERM reaches the fork before the process that it is a fork of ends."""
    asked = fake_request(steps=1000, sleep=0.05)
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(process.run_stage(asked)))
    with pytest.raises(KeyboardInterrupt), process.stages_of_flow():
        thread.start()
        wait_for((workspace.work_folder(asked.key()) / "checkpoints" / "count").exists)
        raise KeyboardInterrupt
    thread.join(30)
    assert process.stopped() == ["count stopped"]
    process.begin()
    assert results[0].status == "preempted" and process.stopped() == []


def test_a_fork_that_fails_leaves_the_others_alone(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has no room for another process the stage starts by itself."""
    monkeypatch.setenv("FAKE_FORKS", "1")
    second, states = tmp_path / "second", list[Result]()
    hold = fake_request(steps=1000, sleep=0.05)
    thread = threading.Thread(target=lambda: states.append(process.run_stage(hold)))
    with warm.warm():
        thread.start()
        wait_for((workspace.work_folder(hold.key()) / "checkpoints" / "count").exists)
        state = state_of(second, fake_request(steps=0, state=str(second)))
        assert not states and state["parent"] == os.getpid()
        process.stop_all()
        thread.join(30)
    process.begin()
    assert states[0].status == "preempted"


def test_all_die_with_the_flow(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while a stage runs, and while the warm process still imports."""
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for heavy, until in (("", "checkpoints/count"), ("slow", "asks")):
        asked = fake_request(steps=1000, sleep=0.05, turn=heavy)
        (tmp_path / "request.json").write_text(asked.model_dump_json())
        code = (
            "import sys; from pathlib import Path; from flows.execution import process, warm; "
            "from schemas.stage import STAGES, Request, StageSpec; "
            "STAGES['fake'] = StageSpec(1, needs_device=True); warm.COMMAND = sys.argv[2:]; "
            "asked = Request.model_validate_json(Path(sys.argv[1]).read_text())\n"
            "with warm.warm(): process.run_stage(asked)"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "request.json"), *ALONE]
        variables = {**process.environment(asked), "FAKE_HEAVY": heavy}
        flow = psutil.Popen(command, env=variables, stderr=subprocess.DEVNULL)
        wait_for((workspace.work_folder(asked.key()) / until).exists)
        wait_for(lambda flow=flow: len(flow.children()) == 2)
        below = flow.children(recursive=True)
        flow.kill()
        flow.wait()
        assert len(below) == (2 if heavy else 3)
        wait_for(lambda below=below: not alive([one.pid for one in below]), seconds=5)


def test_without_the_warm_process_a_stage_starts_by_itself(fake: Path, tmp_path: Path) -> None:
    asked = fake_request(steps=1)
    (tmp_path / "request.json").write_text(asked.model_dump_json())
    command = [*ALONE, "fake", str(tmp_path / "request.json")]
    assert subprocess.run(command, env={**process.environment(asked), WARM: "9"}).returncode == 0
    assert Result.model_validate_json((tmp_path / "result.json").read_text()).status == "done"
    stand_in = [sys.executable, "-c", "from stages import warm; warm.hand_over(['fake']); print('by itself')"]
    for number in ("9", "-1", "x"):
        told = subprocess.run(
            stand_in, env={**process.environment(asked), WARM: number}, capture_output=True, text=True
        )
        assert told.stdout == "by itself\n", told.stderr


def test_several_devices_and_foreign_launchers_take_no_fork(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def taken(asked: Request) -> bool:
        with warm.warm():
            return warm.asks(asked, process.environment(asked)) is not None

    monkeypatch.setattr(warm, "COMMAND", ["true"])
    training = Request(stage="sft", version=1, params={})
    assert taken(training) and warm.asks(training, {}) is None  # no flow around
    assert not taken(Request(stage="validate", version=1, params={}))
    assert not taken(training.model_copy(update={"placement": Placement(devices=2)}))
    monkeypatch.setenv("ALIGNFLOW_LAUNCHER", "srun")
    assert not taken(training)
    monkeypatch.delenv("ALIGNFLOW_LAUNCHER")
    monkeypatch.setattr(warm, "_NVIDIA", tmp_path)
    assert not taken(training)


@pytest.mark.slow
def test_a_fork_learns_the_same(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a small training, bit for bit; each in a home of its own, where there is nothing to reuse."""
    pairs = [{"response": pair["chosen"]} for pair in PAIRS]
    folders = {"model": model_folder(tmp_path / "model"), "data": data_folder(tmp_path / "data", sft=rows(12, *pairs))}
    inputs = {name: Artifact(uri=str(folder), sha256=tracking.digest(folder)) for name, folder in folders.items()}
    params = SFTConfig(batch_size=4, max_steps=3, max_length=64).model_dump(mode="json")
    asked = Request(stage="sft", version=STAGES["sft"].version, params=params, inputs=inputs)
    weights = []
    for name in ("alone", "fork"):
        monkeypatch.setenv("ALIGNFLOW_HOME", str(homes.furnish(tmp_path / name, ready)))
        with warm.warm() if name == "fork" else contextlib.nullcontext():
            result = process.run_stage(asked)
        assert result.status == "done" and not result.reused
        weights.append(result.outputs["model"].sha256)
    assert weights[0] == weights[1] != inputs["model"].sha256
