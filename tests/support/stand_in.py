"""A Python that has imported everything: `python stand_in.py -c CODE`, `-m MODULE`, `alignflow` or `fake`, and words.

A fork of the tests' server does the work. This process is what has been started: signals go on to the fork, it ends as
the fork ends, and each dies with the other. What a process has besides its words, variables, folder and the first three
descriptors (limits, umask, group) is not the fork's. Where no such server runs, or a variable is for the start of
Python itself, it becomes what it stands in for.
"""

import ctypes
import os
import re
import signal
import sys
from itertools import dropwhile
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.support import forks  # noqa: E402 - it imports nothing but Python's own

BE = {"alignflow": ("tests.support.commands", "be"), "fake": ("tests.support.scripted_stage", "be")}
"""The command, and the stage of that name."""
ALONE = {"alignflow": ["-P", "-m", "flows.cli"], "fake": [str(Path(__file__).with_name("scripted_stage.py")), "fake"]}
OTHERS = {"stages.warm", "stages.engine.torchrun", "torch.distributed.run"}
"""Modules that inherit a descriptor by its number, or start ranks as their own children."""
PARENT = "ALIGNFLOW_PARENT"  # as in schemas/environment.py, whose imports would take longer than all of this
FORWARDED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def main(given: list[str]) -> None:
    what, *words = dropwhile({"-P", "-u"}.__contains__, given)
    if (
        forks.SERVER not in os.environ
        or "PYTHONHASHSEED" in os.environ
        or what not in {"-c", "-m", *BE}
        or OTHERS & {*words[:1]}
    ):
        os.execv(sys.executable, [sys.executable, *(given if what not in ALONE else [*ALONE[what], *words])])
    # what is open here is not open in the fork
    words = [re.sub("^/dev/fd/", f"/proc/{os.getpid()}/fd/", word) for word in words]
    if os.environ.get(PARENT) == str(os.getppid()):  # else it waits for another, and the fork may see that
        os.environ[PARENT] = str(os.getpid())
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until there is a fork that they can go to
    # Else multiprocessing would start a process, which unblocks the signals.
    resource_tracker._resource_tracker._fd = os.open(os.devnull, os.O_WRONLY)  # type: ignore[attr-defined]
    fork = forks.start_as(BE.get(what, forks.BE_PYTHON), [what, *words], os.environ, Path.cwd())

    def forward(signum: int, frame: FrameType | None) -> None:
        os.kill(fork.pid or 0, signum)

    for one in FORWARDED:
        signal.signal(one, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    fork.join()
    code = 1 if fork.exitcode is None else fork.exitcode
    if code < 0:
        if -code != signal.SIGKILL:  # which has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
