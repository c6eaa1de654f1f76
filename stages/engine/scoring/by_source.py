"""Numbers of rows by the sources of a mixture that the rows come from (stages/validate/mixtures)."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")


def by_source(rows: Iterable[Mapping[str, Any]], values: Iterable[Value]) -> dict[str, list[Value]]:
    """Name of a source -> the values of its rows, in order; by name. Nothing where all rows are of one source.

    rows, values: one value for each row. Rows of a data set that is no mixture have no `source`.
    """
    groups: dict[str, list[Value]] = {}
    for row, value in zip(rows, values, strict=True):
        groups.setdefault(row.get("source", ""), []).append(value)
    return dict(sorted(groups.items())) if len(groups) > 1 else {}
