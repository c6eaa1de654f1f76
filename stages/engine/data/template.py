"""Chat templates as text: the default one, and what is put before one so that it says the same every time."""

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

# What a tokenizer without a chat template gets: the messages' text, one after the other, each on a line of its own;
# before them each tool as a line of JSON, and below an assistant's text each of its calls.
# An assistant's turn ends with the end-of-sequence token. `{BOS}` is filled in where the tokenizer starts texts so.
DEFAULT_TEMPLATE = (
    "{BOS}{% for tool in tools or [] %}{{ tool['function'] | tojson }}{{ '\\n' }}{% endfor %}"
    "{% for message in messages %}{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '\\n' if message['content'] or not loop.first else '' }}{{ call['function'] | tojson }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)

TODAY = datetime(2024, 7, 26)
"""The day that templates are told: the one that Llama 3's template falls back to where there is no clock."""
_CLOCK = "strftime_now"

_THOUGHT = r"think|thinking|thoughts?|reason|reasoning|scratchpad"
_OPENS_THOUGHT = re.compile(rf"(?P<tag><({_THOUGHT})>|\[THINK\]|<\|begin_of_thought\|>)\s*\Z", re.IGNORECASE)
_EMPTY_THOUGHT = re.compile(rf"<({_THOUGHT})>\s*</\1>\s*\Z", re.IGNORECASE)
_EMPTY_THOUGHT_FIRST = re.compile(rf"\A\s*<({_THOUGHT})>\s*</\1>\s*", re.IGNORECASE)


def default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """`DEFAULT_TEMPLATE`, starting with BOS exactly when the tokenizer starts its own texts with it."""
    starts = tokenizer.bos_token_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
    return DEFAULT_TEMPLATE.replace("{BOS}", "{{ bos_token }}" if starts else "")


def one_template(templates: Mapping[str, str]) -> str | None:
    """A model's templates as one: that for tools where a conversation has some, else the default; None without one."""
    default, tools = templates.get("default"), templates.get("tool_use")
    if default is None or tools is None:
        return default
    return f"{{% if tools %}}\n{tools}{{% else %}}\n{default}{{% endif %}}"


def with_system_prompt(template: str, system_prompt: str) -> str:
    """The template, with `system_prompt` put before conversations that bring no system message."""
    return (
        "{% if messages[0]['role'] != 'system' %}"
        # Jinja reads Python's string literals, so `repr` is the escape.
        f"{{% set messages = [{{'role': 'system', 'content': {system_prompt!r}}}] + messages %}}"
        "{% endif %}\n" + template  # the newline goes, and the template still begins at the start of a line
    )


def for_each(template: str) -> str:
    """A template that writes `separator` and what `template` writes, for each of `all_messages`: setting a template up
    takes longer than most conversations do.
    """
    # Jinja takes a template's last line break away, but not one within it.
    body = template.removesuffix("\n")
    return "{% for messages in all_messages %}{{ separator }}" + body + "{% endfor %}"


def with_arguments(template: str, arguments: Mapping[str, Any]) -> str:
    """The template with variables such as `enable_thinking` set to JSON values."""
    return "".join(f"{{% set {name} = {value!r} %}}\n" for name, value in arguments.items()) + template


def options(template: str) -> list[str]:
    """The names that a template asks for with `is defined`: what it may be told from outside."""
    return sorted(set(re.findall(r"(\w+) is (?:not )?(?:un)?defined", template)) - {_CLOCK})


def without_clock(template: str) -> str:
    """The template, its `strftime_now` giving `TODAY` always: else a prompt's ids would change from day to day."""
    if _CLOCK not in template or f"macro {_CLOCK}" in template:
        return template
    directives = [f"%-{letter}" for letter in "dHIjmMS"] + [f"%{letter}" for letter in "aAbBcdfHIjmMpSUuwWxXyYZz"]
    replaced = "".join(f".replace({directive!r}, {TODAY.strftime(directive)!r})" for directive in directives)
    return f"{{% macro {_CLOCK}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"


# --- thoughts ---


class Thought:
    """What a generation prompt has already written of the answer's thought: nothing, an opened one, or an empty one.

    Reasoning models' templates end in `<think>`, or without thinking in `<think></think>`. Rows hold answers with the
    tag, or without any thought.
    """

    def __init__(self, prompt: str) -> None:
        """`prompt`: as the template ends it, where the assistant begins."""
        opened = _OPENS_THOUGHT.search(prompt)
        closed = _EMPTY_THOUGHT.search(prompt)
        self.opened = opened.group() if opened else ""
        self.closes = _closing(opened["tag"]) if opened else ""
        self.empty = closed is not None

    def behind(self, answer: str) -> str:
        """The answer as it goes on behind the prompt: no tag twice, and a plain answer not inside the thought."""
        if self.empty:
            return without_empty_thought(answer)
        if not self.opened:
            return answer
        tag = self.opened.rstrip()
        if answer.lstrip()[: len(tag)].lower() == tag.lower():
            return answer.lstrip()[len(tag) :].removeprefix(self.opened[len(tag) :])
        return answer if self.closes in answer else f"\n{self.closes}\n\n{answer}"

    def whole(self, answer: str) -> str:
        """What was sampled behind the prompt, with what the prompt has opened: an answer as rows hold it."""
        if not self.opened or not answer:
            return answer
        return (
            answer.removeprefix(f"\n{self.closes}\n\n")
            if answer.startswith(f"\n{self.closes}")
            else self.opened + answer
        )


def without_empty_thought(turn: str) -> str:
    """A turn without the empty thought that templates put before a last answer without one."""
    return _EMPTY_THOUGHT_FIRST.sub("", turn, count=1)


def _closing(tag: str) -> str:
    """The tag that closes a thought."""
    if tag.startswith("<|"):
        return tag.replace("begin", "end")
    return f"{tag[0]}/{tag[1:]}"
