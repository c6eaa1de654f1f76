"""`alignflow` as a user calls it, and what it says: in this process, since one of its own imports for seconds."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import IO

import pytest

from flows import cli


@contextlib.contextmanager
def caught(descriptor: int) -> Iterator[IO[str]]:
    """A file that holds what this process, and those that it starts, write to a descriptor."""
    kept = os.dup(descriptor)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), descriptor)
        try:
            yield file
        finally:
            os.dup2(kept, descriptor)
            os.close(kept)


def here(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command's whole entry point, run in this process, which is left as it was.

    Not for commands that ask a Prefect server: its settings are read once per process.
    """
    words, code = ["alignflow", *map(str, arguments)], 0
    umask, before = os.umask(0o022), dict(os.environ)
    with caught(1) as out, caught(2) as err, pytest.MonkeyPatch.context() as patch:
        for name, value in (("argv", words), ("path", [*sys.path]), ("excepthook", sys.excepthook)):
            patch.setattr(sys, name, value)
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        os.environ.update(environment)
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        finally:
            os.umask(umask)
            os.environ.clear()
            os.environ.update(before)
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read())
    return subprocess.CompletedProcess(words, code, *said)
