"""`alignflow validate`: check a data file without MLflow."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.commands import ValidateCommand
from schemas.errors import EXIT_CODES, StageError
from schemas.text import one_line, show, show_tracebacks
from stages.validate import check
from stages.validate.context import Context

if TYPE_CHECKING:
    from stages.engine.data.codec import Codec


def main(command: ValidateCommand) -> int:
    """Check the file, print what came of it; returns 0, or 65 when the data is refused."""
    report: dict[str, Any] = {"rows": 0, "kept": 0, "quarantined": 0, "reasons": {}}
    error, checked = None, False
    try:
        codec = None if command.model is None else _codec(command.model)
        checked = True
        check(Context(command, codec, command.evaluation), command.out)
    except StageError as refusal:
        error = refusal
    if checked:  # a refusal writes its report too
        report |= json.loads((command.out / "report.json").read_text(encoding="utf-8"))
    _print(command, report, error)
    return 0 if error is None else EXIT_CODES[error.status]


def _codec(folder: Path) -> "Codec":
    from stages.engine.data.codec import Codec

    try:
        return Codec.load(folder)
    except StageError as error:
        if error.problem.field != "folder":
            raise
        named = error.problem.model_copy(update={"field": "model"})  # the option's name
        raise StageError(named, status=error.status) from error


def _print(command: ValidateCommand, report: dict[str, Any], error: StageError | None) -> None:
    if command.as_json:
        places = {"source": command.path, "out": str(command.out), "quarantine": str(command.out / "quarantine.jsonl")}
        show(json.dumps(report | {"error": None if error is None else str(error)} | places))
        return
    show(f"{one_line(command.path)}: {report['rows']} rows, {report['kept']} kept, {report['quarantined']} quarantined")
    for name, count in [*report.get("checks", {}).items(), *report.get("notes", {}).items()]:
        show(f"  {count:8d}  {one_line(name)}")
    if error is not None:
        show(f"refused: {error}", sys.stderr)


if __name__ == "__main__":
    show_tracebacks()
    sys.exit(main(ValidateCommand.model_validate(json.loads(Path(sys.argv[1]).read_text()))))
