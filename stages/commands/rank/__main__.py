"""`python -P -m stages.commands.rank request.json`: see the folder's docstring."""

import json
import sys
from pathlib import Path

from schemas.commands import RankCommand, RankForm
from schemas.errors import StageError, refuse
from schemas.text import show
from stages.commands.entry import begin, refused
from stages.commands.rank import questions, rows
from stages.commands.rank.interview import interruptible, interview
from stages.commands.rank.session import Session
from stages.commands.rank.verdicts import Verdicts

_ENDINGS: dict[RankForm, str] = {"ranking": "ranked", "pairs": "pairs", "thumbs": "thumbs"}


def places(command: RankCommand) -> tuple[Path, Path]:
    """The file of rows and the file of verdicts beside it.

    Raises:
        StageError: the first exists and is not ours: there are no verdicts beside it.
    """
    name = command.file.name.removesuffix(".gz")
    output = command.output or command.file.with_name(f"{Path(name).stem}.{_ENDINGS[command.form]}.jsonl")
    verdicts = output.with_suffix(".verdicts.jsonl")
    if output.suffix != ".jsonl":
        raise refuse("--output", output, "rows are written as JSON lines.", "name a file that ends in .jsonl")
    if output.exists() and (not verdicts.exists() or output.samefile(command.file)):
        message = "the file already exists, and holds no ranking of this command."
        raise refuse("--output", output, message, "name another file", kind="file_exists")
    return output, verdicts


def main(command: RankCommand) -> int:
    """Let a person judge, then write the rows and say what comes next; returns the exit code."""
    try:
        output, file = places(command)
        asked = questions.read(command.file, command.form, command.columns)
        verdicts = Verdicts(file)
        session = Session(asked.items, verdicts, command.annotator, command.form, command.seed)
    except StageError as error:
        return refused("alignflow rank", error)
    if asked.repeated or asked.nothing_to_compare:
        left = f"{asked.repeated} repeated, {asked.nothing_to_compare} with nothing to compare"
        show(f"rows left out: {left}", sys.stderr)
    if verdicts.cut is not None:
        show(f"the last line of {file} was cut off, and was moved to {verdicts.cut}: judge that item again", sys.stderr)
    done = len(asked.items) - session.view(None)["states"].count(".")
    stream = sys.stderr if command.as_json else sys.stdout
    show(
        f"{len(asked.items)} items, {done} of them judged by {command.annotator} before; verdicts go to {file}", stream
    )

    def finish() -> list[str]:
        told = verdicts.read(command.form)
        made = rows.rows_of(asked.items, told)
        lines = rows.summary(asked.items, told)
        if not made:
            return [*lines, "nothing was judged yet, so that no rows were written"]
        rows.write(made, output)
        return [
            *lines,
            f"wrote     {len(made)} rows to {output}",
            f"next      {rows.next_command(output, command.form)}",
        ]

    try:
        lines = interview(session, command, finish, stream)
    except StageError as error:
        return refused("alignflow rank", error)
    if command.as_json:
        told = verdicts.read(command.form)
        made = {"out": str(output), "rows": len(rows.rows_of(asked.items, told)), "verdicts": str(file)}
        show(json.dumps(made | rows.numbers(asked.items, told), indent=2))
    for line in () if command.as_json else lines:
        show(line)
    return 0


if __name__ == "__main__":
    interruptible()
    begin(RankCommand.model_validate, main)
