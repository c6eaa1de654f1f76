"""JSON lines, in chunks of whole lines: who reads them may look at all lines of a chunk at once, or row by row."""

import codecs
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from stages.validate.readers import bounds
from stages.validate.readers.files import Record, bytes_of, encoding_of, text_of
from stages.validate.readers.json_rows import Decoder, other_orientation

_ROWS = 20_000
_SPACE = b" \t\r\n"


class Lines(NamedTuple):
    """Lines that follow each other, without the space around them; blank ones are left out."""

    lines: list[bytes]
    numbers: list[int]
    """The number of each in its file, from 1."""

    def records(self, places: Iterable[int] | None = None) -> Iterator[Record]:
        """The rows of the lines, or of those at some places."""
        decoder = Decoder()
        for place in range(len(self.lines)) if places is None else places:
            yield _parse(self.lines[place], self.numbers[place], decoder)

    def head(self, rows: int) -> "Lines":
        """The first lines."""
        return Lines(self.lines[:rows], self.numbers[:rows])


def lines_of(file: Path) -> Iterator[Lines]:
    """The lines of a file, some thousands at a time, as UTF-8. What is not UTF-8 in them stays as it is.

    Raises StageError when the file cannot be read, or its first object holds all of its rows.
    """
    begun = False
    with bytes_of(file) as stream:
        for numbers, lines in _split(file, stream):
            kept = [place for place, line in enumerate(lines) if line]
            numbers = numbers if len(kept) == len(lines) else [numbers[place] for place in kept]
            chunk = Lines(lines if len(kept) == len(lines) else [lines[place] for place in kept], numbers)
            if chunk.lines and not begun:
                begun = True
                if error := other_orientation(file, next(chunk.records([0])).row):
                    raise error
            for begin in range(0, len(chunk.lines), _ROWS):
                part = slice(begin, begin + _ROWS)
                yield Lines(chunk.lines[part], chunk.numbers[part])


def _split(file: Path, stream: IO[bytes]) -> Iterator[tuple[list[int], list[bytes]]]:
    """(numbers, lines) of parts of the stream."""
    first = 1
    if encoding_of(stream) == "utf-8-sig":
        for block in bounds.blocks(stream, file):
            block = block.removeprefix(codecs.BOM_UTF8) if first == 1 else block
            whole = block.split(b"\n")
            whole = whole if whole[-1] else whole[:-1]
            numbers = list(range(first, first + len(whole)))
            if max(map(len, whole), default=0) > bounds.LINE_BYTES:
                long = next(n for n, line in zip(numbers, whole, strict=True) if len(line) > bounds.LINE_BYTES)
                raise bounds.refuse_long(file, f"line {long}")
            yield numbers, [line.strip(_SPACE) for line in whole]
            first += len(whole)
        return
    with text_of(stream, "\n") as text:
        every = bounds.lines(text, file, stream)
        while texts := list(itertools.islice(every, _ROWS)):
            texts[0] = texts[0].removeprefix("\ufeff") if first == 1 else texts[0]
            lines = [line.encode(errors="surrogatepass").strip(_SPACE) for line in texts]
            yield list(range(first, first + len(lines))), lines
            first += len(lines)


def _parse(line: bytes, number: int, decoder: Decoder) -> Record:
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
