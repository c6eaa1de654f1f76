"""What one cell of a user's row holds: text, a conversation, a list or a number. Anything else raises `BadRow`."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]
Turn = tuple[str, str]
"""Role and content of a message."""
Turns = tuple[Turn, ...]
Parsed = dict[str, Any]
"""A row in its kind's form, the prompt as Turns; key `notes` names what is worth reporting about it."""

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
_SURROGATE = re.compile("[\ud800-\udfff]")
SPEAKER = re.compile(r"\n\n(Human|Assistant):")


class BadRow(Exception):
    """A row that cannot be used: which column, why, and the value found there."""

    def __init__(self, column: str, reason: str, value: object = None) -> None:
        super().__init__(f"{column}: {reason}")
        self.column, self.reason, self.value = column, reason, value


def text(value: object, column: str) -> str:
    """The value, which has to be text that can be written down."""
    if not isinstance(value, str):
        raise BadRow(column, "missing" if value is None else "not_text", value)
    if not value.isascii() and _SURROGATE.search(value):
        raise BadRow(column, "not_unicode", value)
    return value


def turns(value: object, column: str) -> Turns:
    """A prompt or conversation in any of its forms, as (role, content) in order."""
    if isinstance(value, str):
        return transcript(value, column) if value.startswith("\n\nHuman:") else (("user", text(value, column)),)
    if not isinstance(value, list):
        raise BadRow(column, "missing" if value is None else "not_text", value)
    if not value:
        raise BadRow(column, "empty", value)
    return tuple(_turn(message, column) for message in value)


def _turn(message: object, column: str) -> Turn:
    if not isinstance(message, dict):
        raise BadRow(column, "not_a_message", message)
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise BadRow(column, "unknown_role", role)
    content = message["content"] if "content" in message else message.get("value")
    return _ROLES[role.lower()], text(content, column)


def transcript(value: str, column: str) -> Turns:
    """Turns that begin with "\\n\\nHuman:" or "\\n\\nAssistant:". An unanswered "Assistant:" at the end is left out."""
    pieces = SPEAKER.split(text(value, column))[1:]
    spoken = [
        ("user" if who == "Human" else "assistant", words.strip())
        for who, words in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return tuple(spoken[:-1] if spoken[-1] == ("assistant", "") and len(spoken) > 1 else spoken)


def listed(value: object, column: str) -> list[Any]:
    """A list; in CSV, written as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(column, "malformed_json", value) from error
    if not isinstance(value, list):
        raise BadRow(column, "missing" if value is None else "not_a_list", value)
    return value


def number(value: object, column: str) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError as error:
            raise BadRow(column, "not_a_number", value) from error
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(column, "not_a_number", value)
    try:
        finite = float(value)
    except OverflowError as error:
        raise BadRow(column, "not_finite", value) from error
    if not math.isfinite(finite):
        raise BadRow(column, "not_finite", value)
    return finite
