"""How a command's process begins, and how it ends when it is refused: the same for all of them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from schemas import Strict
from schemas.errors import EXIT_CODES, StageError
from schemas.text import show, show_tracebacks

Command = TypeVar("Command", bound=Strict)


def begin(read: Callable[[Any], Command], main: Callable[[Command], int]) -> NoReturn:
    """Run the command that the file named by the first argument asks for, and exit with its code."""
    show_tracebacks()
    sys.exit(main(read(json.loads(Path(sys.argv[1]).read_text()))))


def refused(who: str, error: StageError) -> int:
    """Say on stderr why, and return the exit code."""
    show(f"{who}: {error}", sys.stderr)
    return EXIT_CODES[error.status]
