"""The guard of a server: whatever the server has started ends with the one who started the guard."""

import subprocess
import sys

from tests.support.live_servers import alive, left_after

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
