"""Two processes that take turns, so that both sides of a comparison meet the same machine: A, B, A, B, ...

The worker waits for a line on its stdin, does one piece of work and answers with one line of JSON; whatever else it
prints goes to stderr. Needs nothing but Python, since the peer's worker runs in another environment.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any


def peak_memory() -> float:
    """The most memory this process has held so far, in MiB (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


class Turns:
    """The worker's end."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.began = self.cpu_began = 0.0

    def wait(self) -> None:
        """Sleep until it is this worker's turn, then start the clock. Ends the process when there are no more turns."""
        if not sys.stdin.readline():
            sys.stderr.flush()
            os._exit(0)
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def done(self, **found: Any) -> None:
        """Stop the clocks and answer. CPU seconds, of all threads, depend less on what else the machine does."""
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.synchronize()
            found["device_memory"] = torch.cuda.max_memory_allocated()
        seconds, cpu = time.perf_counter() - self.began, time.process_time() - self.cpu_began
        found |= {"seconds": seconds, "cpu": cpu, "memory": peak_memory()}
        self.answers.write(json.dumps(found) + "\n")
        self.answers.flush()


class Worker:
    """The other end: a worker process, and its log."""

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **environment},
                text=True,
            )

    def turn(self) -> dict[str, Any]:
        """Let the worker do its next piece of work; what it answers. Raises RuntimeError when it has died."""
        try:
            self._pipe(self.process.stdin).write("go\n")
            self._pipe(self.process.stdin).flush()
            line = self._pipe(self.process.stdout).readline()
        except BrokenPipeError:
            line = ""
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-15:])
            raise RuntimeError(f"a worker died with exit code {self.process.wait()}; {self.log} ends with:\n{tail}")
        return json.loads(line)

    def end(self) -> None:
        """No more turns."""
        self._pipe(self.process.stdin).close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._pipe(self.process.stdout).close()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe
