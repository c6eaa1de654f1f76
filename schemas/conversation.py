"""What a message of a conversation may hold beside its role and its text, and how that travels.

A message is {"role", "content"} everywhere, and where it has more, "extra": a JSON object of

- tools: the functions that the assistant may call, in OpenAI's form; on a conversation's first message
- tool_calls: what an assistant's message calls, in OpenAI's form with `arguments` as an object
- name, tool_call_id: of whose call a message of role `tool` is the result
- weight: 0 on an assistant's message that is not to be learned

So whoever hands on the messages hands on the tools. `opened` gives both as chat templates, and files, have them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, str]
"""`role`, `content`, and perhaps `extra`."""

EXTRA = "extra"
_OF_MESSAGES = ("tool_calls", "name", "tool_call_id")


def extra_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """What a message holds beside role and text; empty for most."""
    written = message.get(EXTRA)
    return json.loads(written) if written else {}


def written(extra: Mapping[str, Any]) -> str | None:
    """An extra as JSON, keys and arguments in the order in which they were given; None where there is nothing."""
    return json.dumps(dict(extra), ensure_ascii=False) if extra else None


def with_extra(message: Message, extra: Mapping[str, Any]) -> dict[str, str]:
    """The message with another extra."""
    text = written(extra)
    return {"role": message["role"], "content": message["content"], **({} if text is None else {EXTRA: text})}


def has_extra(messages: Sequence[Message]) -> bool:
    """Whether a conversation holds more than roles and texts."""
    return any(message.get(EXTRA) for message in messages)


def opened(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """(the messages as a chat template takes them, the tools; None without any). Weights are not part of it."""
    chat: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] | None = None
    for message in messages:
        extra = extra_of(message)
        tools = extra.get("tools") or tools
        more = {key: extra[key] for key in _OF_MESSAGES if key in extra}
        chat.append({"role": message["role"], "content": message["content"], **more})
    return chat, tools


def is_unlearned(message: Message) -> bool:
    """Whether a message says that it is not to be learned (`weight: 0`)."""
    return extra_of(message).get("weight") == 0


def without_weight(text: str) -> str | None:
    """A written extra without its weight, which no model sees; None where that is all."""
    if '"weight"' not in text:
        return text
    return written({key: part for key, part in json.loads(text).items() if key != "weight"})


def words_of(message: Message) -> str:
    """All that a message says to the model, as one text: ids of prompts and digests are made of it. A plain one's is
    its content.
    """
    extra = without_weight(message.get(EXTRA) or "")
    return f"{message['content']}\n{extra}" if extra else message["content"]


def shown(message: Message) -> str:
    """A message's text for people and judges, the calls of its tools as JSON below it."""
    extra = extra_of(message)
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in extra.get("tool_calls", ())]
    return "\n".join(part for part in (message["content"], *calls) if part)


def shown_tools(messages: Sequence[Message]) -> str:
    """The tools of a conversation for judges, one per line; empty without any."""
    _, tools = opened(messages)
    return "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools or ())
