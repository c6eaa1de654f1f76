"""Why a stage stops: the problem a person reads, the statuses and their exit codes."""

from typing import Literal

from schemas import Strict, text

Status = Literal["done", "refused", "diverged", "preempted", "failed"]

_LONGEST = 2000
"""Characters of a value that are shown."""

EXIT_CODES: dict[Status, int] = {"done": 0, "refused": 65, "diverged": 70, "preempted": 75, "failed": 1}


class Problem(Strict):
    """Why a stage stopped, for a person: what is wrong, with which field and value, and how to fix it."""

    kind: str
    message: str
    field: str | None = None
    value: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        # Values and messages quote what comes from outside, and this is printed, logged and shown on pages.
        where = f"{text.one_line(self.field)} = {text.one_line(self.value, _LONGEST)}: " if self.field else ""
        message = text.message(self.message)
        if not self.fix:
            return f"{where}{message}"
        message = message.rstrip()
        stop = "" if message.endswith((".", "!", "?", ":")) else "."
        return f"{where}{message}{stop} Fix: {text.message(self.fix)}"


class StageError(Exception):
    """Raised inside a stage to end it with a status and a problem that a person can act on."""

    def __init__(
        self, problem: Problem | str, *, status: Status = "refused", kind: str = "input", fix: str | None = None
    ) -> None:
        self.status: Status = status
        self.problem = problem if isinstance(problem, Problem) else Problem(kind=kind, message=problem, fix=fix)
        super().__init__(str(self.problem))


def stop_in(error: BaseException | None) -> StageError | None:
    """The stop (status `preempted`) behind an error: a library may have wrapped it; None where there is none."""
    while error is not None:
        if isinstance(error, StageError) and error.status == "preempted":
            return error
        error = error.__cause__ or error.__context__
    return None


def problem(field: str | None, value: object, message: str, fix: str | None = None, *, kind: str = "config") -> Problem:
    """What is wrong with a field's value and how to fix it; None as a value is shown as null."""
    return Problem(kind=kind, message=message, field=field, value="null" if value is None else str(value), fix=fix)


def refuse(
    field: str | None,
    value: object,
    message: str,
    fix: str | None = None,
    *,
    kind: str = "config",
    status: Status = "refused",
) -> StageError:
    """The error of a field's value, to be raised; in the order in which a person reads it."""
    return StageError(problem(field, value, message, fix, kind=kind), status=status)
