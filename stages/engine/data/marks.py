"""A tokenizer as a folder has it, and what it and its template end, begin and pad turns with: each function looks at
what the template writes.
"""

import contextlib
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from schemas.conversation import Message
from schemas.errors import StageError, refuse
from schemas.text import one_line

if TYPE_CHECKING:
    from stages.engine.data.codec import Codec

GREETING = [{"role": "user", "content": "hello"}]
MARK = "alignflow"
"""Stands for a text where it is looked up what the template writes around one."""
_ANCHOR = 32  # characters before an answer that may decide its first token


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


def pattern_of(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches any special token, longest first. Added tokens that are not special (`<think>`) may be written."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special += [str(token) for token in tokenizer.all_special_tokens]
    return re.compile("|".join(re.escape(token) for token in sorted(set(special), key=len, reverse=True)) or "(?!)")


def controls(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special.union(tokenizer.all_special_ids) - {number(tokenizer.unk_token_id)}


def _around_answer(codec: "Codec", before: Sequence[Message] = GREETING) -> tuple[str, str]:
    """What the template writes before and after an assistant's text; all of it before where the text is not there."""
    chat = [*before, {"role": "assistant", "content": MARK}]
    rendered = codec.render(chat, add_generation_prompt=False)
    left, found, right = rendered.rpartition(MARK)
    return (left, right) if found else (rendered, "")


def turn_marks(codec: "Codec") -> list[Any]:
    """The added tokens that the template writes around messages and that are not special, though they should be.

    Some models declare `<|im_end|>` so: a user's text could then end its turn, and sampling would run past it. Tags
    that answers write themselves, such as `<think>`, come in pairs and stand in the assistant's turn alone.
    """
    plain = [t for t in codec.tokenizer.added_tokens_decoder.values() if not t.special and t.content.strip()]
    if not plain:
        return []
    names = {token.content for token in codec.tokenizer.added_tokens_decoder.values()}
    left, right = _around_answer(codec)
    of_user = ""
    for chat in (GREETING, [{"role": "system", "content": "hello"}, *GREETING]):
        with contextlib.suppress(TemplateError):  # of one without a system role, or that wants the assistant to end it
            of_user += codec.render(chat, add_generation_prompt=False)
    pattern = re.compile("|".join(re.escape(t.content) for t in sorted(plain, key=lambda t: -len(t.content))))
    ends = pattern.findall(right)[:1] if not codec.special.search(right) else []
    written = {*pattern.findall(of_user), *ends}
    tags = {name for name in names if {name.replace("<", "</", 1), name.replace("</", "<", 1)} & (names - {name})}
    written |= set(pattern.findall(left + right + codec.render(GREETING))) - tags
    return [token for token in plain if token.content in written]


def make_special(tokenizer: PreTrainedTokenizerBase, added: Iterable[Any]) -> None:
    """Declare added tokens special: they keep their ids, and their spelling inside a message stays text."""
    tokens = [AddedToken(t.content, special=True, normalized=False, lstrip=t.lstrip, rstrip=t.rstrip) for t in added]
    if tokens:
        tokenizer.add_tokens(tokens, special_tokens=True)  # type: ignore[arg-type]


def before_answers(codec: "Codec") -> tuple[str, str]:
    """(text that stands before an answer, what the template puts between it and the answer).

    Both are empty where an answer's tokens do not depend on what comes before, as with byte-level tokenizers.
    """
    line_break, probe = "\n", "a"
    before, joint, alone = codec.encode_all([line_break, line_break + probe, probe], split_special_tokens=True)
    if joint == [*before, *alone]:
        return "", ""
    prompt = codec.render(GREETING)
    left, _ = _around_answer(codec)
    lead = left.removeprefix(prompt) if left.startswith(prompt) else ""
    *_, tail = codec.special.split(prompt)
    if tail:
        return tail[-_ANCHOR:], lead
    # Behind a special token the tokenizer decides whether a space begins the text.
    behind = codec.encode_control(prompt + probe)[len(codec.encode_control(prompt)) :]
    return ("", "") if behind == alone else (line_break, lead)


def find_end(codec: "Codec") -> int:
    """The first special token that the template writes after an assistant's text, else the end-of-sequence token."""
    tokenizer = codec.tokenizer
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer.encode(_around_answer(codec)[1], add_special_tokens=False)
    ends = [token for token in ids if token in special and token != tokenizer.unk_token_id]
    end = ends[0] if ends else number(tokenizer.eos_token_id)
    if end is None:
        message = "the tokenizer has no token that ends an answer"
        raise StageError(message, kind="no_end_token", fix="set eos_token in tokenizer_config.json")
    return end


def number(token_id: Any) -> int | None:
    """A token id of the tokenizer's, which declares them as all sorts of things."""
    return None if token_id is None else int(token_id)
