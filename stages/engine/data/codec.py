"""From messages to token ids and back. Everything that touches a tokenizer's text goes through `Codec`. No torch."""

import contextlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateRuntimeError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from schemas.architectures import positions
from schemas.conversation import EXTRA, Message, has_extra, opened
from schemas.errors import refuse
from schemas.model_folder import UNREADABLE, config_of, listed_ends, stale_end
from schemas.text import one_line
from stages.engine.data.alike import cuts_of, encode_alike
from stages.engine.data.guard import Guarded, Piece, guard, pieces
from stages.engine.data.marks import (
    GREETING,
    MARK,
    before_answers,
    controls,
    find_end,
    load_tokenizer,
    make_special,
    number,
    pattern_of,
    turn_marks,
)
from stages.engine.data.template import Thought, default_template, for_each, without_clock
from stages.engine.data.tools import LeftOut, missing_marks, stand_in
from stages.runtime.limits import TooMuch, limited

RENDER_SECONDS = 30.0
RENDER_BYTES = 2 << 30
"""What a chat template may take for the conversations that it is given at once: milliseconds and kilobytes each."""

_SEPARATOR = "\x00alignflow\x00"
"""Stands between conversations that are rendered together."""

_TAGS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Codec:
    """A tokenizer with its chat template: prompts, answers and rendered chats."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int] = (), positions: int | None = None
    ) -> None:
        """`stop_ids`: further tokens that end an answer, as the model's generation config lists them."""
        self.tokenizer = tokenizer
        self.positions = positions
        """Tokens that the model was made for, where its folder says so."""
        tokenizer.clean_up_tokenization_spaces = False
        if not tokenizer.chat_template:
            tokenizer.chat_template = default_template(tokenizer)
        if isinstance(tokenizer.chat_template, str):
            tokenizer.chat_template = without_clock(tokenizer.chat_template)
        self.special = pattern_of(tokenizer)
        make_special(tokenizer, turn_marks(self))
        self.special = pattern_of(tokenizer)
        self._cuts = cuts_of(tokenizer)
        self.end_id: int = find_end(self)
        """Ends an assistant's turn."""
        pad, eos = number(tokenizer.pad_token_id), number(tokenizer.eos_token_id)
        self.pad_id: int = self.end_id if pad is None else pad
        """Fills rows; may equal `end_id`, so masks go by length and never by id."""
        self.stop_ids: frozenset[int] = frozenset([self.end_id, *([] if eos is None else [eos]), *stop_ids])
        """Any of these ends a sampled answer."""
        self.control_ids: frozenset[int] = self.stop_ids | controls(tokenizer)
        """What only the template may write: special tokens, without the one for unknown words."""
        prompt, asked = self.render(GREETING), ""
        with contextlib.suppress(TemplateError):  # of a template that wants the assistant to speak last
            asked = self.render(GREETING, add_generation_prompt=False)
        self.generation_prompt = prompt.removeprefix(asked) if asked and prompt.startswith(asked) else ""
        """What the template writes where the assistant is to begin; empty where it writes nothing, or all otherwise."""
        self._thought = Thought(prompt)
        self._left_out: dict[tuple[tuple[str, ...], ...], list[str]] = {}
        """Conversations that say nothing of their own -> what the template leaves out of their kind."""
        self._anchor, self.lead = before_answers(self)
        """`lead`: what the template writes between a generation prompt and an answer, where tokens depend on it."""

    @classmethod
    def load(cls, folder: Path | str) -> "Codec":
        """Read the tokenizer of a model folder. Raises StageError when there is none."""
        tokenizer = load_tokenizer(Path(folder))
        try:
            if problem := stale_end(Path(folder)):
                raise refuse("folder", folder, problem[0], problem[1], kind="model")
            return cls(tokenizer, listed_ends(Path(folder)), positions(config_of(Path(folder))))
        except UNREADABLE as error:
            message = f"generation_config.json cannot be read: {one_line(error, 300)}"
            raise refuse("folder", folder, message, "fix or remove it", kind="model") from error
        except TemplateError as error:
            fix = "put a template that works into it, or none"
            message = f"its chat template fails: {one_line(error, 300)}"
            raise refuse("folder", folder, message, fix, kind="chat_template") from error

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant begins; ids of `apply_chat_template`, at most one BOS.

        A special token spelled out inside a message is text: it never becomes the control token.
        """
        return self._encode(messages, add_generation_prompt=True)

    def prompts(self, conversations: Sequence[Sequence[Message]]) -> list[list[int] | TemplateError]:
        """`prompt` of each conversation, or the template's refusal; tokenized together, on all cores."""
        return self.encode_rendered(self.render_all(conversations))

    def render_all(self, conversations: Sequence[Sequence[Message]]) -> list[str | list[int] | TemplateError]:
        """What the template writes of each prompt, or its refusal; ids where the text alone does not tell them."""
        plain = [self._is_plain(messages) for messages in conversations]
        rendered = iter(self._render_plain([c for c, is_plain in zip(conversations, plain, strict=True) if is_plain]))
        return [
            next(rendered) if is_plain else self._prompt_or_refusal(c)
            for c, is_plain in zip(conversations, plain, strict=True)
        ]

    def encode_rendered(self, rendered: Sequence[str | list[int] | TemplateError]) -> list[list[int] | TemplateError]:
        """Ids of what `render_all` gave."""
        texts = [text for text in rendered if isinstance(text, str)]
        ids = iter(encode_alike(texts, self.encode_all, self._cuts))
        return [next(ids) if isinstance(text, str) else text for text in rendered]

    def _is_plain(self, messages: Sequence[Message]) -> bool:
        """Whether a conversation holds roles and texts alone, and no special token spelled out."""
        for message in messages:
            if message.get(EXTRA) or message["role"] == "tool" or self.special.search(message["content"]):
                return False
        return True

    def check_prompts(self, conversations: Sequence[Sequence[Message]], new_tokens: int, field: str, who: str) -> None:
        """Raise StageError for a prompt that the template refuses, or that leaves no room for `new_tokens`, before
        anything long starts. `who` reads them: "the judge".
        """
        for place, ids in enumerate(self.check_templates(conversations, field, who)):
            if self.positions is not None and len(ids) + new_tokens > self.positions:
                room = self.positions - len(ids)
                where = _which(conversations, place)
                message = f"{who} has {self.positions} positions, and {where} takes {len(ids)} of them."
                fix = f"set max_new_tokens to at most {room}, or " if room > 0 else ""
                fix += f"use a model of at least {len(ids) + new_tokens} positions, or give shorter prompts"
                raise refuse(field, f"{new_tokens} new tokens", message, fix, kind="too_long")

    def check_templates(self, conversations: Sequence[Sequence[Message]], field: str, who: str) -> list[list[int]]:
        """Ids of all prompts. Raises StageError for one that the template refuses; `who` reads them: "the judge"."""
        encoded: list[list[int]] = []
        for place, ids in enumerate(self.prompts(conversations)):
            if isinstance(ids, TemplateError):
                roles = ", ".join(dict.fromkeys(message["role"] for message in conversations[place]))
                where = f"{_which(conversations, place)}, with the roles {roles}"
                message = f"the chat template of {who} refuses {where}: {one_line(ids, 200)}."
                fix = "take out what it refuses (a system message, turns that do not alternate), or use another model"
                fix = LeftOut.fix if isinstance(ids, LeftOut) else fix
                raise refuse(field, len(conversations), message, fix, kind="chat_template")
            encoded.append(ids)
        return encoded

    def ended(self, prompt: Sequence[Message], answer: str) -> tuple[list[int], list[int]]:
        """A prompt and its ended answer as ids, the answer cut where both would exceed the model's positions.

        Raises:
            TemplateError: the template refuses the prompt.
            StageError: the prompt alone leaves no room.
        """
        before, after = self.prompt(prompt), self.answer(answer)
        if self.positions is None or len(before) + len(after) <= self.positions:
            return before, after
        if len(before) >= self.positions:
            message = f"the model has {self.positions} positions, and a prompt alone has {len(before)} tokens."
            raise refuse("model", f"{self.positions} positions", message, "give shorter prompts", kind="too_long")
        return before, [*after[: self.positions - len(before) - 1], self.end_id]

    def encode_all(self, texts: Sequence[str], split_special_tokens: bool = False) -> list[list[int]]:
        """Ids of texts, on all cores, without special tokens put around them."""
        backend: Any = self.tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = split_special_tokens
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def answer(self, text: str) -> list[int]:
        """Ids of an answer behind a prompt, and the token that ends it."""
        return [*self.answers([text])[0], self.end_id]

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of answers, without their ends; tokenized together, on all cores.

        An answer is tokenized on its own, as sampling does, but for its first token where that depends on what comes
        before: SentencePiece's tokenizers begin a text with a space that does not exist behind a line break. A thought
        that the prompt has opened already is not opened again.
        """
        texts = [self._thought.behind(text) for text in texts]
        if not self._anchor:
            return self.encode_all(texts, split_special_tokens=True)
        before = self.encode_all([self._anchor], split_special_tokens=True)[0]
        joint = self.encode_all([self._anchor + self.lead + text for text in texts], split_special_tokens=True)
        merged = [i for i, ids in enumerate(joint) if ids[: len(before)] != before]
        alone = self.encode_all([texts[i] for i in merged], split_special_tokens=True)
        answers = [ids[len(before) :] for ids in joint]
        for i, ids in zip(merged, alone, strict=True):  # letters that merge across the border
            answers[i] = ids
        return answers

    @property
    def end(self) -> str:
        """The token `end_id` as it is spelled."""
        return str(self.tokenizer.convert_ids_to_tokens(self.end_id))

    def is_word(self, token: int) -> bool:
        """Whether a token stands for ordinary text: neither special nor added."""
        tokenizer = self.tokenizer
        return 0 <= token < len(tokenizer) and token not in {
            *tokenizer.added_tokens_decoder,
            *tokenizer.all_special_ids,
        }

    def pad_apart(self) -> int | None:
        """Make a token that ends no answer the tokenizer's padding, and return it; None where it has none.

        The one that it has, or else the one for unknown words, a special token that nothing uses, BOS.
        """
        names = self.tokenizer.added_tokens_decoder
        special = sorted(
            (i for i, token in names.items() if token.special), key=lambda i: "pad" not in names[i].content
        )
        first = [number(self.tokenizer.pad_token_id), number(self.tokenizer.unk_token_id)]
        bos = number(self.tokenizer.bos_token_id)
        for token in [*first, *(i for i in special if i != bos), bos]:
            if token is not None and token not in self.stop_ids | {self.end_id}:
                self.pad_id = token
                self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(token)
                return token
        return None

    def text(self, ids: Sequence[int]) -> str:
        """The answer in words: up to its first stop token, without special tokens."""
        stop = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return self._thought.whole(str(self.tokenizer.decode(list(ids[:stop]), skip_special_tokens=True)))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation, with its tools, as the template writes it.

        Raises:
            TemplateError: the template refuses it, fails, or leaves out tools, calls or results (`LeftOut`).
            StageError: it goes beyond the bounds of time and memory.
        """
        chat, tools = opened(messages)
        rendered = self.write(Guarded(chat, tools), add_generation_prompt)
        self.refuse_left_out(messages, add_generation_prompt)
        return rendered

    def refuse_left_out(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> None:
        """Raise LeftOut where the template passes over tools, calls or results of a conversation without a word."""
        if not has_extra(messages) and not any(message["role"] == "tool" for message in messages):
            return
        plain, marks = stand_in(messages)
        kind = (("", str(add_generation_prompt)), *(tuple(message.values()) for message in plain))
        if kind not in self._left_out:
            rendered = self.write(Guarded(*opened(plain)), add_generation_prompt)
            self._left_out[kind] = missing_marks(marks, rendered)
        if self._left_out[kind]:
            raise LeftOut(f"the chat template leaves out {', '.join(self._left_out[kind])}")

    def writes_system(self) -> bool:
        """Whether a system message reaches the model; true too where the template refuses it, and so says it."""
        try:
            return MARK in self.render([{"role": "system", "content": MARK}, *GREETING])
        except TemplateError:
            return True

    def guarded(self, messages: Sequence[Message]) -> Guarded:
        """The conversation, so that its own texts never become control tokens."""
        return guard(*opened(messages), self.special)

    def write(self, conversation: Guarded, add_generation_prompt: bool) -> str:
        """What the template writes of one conversation, whatever it leaves out. Raises TemplateError, StageError."""
        chat: list[Any] = conversation.chat
        tools: list[Any] | None = conversation.tools
        apply = self.tokenizer.apply_chat_template
        return str(
            self._bounded(lambda: apply(chat, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt))
        )

    def write_tagged(self, conversation: Guarded) -> tuple[str, list[tuple[int, int]]]:
        """A prompt as the template writes it, and where in it `{% generation %}` begins and ends. Raises TemplateError,
        StageError.
        """
        template = str(self.tokenizer.chat_template)
        named: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        tools: list[Any] | None = conversation.tools

        def tagged() -> Any:
            return render_jinja_template(
                [conversation.chat],
                tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                add_generation_prompt=True,
                **named,
            )

        [text], [spans] = self._bounded(tagged)
        return str(text), list(spans)

    @property
    def has_tags(self) -> bool:
        """Whether the template says itself what the assistant has generated."""
        return _TAGS.search(str(self.tokenizer.chat_template)) is not None

    def _bounded(self, apply: Callable[[], Any]) -> Any:
        """What `apply` makes of the template, which may come from anywhere."""
        try:
            return limited(apply, RENDER_SECONDS, RENDER_BYTES)
        except TemplateError:
            raise
        except TooMuch as error:
            value = one_line(self.tokenizer.chat_template, 200)
            fix = "set model.chat_template to one that ends"
            raise refuse("model.chat_template", value, f"{error}.", fix, kind="chat_template") from None
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise TemplateRuntimeError(f"{type(error).__name__}: {one_line(error, 300)}") from error

    def save(self, folder: Path | str) -> None:
        """Write the tokenizer and its template; plain transformers reads them."""
        # Where it came from, which is not content:
        for name in ("is_local", "local_files_only", "auto_map", "gguf_file"):
            self.tokenizer.init_kwargs.pop(name, None)
        self.tokenizer.save_pretrained(str(folder))

    def _encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """Render and tokenize, with the special tokens that the conversation spells out kept apart as text."""
        conversation = self.guarded(messages)
        rendered = self.write(conversation, add_generation_prompt)
        self.refuse_left_out(messages, add_generation_prompt)
        return self.ids_of(rendered, conversation)

    def ids_of(self, rendered: str, conversation: Guarded) -> list[int]:
        """Ids of what the template wrote of a conversation, or of a part of it."""
        if not conversation.left:
            return self.encode_control(rendered)
        ids: list[int] = []
        for _, piece, is_text in pieces(rendered, conversation):
            if is_text:
                ids += self.tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True, verbose=False)
            else:
                ids += self.encode_control(piece)
        return ids

    def tokens_of(self, rendered: str, conversation: Guarded) -> list[Piece]:
        """`ids_of`, with the characters of `rendered` that each token stands for."""
        backend: Any = self.tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        backend.no_truncation()
        backend.no_padding()
        tokens: list[Piece] = []
        for at, piece, is_text in pieces(rendered, conversation):
            backend.encode_special_tokens = is_text
            encoding = backend.encode(piece, add_special_tokens=False)
            places = zip(encoding.ids, encoding.offsets, strict=True)
            tokens += [Piece(token, at + start, at + end) for token, (start, end) in places]
        return tokens

    def _render_plain(self, conversations: list[Sequence[Message]]) -> list[str | TemplateError]:
        """All in one call; one by one only where the template refuses some of them. They hold roles and texts alone."""
        chats = [[{"role": m["role"], "content": m["content"]} for m in messages] for messages in conversations]
        template = for_each(str(self.tokenizer.chat_template))
        apply = self.tokenizer.apply_chat_template
        named: dict[str, Any] = {"chat_template": template, "all_messages": chats, "separator": _SEPARATOR}
        rendered: list[str] = []
        with contextlib.suppress(TemplateError):
            text = self._bounded(lambda: apply(GREETING, tokenize=False, add_generation_prompt=True, **named))
            rendered = str(text).split(_SEPARATOR)[1:]
        ends = [0, -1] if len(rendered) == len(chats) > 0 else []
        # Two are looked at, in case that the template is one of those that do something else within another.
        if ends and all(rendered[at] == self._render_or_refusal(conversations[at]) for at in ends):
            return list(rendered)
        return [self._render_or_refusal(messages) for messages in conversations]

    def _render_or_refusal(self, messages: Sequence[Message]) -> str | TemplateError:
        try:
            return self.render(messages)
        except TemplateError as error:
            return error

    def _prompt_or_refusal(self, messages: Sequence[Message]) -> list[int] | TemplateError:
        try:
            return self.prompt(messages)
        except TemplateError as error:
            return error

    def encode_control(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False, verbose=False))


def _which(conversations: Sequence[Sequence[Message]], place: int) -> str:
    """One of several prompts, so that a person finds it."""
    return f"prompt {place + 1} of {len(conversations)} ({one_line(conversations[place][-1]['content'], 60)!r})"
