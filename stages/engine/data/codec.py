"""From messages to token ids and back. Everything that touches a tokenizer's text goes through `Codec`. No torch."""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateRuntimeError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from schemas.errors import StageError, refuse
from schemas.text import one_line
from stages.runtime.limits import TooMuch, limited

Message = Mapping[str, str]

RENDER_SECONDS = 30.0
RENDER_BYTES = 2 << 30
"""What a chat template may take for the conversations that it is given at once: milliseconds and kilobytes each."""

# What a tokenizer without a chat template gets: the messages' text, one after the other, each on a line of its own.
# An assistant's turn ends with the end-of-sequence token. `{BOS}` is filled in where the tokenizer starts texts so.
DEFAULT_TEMPLATE = (
    "{BOS}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)


class Codec:
    """A tokenizer with its chat template: prompts, answers and rendered chats."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int] = ()):
        """`stop_ids`: further tokens that end an answer, as the model's generation config lists them."""
        self.tokenizer = tokenizer
        tokenizer.clean_up_tokenization_spaces = False
        if not tokenizer.chat_template:
            tokenizer.chat_template = default_template(tokenizer)
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

    @classmethod
    def load(cls, folder: Path | str) -> "Codec":
        """Read the tokenizer of a model folder. Raises StageError when there is none."""
        tokenizer = load_tokenizer(Path(folder))
        try:
            return cls(tokenizer, _stop_ids(Path(folder)))
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

    def encode_all(self, texts: Sequence[str], split_special_tokens: bool = False) -> list[list[int]]:
        """Ids of texts, on all cores, without special tokens put around them."""
        backend: Any = self.tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = split_special_tokens
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def answer(self, text: str) -> list[int]:
        """Ids of an answer, tokenized on its own, and the token that ends it."""
        return [*self._encode_text(text), self.end_id]

    def text(self, ids: Sequence[int]) -> str:
        """The answer in words: up to its first stop token, without special tokens."""
        stop = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return str(self.tokenizer.decode(list(ids[:stop]), skip_special_tokens=True))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as the template writes it.

        Raises:
            TemplateError: the template refuses it, or fails.
            StageError: it goes beyond the bounds of time and memory.
        """
        return str(self._apply([dict(message) for message in messages], add_generation_prompt))

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


def default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """`DEFAULT_TEMPLATE`, starting with BOS exactly when the tokenizer starts its own texts with it."""
    starts = tokenizer.bos_token_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
    return DEFAULT_TEMPLATE.replace("{BOS}", "{{ bos_token }}" if starts else "")


def with_system_prompt(template: str, system_prompt: str) -> str:
    """The template, with `system_prompt` put before conversations that bring no system message."""
    return (
        "{% if messages[0]['role'] != 'system' %}"
        # Jinja reads Python's string literals, so `repr` is the escape.
        f"{{% set messages = [{{'role': 'system', 'content': {system_prompt!r}}}] + messages %}}"
        "{% endif %}\n" + template  # the newline goes, and the template still begins at the start of a line
    )


def _pattern_of(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches any special token, longest first. Added tokens that are not special (`<think>`) may be written."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special += [str(token) for token in tokenizer.all_special_tokens]
    return re.compile("|".join(re.escape(token) for token in sorted(set(special), key=len, reverse=True)) or "(?!)")


def _controls(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special.union(tokenizer.all_special_ids) - {_number(tokenizer.unk_token_id)}


def _find_end(codec: Codec) -> int:
    """The first special token that the template writes after an assistant's text, else the end-of-sequence token."""
    tokenizer, mark = codec.tokenizer, "alignflow"
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": mark}]
    _, seen, after = codec.render(chat, add_generation_prompt=False).rpartition(mark)
    ids = tokenizer.encode(after, add_special_tokens=False) if seen else []
    ends = [token for token in ids if token in special and token != tokenizer.unk_token_id]
    end = ends[0] if ends else _number(tokenizer.eos_token_id)
    if end is None:
        message = "the tokenizer has no token that ends an answer"
        raise StageError(message, kind="no_end_token", fix="set eos_token in tokenizer_config.json")
    return end


def _number(token_id: Any) -> int | None:
    """A token id of the tokenizer's, which declares them as all sorts of things."""
    return None if token_id is None else int(token_id)


def _stop_ids(folder: Path) -> list[int]:
    """The end tokens that the folder's generation_config.json lists."""
    file = folder / "generation_config.json"
    try:
        listed = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        return [] if listed is None else [int(i) for i in (listed if isinstance(listed, list) else [listed])]
    except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        message = f"generation_config.json cannot be read: {one_line(error, 300)}"
        raise refuse("folder", folder, message, "fix or remove it", kind="model") from error


def _unused_characters(text: str) -> tuple[str, str]:
    """Two private-use characters that the text does not hold, to mark places in it."""
    unused = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
    return next(unused), next(unused)
