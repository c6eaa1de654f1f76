"""JSON as Python values, and what a file of JSON holds in the place of rows, when it was written for another reader."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schemas.errors import StageError, refuse
from schemas.text import listed, one_line

_ROWS = ("data", "rows", "examples", "instances", "train", "test", "validation")


class Decoder:
    """Decodes JSON, and notices objects that have a key twice: JSON itself does not say which of the two counts."""

    def __init__(self) -> None:
        self.repeated = False
        """Whether some object of the last value has a key twice."""
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            self.repeated = True
        return made

    def decode(self, text: str) -> Any:
        """The value that is the whole text. Raises ValueError, or RecursionError."""
        self.repeated = False
        return self._decoder.decode(text)

    def decode_at(self, text: str, begin: int) -> tuple[Any, int]:
        """The value that begins in a text, and where it ends. Raises ValueError, or RecursionError."""
        self.repeated = False
        return self._decoder.raw_decode(text, begin)


def other_orientation(file: Path, value: object, alone: bool = True) -> StageError | None:
    """The first object of a file holds all its rows, as pandas and others write tables; None where it is a row.

    `alone`: no other object follows. Beside others a list of objects under `examples`, say, is a cell of a row.
    """
    if not isinstance(value, dict) or not value:
        return None
    how = 'read it with pandas.read_json{} and write it by `to_json("rows.jsonl", orient="records", lines=True)`'
    what = ""
    if isinstance(value.get("data"), list) and isinstance(value.get("columns"), list):
        what, how = "a table of pandas (orient `split`)", how.format('(..., orient="split")')
    elif isinstance(value.get("data"), list) and isinstance(value.get("schema"), dict):
        what, how = "a table of pandas (orient `table`)", how.format('(..., orient="table")')
    elif all(isinstance(column, dict) and _numbered(column) for column in value.values()):
        what, how = "column after column (orient `columns`, what pandas writes by default)", how.format("")
    elif _numbered(value) and all(isinstance(row, dict) for row in value.values()):
        what, how = "rows by their numbers (orient `index` of pandas)", how.format('(..., orient="index")')
    elif len(value) > 1 and _lists_of_cells(value):
        what, how = "column after column, each a list", how.format("")
    elif alone and (name := next((key for key in _ROWS if _is_table(value.get(key))), None)):
        what = f"its rows in a list under `{name}`"
        how = f"take them out: `jq -c '.{name}[]' {one_line(file.name)} > rows.jsonl`"
    if not what:
        return None
    message = f"the file holds {what}, not a row in each object; its first object has {listed(value, 5)}"
    return refuse("path", file, message, how, kind="other_orientation")


def _numbered(column: Mapping[str, object]) -> bool:
    """Whether the keys are row numbers, as of a pandas index."""
    return bool(column) and all(key.isdecimal() for key in column)


def _lists_of_cells(value: Mapping[str, object]) -> bool:
    """Whether all are lists of one length, of cells that are no messages and no numbers alone."""
    lists = list(value.values())
    if not all(isinstance(column, list) and column for column in lists):
        return False
    lengths = {len(column) for column in lists if isinstance(column, list)}
    texts = [isinstance(column, list) and all(isinstance(cell, str) for cell in column) for column in lists]
    return len(lengths) == 1 and lengths != {1} and sum(texts) > 1


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) and "role" not in row for row in value)
