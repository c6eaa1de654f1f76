"""Texts from outside (rows, models, names, paths) as a terminal, a log or a page may show them."""

import json
import os
import re
import sys
import traceback
from reprlib import Repr
from typing import Any, TextIO

MARK = "\ufffd"
"""Stands where a character was that must not be shown."""

# Control characters (of escape sequences too), lone surrogates, and the characters that reorder text around them.
# Tab and line feed stay.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BREAK = re.compile("[\n\u2028\u2029]")
_OURS = re.compile(r"^(?=\s*(?:debug|info|warning|error|critical|refused|alignflow)\b[^\n]*:)", re.I | re.M)
_WIDTH = 60


def visible(value: object) -> str:
    """Text with a mark in the place of every character that could hide, move or reorder it; line feeds stay."""
    return _UNSEEN.sub(MARK, str(value).replace("\r\n", "\n"))


def one_line(value: object, most: int | None = None) -> str:
    """The text on one line, so that it begins none of its own; cut after `most` characters."""
    text = str(value)
    if most is not None and len(text) > most:
        text = text[: most - 3] + "..."
    return _BREAK.sub(" ", visible(text))


def message(value: object) -> str:
    """A text of several lines, of which none but the first can be taken for a message of ours: they are indented."""
    first, *more = _BREAK.split(visible(value))
    return "\n".join([first, *(f"  {line}" if _OURS.match(line) else line for line in more)])


def short(value: object) -> str:
    """The value as Python writes it, bounded before it is made: a small text may stand for gigabytes."""
    return one_line(_SHORT.repr(value), _WIDTH)


def as_setting(value: object) -> str:
    """A value as `--set`, whose values are YAML, reads it back: in quotes where YAML would take it for something else
    (`pairs #2.jsonl`, `true`).
    """
    plain = isinstance(value, str) and _PLAIN.fullmatch(value) and not _NO_TEXT.fullmatch(value)
    return str(value) if plain else json.dumps(value)


_PLAIN = re.compile(r"[A-Za-z_./][\w./:-]*(?<!:)")
_NO_TEXT = re.compile(r"true|false|null|[.](inf|nan|[0-9_]+(e[+-]?[0-9]+)?)", re.IGNORECASE)


def listed(names: Any, most: int = 20) -> str:
    """Names from outside, with commas between; of many the first, and how many more there are."""
    every = list(names)
    shown = ", ".join(one_line(name, _WIDTH) for name in every[:most])
    return f"{shown} and {len(every) - most} more" if len(every) > most else shown


def show(value: object = "", file: TextIO | None = None) -> None:
    """Print a text at once, also into a pipe, with nothing in it that a terminal would act on.

    Where nobody reads any more (`| head`), this text and all that follow are dropped, and the work goes on.
    """
    stream = file or sys.stdout
    try:
        print(visible(value), file=stream, flush=True)
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:  # in place of the pipe, of which Python would complain again at the end
            os.dup2(nowhere.fileno(), stream.fileno())


def show_tracebacks() -> None:
    """Let an error that nobody expects print its traceback as `show` does: its message may quote anything."""
    sys.excepthook = lambda *raised: show("".join(traceback.format_exception(*raised)).rstrip("\n"), sys.stderr)


class _Bounded(Repr):
    """Python's own bounded repr, also for whole numbers that are too long to be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.maxother = _WIDTH
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = _WIDTH // 3
        self.maxlevel = 4

    def repr_str(self, x: str, level: int) -> str:
        return repr(x[:_WIDTH])

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 256 else f"a number of {x.bit_length()} bits"


_SHORT = _Bounded()
