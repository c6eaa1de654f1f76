"""`python -P -m stages.commands.label request.json`: see the folder's docstring."""

import json
import shlex
from pathlib import Path
from typing import Any

from schemas.commands import LabelCommand
from schemas.errors import StageError, refuse
from schemas.text import one_line, show
from stages.commands.entry import begin, refused
from stages.commands.label import argilla, label_studio, mlflow_traces
from stages.commands.label.collected import Told, Unreadable, as_verdicts, form_of, load
from stages.commands.label.project import Server
from stages.commands.rank import questions, rows
from stages.runtime.workspace import write_whole


def main(command: LabelCommand) -> int:
    """Write tasks, or rows; returns the exit code."""
    try:
        for line in sent(command) if command.action == "export" else received(command):
            show(line)
    except StageError as error:
        return refused("alignflow label", error)
    return 0


def sent(command: LabelCommand) -> list[str]:
    """Write a file's questions as tasks, with the configuration of their project; returns lines for people.

    Raises:
        StageError: the file holds nothing to judge, or the folder exists.
    """
    if command.url is not None:
        return _made(command, command.url)
    folder = command.out or command.file.with_name(f"{Path(command.file.name.removesuffix('.gz')).stem}.label-studio")
    if folder.exists():
        raise refuse("--out", folder, "it already exists.", "name a new folder", kind="file_exists")
    asked = questions.read(command.file, command.form)
    folder.mkdir(parents=True)
    tasks = json.dumps(label_studio.tasks(asked.items, command.seed), ensure_ascii=False, indent=1, default=str)
    write_whole(folder / "tasks.json", tasks.encode("utf-8", "backslashreplace").decode())
    write_whole(folder / "config.xml", label_studio.CONFIGS[command.form])
    left = asked.repeated + asked.nothing_to_compare
    return [
        f"wrote     {len(asked.items)} tasks to {folder / 'tasks.json'}" + (f", {left} rows left out" if left else ""),
        f"config    {folder / 'config.xml'}: the labelling configuration of the project",
        f"next      {shlex.join(['alignflow', 'label', 'import', 'EXPORT.json', '--from', 'label-studio'])}",
    ]


def _made(command: LabelCommand, url: str) -> list[str]:
    """Make a project of a file's questions on a running Label Studio; returns lines for people."""
    if command.out is not None:
        raise refuse("--out", command.out, "with --url no files are written.", "leave one of the two out")
    server = Server(url)
    asked = questions.read(command.file, command.form)
    title = Path(command.file.name.removesuffix(".gz")).stem
    number = server.make(title, label_studio.CONFIGS[command.form], label_studio.tasks(asked.items, command.seed))
    again = ["alignflow", "label", "import", str(number), "--from", "label-studio", "--url", server.url]
    return [
        f"made      {len(asked.items)} tasks in project {number}: {server.url}/projects/{number}/data",
        f"next      {shlex.join(again)}",
    ]


def received(command: LabelCommand) -> list[str]:
    """Write what people said as rows; returns lines for people.

    Raises:
        StageError: the output exists, or the export is not what its tool writes (the record is named).
    """
    beside = command.file if command.url is None else Path(f"project-{command.file}.json")
    output = command.out or beside.with_name(f"{beside.stem}.rows.jsonl")
    if command.url is not None and command.source != "label-studio":
        raise refuse("--url", command.url, f"only files are read from {command.source}.", "leave it out")
    if output.suffix != ".jsonl":
        raise refuse("--out", output, "rows are written as JSON lines.", "name a file that ends in .jsonl")
    if output.exists():
        raise refuse("--out", output, "the file already exists.", "name another file", kind="file_exists")
    records = load(command.file) if command.url is None else Server(command.url).judged(command.file)
    told: list[Told] = []
    judged: list[Any] = []
    try:
        if command.source == "label-studio":
            read = label_studio.read(records)
        elif command.source == "argilla":
            read = argilla.read(records)
        else:
            read = mlflow_traces.read(records, command.name)
        for number, some in read:
            told += some
            judged += [records[number]] if some and command.source == "mlflow" else []
        items, verdicts = as_verdicts(told)
    except Unreadable as problem:
        fix = f"export what people judged from {command.source} as JSON; schemas/README.md shows the form"
        raise refuse("FILE", command.file, f"{problem}.", fix, kind="bad_data") from problem
    rest = mlflow_traces.unused(judged)
    lines = [f"unused    inputs of the traces that no row has: {one_line(rest, 200)}"] if rest else []
    lines += [line.replace(", median 0.0 s per item", "") for line in rows.summary(items, verdicts)]
    made = rows.rows_of(items, verdicts)
    if not made:
        return [*lines, "nothing was judged yet, so that no rows were written"]
    rows.write(made, output)
    form = form_of(told)
    return [*lines, f"wrote     {len(made)} rows to {output}", f"next      {rows.next_command(output, form)}"]


if __name__ == "__main__":
    begin(LabelCommand.model_validate, main)
