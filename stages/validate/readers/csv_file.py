"""Reads rows from CSV, as spreadsheets of any country write it: commas, semicolons, tabs or bars between the cells."""

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from schemas.errors import refuse
from schemas.text import listed
from stages.validate.readers import bounds
from stages.validate.readers.files import Record, bytes_of, digestible, has_bytes, not_utf8, text_of

_DELIMITERS = ",;\t|"


def from_csv(file: Path) -> Iterator[Record]:
    """Cells stay text: what they mean depends on the kind of data. Bytes that are not UTF-8 become lone surrogates."""
    csv.field_size_limit(bounds.LINE_BYTES)
    with bytes_of(file) as stream, text_of(stream) as text:
        read = of_row = 0

        def counted() -> Iterator[str]:  # a cell in quotes goes on over lines, and a row over cells
            nonlocal read, of_row
            for line in bounds.lines(text, file, stream):
                of_row += len(line)
                if of_row > bounds.LINE_BYTES:
                    raise bounds.refuse_long(file, f"the row that ends after line {read}")
                read += 1
                yield line

        lines = counted()
        first = next(lines, "").removeprefix("\ufeff")
        announced = re.fullmatch(r"sep=([^\r\n])[\r\n]*", first, re.IGNORECASE)  # as spreadsheets write it
        if announced:
            first = next(lines, "")
        delimiter = announced[1] if announced else _delimiter(first)
        # `a, b, c`: the blanks are no part of the cells, and a quote after one opens a cell.
        spaced = f"{delimiter} " in first
        rest = itertools.chain([first] if first else [], lines)
        reader = csv.reader(rest, strict=True, delimiter=delimiter, skipinitialspace=spaced)
        try:
            header: list[str] = []
            for number, cells in enumerate(reader):
                of_row = 0
                if len(cells) > bounds.COLUMNS:
                    message = f"the row at line {read} has {len(cells)} cells; {bounds.COLUMNS} are allowed"
                    raise refuse("path", file, message, "leave out the columns that no kind reads", kind="too_large")
                if number == 0:
                    header = [name.strip() for name in cells]
                    _refuse_header(header, file)
                elif cells:
                    yield _record(header, cells, read)
        except csv.Error as error:
            message = f"the CSV is malformed at line {read}: {error}"
            fix = 'quote cells that hold commas, quotes or line breaks, and write a quote inside as ""'
            raise refuse("path", file, message, fix, kind="broken_file") from error


def _delimiter(header: str) -> str:
    """What stands between the cells of a header: a comma, unless there is none outside of quotes and another is."""
    outside = "".join(header.split('"')[::2])
    return max(_DELIMITERS, key=lambda mark: (outside.count(mark) > 0 and mark == ",", outside.count(mark)))


def _refuse_header(header: list[str], file: Path) -> None:
    broken = next((place for place, name in enumerate(header, 1) if has_bytes(name)), None)
    if broken is not None:
        raise not_utf8(file, f"the name of the CSV's column {broken} holds bytes that are not UTF-8")
    repeated = sorted(name for name, times in Counter(header).items() if times > 1)
    if repeated:
        message = f"the CSV's header names {listed(repeated)} more than once"
        fix = "give every column a name of its own"
        raise refuse("path", file, message, fix, kind="broken_file")


def _record(header: list[str], cells: list[str], line: int) -> Record:
    raw = digestible(cells)
    if len(cells) != len(header):
        return Record(None, raw, "wrong_number_of_cells", line)
    return Record(dict(zip(header, cells, strict=True)), raw, "", line)
