"""Special tokens that a conversation spells out stay text: two characters that it does not hold mark where they are."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Chat = list[dict[str, Any]]


class Guarded(NamedTuple):
    """A conversation as a chat template takes it, the special tokens that it spells out between two marks."""

    chat: Chat
    tools: list[dict[str, Any]] | None
    left: str = ""
    right: str = ""
    """The marks; empty where no special token is spelled out."""


class Piece(NamedTuple):
    """A token, and where it stands in a text."""

    id: int
    start: int
    end: int


def guard(chat: Chat, tools: list[dict[str, Any]] | None, special: re.Pattern[str]) -> Guarded:
    """The conversation with marks around whatever `special` matches in its texts, its tools and their calls."""
    said = [[{key: part for key, part in message.items() if key != "role"} for message in chat], tools]
    everything = "\0".join(_texts(said))
    if not special.search(everything):
        return Guarded(chat, tools)
    # Two private-use characters that the texts do not hold, to mark places in them.
    unused = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in everything)
    left, right = next(unused), next(unused)

    def marked(text: str) -> str:
        return special.sub(rf"{left}\g<0>{right}", text)

    messages = [{**_changed(message, marked), "role": message["role"]} for message in chat]
    return Guarded(messages, _changed(tools, marked), left, right)


def pieces(rendered: str, conversation: Guarded) -> Iterator[tuple[int, str, bool]]:
    """(place, text, whether a conversation spelled it out) of all that the template wrote, without the marks."""
    left, right = conversation.left, conversation.right
    at = 0
    for piece in re.split(f"({left}[^{right}]*{right})", rendered) if left else [rendered]:
        if left and piece.startswith(left):
            yield at + 1, piece[1:-1], True
        elif piece:
            yield at, piece, False
        at += len(piece)


def _texts(value: Any) -> Iterator[str]:
    """All texts within lists and objects, keys too."""
    if isinstance(value, str):
        yield value
    for part in value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, dict) else ():
        yield from _texts(part)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """The value with all texts within it changed, keys too: those of our own spell out no special token."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_changed(part, change) for part in value]
    return {change(key): _changed(part, change) for key, part in value.items()} if isinstance(value, dict) else value
