"""The guard of a server: whatever the server has started ends with the one who started the guard."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from flows.servers import supervisor
from flows.servers.supervisor import Running, Server
from schemas.errors import StageError
from tests.support.processes import alive, left_after

# Both refuse SIGTERM; the second has left its session and its parent, as a daemon does.
STUBBORN = """import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
print(os.getpid(), flush=True)
time.sleep(600)"""
STARTER = """import os, subprocess, sys, time
guard = [sys.executable, "-P", "-m", "flows.servers.supervisor", str(os.getpid())]
subprocess.Popen([*guard, sys.executable, "-c", sys.argv[1]], start_new_session=True)
time.sleep(600)"""


def test_a_daemon_that_refuses_to_stop_does_not_outlive_a_killed_starter() -> None:
    command = [sys.executable, "-c", STARTER, STUBBORN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        started = [int(starter.stdout.readline()) for _ in range(2)]
        assert len(alive(started)) == 2
        starter.kill()
        assert left_after(started, 5) == []


def test_what_stops_is_started_again_after_growing_pauses_and_given_up_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stops as soon as it starts: pauses of 0, 1, 2, 4 s, and the fifth stop in a minute is the last."""
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path))
    clock = [0.0]  # moved by hand
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    server = Server("MLflow", "", "", [sys.executable, "-c", "print('no room'); exit(3)"], {})
    one = Running(server, supervisor.start(server))
    started = []
    while len(started) < 4:
        before = one.process
        before.wait()
        one.look_after()
        assert one.process is before or clock[0] == 0.0
        while one.process is before:
            clock[0] += 0.5
            one.look_after()
        started.append(clock[0])
    assert started == [0.0, 1.0, 3.0, 7.0]
    one.process.wait()
    with pytest.raises(StageError, match="MLflow does not run") as given_up:
        one.look_after()
    assert str(given_up.value).count("no room") == 5  # the log goes on where it was
    assert capsys.readouterr().out.splitlines()[1] == "MLflow stopped (exit code 3); starting it again in 1 s."


def test_stops_of_long_ago_are_forgiven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path))
    server = Server("MLflow", "", "", [sys.executable, "-c", ""], {})
    long_ago = time.monotonic() - supervisor.RESTART_WINDOW
    one = Running(server, supervisor.start(server), stopped=[long_ago] * 4)
    before = one.process
    before.wait()
    one.look_after()
    assert one.process is not before
    one.process.wait()


def test_what_a_killed_guard_leaves_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its server would keep the port from the next one."""
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path))
    below = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    server = Server("MLflow", "", "", [sys.executable, "-c", below], {})
    one = Running(server, supervisor.start(server))
    try:
        guard = psutil.Process(one.process.pid)
        while len(started := guard.children(recursive=True)) < 2:
            time.sleep(0.05)
        one.process.kill()
        one.process.wait()
        one.look_after()
        assert left_after([process.pid for process in started], 5) == []
        assert one.process.pid != guard.pid and os.getpgid(one.process.pid) == one.process.pid
    finally:
        one.process.terminate()
        one.process.wait()
