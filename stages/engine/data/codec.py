"""From messages to token ids and back. Everything that touches a tokenizer's text goes through `Codec`. No torch."""

import contextlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateRuntimeError
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from schemas.architectures import positions
from schemas.errors import StageError, refuse
from schemas.model_folder import UNREADABLE, config_of, listed_ends, stale_end
from schemas.text import one_line
from stages.engine.data.template import Thought, default_template, without_clock
from stages.runtime.limits import TooMuch, limited

Message = Mapping[str, str]

RENDER_SECONDS = 30.0
RENDER_BYTES = 2 << 30
"""What a chat template may take for the conversations that it is given at once: milliseconds and kilobytes each."""

_GREETING = [{"role": "user", "content": "hello"}]
_MARK = "alignflow"
"""Stands for an answer where it is looked up what the template writes around one."""
_ANCHOR = 32  # characters before an answer that may decide its first token


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
        self._special = _pattern_of(tokenizer)
        _make_special(tokenizer, _turn_marks(self))
        self._special = _pattern_of(tokenizer)
        self.end_id: int = _find_end(self)
        """Ends an assistant's turn."""
        pad, eos = _number(tokenizer.pad_token_id), _number(tokenizer.eos_token_id)
        self.pad_id: int = self.end_id if pad is None else pad
        """Fills rows; may equal `end_id`, so masks go by length and never by id."""
        self.stop_ids: frozenset[int] = frozenset([self.end_id, *([] if eos is None else [eos]), *stop_ids])
        """Any of these ends a sampled answer."""
        self.control_ids: frozenset[int] = self.stop_ids | _controls(tokenizer)
        """What only the template may write: special tokens, without the one for unknown words."""
        self._thought = Thought(self.render(_GREETING))
        self._anchor, self.lead = _before_answers(self)
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
        plain = [not self._special.search("".join(m["content"] for m in messages)) for messages in conversations]
        rendered = self._render_all([c for c, is_plain in zip(conversations, plain, strict=True) if is_plain])
        ids = iter(self.encode_all([text for text in rendered if isinstance(text, str)]))
        texts = (text if isinstance(text, TemplateError) else next(ids) for text in rendered)
        return [
            next(texts) if is_plain else self._prompt_or_refusal(c)
            for c, is_plain in zip(conversations, plain, strict=True)
        ]

    def check_prompts(self, conversations: Sequence[Sequence[Message]], new_tokens: int, field: str, who: str) -> None:
        """Raise StageError for a prompt that the template refuses, or that leaves no room for `new_tokens`, before
        anything long starts. `who` reads them: "the judge".
        """
        for number, ids in enumerate(self.check_templates(conversations, field, who)):
            if self.positions is not None and len(ids) + new_tokens > self.positions:
                room = self.positions - len(ids)
                where = _which(conversations, number)
                message = f"{who} has {self.positions} positions, and {where} takes {len(ids)} of them."
                fix = f"set max_new_tokens to at most {room}, or " if room > 0 else ""
                fix += f"use a model of at least {len(ids) + new_tokens} positions, or give shorter prompts"
                raise refuse(field, f"{new_tokens} new tokens", message, fix, kind="too_long")

    def check_templates(self, conversations: Sequence[Sequence[Message]], field: str, who: str) -> list[list[int]]:
        """Ids of all prompts. Raises StageError for one that the template refuses; `who` reads them: "the judge"."""
        encoded: list[list[int]] = []
        for number, ids in enumerate(self.prompts(conversations)):
            if isinstance(ids, TemplateError):
                roles = ", ".join(dict.fromkeys(message["role"] for message in conversations[number]))
                where = f"{_which(conversations, number)}, with the roles {roles}"
                message = f"the chat template of {who} refuses {where}: {one_line(ids, 200)}."
                fix = "take out what it refuses (a system message, turns that do not alternate), or use another model"
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
        first = [_number(self.tokenizer.pad_token_id), _number(self.tokenizer.unk_token_id)]
        bos = _number(self.tokenizer.bos_token_id)
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
        """The conversation as the template writes it.

        Raises:
            TemplateError: the template refuses it, or fails.
            StageError: it goes beyond the bounds of time and memory.
        """
        return str(self._apply([dict(message) for message in messages], add_generation_prompt))

    def writes_system(self) -> bool:
        """Whether a system message reaches the model; true too where the template refuses it, and so says it."""
        try:
            return _MARK in self.render([{"role": "system", "content": _MARK}, *_GREETING])
        except TemplateError:
            return True

    def _apply(self, chats: Any, add_generation_prompt: bool) -> Any:
        """What the template, which may come from anywhere, writes of one conversation or of several."""
        try:
            with limited(RENDER_SECONDS, RENDER_BYTES):
                return self.tokenizer.apply_chat_template(
                    chats, tokenize=False, add_generation_prompt=add_generation_prompt
                )
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
        for name in (
            "is_local",
            "local_files_only",
            "auto_map",
            "gguf_file",
        ):  # where it came from, which is not content
            self.tokenizer.init_kwargs.pop(name, None)
        self.tokenizer.save_pretrained(str(folder))

    def _encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """Render and tokenize, with the special tokens that contents hold kept apart as text."""
        contents = "".join(message["content"] for message in messages)
        if not self._special.search(contents):
            return self._encode_control(self.render(messages, add_generation_prompt))
        left, right = _unused_characters(contents)
        marked = [
            {**message, "content": self._special.sub(rf"{left}\g<0>{right}", message["content"])}
            for message in messages
        ]
        rendered = self.render(marked, add_generation_prompt)
        ids: list[int] = []
        for piece in re.split(f"({left}[^{right}]*{right})", rendered):
            if piece.startswith(left):
                ids += self._encode_text(piece[1:-1])
            elif piece:
                ids += self._encode_control(piece)
        return ids

    def _render_all(self, conversations: list[Sequence[Message]]) -> list[str | TemplateError]:
        """All in one call; one by one only where the template refuses some of them."""
        if not conversations:
            return []
        chats = [[dict(message) for message in messages] for messages in conversations]
        try:
            return [str(text) for text in self._apply(chats, add_generation_prompt=True)]
        except TemplateError:
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

    def _encode_control(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False, verbose=False))

    def _encode_text(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a folder, read from its tokenizer.json as it stands. Runs no code from the folder."""
    if not folder.is_dir():
        raise refuse("folder", folder, "the model folder does not exist", None, kind="missing_model")
    if not (folder / "tokenizer.json").is_file():
        message = "the folder has no tokenizer.json"
        fix = "pass it as `model.path`: stage `base` converts what transformers can read"
        raise refuse("folder", folder, message, fix, kind="missing_tokenizer")
    quiet = logging.getLogger("transformers.tokenization_utils_base")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it warns when tokenizer_config.json names another class for the same file
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # tokenizers and transformers raise all sorts; each means the same to the user
        message = f"the tokenizer cannot be read: {one_line(error, 300)}"
        fix = "give the files that save_pretrained wrote"
        raise refuse("folder", folder, message, fix, kind="missing_tokenizer") from error
    finally:
        quiet.setLevel(level)


def _which(conversations: Sequence[Sequence[Message]], number: int) -> str:
    """One of several prompts, so that a person finds it."""
    return f"prompt {number + 1} of {len(conversations)} ({one_line(conversations[number][-1]['content'], 60)!r})"


def _pattern_of(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches any special token, longest first. Added tokens that are not special (`<think>`) may be written."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special += [str(token) for token in tokenizer.all_special_tokens]
    return re.compile("|".join(re.escape(token) for token in sorted(set(special), key=len, reverse=True)) or "(?!)")


def _controls(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special.union(tokenizer.all_special_ids) - {_number(tokenizer.unk_token_id)}


def _around_answer(codec: Codec, before: Sequence[Message] = _GREETING) -> tuple[str, str]:
    """What the template writes before and after an assistant's text; all of it before where the text is not there."""
    chat = [*before, {"role": "assistant", "content": _MARK}]
    rendered = codec.render(chat, add_generation_prompt=False)
    left, found, right = rendered.rpartition(_MARK)
    return (left, right) if found else (rendered, "")


def _turn_marks(codec: Codec) -> list[Any]:
    """The added tokens that the template writes around messages and that are not special, though they should be.

    Some models declare `<|im_end|>` so: a user's text could then end its turn, and sampling would run past it. Tags
    that answers write themselves, such as `<think>`, come in pairs and stand in the assistant's turn alone.
    """
    plain = [t for t in codec.tokenizer.added_tokens_decoder.values() if not t.special and t.content.strip()]
    if not plain:
        return []
    names = {token.content for token in codec.tokenizer.added_tokens_decoder.values()}
    left, right = _around_answer(codec)
    of_user = codec.render(_GREETING, add_generation_prompt=False)
    with contextlib.suppress(TemplateError):  # of a template without a system role
        of_user += codec.render([{"role": "system", "content": "hello"}, *_GREETING], add_generation_prompt=False)
    pattern = re.compile("|".join(re.escape(t.content) for t in sorted(plain, key=lambda t: -len(t.content))))
    ends = pattern.findall(right)[:1] if not codec._special.search(right) else []
    written = {*pattern.findall(of_user), *ends}
    tags = {name for name in names if {name.replace("<", "</", 1), name.replace("</", "<", 1)} & (names - {name})}
    written |= set(pattern.findall(left + right + codec.render(_GREETING))) - tags
    return [token for token in plain if token.content in written]


def _make_special(tokenizer: PreTrainedTokenizerBase, added: Iterable[Any]) -> None:
    """Declare added tokens special: they keep their ids, and their spelling inside a message stays text."""
    tokens = [AddedToken(t.content, special=True, normalized=False, lstrip=t.lstrip, rstrip=t.rstrip) for t in added]
    if tokens:
        tokenizer.add_tokens(tokens, special_tokens=True)  # type: ignore[arg-type]


def _before_answers(codec: Codec) -> tuple[str, str]:
    """(text that stands before an answer, what the template puts between it and the answer).

    Both are empty where an answer's tokens do not depend on what comes before, as with byte-level tokenizers.
    """
    line_break, probe = "\n", "a"
    before, joint, alone = codec.encode_all([line_break, line_break + probe, probe], split_special_tokens=True)
    if joint == [*before, *alone]:
        return "", ""
    prompt = codec.render(_GREETING)
    left, _ = _around_answer(codec)
    lead = left.removeprefix(prompt) if left.startswith(prompt) else ""
    *_, tail = codec._special.split(prompt)
    if tail:
        return tail[-_ANCHOR:], lead
    # Behind a special token the tokenizer decides whether a space begins the text.
    behind = codec._encode_control(prompt + probe)[len(codec._encode_control(prompt)) :]
    return ("", "") if behind == alone else (line_break, lead)


def _find_end(codec: Codec) -> int:
    """The first special token that the template writes after an assistant's text, else the end-of-sequence token."""
    tokenizer = codec.tokenizer
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer.encode(_around_answer(codec)[1], add_special_tokens=False)
    ends = [token for token in ids if token in special and token != tokenizer.unk_token_id]
    end = ends[0] if ends else _number(tokenizer.eos_token_id)
    if end is None:
        message = "the tokenizer has no token that ends an answer"
        raise StageError(message, kind="no_end_token", fix="set eos_token in tokenizer_config.json")
    return end


def _number(token_id: Any) -> int | None:
    """A token id of the tokenizer's, which declares them as all sorts of things."""
    return None if token_id is None else int(token_id)


def _unused_characters(text: str) -> tuple[str, str]:
    """Two private-use characters that the text does not hold, to mark places in it."""
    unused = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
    return next(unused), next(unused)
