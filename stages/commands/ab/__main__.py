"""`python -P -m stages.commands.ab request.json`: see the folder's docstring."""

import sys

from schemas.commands import AbCommand
from schemas.errors import StageError
from schemas.text import show
from stages.commands.ab.contest import Contest
from stages.commands.entry import begin, refused
from stages.commands.rank.interview import interruptible, interview
from stages.commands.rank.session import Session
from stages.commands.rank.verdicts import Verdicts


def main(command: AbCommand) -> int:
    """Let a person judge, then write the result and say what it is; returns the exit code."""
    try:
        contest = Contest(command)
        (command.out / "results").mkdir(parents=True, exist_ok=True)
        name = f"{command.model}-{command.other}"
        verdicts = Verdicts(command.out / f"{name}.verdicts.jsonl")
        session = Session(contest.items, verdicts, command.annotator, "pairs", command.seed)
        stream = sys.stderr if command.as_json else sys.stdout
        left = f"; on {contest.identical} more both gave the same answer" if contest.identical else ""
        done = len(contest.items) - session.view(None)["states"].count(".")
        show(f"{len(contest.items)} prompts, {done} of them judged by {command.annotator} before{left}", stream)
        if verdicts.cut is not None:
            show(f"the last verdict was cut off, and was moved to {verdicts.cut}: judge that item again", sys.stderr)
        file = command.out / "results" / f"{name}.json"
        lines = interview(session, command, lambda: contest.finish(verdicts.read("pairs"), file), stream)
        if command.as_json:
            show(file.read_text() if file.exists() else "null")
        for line in () if command.as_json else lines:
            show(line)
    except StageError as error:
        return refused("alignflow ab", error)
    return 0


if __name__ == "__main__":
    interruptible()
    begin(AbCommand.model_validate, main)
