"""What one cell of a user's row holds: text, a conversation, a list or a number. Anything else raises `BadRow`."""

import ast
import io
import json
import math
import re
import tokenize
from collections.abc import Mapping
from typing import Any

from stages.validate.forms.tools import (
    CALL_KEYS,
    CALL_ROLES,
    RESULT_ROLES,
    TOOL_KEYS,
    WrongTools,
    as_json,
    calls_of,
    check_order,
    parsed_calls,
    refuse_tools_within,
    result_of,
)

Row = Mapping[str, Any]
Turn = tuple[str, str] | tuple[str, str, str]
"""Role and content of a message, and where it holds more, its extra (schemas/conversation.py)."""
Turns = tuple[Turn, ...]
Parsed = dict[str, Any]
"""A row in its kind's form, the prompt as Turns; key `notes` names what is worth reporting about it."""

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bard", "bing", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
"""A role as data sets name it -> ours."""
_TOOL_ROLES = {*RESULT_ROLES, *CALL_ROLES}
_ROLE_KEYS, _TEXT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
_WEIGHT_KEYS = ("weight", "train", "training", "loss")
_FURTHER_KEYS = frozenset((*CALL_KEYS, *_WEIGHT_KEYS, *TOOL_KEYS))
"""The keys for which a message is more than a role and a text."""
_SURROGATE = re.compile("[\ud800-\udfff]")
SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_PART_MEDIA = re.compile("image|video|audio|file")


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


# --- conversations ---


def turns(value: object, column: str) -> Turns:
    """A prompt or conversation in any of its forms, turn by turn. Empty system messages are left out."""
    if isinstance(value, str):
        if value.startswith("\n\nHuman:"):
            return transcript(value, column)
        messages = written_messages(value, column)
        return (("user", text(value, column)),) if messages is None else turns(messages, column)
    value = rows_of(value)
    if not isinstance(value, list):
        raise BadRow(column, "missing" if value is None else "not_text", value)
    spoken: list[Turn] = []
    for message in value:
        if not isinstance(message, dict):
            raise BadRow(column, "not_a_message", message)
        if "input" in message and "output" in message and _first(message, _ROLE_KEYS) is None:
            spoken += [("user", text(message["input"], column)), ("assistant", text(message["output"], column))]
        elif (turn := _turn(message, column)) is not None:
            spoken.append(turn)
    if not spoken:
        raise BadRow(column, "empty", value)
    if any(len(turn) > 2 or turn[0] == "tool" for turn in spoken):
        try:
            check_order([(turn[0], turn[1], extra_of_turn(turn)) for turn in spoken])
        except WrongTools as wrong:
            raise BadRow(column, wrong.reason, wrong.value) from wrong
    return tuple(spoken)


def extra_of_turn(turn: Turn) -> dict[str, Any]:
    """What a turn holds beside role and content; empty for most."""
    return json.loads(turn[2]) if len(turn) > 2 else {}


def turn_with(turn: Turn, extra: Mapping[str, Any], column: str) -> Turn:
    """The turn with another extra. Raises BadRow where that cannot be written down."""
    try:
        text_ = as_json(extra)
    except WrongTools as wrong:
        raise BadRow(column, wrong.reason, wrong.value) from wrong
    if text_ is None:
        return turn[0], turn[1]
    return turn[0], turn[1], text(text_, column)


def rows_of(value: object) -> object:
    """An object of lists of one length as a list of objects: so `datasets` hands out its sequences of features."""
    if not isinstance(value, dict) or not value or not all(isinstance(column, list) for column in value.values()):
        return value
    columns: dict[str, list[Any]] = value
    if len({len(column) for column in columns.values()}) > 1:
        return value
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _turn(message: dict[str, Any], column: str) -> Turn | None:
    """The turn that a message is, or None for a system message that says nothing."""
    role = message.get("role")
    if role is None:
        role = _first(message, _ROLE_KEYS)
    content = message.get("content")
    if content is None:
        content = _first(message, _TEXT_KEYS)
    name = role.strip().lower() if isinstance(role, str) else ""
    if name not in ROLES and name not in _TOOL_ROLES:
        raise BadRow(column, "unknown_role", role)
    if ROLES.get(name) == "system" and (content is None or (isinstance(content, str) and not content.strip())):
        return None
    if name in _TOOL_ROLES or not _FURTHER_KEYS.isdisjoint(message):
        try:
            return _turn_with_tools(name, message, content, column)
        except WrongTools as wrong:
            raise BadRow(column, wrong.reason, wrong.value) from wrong
    return ROLES[name], _words(content, column)


def _words(content: object, column: str) -> str:
    return _joined_parts(content, column) if isinstance(content, list) else text(content, column)


def _turn_with_tools(name: str, message: dict[str, Any], content: object, column: str) -> Turn:
    """The turn of a message that may call tools, be a result, or be weighed."""
    refuse_tools_within(message)
    if name in CALL_ROLES:  # its text is the call
        return turn_with(("assistant", ""), {"tool_calls": parsed_calls(content), **_weight(message)}, column)
    role = ROLES.get(name, "tool")
    calls = calls_of(message)
    if calls and role != "assistant":
        raise WrongTools("calls_of_another_role", name)
    if role == "tool":
        return turn_with((role, _words(content, column)), result_of(message), column)
    said = "" if calls and content in (None, []) else _words(content, column)
    if calls and not said.strip():
        said = ""
    if role != "assistant":
        return role, said
    return turn_with((role, said), {**({"tool_calls": calls} if calls else {}), **_weight(message)}, column)


def _weight(message: Mapping[str, Any]) -> dict[str, Any]:
    """The weight of an assistant's message, where it has another than 1; `train: false` is weight 0."""
    odd = next((message[key] for key in _WEIGHT_KEYS if message.get(key) not in (None, 1)), 1)
    return {} if odd == 1 else {"weight": 0 if odd is False else odd}


def _first(message: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The first value that is not null: files that were merged have the keys of all, most of them null."""
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _joined_parts(parts: list[Any], column: str) -> str:
    """The text of a content that is given in parts. Images, sound and files have no place in a text model's row."""
    texts: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else "text"
        words = part.get("text") if isinstance(part, dict) else part
        media = _PART_MEDIA.search(str(kind or "") or " ".join(part))
        if media:
            raise BadRow(column, f"has_{media.group()}", part)
        if kind in ("tool_use", "tool_result", "tool_call"):
            raise BadRow(column, "tools", part)
        if kind not in (None, "text", "input_text", "output_text"):
            raise BadRow(column, "unknown_part", part)
        texts.append(text(words, column))
    if not texts:
        raise BadRow(column, "empty", parts)
    return "\n".join(texts)


def is_learned(turn: Turn, column: str) -> bool:
    """Whether an assistant's turn is to be learned. Raises BadRow for a weight that is neither 0 nor 1."""
    weight = extra_of_turn(turn).get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadRow(column, "unknown_weight", weight)
    return weight == 1


def unweighed(spoken: Turns, column: str) -> Turns:
    """The turns without their weights."""
    return tuple(
        turn_with(turn, {key: part for key, part in extra_of_turn(turn).items() if key != "weight"}, column)
        if len(turn) > 2 and turn[0] == "assistant"
        else turn
        for turn in spoken
    )


def weighed(spoken: Turns, learn: str, column: str) -> Turns:
    """The turns before an answer: with their weights where all turns are learned, else without. Raises BadRow."""
    if learn == "last":
        return unweighed(spoken, column)
    for turn in spoken:
        if len(turn) > 2 and turn[0] == "assistant":
            is_learned(turn, column)
    return spoken


KNOWN_KEYS = frozenset((*_ROLE_KEYS, *_TEXT_KEYS, *CALL_KEYS, *_WEIGHT_KEYS, "input", "output"))
"""The keys of a message that are read."""
_RESULT_KEYS = frozenset({"name", "tool_call_id"})


def known_keys(message: Mapping[str, Any]) -> frozenset[str]:
    """The keys that are read of this message: a tool's result says whose it is."""
    role = _first(message, _ROLE_KEYS)
    is_result = isinstance(role, str) and role.strip().lower() in RESULT_ROLES
    return KNOWN_KEYS | _RESULT_KEYS if is_result else KNOWN_KEYS


def transcript(value: str, column: str) -> Turns:
    """Turns that begin with "\\n\\nHuman:" or "\\n\\nAssistant:". An unanswered "Assistant:" at the end is left out."""
    pieces = SPEAKER.split(text(value, column))[1:]
    spoken = [
        ("user" if who == "Human" else "assistant", words.strip())
        for who, words in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return tuple(spoken[:-1] if spoken[-1] == ("assistant", "") and len(spoken) > 1 else spoken)


# --- lists that were written down as text ---

_BRACKETS = re.compile(r"\s*(?:array\()?\s*\[?\s*\{\s*['\"]")
_SPOKEN = re.compile(r"['\"](?:role|from|speaker)['\"]\s*:\s*['\"](\w+)['\"]", re.IGNORECASE)
_CUT = re.compile(r"\s*\[\s*\{\s*['\"](?:role|from)['\"]\s*:\s*['\"](?:user|human|system|assistant|gpt)['\"]\s*,")
_HEAD = 200
"""Characters within which a list begins: a text of white space costs no more than a short one."""
_LITERAL_CHARACTERS = 1 << 20
"""A text longer than this is read as JSON only: Python's own parser takes a hundred times as much memory."""


def written_messages(value: str, column: str) -> list[Any] | None:
    """The messages that a text holds as JSON or as Python writes a list; None where it is a text like any other.

    Raises:
        BadRow: it begins as a list of messages and cannot be read as one.
    """
    if not value or value[0] not in "[{a \t\r\n" or not _BRACKETS.match(value[:_HEAD]):
        return None
    spoken = _SPOKEN.search(value)
    if spoken is None or spoken.group(1).lower() not in ROLES.keys() | _TOOL_ROLES:
        return None
    try:
        messages = parsed_list(value)
    except ValueError as error:
        if _CUT.match(value[:_HEAD]):
            raise BadRow(column, "malformed_json", value) from error
        return None
    messages = [messages] if isinstance(messages, dict) else messages
    return messages if isinstance(messages, list) and messages and all(map(_is_message, messages)) else None


def _is_message(value: object) -> bool:
    """Whether this is a message for sure: with a known role, and what it says. An answer may be JSON of its own."""
    if not isinstance(value, dict):
        return False
    role = _first(value, _ROLE_KEYS)
    known = isinstance(role, str) and role.strip().lower() in ROLES.keys() | _TOOL_ROLES
    return known and any(key in value for key in (*_TEXT_KEYS, *CALL_KEYS))


def parsed_list(value: str) -> Any:
    """The list or object that a text holds, as JSON, or as Python or NumPy writes one. Raises ValueError."""
    try:
        return json.loads(value)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:
        if len(value) > _LITERAL_CHARACTERS:
            raise ValueError("neither JSON nor short enough to be tried as Python") from error
    try:
        return ast.literal_eval(_with_commas(value))
    except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ValueError("neither JSON nor a Python list") from error


def _with_commas(value: str) -> str:
    """A list in Python's form. NumPy, and so pandas in a CSV file, writes no commas between elements."""
    values = (tokenize.STRING, tokenize.NUMBER)
    pieces: list[str] = []
    ended = False
    tokens = [
        token
        for token in tokenize.generate_tokens(io.StringIO(value.strip()).readline)
        if token.type in (tokenize.OP, tokenize.NAME, *values)
    ]
    if tokens and tokens[0].string == "array":  # array([...], dtype=object)
        closing = max((place for place, token in enumerate(tokens) if token.string == "]"), default=0)
        tokens = tokens[2 : closing + 1]
    for token in tokens:
        begins = token.type in values or token.string in ("{", "[", "True", "False", "None")
        if ended and begins:
            pieces.append(",")
        pieces.append(token.string)
        ended = token.type in values or token.string in ("}", "]", "True", "False", "None")
    return " ".join(pieces)


def listed(value: object, column: str) -> list[Any]:
    """A list; in CSV, written as JSON or as Python writes one."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "array([")):
        try:
            value = parsed_list(value)
        except ValueError as error:
            raise BadRow(column, "malformed_json", value) from error
    value = rows_of(value)
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
