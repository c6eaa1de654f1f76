"""torchrun for a stage: starts its ranks on this node, watches the other nodes, and ends as the ranks do.

    python -P -m stages.engine.torchrun REQUEST TORCHRUN'S ARGUMENTS

Where the nodes are is said by torchrun's own variables: PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT, or
PET_RDZV_BACKEND and PET_RDZV_ENDPOINT. A node that is gone, with its power or its cable, says nothing: the others would
wait for it in a collective until that gives up, and whoever started them would wait on. So every node counts in the
store that torchrun keeps on one of them, and one that hears nothing from another ends.

What one rank finds out for all goes through the same store: no other rank asks the disk or MLflow for it.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import NoReturn

from torch.distributed import DistError, TCPStore, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from schemas.errors import EXIT_CODES, Problem
from schemas.stage import Request, Result
from schemas.text import show
from stages.runtime.workspace import write_whole

BEAT_SECONDS = 5.0
SILENT_SECONDS = 30.0
"""After so long without a word a node counts as gone."""
START = timedelta(minutes=10)
"""How long nodes wait for each other to start: torchrun's own default."""
ASK_SECONDS = 0.2
PORT = 29500
"""torchrun's own default."""


# --- what the first rank tells the others ---


@cache
def _store() -> TCPStore:
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=START)


def told(name: str, work: Callable[[], str]) -> str:
    """What `work` returns on the first rank. The others wait for it, and do not call it."""
    start = [
        os.environ.get(f"TORCHELASTIC_{one}", "") for one in ("RUN_ID", "RESTART_COUNT")
    ]  # others use the store too
    key = "/".join(["alignflow", *start, name])
    if os.environ["RANK"] == "0":
        value = work()
        _store().set(key, value)
        return value
    while not _store().check([key]):  # not one long call: a signal would wait for its end
        time.sleep(ASK_SECONDS)
    return _store().get(key).decode()


# --- the nodes ---


class Nodes:
    """What is heard of the nodes of a stage."""

    def __init__(self, number: int, host: str, port: int, name: str) -> None:
        """number: how many there are. host, port: of the store. name: of this start, on a store that others use too."""
        self.number, self.address, self.prefix = number, (host, port), f"alignflow/nodes/{name}"
        self.counts: list[bytes] = [b""] * number
        self.heard: list[float] = []
        """When each node was last heard, in seconds of the monotonic clock; empty until all are there."""
        self.answered = 0.0
        """When the store last answered."""

    def count(self) -> None:
        """Count for this node, and look at the others' counts, until the store is gone."""
        try:
            store = TCPStore(*self.address, is_master=False, timeout=START)
            own = (store.add(f"{self.prefix}/number", 1) - 1) % self.number  # one may have been started again
            keys = [f"{self.prefix}/{node}" for node in range(self.number)]
            beat = 0
            while True:
                beat += 1
                store.set(keys[own], str(beat))
                if store.check(keys):
                    self.hear(store.multi_get(keys))
                time.sleep(BEAT_SECONDS)
        except DistError:  # `silent` will tell: it has not answered
            return

    def hear(self, counts: list[bytes]) -> None:
        """Note which counts have changed."""
        now = time.monotonic()
        before = self.heard or [now] * self.number
        heard = [now if new != old else then for new, old, then in zip(counts, self.counts, before, strict=True)]
        self.counts, self.answered, self.heard = counts, now, heard

    def silent(self) -> str | None:
        """Who has not been heard for too long; None while all are, and before all are there."""
        long_ago = time.monotonic() - SILENT_SECONDS
        if not self.heard:
            return None
        if self.answered < long_ago:
            return f"the node at {self.address[0]}, or the network to it,"
        gone = sum(then < long_ago for then in self.heard)
        return f"{gone} of {self.number} nodes" if gone else None

    def watch(self, lost: Callable[[str], NoReturn]) -> None:
        """Look on until one is gone, then call `lost` with who it is. For a thread of its own: `count` may hang."""
        while (who := self.silent()) is None:
            time.sleep(1.0)
        lost(who)


def address() -> tuple[str, int]:
    """Host and port of the store, by torchrun's variables."""
    given = os.environ.get("PET_RDZV_ENDPOINT", "")
    host, _, port = given.partition(":") if given else (os.environ.get("PET_MASTER_ADDR", "127.0.0.1"), "", "")
    return host, int(port or os.environ.get("PET_MASTER_PORT") or (29400 if given else PORT))


def give_up(path: Path, who: str) -> NoReturn:
    """End this node and its ranks at once, as preempted; the result says so unless the first rank has written one."""
    message = f"{who} did not answer for {SILENT_SECONDS:g} s: the training cannot go on without."
    problem = Problem(kind="node_lost", message=message, fix="start it again: it resumes on nodes that are there")
    show(f"error: {problem}", sys.stderr)
    target = path.with_name("result.json")
    if not target.exists():
        key = Request.model_validate_json(path.read_text()).key()
        write_whole(target, Result(status="preempted", key=key, error=problem).model_dump_json(indent=2))
    os._exit(EXIT_CODES["preempted"])  # the ranks die with their parent


def main(argv: list[str]) -> int:
    """Run torchrun; the exit code of the rank that failed first, 128 + its number where a signal has killed it."""
    nodes = int(os.environ.get("PET_NNODES") or 1)
    if nodes > 1:
        others = Nodes(nodes, *address(), os.environ.get("PET_RDZV_ID", "none"))
        threading.Thread(target=others.count, daemon=True).start()
        threading.Thread(target=others.watch, args=[lambda who: give_up(Path(argv[0]), who)], daemon=True).start()
    try:
        run.main(argv[1:])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException:  # it has handed it on, and waited for the ranks
        return EXIT_CODES["preempted"]
    return 0


if __name__ == "__main__":
    ended = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)  # not through the interpreter's end, which a thread that waits for the store would abort
