"""JSON lines, in chunks of whole lines: who reads them may look at all lines of a chunk at once, or row by row."""

import codecs
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import polars as pl

from stages.validate.readers import bounds
from stages.validate.readers.files import Record, bytes_of, encoding_of, text_of
from stages.validate.readers.json_rows import Decoder, other_orientation

_ROWS = 20_000
_SPACE = b" \t\r\n"


class Lines(NamedTuple):
    """Rows as lines of JSON that follow each other, without the space around them; blank ones are left out."""

    lines: pl.Series
    """Of bytes."""
    numbers: Sequence[int] | None = None
    """The number of each in its file, from 1; None where the file has no lines."""
    raw: list[bytes] | None = None
    """What the content digest takes in, where that is not the lines: they were made of other rows."""
    block: bytes | None = None
    """The lines with an end to each, where they stand so in their file."""

    @property
    def joined(self) -> bytes:
        """All lines, with an end to each."""
        return b"\n".join([*self.lines.to_list(), b""]) if self.block is None else self.block

    @property
    def digestible(self) -> bytes:
        """What the content digest takes in."""
        return self.joined if self.raw is None else b"\n".join([*self.raw, b""])

    def records(self, places: Iterable[int] | None = None) -> Iterator[Record]:
        """The rows of the lines, or of those at some places."""
        decoder = Decoder()
        wanted = list(range(len(self.lines)) if places is None else places)
        for place, line in zip(wanted, self.lines.gather(wanted), strict=True):
            number = None if self.numbers is None else self.numbers[place]
            record = _parse(line, number, decoder)
            yield record if self.raw is None else record._replace(raw=self.raw[place])

    def part(self, begin: int, rows: int) -> "Lines":
        """Some of the lines."""
        if begin == 0 and rows >= len(self.lines):
            return self
        own = slice(begin, begin + rows)
        return Lines(self.lines[own], self.numbers and self.numbers[own], self.raw and self.raw[own])


def lines_of(file: Path) -> Iterator[Lines]:
    """The lines of a file, some thousands at a time, as UTF-8. What is not UTF-8 in them stays as it is.

    Raises StageError when the file cannot be read, or its first object holds all of its rows.
    """
    begun = False
    with bytes_of(file) as stream:
        for first, chunk in _split(file, stream):
            numbers: Sequence[int] = range(first, first + len(chunk.lines))
            if (blank := chunk.lines.bin.size() == 0).any():
                chunk = Lines(chunk.lines.filter(~blank))
                numbers = [first + place for place in (~blank).arg_true()]
            chunk = chunk._replace(numbers=numbers)
            if len(chunk.lines) and not begun:
                begun = True
                if error := other_orientation(file, next(chunk.records([0])).row, alone=len(chunk.lines) == 1):
                    raise error
            yield from (chunk.part(begin, _ROWS) for begin in range(0, len(chunk.lines), _ROWS))


def _split(file: Path, stream: IO[bytes]) -> Iterator[tuple[int, Lines]]:
    """Parts of the stream: the number of the first line, and the lines without the space around them."""
    first = 1
    if encoding_of(stream) == "utf-8-sig":
        for block in bounds.blocks(stream, file):
            block = block.removeprefix(codecs.BOM_UTF8) if first == 1 else block
            block = block if block.endswith(b"\n") else block + b"\n"
            lines = _cut(block)
            if (long := lines.bin.size() > bounds.LINE_BYTES).any():
                raise bounds.refuse_long(file, f"line {first + long.arg_true()[0]}")
            bare = (lines.bin.starts_with(b"{") & lines.bin.ends_with(b"}")).all()  # of space; and none is blank
            yield first, Lines(lines, block=block) if bare else Lines(_stripped(lines.to_list()))
            first += len(lines)
        return
    with text_of(stream, "\n") as text:
        every = bounds.lines(text, file, stream)
        while texts := list(itertools.islice(every, _ROWS)):
            texts[0] = texts[0].removeprefix("\ufeff") if first == 1 else texts[0]
            yield first, Lines(_stripped([line.encode(errors="surrogatepass") for line in texts]))
            first += len(texts)


def _cut(block: bytes) -> pl.Series:
    """The lines of a block, which ends with one."""
    try:
        lines = pl.Series([block], dtype=pl.Binary).cast(pl.String).str.split("\n").explode().cast(pl.Binary)
    except pl.exceptions.ComputeError:  # some are not UTF-8
        lines = pl.Series(block.split(b"\n"), dtype=pl.Binary)
    return lines.head(-1)


def _stripped(lines: list[bytes]) -> pl.Series:
    return pl.Series([line.strip(_SPACE) for line in lines], dtype=pl.Binary)


def _parse(line: bytes, number: int | None, decoder: Decoder) -> Record:
    try:
        row = decoder.decode(line.decode())
    except UnicodeDecodeError:
        return Record(None, line, "not_unicode", number)
    except (ValueError, RecursionError):  # RecursionError: thousands of nested brackets
        return Record(None, line, "malformed_json", number)
    if not isinstance(row, dict):
        return Record(None, line, "not_an_object", number)
    if decoder.repeated:
        return Record(None, line, "duplicate_key", number)
    return Record(row, line, "", number)
