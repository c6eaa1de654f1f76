"""`alignflow validate`: check a data file without MLflow."""

import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.commands import MixtureCommand, ValidateCommand
from schemas.config import ENOUGH_PROMPTS
from schemas.config.data import SLOTS, DataConfig, ValidateParams
from schemas.errors import EXIT_CODES, StageError, refuse
from schemas.source import File, data_source
from schemas.text import as_setting, listed, one_line, show
from stages.commands.entry import begin
from stages.validate import check, check_mixture
from stages.validate.context import Context
from stages.validate.mixtures import about_source
from stages.validate.mixtures import report as mixtures
from stages.validate.readers import records

if TYPE_CHECKING:
    from stages.engine.data.codec import Codec

_SOURCE = "source.json"
"""Beside the rows: which data they are of. The stage writes none, since equal rows make equal folders there."""


Command = ValidateCommand | MixtureCommand


def main(command: Command) -> int:
    """Check the data, print what came of it; returns 0, or 65 when it is refused."""
    report: dict[str, Any] = {"rows": 0, "kept": 0, "quarantined": 0, "reasons": {}}
    error, checked = None, False
    try:
        source = _source(command)
        _refuse_other_data(command, source)
        codec = None if command.model is None else _codec(command.model)
        checked = True
        command.out.mkdir(parents=True, exist_ok=True)
        (command.out / _SOURCE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
        if isinstance(command, ValidateCommand):
            check(Context(command, codec, command.evaluation), command.out)
        else:
            read = {one.name: Context(command.of(one), codec, command.evaluation) for one in command.sources}
            check_mixture(command, read, command.out)
    except StageError as refusal:
        error = refusal
    if checked:  # a refusal writes its report too
        report |= json.loads((command.out / "report.json").read_text(encoding="utf-8"))
    _print(command, report, error)
    return 0 if error is None else EXIT_CODES[error.status]


def _source(command: Command) -> dict[str, Any]:
    """What tells one source from another: the bytes of a file, else its name and revision; of a mixture those of each
    source by its name."""
    if isinstance(command, ValidateCommand):
        return _identity(command)
    found: dict[str, Any] = {}
    for place, one in enumerate(command.sources):
        try:
            found[one.name] = _identity(command.of(one))
        except StageError as error:
            raise about_source(place, one.name, error) from error
    return found


def _identity(params: ValidateParams) -> dict[str, str | None]:
    match data_source(params.path):
        case File(path):
            next(records(params), None)  # one that cannot be read is named, and costs no earlier results
            with path.open("rb") as stream:
                return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "kind": params.kind}
        case _:
            named = {"path": params.path, "revision": params.revision, "subset": params.subset}
            return {**named, "split": params.split, "kind": params.kind}


def _refuse_other_data(command: Command, source: dict[str, Any]) -> None:
    """Raise StageError where the folder holds something else than an earlier check of the same data."""
    if command.force or not command.out.is_dir() or not any(command.out.iterdir()):
        return
    try:
        before = json.loads((command.out / _SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if before != source:
        what = "holds files of another origin" if before is None else "holds what an earlier call made of other data"
        fix = "name another folder, or add --force to replace them"
        raise refuse("--out", command.out, f"the folder {what}.", fix, kind="not_empty")


def _codec(folder: Path) -> "Codec":
    from stages.engine.data.codec import Codec

    try:
        return Codec.load(folder)
    except StageError as error:
        if error.problem.field != "folder":
            raise
        named = error.problem.model_copy(update={"field": "model"})  # the option's name
        raise StageError(named, status=error.status) from error


def _print(command: Command, report: dict[str, Any], error: StageError | None) -> None:
    single = isinstance(command, ValidateCommand)
    name = command.path if single else f"{command.config}: data.{command.slot}"
    if command.as_json:
        places = {"source": name, "out": str(command.out), "quarantine": str(command.out / "quarantine.jsonl")}
        show(json.dumps(report | {"error": None if error is None else str(error)} | places))
        return
    show(f"{one_line(name)}: {report['rows']} rows, {report['kept']} kept, {report['quarantined']} quarantined")
    for line in mixtures.lines(mixtures.MixtureReport.model_validate(report)) if report.get("sources") else ():
        show(f"  {line}")
    for name, count in [*report.get("checks", {}).items(), *report.get("notes", {}).items()]:
        show(f"  {count:8d}  {one_line(name)}")
    for what in report.get("read", ()):
        show(f"read as   {one_line(what)}")
    if report.get("unused"):
        unused = (
            name if value is None else f"{name} ({one_line(value, 30)})" for name, value in report["unused"].items()
        )
        show(f"not used  {listed(unused, 8)}")
    if error is not None:
        show(f"refused: {error}", sys.stderr)
        return
    kind = command.kind
    parts = [f"{part} {_count(kinds, kind)}" for part, kinds in report["parts"].items() if kinds]
    show(f"split     {', '.join(parts)}")
    held_out = report["parts"]["eval"].get("prompt", 0)
    if held_out < ENOUGH_PROMPTS:
        fix = "raise eval_fraction, or name prompts to evaluate on in data.evaluation"
        show(
            f"note      {held_out} prompts are held out: with {ENOUGH_PROMPTS} or more, models can be told apart; {fix}"
        )
    if lengths := report["lengths"]:
        sizes = f"median {lengths['median']}, 95 % at most {lengths['p95']}, longest {lengths['longest']}"
        show(f"lengths   {sizes} {lengths['unit']}" + ("" if command.model else "; --model counts tokens"))
    show(
        f"files     {command.out}: {listed(sorted(part for part, kinds in report['parts'].items() if kinds))}, "
        f"quarantine.jsonl, report.json"
    )
    show(f"next      {_next(command)}")


def _count(kinds: dict[str, int], kind: str) -> str:
    """How many rows and prompts a part has."""
    prompts = f"{kinds.get('prompt', 0)} prompts"
    return prompts if kind == "prompt" else f"{kinds.get(kind, 0)} rows of {prompts}"


def _next(command: Command) -> str:
    """The command that plans a run on this data, with every option that was given here."""
    if isinstance(command, MixtureCommand):
        return shlex.join(["alignflow", "run", str(command.config), "--dry-run"])
    slot = f"data.{SLOTS.get(command.kind, command.kind)}"
    given = DataConfig.model_validate(command.model_dump(include=set(DataConfig.model_fields)))
    values = given.model_dump(mode="json", exclude_defaults=True)
    settings = [shlex.quote(f"{slot}.{key}={as_setting(value)}") for key, value in values.items()]
    settings += ["sft.learn=all"] if command.learn == "all" else []
    return "alignflow run my.yaml --dry-run " + " ".join(f"--set {setting}" for setting in settings)


def _asked(given: Any) -> Command:
    return (MixtureCommand if "sources" in given else ValidateCommand).model_validate(given)


if __name__ == "__main__":
    begin(_asked, main)
