"""Stages as processes: results, deaths, reuse, two at once, and what is left running (nothing)."""

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from flows.execution import output
from flows.execution import process as execution_process
from flows.planning import requests
from schemas.errors import EXIT_CODES, StageError, Status
from schemas.stage import Artifact, Placement, Request, Result
from stages import __main__ as entry
from stages import tracking
from stages.runtime import workspace
from tests.conftest import ROOT
from tests.support.processes import alive, wait_for
from tests.support.scripted import ALONE, FAKE, fake_request


def losses(run_id: str | None) -> list[tuple[int, float]]:
    assert run_id is not None
    return [(m.step, m.value) for m in tracking.client().get_metric_history(run_id, "train/loss")]


def test_a_stage_runs_and_is_reused(either: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    result = execution_process.run_stage(fake_request(steps=3))
    assert result.status == "done" and not result.reused
    assert result.metrics == {"eval/loss": 0.5, "resumed/at": 0.0}
    assert losses(result.run_id) == [(0, 1.0), (1, 0.5), (2, 1.0 / 3.0)]
    assert (tracking.fetch(result.outputs["folder"]) / "inner" / "text.txt").read_text() == "{'steps': 3}"
    assert "count  3/3 steps" in caplog.text
    assert not (workspace.work_folder(result.key) / "checkpoints").exists()
    again = execution_process.run_stage(fake_request(steps=3))
    assert again == result.model_copy(update={"reused": True})
    assert f"count: reused, from run {result.run_id}" in caplog.text
    assert len(list((workspace.work_folder(result.key) / "asks").iterdir())) == 1  # no second process


def test_an_altered_artifact_is_rebuilt(forked: Path) -> None:
    first = execution_process.run_stage(fake_request(model=True))
    (tracking.fetch(first.outputs["folder"]) / "inner" / "text.txt").write_text("altered")
    second = execution_process.run_stage(fake_request(model=True))
    assert not second.reused and second.run_id != first.run_id
    assert second.outputs["folder"].sha256 == first.outputs["folder"].sha256
    assert execution_process.run_stage(fake_request(model=True)).run_id == second.run_id


def test_killed_and_started_again(either: Path) -> None:
    asked = fake_request(steps=6, die_at=4, sleep=0.05)
    killed = execution_process.run_stage(asked)
    assert killed.status == "failed" and killed.error is not None
    assert "was killed by SIGKILL" in killed.error.message
    (left,) = tracking.client().search_runs([tracking.experiment("tests")])
    assert left.info.status == "RUNNING"
    result = execution_process.run_stage(asked)
    assert result.status == "done" and result.metrics["resumed/at"] == 3.0
    assert result.run_id == left.info.run_id
    assert losses(result.run_id) == [(step, 1.0 / (step + 1)) for step in range(6)]
    assert tracking.client().get_run(left.info.run_id).info.status == "FINISHED"


def test_a_stage_that_refuses(forked: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = execution_process.run_stage(fake_request(end="refuse"))
    assert result.status == "refused" and str(result.error) == "path = x.jsonl: the rows are bad. Fix: fix them"
    assert "refused: path = x.jsonl: the rows are bad." in caplog.text
    assert result.run_id is not None
    run = tracking.client().get_run(result.run_id)
    assert run.info.status == "FAILED" and run.data.tags["problem"] == str(result.error)


def test_a_bug_leaves_its_traceback(forked: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = execution_process.run_stage(fake_request(end="bug"))
    assert result.status == "failed" and result.error is not None
    assert result.error.kind == "RuntimeError" and result.error.message == "this is a bug"
    assert "Traceback" in caplog.text and "scripted_stage.py" in caplog.text
    assert result.run_id is not None
    trace = tracking.client().download_artifacts(result.run_id, "traceback.txt")
    assert "RuntimeError: this is a bug" in Path(trace).read_text()


def test_same_key_twice_at_once(either: Path) -> None:
    asked = fake_request(steps=10, sleep=0.1)
    results: list[Result] = []
    threads = [threading.Thread(target=lambda: results.append(execution_process.run_stage(asked))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.status for result in results] == ["done", "done"]
    assert sorted(result.reused for result in results) == [False, True]
    assert results[0].outputs == results[1].outputs and results[0].run_id == results[1].run_id
    assert len(tracking.client().search_runs([tracking.experiment("tests")])) == 1


def test_an_input_that_is_gone(forked: Path, tmp_path: Path) -> None:
    asked = fake_request().model_copy(update={"inputs": {"data": Artifact(uri=str(tmp_path / "gone"), sha256="0")}})
    result = execution_process.run_stage(asked)
    assert result.status == "refused" and "the artifact is gone" in str(result.error)


@pytest.mark.parametrize(("end", "status"), [(None, "done"), ("refuse", "refused"), ("bug", "failed")])
def test_exit_codes(fake: Path, tmp_path: Path, end: str | None, status: Status) -> None:
    process = start(tmp_path / "ask", fake_request(end=end))
    assert process.wait(120) == EXIT_CODES[status]
    assert Result.model_validate_json((tmp_path / "ask" / "result.json").read_text()).status == status


def start(path: Path, asked: Request) -> "subprocess.Popen[bytes]":
    path.mkdir()
    (path / "request.json").write_text(asked.model_dump_json())
    environment = execution_process.environment(asked)
    return subprocess.Popen([*FAKE, "fake", str(path / "request.json")], env=environment, stderr=subprocess.DEVNULL)


def test_sigterm_is_a_preemption(fake: Path, tmp_path: Path) -> None:
    asked = fake_request(steps=200, sleep=0.05)
    count = workspace.work_folder(asked.key()) / "checkpoints" / "count"
    process = start(tmp_path / "ask", asked)
    wait_for(count.exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == EXIT_CODES["preempted"]
    result = Result.model_validate_json((tmp_path / "ask" / "result.json").read_text())
    assert result.status == "preempted" and result.run_id is not None
    assert tracking.client().get_run(result.run_id).info.status == "KILLED"


def test_a_stopped_flow_leaves_nothing_running(either: Path) -> None:
    asked = fake_request(steps=1000, sleep=0.05)
    count = workspace.work_folder(asked.key()) / "checkpoints" / "count"
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(execution_process.run_stage(asked)))
    thread.start()
    wait_for(count.exists)
    (process,) = execution_process._processes
    execution_process.stop_all()
    thread.join(10)
    assert not alive([process.pid]) and not execution_process._processes
    assert results[0].status == "preempted"


def test_ranks_have_as_long_to_save_as_torchrun_waits_for_them(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process takes half a second to save, and a stage of one has a tenth here."""
    saves = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit(75)))\n"
    monkeypatch.setattr(
        execution_process, "COMMAND", [sys.executable, "-c", f"{saves}print(flush=True); time.sleep(60)"]
    )
    monkeypatch.setattr(execution_process, "GRACE_SECONDS", 0.1)
    codes = []
    for devices in (1, 2):
        request = fake_request().model_copy(update={"placement": Placement(devices=devices)})
        process = execution_process.start(request, tmp_path / "request.json", {}, [])
        assert process.stdout is not None and process.stdout.readline()
        execution_process.stop_all()
        codes.append(process.wait())
        process.stdout.close()
        execution_process._processes.clear()
    execution_process.begin()
    assert codes == [-signal.SIGKILL, EXIT_CODES["preempted"]]
    assert execution_process.RANKS_SECONDS > 30  # torchrun's own


def test_a_stage_dies_with_its_parent(fake: Path, tmp_path: Path) -> None:
    asked = fake_request(steps=1000, sleep=0.05)
    path = tmp_path / "request.json"
    path.write_text(asked.model_dump_json())
    code = (
        "import subprocess, sys; process = subprocess.Popen(sys.argv[1:]); print(process.pid, flush=True); "
        "process.wait()"
    )
    environment = {
        name: value for name, value in execution_process.environment(asked).items() if name != "ALIGNFLOW_PARENT"
    }
    parent = subprocess.Popen(
        [sys.executable, "-c", code, *ALONE, "fake", str(path)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        wait_for((workspace.work_folder(asked.key()) / "checkpoints" / "count").exists)
        parent.kill()
    wait_for(lambda: not alive([pid]), seconds=5)


def test_a_wrong_request_is_refused(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(entry.MODULES, "fake", "scripted_stage")
    path = tmp_path / "request.json"
    for text, words in (
        ("{", "cannot be read"),
        (fake_request().model_copy(update={"version": 9}).model_dump_json(), "version = 9"),
        (fake_request().model_copy(update={"stage": "sft"}).model_dump_json(), "stage = sft"),
    ):
        path.write_text(text)
        with pytest.raises(StageError, match=words):
            entry.read_request("fake", path)


def test_two_ranks_do_and_reuse_together(fake: Path, tmp_path: Path) -> None:
    asked = fake_request(steps=2)
    path = tmp_path / "request.json"
    path.write_text(asked.model_dump_json())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for reused in (False, True):
        command = [*torchrun, FAKE[1], "fake", str(path)]
        done = subprocess.run(
            command, env=execution_process.environment(asked), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert Result.model_validate_json((tmp_path / "result.json").read_text()).reused is reused
    (run,) = tracking.client().search_runs([tracking.experiment("tests")])
    assert losses(run.info.run_id) == [(0, 1.0), (1, 0.5)]


def test_more_devices_mean_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], Mapping[str, str]]] = []
    monkeypatch.setattr(
        entry.os, "execve", lambda program, arguments, environment: started.append((arguments, environment))
    )
    placed = fake_request().model_copy(update={"placement": Placement(devices=2)})
    entry.become_torchrun(placed, ["sft", "request.json"])
    arguments, environment = started[0]
    assert arguments[-5:] == ["--nproc-per-node=2", "-m", "stages", "sft", "request.json"]
    assert arguments[1] == "-P" and environment["PYTHONSAFEPATH"] == "1"


def test_threads_follow_the_placement(fake: Path) -> None:
    placed = fake_request().model_copy(update={"placement": Placement(threads=3)})
    assert execution_process.environment(placed)["OMP_NUM_THREADS"] == "3"
    assert placed.key() == fake_request().key()


def test_validate_imports_no_torch() -> None:
    code = (
        "import sys; import stages.__main__, stages.tracking; print({'torch', 'mlflow', 'prefect'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"


# --- What lies outside the request ------------------------------------------------------------------------------------


def validate_request(path: str) -> Request:
    return Request(stage="validate", version=1, params={"path": path, "kind": "sft"})


def test_a_changed_file_is_another_key(tmp_path: Path) -> None:
    one, copy = tmp_path / "one.jsonl", tmp_path / "copy.jsonl"
    one.write_text("rows")
    copy.write_text("rows")
    key = requests.with_sources(validate_request(str(one)), "data.sft").key()
    assert requests.with_sources(validate_request(str(copy)), "data.sft").key() == key
    one.write_text("other rows")
    assert requests.with_sources(validate_request(str(one)), "data.sft").key() != key
    with pytest.raises(StageError, match=r"data\.sft\.path = .*no such file.*Fix: give its path"):
        requests.with_sources(validate_request(str(tmp_path / "none")), "data.sft")


def test_what_is_pinned_has_no_source() -> None:
    for path in ("hub:someone/rows", "demo:sft", "input:rows"):
        assert requests.with_sources(validate_request(path), "data.sft") == validate_request(path)
    hub = Request(stage="base", version=1, params={"path": "someone/model", "revision": "0" * 40})
    assert requests.with_sources(hub, "model") == hub


def test_a_template_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages }}")
    for value in (str(path), "{{ messages }}"):
        asked = Request(stage="base", version=1, params={"scratch": {}, "chat_template": value})
        assert requests.with_sources(asked, "model").params["chat_template"] == "{{ messages }}"


# --- Lines that hold what comes from outside --------------------------------------------------------------------------


def test_a_text_in_a_line_is_text_and_no_line_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """Of a row, a name or a model: it neither acts on a terminal nor passes for an error of the stage."""
    caplog.set_level(logging.INFO)
    formatter, text = entry.Lines(), "row \x1b[2J\nerror: forged\rerror: again\n  warning: third\u2028x"
    for level in (logging.INFO, logging.ERROR):
        for message in (text, f"error: {text}"):
            record = logging.LogRecord("alignflow", level, "file", 1, "%s", (message,), None)
            for line in formatter.format(record).split("\n"):
                output.pass_on(line, logging.getLogger("alignflow"))
            assert {one.levelno for one in caplog.records} == {level}
            assert not set(caplog.text.replace("\n", "")) & set("\x1b\r") and "[2J" in caplog.text
            caplog.clear()


def test_what_a_library_prints_is_text_too(caplog: pytest.LogCaptureFixture) -> None:
    output.pass_on("error: \x1b]52;c;aGk=\x07\x85", logging.getLogger("alignflow"))
    assert [(one.levelno, one.getMessage()) for one in caplog.records] == [
        (logging.ERROR, "\ufffd]52;c;aGk=\ufffd\ufffd")
    ]


def test_a_stage_that_hangs_is_stopped_as_preempted(
    either: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_HOLD", str(tmp_path / "never"))  # its third step waits for it
    asked = fake_request(steps=3).model_copy(update={"placement": Placement(minutes=0.05)})
    assert asked.key() == fake_request(steps=3).key()
    result = execution_process.run_stage(asked)
    assert result.status == "preempted" and result.error is not None and result.error.kind == "no_progress"
    assert "stage_minutes = 0.05" in str(result.error) and not execution_process._processes
    (ask,) = (workspace.work_folder(asked.key()) / "asks").iterdir()
    assert (ask / "output.log").exists()
