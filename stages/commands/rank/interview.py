"""A person's sitting, on the page or in the terminal: from the first item to what is written at its end."""

import io
import os
import shutil
import signal
import sys
import tempfile
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from schemas.commands import Interview
from schemas.text import show
from stages.commands.rank import terminal
from stages.commands.rank.server import Server
from stages.commands.rank.session import Session
from stages.runtime.process import die_with_parent


def interview(session: Session, command: Interview, finish: Callable[[], list[str]], out: TextIO) -> list[str]:
    """Ask until the person ends it, then write what came of it; returns the lines that `finish` gives.

    out: where the items are shown, or the page's address.

    Raises:
        StageError: the port is taken, or what `finish` raises.
    """
    try:
        if command.terminal:
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(errors="replace")
            terminal.rank(session, sys.stdin, out)
        else:
            serve(Server(session, command.port, finish), command.open, out)
    except KeyboardInterrupt:
        show(file=out)
    return finish()


def serve(server: Server, opens: bool, out: TextIO | None = None) -> None:
    """Serve the page until the person has finished, or Ctrl-C.

    A browser is started with a file that leads to the page: other users of the machine can read its command line.
    """
    folder = Path(tempfile.mkdtemp(prefix="alignflow-"))
    try:
        show(f"open      {server.address}\nCtrl-C, or Finish on the page, writes the result and ends.", out)
        if opens and sys.stdout.isatty() and (os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}):
            (folder / "rank.html").write_text(f'<meta http-equiv="refresh" content="0;url={server.address}">')
            webbrowser.open((folder / "rank.html").as_uri())
        server.serve_forever(poll_interval=0.1)
    finally:
        server.server_close()
        shutil.rmtree(folder, ignore_errors=True)


def interruptible() -> None:
    """Let whatever ends this process from outside end it as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    die_with_parent(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
