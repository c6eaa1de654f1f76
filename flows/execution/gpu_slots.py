"""The devices of this machine as slots: one GPU holds one stage at a time, whoever started it.

A slot is a locked file. Its lock is handed on to the stage's process, lasts as long as that or its starter lives, and
is freed by the kernel when both are gone, however they died.
"""

import contextlib
import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from schemas.errors import StageError, refuse
from schemas.stage import Request

POLL_SECONDS = 0.3

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]


def names() -> list[str]:
    """The devices that runs here may use: CUDA_VISIBLE_DEVICES, else all NVIDIA GPUs. Without one, as many slots as
    ALIGNFLOW_DEVICE_SLOTS says; by default none, which means no limit.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    gpus = Path("/proc/driver/nvidia/gpus")
    if gpus.is_dir():
        return [str(number) for number in range(sum(1 for _ in gpus.iterdir()))]
    return [f"slot-{number}" for number in range(int(os.environ.get("ALIGNFLOW_DEVICE_SLOTS") or 0))]


def folder() -> Path:
    """Where the slots' files lie: one place for all homes and users of this machine."""
    place = Path(os.environ.get("ALIGNFLOW_DEVICE_LOCKS") or Path(tempfile.gettempdir()) / "alignflow-devices")
    if not place.is_dir():
        place.mkdir(parents=True, exist_ok=True)
        place.chmod(0o777)  # other users' runs need the same devices
    return place


@contextlib.contextmanager
def held(request: Request, log: Log, stopping: Callable[[], bool]) -> Iterator[tuple[dict[str, str], list[int]]]:
    """Hold as many devices as a stage's placement asks for; waits until they are free.

    Gives the environment variables that show the stage its devices, and the descriptors of the locks to hand on.

    Raises:
        StageError: there are fewer devices, or the run is stopped while it waits.
    """
    elsewhere = "ALIGNFLOW_LAUNCHER" in os.environ  # Slurm hands out the devices of its own machines
    there = names() if request.spec.needs_device and not elsewhere else []
    if not there:
        yield {}, []
        return
    wanted = request.placement.devices
    if wanted > len(there):
        fix = "ask for fewer, or place the stage on a pool of larger machines"
        message = f"this machine has {len(there)}."
        raise refuse("devices", wanted, message, fix, kind="devices")
    taken = take(there, wanted, log, stopping)
    try:
        named = [name for name in taken if not name.startswith("slot-")]
        shown = {"CUDA_VISIBLE_DEVICES": ",".join(named), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if named else {}
        yield shown, list(taken.values())
    finally:
        for descriptor in taken.values():
            os.close(descriptor)


def take(there: Sequence[str], wanted: int, log: Log, stopping: Callable[[], bool]) -> dict[str, int]:
    """Lock so many of the devices: name -> descriptor. All or none, in turn: two that wait never block each other."""
    said = False
    turn: int | None = None
    try:
        while not stopping():
            turn = try_lock("turn") if turn is None else turn
            found = free(there, wanted) if turn is not None else {}
            if len(found) == wanted:
                return found
            for descriptor in found.values():
                os.close(descriptor)
            if not said:
                log.info("waiting for a device: of %s %d must be free", ", ".join(there), wanted)
                said = True
            time.sleep(POLL_SECONDS)
    finally:
        if turn is not None:
            os.close(turn)
    message, fix = "stopped while it waited for a device.", "start it again"
    raise StageError(message, status="preempted", kind="preempted", fix=fix)


def free(there: Sequence[str], wanted: int) -> dict[str, int]:
    """Up to `wanted` devices that nobody holds, now locked."""
    found: dict[str, int] = {}
    for name in there:
        descriptor = try_lock(name) if len(found) < wanted else None
        if descriptor is not None:
            found[name] = descriptor
    return found


def try_lock(name: str) -> int | None:
    """A descriptor that holds the lock of a name, or None when another holds it."""
    path = folder() / f"{name.replace('/', '_')}.lock"
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
