"""A stage that does what its parameters say, run through the real entry point: `python scripted_stage.py`.

Where a flow has a warm process it stands in for its fork, or is that process, which imports what FAKE_HEAVY names.
"""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

from schemas.environment import WARM
from schemas.errors import refuse
from schemas.stage import STAGES, StageSpec
from stages import __main__ as entry
from stages import warm
from stages.tracking import StageRun

STAGES["fake"] = StageSpec(1, needs_device=True)
entry.MODULES["fake"] = "scripted_stage" if __name__ == "__main__" else __name__


def run(run: StageRun) -> dict[str, float]:
    """Count to `steps`, keeping the count as a checkpoint; then publish it, or end as `end` says.

    With FAKE_HOLD in the environment the third step waits until a file of that name exists: no part of the key.
    """
    params = run.request.params
    if run.rank > 0:  # the counting is rank 0's
        return {}
    checkpoint = run.work / "checkpoints" / "count"
    checkpoint.parent.mkdir(exist_ok=True)
    start = int(checkpoint.read_text()) if checkpoint.exists() else 0
    for name in run.request.inputs:
        run.input(name)
    for step in range(start, int(str(params.get("steps", 3)))):
        while step == 2 and "FAKE_HOLD" in os.environ and not Path(os.environ["FAKE_HOLD"]).exists():
            time.sleep(0.05)
        if params.get("die_at") == step and start == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        run.metrics({"train/loss": 1.0 / (step + 1)}, step=step)
        run.progress(step + 1, int(str(params.get("steps", 3))), "steps")
        checkpoint.write_text(str(step))  # behind by one: the last step is done again, as after a real crash
        time.sleep(float(str(params.get("sleep", 0))))
    if "state" in params:
        import torch  # takes seconds, and few tests ask

        about = {"folder": os.getcwd(), "umask": os.umask(0), "threads": torch.get_num_threads()}
        about |= {"environment": dict(os.environ), "arguments": sys.argv[-2:], "group": os.getpgrp()}
        Path(str(params["state"])).write_text(json.dumps({**about, "parent": os.getppid(), "own": os.getpid()}))
    if params.get("end") == "refuse":
        raise refuse("path", "x.jsonl", "the rows are bad.", "fix them", kind="data")
    if params.get("end") == "bug":
        raise RuntimeError("this is a bug")
    run.publish("folder", write(run.work / "out", str(params)), model=bool(params.get("model")))
    return {"eval/loss": 0.5, "resumed/at": float(start)}


def no_room() -> int:
    """What fork does where the system allows no more processes."""
    raise BlockingIOError(errno.EAGAIN, "no room")


def write(folder: Path, text: str) -> Path:
    """A folder with something in it."""
    (folder / "inner").mkdir(parents=True, exist_ok=True)
    (folder / "inner" / "text.txt").write_text(text)
    return folder


def be(words: list[str]) -> int:
    """Run as the stage, in a fork."""
    return entry.start(words)


if __name__ == "__main__":
    warm._HEAVY[:] = os.environ.get("FAKE_HEAVY", "").split()
    if "FAKE_FORKS" in os.environ:  # so many succeed
        forks, fork = iter(range(int(os.environ["FAKE_FORKS"]))), os.fork
        os.fork = lambda: fork() if next(forks, None) is not None else no_room()
    sys.exit((warm.main if WARM in os.environ else entry.start)(sys.argv[1:]))
