"""A JSON array that is read element by element, so that memory holds one of them and not the file."""

import gzip
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from schemas.errors import refuse
from stages.validate.readers import bounds
from stages.validate.readers.files import encoding_of, not_utf8
from stages.validate.readers.json_rows import Decoder

_SPACE = re.compile(r"[ \t\r\n]*")


class Array:
    """The array that a stream holds."""

    def __init__(self, file: Path, stream: IO[bytes]) -> None:
        self.file, self.stream = file, stream
        self._text = io.TextIOWrapper(stream, encoding=encoding_of(stream), errors="surrogatepass")
        self._decoder = Decoder()
        self._most = bounds.most_unpacked(file) if isinstance(stream, gzip.GzipFile) else None
        self._buffer, self._at, self._number = "", 0, 0

    @property
    def repeated(self) -> bool:
        """Whether some object of the last element has a key twice."""
        return self._decoder.repeated

    def elements(self) -> Iterator[Any]:
        """The elements, in order.

        Raises:
            StageError: the text is not JSON, or an element is too long.
        """
        try:
            yield from self._elements()
        except UnicodeDecodeError as error:
            raise not_utf8(self.file, f"element {self._number or 1} or one after it holds other bytes") from error
        except (ValueError, RecursionError) as error:
            why = f"at element {self._number}: {error}" if self._number else str(error)
            raise refuse("path", self.file, f"the file is not JSON: {why}", None, kind="broken_file") from error
        finally:
            self._text.detach()  # the stream is its owner's to close

    def _elements(self) -> Iterator[Any]:
        self._next()
        self._at += self._buffer.startswith("\ufeff", self._at)
        self._take("[")
        if self._next() != "]":
            while True:
                self._number += 1
                yield self._element()
                if self._next() != ",":
                    break
                self._take(",")
        self._take("]")
        if self._next():
            raise ValueError("something follows the array")

    def _element(self) -> Any:
        """The next element, decoded with twice as much text after each try that may have lacked its end."""
        self._next()
        while True:
            try:
                value, end = self._decoder.decode_at(self._buffer, self._at)
            except ValueError:
                if not self._more():
                    raise
                continue
            if end < len(self._buffer) or not self._more():  # a number may go on
                self._at = end
                return value

    def _take(self, what: str) -> None:
        if self._next() != what:
            raise ValueError(f"no {what!r} where one is expected")
        self._at += 1

    def _next(self) -> str:
        """The next character that is not white space, still to be taken; nothing at the end."""
        while True:
            space = _SPACE.match(self._buffer, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._buffer) or not self._more():
                return self._buffer[self._at : self._at + 1]

    def _more(self) -> bool:
        """Read on, as much again as is left; False at the end."""
        self._buffer, self._at = self._buffer[self._at :], 0
        if len(self._buffer) > bounds.LINE_BYTES:
            raise bounds.refuse_long(self.file, f"element {self._number}")
        piece = self._text.read(max(1 << 16, len(self._buffer)))
        if self._most is not None and self.stream.tell() > self._most:
            raise bounds.refuse_unpacked(self.file, f"element {self._number}")
        self._buffer += piece
        return bool(piece)
