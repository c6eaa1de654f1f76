"""Options of the command line that set a config's fields: a wrong one is named as its user has typed it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from flows.planning.explain import explain
from schemas.config import DataConfig
from schemas.errors import StageError, refuse


def check_data(columns: Sequence[str], model: Path | None, evaluation: Path | None, out: Path, **given: Any) -> None:
    """Hold the options of `alignflow validate` against a config's `data`, before a process starts for it.

    Raises:
        StageError: an option has a value that its field cannot, or names a folder that is none.
    """
    check(DataConfig, given | {"columns": pairs("--columns", columns)})
    if model is not None and not model.is_dir():
        raise refuse("--model", model, "there is no such folder.", f"give its path as seen from {Path.cwd()}")
    if evaluation is not None and not (evaluation / "eval" / "prompt.parquet").is_file():
        fix = "name the folder that `alignflow validate ... --out` wrote, with prompts held out"
        raise refuse("--evaluation", evaluation, "there are no held-out prompts.", fix)
    if out.exists() and not out.is_dir():
        raise refuse("--out", out, "this is not a folder.", "name a folder, or one that does not exist yet")


def check(config: type[BaseModel], given: dict[str, Any]) -> None:
    """Raise StageError, one line per mistake, where a config would refuse what is given; None is what is not given."""
    try:
        config.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        lines = [explain({**details, "loc": (option(details["loc"][0]),)}, {}) for details in error.errors()]
        raise StageError("\n".join(lines), kind="config") from None


def option(field: int | str) -> str:
    """The option or argument that sets a field."""
    return "PATH" if field == "path" else "--" + str(field).replace("_", "-")


def pairs(name: str, values: Sequence[str]) -> dict[str, str]:
    """An option's values of the form OURS=THEIRS. Raises StageError for one of another form, or a name given twice."""
    found: dict[str, str] = {}
    for value in values:
        ours, equals, theirs = value.partition("=")
        if not (ours and equals and theirs):
            raise refuse(
                name, value, "this is not a pair of column names.", "write OURS=THEIRS, such as prompt=question"
            )
        if ours in found:
            raise refuse(name, value, f"{ours} stands twice.", "give each of our names once")
        found[ours] = theirs
    return found
