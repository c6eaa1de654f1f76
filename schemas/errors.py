"""Why a stage stops: the problem a person reads, the statuses and their exit codes."""

from typing import Any, Literal

from schemas.strict import Strict

Status = Literal["done", "refused", "diverged", "preempted", "failed"]

EXIT_CODES: dict[Status, int] = {"done": 0, "refused": 65, "diverged": 70, "preempted": 75, "failed": 1}


class Problem(Strict):
    """Why a stage stopped, for a person: what is wrong, with which field and value, and how to fix it."""

    kind: str
    message: str
    field: str | None = None
    value: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        where = f"{self.field} = {self.value}: " if self.field else ""
        if not self.fix:
            return f"{where}{self.message}"
        message = self.message.rstrip()
        stop = "" if message.endswith((".", "!", "?", ":")) else "."
        return f"{where}{message}{stop} Fix: {self.fix}"


class StageError(Exception):
    """Raised inside a stage to end it with a status and a problem that a person can act on."""

    def __init__(self, message: str, *, status: Status = "refused", kind: str = "input", **where: Any) -> None:
        self.status: Status = status
        texts = {k: None if v is None else str(v) for k, v in where.items()}
        self.problem = Problem(kind=kind, message=message, **texts)
        super().__init__(str(self.problem))
