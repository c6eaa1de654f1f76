"""`alignflow generate`: a model writes several answers to each prompt of a file, without MLflow."""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from schemas.commands import GenerateCommand
from schemas.config.data import ValidateParams
from schemas.conversation import EXTRA
from schemas.errors import StageError, refuse
from schemas.text import show
from stages.commands.entry import begin, refused
from stages.engine.data.codec import Codec
from stages.engine.models.loading import load_policy
from stages.engine.scoring.judges import Judge, RewardJudge, RuleJudge, SentimentJudge
from stages.generate import HOW_TO_RANK, Messages, Progress, answer, label, score, summary, write
from stages.validate import readers
from stages.validate.forms import formats
from stages.validate.forms.cells import BadRow
from stages.validate.forms.column_advice import KNOWN
from stages.validate.forms.columns import Columns


class Asked(NamedTuple):
    """A prompt of a user's file, and what stands beside it: ids, sources, whatever ranked rows are joined back by."""

    prompt: Messages
    beside: dict[str, Any]


_FIELDS: tuple[str, ...] = ("role", "content", EXTRA)
_WRITTEN = {"responses", "order", "scores", "comparisons", "ranks", "tools"}


def prompts_of(path: str, limit: int | None) -> list[Asked]:
    """The prompts of a user's file, each once, with the columns beside the first row that has it.

    A system message, an input and earlier turns in columns of their own are part of the prompt, as in `validate`.

    A column that is called like one of the rows written is kept as `prompt_NAME`. Raises StageError at the first row
    that holds no prompt.
    """
    prompts: dict[str, Asked] = {}
    params = ValidateParams(path=path, kind="prompt", limit=limit)
    columns = Columns(params)
    for number, record in enumerate(readers.records(params)):
        try:
            if record.row is None:
                raise BadRow("row", record.reason)
            parsed = formats.parse("prompt", columns.row(record.row))
            turns = columns.around(record.row, parsed)["prompt"]
        except BadRow as problem:
            fix = "`alignflow validate --kind prompt` cleans a file"
            message = f"row {number} holds no prompt: {problem}"
            raise refuse("--prompts", path, message, fix, kind="bad_data") from problem
        prompt: Messages = [dict(zip(_FIELDS, turn, strict=False)) for turn in turns]
        plan = columns.plan(record.row)
        spoken = {*KNOWN["prompt"], *plan.takes.values(), plan.system, plan.input, plan.history, plan.tools}
        beside = {
            f"prompt_{name}" if name in _WRITTEN else name: value
            for name, value in record.row.items()
            if name not in spoken
        }
        prompts.setdefault(json.dumps(prompt), Asked(prompt, beside))
    if not prompts:
        raise refuse("--prompts", path, "the file holds no prompts", None, kind="empty_file")
    return list(prompts.values())


def on_stderr() -> Progress:
    """Progress: on a terminal one line that counts up, elsewhere a line every few seconds."""
    terminal = sys.stderr.isatty()
    shown = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if done == total or now - shown >= (0.1 if terminal else 10):
            shown = now
            start, end = ("\r", "\n" if done == total else "") if terminal else ("", "\n")
            print(f"{start}answers {done}/{total}", end=end, file=sys.stderr, flush=True)

    return progress


def alone(command: GenerateCommand) -> dict[str, float]:
    """Answer a file's prompts and write the rows; returns the counts. Overwrites nothing: raises StageError instead."""
    if command.out.exists():
        fix = "name another file, or move this one away: it may hold people's rankings"
        raise refuse("--out", command.out, "the file already exists.", fix, kind="file_exists")
    began = time.monotonic()
    judge: Judge | None = None
    if command.judge == "rule":
        judge = RuleJudge()
    elif command.judge == "sentiment":
        judge = SentimentJudge("--judge")
    elif command.judge != "none":
        judge = RewardJudge(Path(command.judge), field="--judge", frozen=command.frozen)
    asked = prompts_of(command.prompts, command.limit)
    policy = load_policy(command.model, trainable=False, frozen=command.frozen)
    prompts = [prompt for prompt, _ in asked]
    items, tokens = answer(policy, Codec.load(command.model), prompts, command, command.seed, on_stderr(), judge)
    del policy  # before the judge's weights are loaded
    items = score(items, judge)
    beside = {json.dumps(prompt): columns for prompt, columns in asked}
    rows = [{**label(item, command.noise, command.seed), **beside[json.dumps(item.prompt)]} for item in items]
    write(rows, command.out)
    if judge is None:
        by_page = f"`alignflow rank {command.out.name}` lets people rank on a page, or in the terminal. By hand:\n\n"
        how = by_page + HOW_TO_RANK.replace("rows.jsonl", command.out.name)
        command.out.with_suffix(".README.txt").write_text(how)
    return summary(items, tokens, time.monotonic() - began)


def main(command: GenerateCommand) -> int:
    """Prints what was written and what comes next; returns the exit code."""
    try:
        counts = alone(command)
    except StageError as error:
        return refused("error", error)
    if command.as_json:
        numbers = {name[9:]: value for name, value in counts.items() if name.startswith("generate/")}
        show(json.dumps({"out": str(command.out), **numbers}, indent=2))
        return 0
    made = f"{counts['generate/answers']:.0f} answers to {counts['generate/prompts']:.0f} prompts in {command.out}"
    if command.judge == "none":
        show(f"{made}\nnext      {shlex.join(['alignflow', 'rank', str(command.out)])}")
    else:
        show(f"{made}, {'compared' if command.noise else 'scored'} by {command.judge}")
    return 0


if __name__ == "__main__":
    begin(GenerateCommand.model_validate, main)
