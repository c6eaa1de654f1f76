"""The devices of this machine as slots: one GPU holds one stage at a time, whoever started it.

A slot is a locked file. Its lock is handed on to the stage's process, lasts as long as that or its starter lives, and
is freed by the kernel when both are gone, however they died.
"""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from schemas import environment
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
    return [f"slot-{number}" for number in range(environment.device_slots())]


@contextlib.contextmanager
def hold_devices(
    request: Request, log: Log, stopping: Callable[[], bool]
) -> Iterator[tuple[dict[str, str], list[int]]]:
    """Hold as many devices as a stage's placement asks for; waits until they are free.

    Gives the environment variables that show the stage its devices, and the descriptors of the locks to hand on.

    Raises:
        StageError: there are fewer devices, or the run is stopped while it waits.
    """
    elsewhere = bool(environment.launcher())  # Slurm hands out the devices of its own machines
    devices = names() if request.spec.needs_device and not elsewhere else []
    if not devices:
        yield {}, []
        return
    wanted = request.placement.devices
    if wanted > len(devices):
        fix = "ask for fewer, or place the stage on a pool of larger machines"
        message = f"this machine has {len(devices)}."
        raise refuse("devices", wanted, message, fix, kind="devices")
    locks = wait_for(devices, wanted, log, stopping)
    try:
        gpus = [name for name in locks if not name.startswith("slot-")]
        shown = {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if gpus else {}
        yield shown, list(locks.values())
    finally:
        for descriptor in locks.values():
            os.close(descriptor)


def wait_for(devices: Sequence[str], wanted: int, log: Log, stopping: Callable[[], bool]) -> dict[str, int]:
    """Lock `wanted` of the devices: name -> descriptor. All or none, in turn: two that wait never block each other."""
    announced = False
    turn: int | None = None
    try:
        while not stopping():
            turn = try_lock("turn") if turn is None else turn
            locks: dict[str, int] = {}
            for name in devices if turn is not None else ():
                if len(locks) < wanted and (descriptor := try_lock(name)) is not None:
                    locks[name] = descriptor
            if len(locks) == wanted:
                return locks
            for descriptor in locks.values():
                os.close(descriptor)
            if not announced:
                log.info("waiting for a device: of %s %d must be free", ", ".join(devices), wanted)
                announced = True
            time.sleep(POLL_SECONDS)
    finally:
        if turn is not None:
            os.close(turn)
    message, fix = "stopped while it waited for a device.", "start it again"
    raise StageError(message, status="preempted", kind="preempted", fix=fix)


def try_lock(name: str) -> int | None:
    """A descriptor that holds the lock of a name, or None when another holds it."""
    folder = environment.device_locks()
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)  # other users' runs need the same devices
    descriptor = os.open(
        folder / f"{name.replace('/', '_')}.lock", os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644
    )
    with contextlib.suppress(PermissionError):  # another user's, who has done the same
        os.fchmod(descriptor, 0o644)  # whatever the umask
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
