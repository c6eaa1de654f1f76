"""A file's bytes, unpacked, and its text, in whichever encoding that can be told for sure; and one row as it was read.

UTF-8 with or without a byte order mark, UTF-16 and UTF-32. Older encodings (Windows-1252, Latin-1, ...) cannot be told
from each other, so that none of them is guessed: `not_utf8` words what to do instead.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from schemas.errors import StageError, refuse
from schemas.text import one_line

Row = dict[str, Any]

_MARKS = (  # UTF-32's first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BYTE = re.compile("[\udc80-\udcff]")
"""A byte that is not UTF-8, as `surrogateescape` has it."""


class Record(NamedTuple):
    """One row as it was read."""

    row: Row | None
    """None when it is broken."""
    raw: bytes
    """What the content digest takes in: the line, or the row as JSON."""
    reason: str = ""
    """Why it is broken."""
    line: int | None = None
    """Line in the file, from 1."""


def digestible(value: object) -> bytes:
    """JSON with sorted keys; ASCII, so that lone surrogates pass."""
    return json.dumps(value, sort_keys=True, default=str).encode()


@contextmanager
def bytes_of(file: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked. Errors of reading, also those met later on, name the file."""
    try:
        with file.open("rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            if packed:
                with gzip.open(plain) as unpacked:
                    yield unpacked  # type: ignore[misc]
            elif file.suffix.lower() == ".gz" and file.stat().st_size:
                raise gzip.BadGzipFile("it does not begin like one")
            else:
                yield plain
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        message = f"the gzip file is broken or cut short: {error}"
        fix = "fetch or pack it again; `gzip -t` tells whether it is whole"
        raise refuse("path", file, message, fix, kind="broken_file") from error
    except UnicodeDecodeError as error:
        message = f"the file begins like {error.encoding.upper()} and cannot be read as that: {error.reason}"
        fix = "write it again, as UTF-8"
        raise refuse("path", file, message, fix, kind="broken_file") from error
    except OSError as error:
        raise refuse("path", file, f"the file cannot be read: {error}", None, kind="unreadable_file") from error


def encoding_of(stream: IO[bytes]) -> str:
    """What a stream's first bytes, which stay in it, are written in: `utf-8-sig` unless they cannot be that."""
    head: bytes = stream.peek(4)[:4]  # type: ignore[attr-defined]
    marked = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if marked is None and len(head) >= 2 and head.count(0) == len(head) // 2:
        # No text begins with a NUL, nor has one as its second character: these are the halves of UTF-16.
        return "utf-16-be" if head[0] == 0 else "utf-16-le" if head[1] == 0 else "utf-8-sig"
    return marked or "utf-8-sig"


@contextmanager
def text_of(stream: IO[bytes], newline: str = "") -> Iterator[io.TextIOWrapper]:
    """A stream as text, its line ends as they are. What cannot be decoded in it becomes lone surrogates."""
    encoding = encoding_of(stream)
    errors = "surrogateescape" if encoding == "utf-8-sig" else "surrogatepass"
    text = io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline=newline)
    try:
        yield text
    finally:
        text.detach()  # the stream is its owner's to close


def has_bytes(text: str) -> bool:
    """Whether a text of `text_of` holds bytes that are not UTF-8."""
    return not text.isascii() and _BYTE.search(text) is not None


def not_utf8(file: Path, where: str) -> StageError:
    """The error of a file in an encoding that can only be guessed; `where` that shows."""
    return refuse("path", file, f"{where}, so that the file is not UTF-8", how_to_convert(file), kind="not_utf8")


def how_to_convert(file: Path) -> str:
    """The advice for a file that is not UTF-8."""
    packed = file.suffix.lower() == ".gz"
    plain = file.with_suffix("") if packed else file
    copy = one_line(plain.with_name(f"{plain.stem}-utf8{plain.suffix}"))
    name = one_line(file)
    convert = "iconv -f WINDOWS-1252 -t UTF-8"
    command = f"gzip -dc '{name}' | {convert} > '{copy}'" if packed else f"{convert} '{name}' > '{copy}'"
    return f"convert it to UTF-8. Windows and older spreadsheets mostly write Windows-1252: `{command}`"
