"""How much of a file is read: a small one may unpack to more than any memory holds, and be one row without end."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import IO, AnyStr

from schemas.errors import StageError, refuse

LINE_BYTES = 64 << 20
"""Of a row: a line, an element of an array, a row of CSV or Parquet. Nobody writes one that is near."""
UNPACKED_BYTES = 256 << 20
"""So much a packed file may always unpack to; beyond it, `RATIO` times its own size. Text packs to a tenth or so."""
RATIO = 64
COLUMNS = 10_000
BLOCK_BYTES = 4 << 20
"""So much of a file of lines is read at once, the first time less: who takes a few rows reads no further than he must.
"""
_FIRST_BYTES = 64 << 10


def refuse_long(file: Path, where: str) -> StageError:
    """The error of a row that is too long; `where` it is."""
    message = f"{where} has more than {readable(LINE_BYTES)}, the most that a row may have"
    return refuse(
        "path", file, message, "give each row a line of its own, without what no model reads", kind="too_large"
    )


def refuse_unpacked(file: Path, where: str) -> StageError:
    """The error of a file that unpacks to too much; `where` that shows."""
    sizes = f"{readable(most_unpacked(file))} unpacked; the file itself has {readable(file.stat().st_size)}"
    fix = f"if it is yours, write it unpacked, as .jsonl: more than {RATIO} times a file's size is taken for a bomb"
    return refuse("path", file, f"{where} goes beyond {sizes}", fix, kind="too_large")


def most_unpacked(file: Path) -> int:
    """Bytes that a packed file may unpack to."""
    return max(UNPACKED_BYTES, RATIO * file.stat().st_size)


def readable(size: int) -> str:
    """A size for people."""
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size} bytes"


def blocks(stream: IO[bytes], file: Path) -> Iterator[bytes]:
    """The stream in blocks of whole lines, within the same bounds as `lines`."""
    most = most_unpacked(file) if isinstance(stream, gzip.GzipFile) else None
    number, size = 1, min(_FIRST_BYTES, BLOCK_BYTES, LINE_BYTES)
    while block := stream.read(size):
        size = min(2 * size, BLOCK_BYTES, LINE_BYTES)
        if not block.endswith(b"\n"):
            block += stream.readline(LINE_BYTES + 1)
        if most is not None and stream.tell() > most:
            raise refuse_unpacked(file, f"line {number}")
        yield block
        if most is not None:
            number += block.count(b"\n")


def lines(stream: IO[AnyStr], file: Path, plain: IO[bytes]) -> Iterator[AnyStr]:
    """The lines of a stream, none longer than a row may be, and no more than its file may unpack to.

    `plain`: the bytes that the stream reads, which tell whether they are unpacked and how many were read.
    """
    most = most_unpacked(file) if isinstance(plain, gzip.GzipFile) else None
    number = 0
    while line := stream.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES:
            raise refuse_long(file, f"line {number}")
        if most is not None and plain.tell() > most:
            raise refuse_unpacked(file, f"line {number}")
        yield line
