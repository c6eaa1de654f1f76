"""Tools, calls of them and their results, as files have them, in the one form of schemas/conversation.py.

Read are OpenAI's form (`tools`, `tool_calls`, role `tool`), its older one (`functions`, `function_call`, role
`function`), lists and objects that were written down as JSON, and turns of ShareGPT from `function_call`,
`observation` and the like. Whatever could mean two things is refused by name.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from schemas.conversation import written

RESULT_ROLES = ("tool", "function", "function_response", "tool_response", "observation", "ipython")
"""Roles of messages that say what a call gave; ours is `tool`."""
CALL_ROLES = ("function_call", "tool_call")
"""ShareGPT's roles of an assistant's message whose text is the call."""
CALL_KEYS = ("tool_calls", "function_call")
TOOL_KEYS = ("tools", "functions")
_ARGUMENTS = ("arguments", "parameters")
"""Where a call holds its arguments: OpenAI's key, or else Llama 3's."""
_NOTHING = (None, "", [], {})
_WRITTEN_NOTHING = ("", "[]", "{}", "null", "None")
_IN_TEXT = ("<tool_call>", "<function_call>", "<functioncall>", "[TOOL_CALLS]", "<|python_tag|>")
"""How calls that were rendered with a template begin within a text."""


class WrongTools(Exception):
    """What is wrong with tools, calls or results (`reason`), and where."""

    def __init__(self, reason: str, value: object = None) -> None:
        super().__init__(reason)
        self.reason, self.value = reason, value


def tools_of(value: object) -> list[dict[str, Any]]:
    """The functions of a row's `tools`: OpenAI's objects, or bare functions; a list, or JSON of one. Raises WrongTools.

    Without any, the list is empty.
    """
    value = _parsed(value, "broken_tools") if isinstance(value, str) and value.strip() else value
    if value in _NOTHING:
        return []
    if not isinstance(value, list):
        raise WrongTools("tools_not_a_list", value)
    return [_tool(tool) for tool in value]


def _tool(value: object) -> dict[str, Any]:
    value, function = _function_of(value, "not_a_tool", "broken_tools")
    if not isinstance(function.get("parameters") or {}, dict):
        raise WrongTools("not_a_tool", value)
    return {"type": "function", "function": {key: part for key, part in function.items() if key != "type"}}


def _function_of(value: object, wrong: str, broken: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tool or a call, which may be JSON written as text, and the function that it names. Raises WrongTools."""
    value = _parsed(value, broken) if isinstance(value, str) else value
    if not isinstance(value, dict) or value.get("type") not in (None, "function"):
        raise WrongTools(wrong, value)
    function = value.get("function", value)
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise WrongTools(wrong, value)
    return value, function


def refuse_tools_within(message: Mapping[str, Any]) -> None:
    """Raise WrongTools where tools stand in a message: they belong to the whole conversation."""
    for key in TOOL_KEYS:
        if not _is_nothing(message.get(key)):
            raise WrongTools("tools_in_a_message", message[key])


def calls_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a message calls; empty where it calls nothing. Raises WrongTools."""
    given = [message[key] for key in CALL_KEYS if not _is_nothing(message.get(key))]
    if len(given) > 1:
        raise WrongTools("two_kinds_of_calls", given)
    return parsed_calls(given[0]) if given else []


def parsed_calls(value: object) -> list[dict[str, Any]]:
    """A call, or several: objects, or JSON of them. Raises WrongTools."""
    value = _parsed(value, "broken_tool_calls") if isinstance(value, str) else value
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise WrongTools("not_a_tool_call", value)
    return [_call(call) for call in calls]


def _call(value: object) -> dict[str, Any]:
    value, function = _function_of(value, "not_a_tool_call", "broken_tool_calls")
    where = next((key for key in _ARGUMENTS if function.get(key) not in (None, "")), "")
    _refuse_further_keys(value, function, where)
    arguments = function.get(where)
    if isinstance(arguments, str) and arguments.strip():
        arguments = _parsed(arguments, "broken_arguments")
    if arguments in (None, ""):  # of a function that takes none
        arguments = {}
    if not isinstance(arguments, dict):
        raise WrongTools("arguments_not_an_object", arguments)
    own = value.get("id")
    if own is not None and not _is_name(own):
        raise WrongTools("not_a_tool_call", value)
    return {
        **({} if own is None else {"id": own}),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _refuse_further_keys(value: Mapping[str, Any], function: Mapping[str, Any], where: str) -> None:
    """Raise WrongTools for what a call holds beside its name and the arguments at `where`: it may be the arguments."""
    known = {"name", where}
    if where == "arguments":  # beside them some files repeat what the function is
        known |= {"description", "parameters"}
    around = {"id", "type", "index"}
    parts = [(value, around | known)] if function is value else [(value, around | {"function"}), (function, known)]
    for part, keys in parts:
        for key, held in part.items():
            if key not in keys and not _is_nothing(held):
                raise WrongTools("unknown_key_of_a_call", {key: held})


def result_of(message: Mapping[str, Any]) -> dict[str, str]:
    """Of whose call a result is, where the message says it. Raises WrongTools."""
    extra: dict[str, str] = {}
    for key in ("name", "tool_call_id"):
        if message.get(key) not in _NOTHING:
            if not _is_name(message[key]):
                raise WrongTools("not_a_tool_result", message[key])
            extra[key] = message[key]
    return extra


def check_order(turns: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
    """Results stand behind the message that calls, and no call stays without one, but in the last message.

    `turns` are (role, content, extra) of one conversation. Raises WrongTools.
    """
    open_calls = 0
    ids: set[str] = set()
    said = ""
    for role, content, extra in turns:
        if role == "tool":
            if not open_calls:
                in_text = any(mark in said for mark in _IN_TEXT)
                raise WrongTools("calls_in_text" if in_text else "result_without_call", content)
            own = extra.get("tool_call_id")
            if own is not None and ids and own not in ids:
                raise WrongTools("result_of_another_call", own)
            ids -= {own}
            open_calls -= 1
            continue
        if open_calls:
            raise WrongTools("call_without_result", content)
        calls = extra.get("tool_calls", ())
        open_calls, said = len(calls), content
        ids = {call["id"] for call in calls if "id" in call}
    if open_calls and turns[-1][0] == "tool":
        raise WrongTools("call_without_result", turns[-1][1])


def odd(tools: Sequence[Mapping[str, Any]], calls: Sequence[Mapping[str, Any]], texts: Sequence[str] = ()) -> list[str]:
    """Notes on calls of functions that the row does not list, and on texts beside tools that spell out calls."""
    if tools and any(mark in text for text in texts for mark in _IN_TEXT):
        return ["looks_like_calls"]
    if not calls:
        return []
    known = {tool["function"]["name"] for tool in tools}
    if not known:
        return ["calls_without_tools"]
    return ["unknown_tool"] if any(call["function"]["name"] not in known for call in calls) else []


def as_json(extra: Mapping[str, Any]) -> str | None:
    """`written` of an extra that a file gave. Raises WrongTools where it is no JSON."""
    try:
        return written(extra)
    except (ValueError, RecursionError, TypeError) as error:
        raise WrongTools("not_json", str(error)) from error


def _is_nothing(value: object) -> bool:
    """Whether this holds nothing, as it is or written down."""
    return value.strip() in _WRITTEN_NOTHING if isinstance(value, str) else value in _NOTHING


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _parsed(value: str, reason: str) -> Any:
    """What a text holds as JSON. Raises WrongTools with the reason."""
    try:
        return json.loads(value, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise WrongTools(reason, value) from error


def _refuse_constant(name: str) -> NoReturn:
    """NaN and Infinity are no JSON, and most parsers that read a call refuse them."""
    raise ValueError(f"{name} is not JSON")
