"""A process of its own for what imports torch, which nothing here may."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, NoReturn

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel


_TO_SAVE_SECONDS = 10


def run_python(module: str, *arguments: object, keep: int | None = None) -> int:
    """Run `python -P -m module` with arguments on this terminal; returns its exit code. `keep`: a file it inherits.

    Ctrl-C reaches it too: it has ten seconds to save what it must, and its own code counts where it ends by itself.
    """
    inherited = () if keep is None else (keep,)
    with subprocess.Popen([sys.executable, "-P", "-m", module, *map(str, arguments)], pass_fds=inherited) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            try:
                code = process.wait(_TO_SAVE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise KeyboardInterrupt from None
            if code < 0:
                raise
            return code


def start(context: typer.Context, request: type["BaseModel"], **values: Any) -> NoReturn:
    """Run the command's module in stages/commands and exit with its code.

    Its request holds the options and arguments as typer has them, but for `values`; None is what is not given.

    Raises:
        StageError: before a process starts, one line for each option whose value the request cannot have.
    """
    from pydantic import ValidationError

    from flows.planning.explain import explain
    from schemas.errors import StageError

    given = {name: value for name, value in {**context.params, **values}.items() if value is not None}
    try:
        checked = request.model_validate(given)
    except ValidationError as error:
        typed = {p.name: p.opts[0] if p.opts[0].startswith("-") else p.opts[0].upper() for p in context.command.params}
        errors = ({**one, "loc": tuple(typed[str(part)] for part in one["loc"][:1])} for one in error.errors())
        lines = [explain(one, {}) for one in errors]
        raise StageError("\n".join(lines), kind="config") from None
    with _written(checked) as file:
        code = run_python(f"stages.commands.{context.info_name}", f"/dev/fd/{file}", keep=file)
    raise typer.Exit(code)


def answer(name: str, request: "BaseModel") -> str:
    """What a module of stages/commands prints on stdout for a request. It is asked on the way of another command."""
    with _written(request) as file:
        command = [sys.executable, "-P", "-m", f"stages.commands.{name}", f"/dev/fd/{file}"]
        return subprocess.run(command, pass_fds=[file], stdout=subprocess.PIPE, text=True).stdout


@contextmanager
def _written(request: "BaseModel") -> Iterator[int]:
    """The descriptor of a file that holds a request. It has no name, so that no death leaves it behind."""
    with TemporaryFile("w+") as file:
        file.write(json.dumps(request.model_dump(mode="json")))
        file.seek(0)
        yield file.fileno()
