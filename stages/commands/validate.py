"""`alignflow validate`: check a data file without MLflow."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from pydantic import ValidationError

from schemas.config import Kind, ValidateParams
from schemas.errors import EXIT_CODES, StageError, refuse
from stages.validate import check
from stages.validate.context import Context

if TYPE_CHECKING:
    from stages.engine.data.codec import Codec


def main(arguments: list[str] | None = None) -> int:
    """Check the file that the command line names; returns 0, or 65 when the data is refused."""
    options = _options().parse_args(arguments)
    error = None
    try:
        params = _params(options)
        codec = None if options.model is None else _codec(options.model)
        check(Context(params, codec, options.evaluation), options.out)
    except StageError as refusal:
        error = refusal
    _print(options, error)
    return 0 if error is None else EXIT_CODES[error.status]


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "alignflow validate", description="Check rows, split them and derive further kinds."
    )
    add = parser.add_argument
    add("path", help="JSONL, JSONL.gz, Parquet or CSV file, or hub:NAME")
    add("--kind", required=True, choices=get_args(Kind))
    add("--out", required=True, type=Path, help="folder for Parquet, quarantine.jsonl and report.json")
    add("--columns", nargs="*", action="extend", default=[], metavar="OURS=THEIRS", help="such as prompt=question")
    add("--max-bad", type=float, help="share of bad rows above which the data is refused")
    add("--model", type=Path, help="model folder whose tokenizer tells what is too long")
    add("--evaluation", type=Path, help="data folder whose evaluation prompts must not be trained on")
    for name, kind in (("limit", int), ("max-length", int), ("eval-fraction", float), ("gold-fraction", float)):
        add(f"--{name}", type=kind)
    for name in ("revision", "subset", "split"):
        add(f"--{name}", help="of a Hugging Face dataset")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def _codec(folder: Path) -> "Codec":
    from stages.engine.data.codec import Codec

    try:
        return Codec.load(folder)
    except StageError as error:
        if error.problem.field != "folder":
            raise
        named = error.problem.model_copy(update={"field": "model"})  # the option's name
        raise StageError(named, status=error.status) from error


def _params(options: argparse.Namespace) -> ValidateParams:
    given = {name: value for name, value in vars(options).items() if name in ValidateParams.model_fields}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        given["columns"] = dict(pair.split("=", 1) for pair in options.columns)
        return ValidateParams.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise refuse(where, first["input"], first["msg"], None) from error
    except ValueError as error:
        raise refuse("columns", options.columns, "a pair of column names is expected", "write OURS=THEIRS") from error


def _print(options: argparse.Namespace, error: StageError | None) -> None:
    file = options.out / "report.json"
    fresh = error is None or error.problem.kind not in ("config", "missing_model", "missing_tokenizer", "no_end_token")
    found = {"rows": 0, "kept": 0, "quarantined": 0, "reasons": {}}
    if fresh and file.is_file():
        found |= json.loads(file.read_text(encoding="utf-8"))
    found["error"] = None if error is None else str(error)
    found |= {"source": options.path, "out": str(options.out), "quarantine": str(options.out / "quarantine.jsonl")}
    if options.json:
        print(json.dumps(found))
        return
    print(f"{options.path}: {found['rows']} rows, {found['kept']} kept, {found['quarantined']} quarantined")
    for name, count in [*found.get("checks", {}).items(), *found.get("notes", {}).items()]:
        print(f"  {count:8d}  {name}")
    if error is not None:
        print(f"refused: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
