"""Which tokens of a conversation the assistant has written: what SFT learns of it, and answers that call tools.

A turn of the assistant begins where the template's generation prompt ends, and ends with the token that ends it. The
template tells where with `{% generation %}`, or else by what it writes of the conversation up to the turn and through
it. A turn that is written otherwise once others follow (Qwen 3 drops earlier thoughts, or the generation prompt opens
one) is no turn that the model would ever write at that place: it is learned behind the conversation up to it instead.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateRuntimeError

from schemas.conversation import Message, extra_of, is_unlearned, with_extra
from stages.engine.data.codec import Codec
from stages.engine.data.guard import Guarded, Piece
from stages.engine.data.template import without_empty_thought


class Learned(NamedTuple):
    """A prompt's tokens, and which of them are learned."""

    ids: list[int]
    mask: list[bool]
    apart: list[int]
    """Places of the messages that are to be learned as answers of their own, behind the messages before them."""


def learned(codec: Codec, messages: Sequence[Message]) -> Learned:
    """Ids of `codec.prompt`, those of the assistant's turns marked, but of messages with weight 0.

    Raises TemplateError where the template refuses the conversation.
    """
    codec.refuse_left_out(messages)
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    conversation = codec.guarded(messages)
    rendered, spans = codec.write(conversation, add_generation_prompt=True), dict[int, tuple[int, int]]()
    if codec.has_tags and places:
        _, tagged = codec.write_tagged(conversation)
        if len(tagged) == len(places):  # a template may tag the parts of a turn one by one
            spans = {
                place: _tagged(codec, conversation, rendered, *span) for place, span in zip(places, tagged, strict=True)
            }
    tokens = codec.tokens_of(rendered, conversation)
    if not spans:
        spans = {place: span for place in places if (span := _span(codec, conversation, place, rendered, tokens))}
    mask = [False] * len(tokens)
    for place, (start, end) in spans.items():
        if not is_unlearned(messages[place]):
            for number, token in enumerate(tokens):
                mask[number] |= token.start < end and token.end > start
    apart = [place for place in places if place not in spans and not is_unlearned(messages[place])]
    return Learned([token.id for token in tokens], mask, apart)


def learned_apart(
    codec: Codec, messages: Sequence[Message], places: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """(ids of the conversation up to a turn, those of the turn) of each turn at `places`, which `learned` found apart.

    Raises TemplateError where the template refuses a conversation that ends there, or does not write calls behind its
    generation prompt.
    """
    parts = [(messages[:place], messages[place]) for place in places]
    return [(codec.prompt(before), answer_ids(codec, before, turn)) for before, turn in parts]


def answer_ids(codec: Codec, prompt: Sequence[Message], answer: Message) -> list[int]:
    """Ids of an assistant's message behind a prompt, and the token that ends it.

    A text is tokenized as sampling would (`Codec.answer`); calls are as the template writes them, with the tokens that
    they have in the whole conversation. Raises TemplateError
    where it writes them otherwise than behind its generation prompt.
    """
    if "tool_calls" not in extra_of(answer):
        return codec.answer(answer["content"])
    whole = [*prompt, answer]
    codec.refuse_left_out(whole, add_generation_prompt=False)
    conversation = codec.guarded(whole)
    turn = _turn(codec, conversation, len(prompt))
    if turn is None:
        raise TemplateRuntimeError("an answer that calls tools is not written behind the generation prompt")
    ids = _ids_behind(codec, conversation, *turn)
    return ids if ids[-1] in codec.stop_ids else [*ids, codec.end_id]


def _ids_behind(codec: Codec, conversation: Guarded, before: str, turn: str) -> list[int]:
    """Ids of a turn as they stand behind what comes before; of the turn alone where letters merge across the border."""
    prompt, whole = codec.ids_of(before, conversation), codec.ids_of(before + turn, conversation)
    return whole[len(prompt) :] if whole[: len(prompt)] == prompt else codec.ids_of(turn, conversation)


def answer_of(row: Mapping[str, Any]) -> Message:
    """The assistant's message that answers in a row of kind `sft`: a text, and what it calls."""
    calls = {"tool_calls": json.loads(row["calls"])} if row.get("calls") else {}
    return with_extra({"role": "assistant", "content": row["response"]}, calls)


def _turn(codec: Codec, conversation: Guarded, place: int) -> tuple[str, str] | None:
    """(What stands before a turn, the turn up to its end) as the template writes them where nothing follows yet.

    None where the turn is not what goes on behind the generation prompt.
    """
    chat = conversation.chat
    before = codec.write(conversation._replace(chat=chat[:place]), add_generation_prompt=True)
    through = codec.write(conversation._replace(chat=chat[: place + 1]), add_generation_prompt=False)
    if not through.startswith(before):
        return None
    turn = _up_to_its_end(codec, conversation, without_empty_thought(through[len(before) :]))
    return (before, turn) if turn else None


def _span(
    codec: Codec, conversation: Guarded, place: int, rendered: str, tokens: Sequence[Piece]
) -> tuple[int, int] | None:
    """Where a turn stands in the whole; None where it is written otherwise there, or shares a token with others."""
    try:
        turn = _turn(codec, conversation, place)
    except TemplateError:  # of a conversation that ends there
        return None
    if turn is None or not rendered.startswith("".join(turn)):
        return None
    start, end = len(turn[0]), len(turn[0]) + len(turn[1])
    shared = any(token.start < edge < token.end for token in tokens for edge in (start, end))
    return None if shared else (start, end)


def _tagged(codec: Codec, conversation: Guarded, rendered: str, start: int, end: int) -> tuple[int, int]:
    """A tagged turn from where the generation prompt ends up to the token that ends it: templates tag it with a part of
    that prompt too, and with its end, without, or with what follows.
    """
    prompt = codec.generation_prompt
    places = range(max(start - len(prompt), 0), start + 1)
    start = next((at + len(prompt) for at in places if rendered.startswith(prompt, at)), start)
    if rendered.startswith(codec.end, end):
        return start, end + len(codec.end)
    return start, start + len(_up_to_its_end(codec, conversation, rendered[start:end]))


def _up_to_its_end(codec: Codec, conversation: Guarded, turn: str) -> str:
    """The turn without what the template writes behind the token that ends it: white space, or another such token."""
    turn = turn.rstrip()
    for found in reversed(list(re.finditer(re.escape(codec.end), turn))):
        spelled = conversation.left and turn[: found.start()].endswith(conversation.left)
        if not spelled and not codec.special.sub("", turn[found.end() :]).strip():
            return turn[: found.end()]
    return turn
