"""Whether a chat template writes the tools, calls and results of a conversation: told by what it writes of a stand-in.

A template without tools drops them without a word, or keeps a part: the text beside a call, the first of several. So it
is shown a conversation of the same shape whose every part is a word of its own, and those words are looked for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateRuntimeError

from schemas.conversation import Message, extra_of, with_extra

_PLAIN = "a"


class LeftOut(TemplateRuntimeError):
    """A chat template does not write a part of a conversation that its answer depends on."""

    fix = "take out the prompts with tools, calls and results, or use a model whose chat template writes them"


def stand_in(messages: Sequence[Message]) -> tuple[list[dict[str, str]], dict[str, str]]:
    """(A conversation of the same roles, calls and tools that says nothing of its own; word -> what it stands for)."""
    marks: dict[str, str] = {}
    ids: dict[str, str] = {}

    def mark(what: str) -> str:
        word = f"alignflow{len(marks)}x"
        marks[word] = what
        return word

    def own_id(given: str) -> str:
        return ids.setdefault(given, f"call{len(ids):05d}")  # nine letters, as Mistral's templates ask for

    def call(given: Mapping[str, Any]) -> dict[str, Any]:
        arguments = {_PLAIN: mark("arguments of calls")} if given["function"]["arguments"] else {}
        function = {"name": mark("calls of tools"), "arguments": arguments}
        return {**({"id": own_id(given["id"])} if "id" in given else {}), "type": "function", "function": function}

    plain: list[dict[str, str]] = []
    for message in messages:
        extra, own = extra_of(message), dict[str, Any]()
        content = _PLAIN if message["content"].strip() else ""
        if "tools" in extra:
            own["tools"] = [_tool(tool["function"], mark("tools")) for tool in extra["tools"]]
        if "tool_calls" in extra:
            content = mark("texts beside calls") if content else ""
            own["tool_calls"] = [call(given) for given in extra["tool_calls"]]
        if message["role"] == "tool":
            content = mark("results of tools")
            own |= {"name": _PLAIN} if "name" in extra else {}
            own |= {"tool_call_id": own_id(extra["tool_call_id"])} if "tool_call_id" in extra else {}
        plain.append(with_extra({"role": message["role"], "content": content}, own))
    return plain, marks


def missing_marks(marks: Mapping[str, str], rendered: str) -> list[str]:
    """What the words stand for that a rendered stand-in does not hold, each kind once."""
    return list(dict.fromkeys(what for word, what in marks.items() if word not in rendered))


def _tool(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A function that takes one text, as far as the one given says what it takes."""
    function: dict[str, Any] = {"name": name}
    if "description" in given:
        function["description"] = _PLAIN
    if "parameters" in given:
        one = {_PLAIN: {"type": "string", "description": _PLAIN}}
        function["parameters"] = {"type": "object", "properties": one, "required": [_PLAIN]}
    return {"type": "function", "function": function}
