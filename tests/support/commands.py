"""`alignflow` as a user calls it, and what it says: its whole entry point, in a process of its own.

That process, its servers, and those of the stages that it runs are forks of one that has imported what takes seconds.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from flows import cli
from flows.servers import address_file
from tests.support import forks


def alignflow(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """How the command ends, with more variables in its environment."""
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        process = begun(words, out, err, environment)
        code = forks.ended(process, 600, lambda: out.read_text() + err.read_text())
        return subprocess.CompletedProcess([*map(str, words)], code, out.read_text(), err.read_text())


def begun(words: Sequence[object], out: Path, err: Path, environment: Mapping[str, str] = {}) -> ForkServerProcess:
    """The command as it begins. What it says goes behind what the two files hold, which may be one."""
    with open(os.devnull) as nothing, out.open("a") as said, err.open("a") as told:
        streams = [one.fileno() for one in (nothing, said, told)]
        everything = {**os.environ, **environment}
        return forks.start_as((__name__, "be"), ["alignflow", *map(str, words)], everything, Path.cwd(), streams)


def be(words: list[str]) -> None:
    """Run as the command; the first of the words is its name."""
    from prefect.context import refresh_global_settings_context

    sys.argv[:] = words
    let_in = address_file.let_in

    def let_in_here(addresses: address_file.Addresses | None) -> None:
        """Prefect, which a command imports after this, is here already."""
        let_in(addresses)
        refresh_global_settings_context()

    address_file.let_in = let_in_here
    cli.main()


def folder_with(folder: Path) -> Path:
    """The folder, with the program `alignflow` in it, for PATH."""
    folder.mkdir(parents=True)
    return forks.program(folder / "alignflow", "alignflow").parent
