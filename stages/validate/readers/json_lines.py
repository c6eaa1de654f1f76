"""JSON lines, in chunks of whole lines: who reads them may look at all lines of a chunk at once, or row by row."""

import codecs
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from stages.validate.readers import bounds
from stages.validate.readers.files import Record, bytes_of, encoding_of, text_of
from stages.validate.readers.json_rows import Decoder, other_orientation

_ROWS = 20_000
_SPACE = b" \t\r\n"
_SPACES = frozenset(_SPACE)


class Lines(NamedTuple):
    """Rows as lines of JSON that follow each other, without the space around them; blank ones are left out."""

    lines: list[bytes]
    numbers: Sequence[int] | None = None
    """The number of each in its file, from 1; None where the file has no lines."""
    raw: list[bytes] | None = None
    """What the content digest takes in, where that is not the lines: they were made of other rows."""

    @property
    def digestible(self) -> bytes:
        """What the content digest takes in."""
        return b"\n".join(self.lines if self.raw is None else self.raw) + b"\n"

    def records(self, places: Iterable[int] | None = None) -> Iterator[Record]:
        """The rows of the lines, or of those at some places."""
        decoder = Decoder()
        for place in range(len(self.lines)) if places is None else places:
            number = None if self.numbers is None else self.numbers[place]
            record = _parse(self.lines[place], number, decoder)
            yield record if self.raw is None else record._replace(raw=self.raw[place])

    def part(self, begin: int, rows: int) -> "Lines":
        """Some of the lines."""
        own = slice(begin, begin + rows)
        return Lines(*(None if values is None else values[own] for values in self))  # type: ignore[arg-type]


def lines_of(file: Path) -> Iterator[Lines]:
    """The lines of a file, some thousands at a time, as UTF-8. What is not UTF-8 in them stays as it is.

    Raises StageError when the file cannot be read, or its first object holds all of its rows.
    """
    begun = False
    with bytes_of(file) as stream:
        for first, lines in _split(file, stream):
            numbers: Sequence[int] = range(first, first + len(lines))
            if b"" in lines:
                numbers = [number for number, line in zip(numbers, lines, strict=True) if line]
                lines = [line for line in lines if line]
            chunk = Lines(lines, numbers)
            if lines and not begun:
                begun = True
                if error := other_orientation(file, next(chunk.records([0])).row, alone=len(lines) == 1):
                    raise error
            yield from (chunk.part(begin, _ROWS) for begin in range(0, len(lines), _ROWS))


def _split(file: Path, stream: IO[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    """Parts of the stream: the number of the first line, and the lines without the space around them."""
    first = 1
    if encoding_of(stream) == "utf-8-sig":
        for block in bounds.blocks(stream, file):
            block = block.removeprefix(codecs.BOM_UTF8) if first == 1 else block
            whole = block.split(b"\n")
            whole = whole if whole[-1] else whole[:-1]
            if max(map(len, whole), default=0) > bounds.LINE_BYTES:
                long = next(place for place, line in enumerate(whole) if len(line) > bounds.LINE_BYTES)
                raise bounds.refuse_long(file, f"line {first + long}")
            borders = {line[0] for line in whole if line} | {line[-1] for line in whole if line}
            yield first, [line.strip(_SPACE) for line in whole] if borders & _SPACES else whole
            first += len(whole)
        return
    with text_of(stream, "\n") as text:
        every = bounds.lines(text, file, stream)
        while texts := list(itertools.islice(every, _ROWS)):
            texts[0] = texts[0].removeprefix("\ufeff") if first == 1 else texts[0]
            lines = [line.encode(errors="surrogatepass").strip(_SPACE) for line in texts]
            yield first, lines
            first += len(lines)


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
