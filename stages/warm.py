"""A process that has imported what stages need, and forks itself for each stage of a flow.

To import torch, transformers and MLflow takes eight seconds of a core, for every stage of a pipeline again; a fork has
them at once. A flow starts one such process (`python -P -m stages.warm`), and in place of a stage its stand-in (`python
-P -m stages.warm NAME request.json`): signals go on to the fork, and the stand-in ends as the fork ends. Each dies with
the other, and both with the flow. CUDA does not survive a fork: on a machine with a GPU a stage starts by itself.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import sys
import threading
from types import FrameType
from typing import Any

from schemas.environment import PARENT, WARM
from schemas.stage import STAGES
from stages.runtime.process import die_with_parent

# All that takes long to import and starts no thread that works: a fork has none but its first.
_HEAVY = [
    *(f"stages.{name}" for name in STAGES),
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
]
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_TAKEN = b"+"
_MESSAGE_BYTES = 1 << 20


# --- the stand-in ---


def hand_over(argv: list[str]) -> None:
    """Run the stage in a fork of the warm process, and end as it ends. Returns where there is no such process."""
    die_with_parent()
    message = {"argv": argv, "environment": dict(os.environ), "folder": os.getcwd(), "group": os.getpgrp()}
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    sent: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        sent.append(signum)
        with contextlib.suppress(OSError):
            here.send(bytes([signum]))

    before = {signum: signal.signal(signum, forward) for signum in _FORWARDED}
    with contextlib.suppress(OSError, ValueError), there, socket.socket(fileno=int(os.environ.pop(WARM, "-1"))) as asks:
        socket.send_fds(asks, [json.dumps(message).encode()], [there.fileno(), 1, 2])
    if _received(here) != _TAKEN:  # it has died, or the environment is too large for one message
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for signum in sent:
            os.kill(os.getpid(), signum)
        return
    code = int(_received(here) or -signal.SIGKILL)
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _received(connection: socket.socket) -> bytes:
    """The next message; empty where the other side is gone."""
    try:
        return connection.recv(_MESSAGE_BYTES)
    except OSError:
        return b""


# --- the warm process ---


def warm_up(asks: socket.socket) -> None:
    """Import what stages need; gives up when the flow is gone."""
    done = threading.Event()

    def leave_with_the_flow() -> None:
        gone = select.poll()
        gone.register(asks, 0)  # POLLHUP is always told
        while not done.is_set():
            if gone.poll(200):
                os._exit(0)

    watch = threading.Thread(target=leave_with_the_flow)
    watch.start()
    gc.disable()  # as stages.__main__.start does; a fork sees to it by itself
    try:
        for name in _HEAVY:
            importlib.import_module(name)
    finally:
        done.set()
        watch.join()  # a thread does not survive a fork
    gc.collect()
    gc.freeze()  # what is never collected is never written to, and stays shared


def serve(asks: socket.socket) -> list[str] | None:
    """Fork for each stage that asks. Returns a stage's arguments in its fork; None here, when the flow is gone."""
    waiting = selectors.DefaultSelector()
    waiting.register(asks, selectors.EVENT_READ)
    forks: dict[socket.socket, int] = {}
    own = os.getpid()
    while True:
        for key, _ in waiting.select():
            if key.fileobj is asks:
                message, descriptors, _, _ = socket.recv_fds(asks, _MESSAGE_BYTES, 3)
                if not message:
                    return None
                pid, ends = _fork() if len(descriptors) == 3 else (-1, -1)
                if pid == 0:
                    for held in (asks, *forks, waiting):
                        held.close()
                    os.close(descriptors[0])
                    return _become(json.loads(message), descriptors[1:], own)
                for descriptor in descriptors[1:] if pid > 0 else descriptors:
                    os.close(descriptor)
                if pid < 0:
                    continue  # its stand-in sees that nobody has taken it, and starts the stage by itself
                stand_in = socket.socket(fileno=descriptors[0])
                forks[stand_in] = pid
                waiting.register(stand_in, selectors.EVENT_READ)
                waiting.register(ends, selectors.EVENT_READ, stand_in)
                with contextlib.suppress(OSError):
                    stand_in.send(_TAKEN)
            elif isinstance(key.fileobj, socket.socket):
                if (pid := forks.get(key.fileobj)) is None:
                    continue  # it has ended meanwhile
                signum = _received(key.fileobj)
                os.kill(pid, signum[0] if signum else signal.SIGKILL)
                if not signum:  # the stand-in is dead
                    waiting.unregister(key.fileobj)
            else:
                stand_in = key.data
                _, status = os.waitpid(forks.pop(stand_in), 0)
                with contextlib.suppress(OSError):
                    stand_in.send(str(os.waitstatus_to_exitcode(status)).encode())
                waiting.unregister(key.fd)
                os.close(key.fd)
                with contextlib.suppress(KeyError):
                    waiting.unregister(stand_in)
                stand_in.close()


def _fork() -> tuple[int, int]:
    """A fork's pid and a descriptor that tells its end; pid 0 in the fork, -1 where the system has no room for one."""
    try:
        pid = os.fork()
    except OSError:
        return -1, -1
    if pid == 0:
        return 0, -1
    try:
        return pid, os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return -1, -1


def _become(message: dict[str, Any], streams: list[int], own: int) -> list[str]:
    """Make this fork what the stage's process would be; returns the arguments."""
    os.setpgid(0, message["group"])  # what ends the stage ends its group
    os.chdir(message["folder"])
    os.environ.clear()
    os.environ.update(message["environment"], **{PARENT: str(own)})
    os.environ.pop(WARM, None)
    for target, stream in enumerate(streams, 1):
        os.dup2(stream, target)
        os.close(stream)
    sys.argv[1:] = message["argv"]
    threads = os.environ.get("OMP_NUM_THREADS", "")  # read when torch was imported
    if "torch" in sys.modules and threads.isdecimal() and int(threads):
        import torch  # known here, but a stand-in must not import it

        torch.set_num_threads(min(int(threads), os.cpu_count() or 1))  # no more than it takes by itself
    return message["argv"]


def main(argv: list[str]) -> int | None:
    """Stand in for a stage, or be the process that forks."""
    if argv:
        hand_over(argv)
    else:
        asks = socket.socket(fileno=int(os.environ.pop(WARM)))
        warm_up(asks)
        forked = serve(asks)
        if forked is None:
            return 0
        argv = forked
    from stages.__main__ import start  # late: a stand-in that is taken needs none of it

    return start(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
