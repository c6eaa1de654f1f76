"""Prompts that are rendered and tokenized together have the ids that each has alone."""

from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stages.engine.data.alike import cuts_of, encode_alike
from stages.engine.data.codec import Codec
from tests.support.families import FAMILIES

TEXTS = [
    "hello",
    " space before",
    "two  lines\n",
    "\tTab and \u00e9\U0001f642",
    "<think> maybe </s>",
    "end ",
    "7",
    "x" * 60,
]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_together_have_the_ids_of_each_alone(family: str) -> None:
    codec = Codec(FAMILIES[family].tokenizer())
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    chats += [[*chats[0], {"role": "assistant", "content": text}, *chats[1]] for text in TEXTS]
    assert codec.prompts(chats) == [codec.prompt(chat) for chat in chats]
    assert codec.prompts(chats[:1]) == [codec.prompt(chats[0])]
    assert codec.prompts([]) == []


def test_conversations_are_rendered_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = FAMILIES["qwen2"].tokenizer()
    tokenizer.chat_template = f"{tokenizer.chat_template}\n"  # Jinja leaves out a template's last line break
    codec = Codec(tokenizer)
    calls: list[Any] = []
    apply = codec.tokenizer.apply_chat_template
    monkeypatch.setattr(
        codec.tokenizer, "apply_chat_template", lambda *given, **named: calls.append(given) or apply(*given, **named)
    )
    codec.prompts([[{"role": "user", "content": f"number {i}"}] for i in range(50)])
    assert len(calls) == 3  # all at once, and two of them alone to compare


def test_a_template_that_does_something_else_within_a_loop_is_rendered_alone() -> None:
    tokenizer = FAMILIES["qwen2"].tokenizer()
    tokenizer.chat_template = "{% if loop is defined %}other {% endif %}{{ messages[0]['content'] }}{{ eos_token }}"
    codec = Codec(tokenizer)
    chats = [[{"role": "user", "content": text}] for text in ("one", "two", "three")]
    assert codec.prompts(chats) == [codec.prompt(chat) for chat in chats]


def words(*added: AddedToken) -> PreTrainedTokenizerFast:
    """One token for each word and each mark of these tests."""
    known = ["[UNK]", *(f"w{i}" for i in range(9)), "a", "<", ">", "end", "user"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def special(text: str, **how: bool) -> AddedToken:
    return AddedToken(text, special=True, normalized=False, **how)


def seen(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What is tokenized in the place of the texts. Their ids must be those of the whole texts."""
    asked: list[list[str]] = []

    def encode(some: Sequence[str]) -> list[list[int]]:
        asked.append(list(some))
        return [tokenizer.encode(text, add_special_tokens=False) for text in some]

    whole = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert encode_alike(texts, encode, cuts_of(tokenizer)) == whole
    return asked[-1]


def test_what_all_texts_begin_and_end_with_is_tokenized_once() -> None:
    texts = [f"<s>user {i}</s>end" for i in ("w1", "w2 w3")]
    assert seen(texts, words(special("<s>"), special("</s>"))) == ["user w1", "user w2 w3"]


@pytest.mark.parametrize("how", ["lstrip", "rstrip", "single_word"])
def test_a_token_that_looks_at_what_stands_beside_it_is_no_place_to_cut(how: str) -> None:
    texts = [f"<s> {i} </s> end" for i in ("w1", "w2 w3")]
    odd = words(special("<s>", **{how: True}), special("</s>", **{how: True}))
    assert seen(texts, odd) == texts


def test_a_token_that_must_stand_alone_is_not_found_where_a_cut_makes_it_so() -> None:
    alone = words(special("S"), special("E"), AddedToken("w1", single_word=True, normalized=False))
    texts = ["Sw1E", "Sw2E"]
    assert seen(texts, alone) == texts


def test_a_space_before_a_text_is_not_put_before_a_piece() -> None:
    first = words(special("<s>"), special("</s>"))
    first.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # type: ignore[attr-defined]
    texts = ["<s>w1</s>", "<s>w2</s>"]
    assert seen(texts, first) == texts


def test_a_longer_token_across_a_border_is_found() -> None:
    marks = words(special("<s>"), special("</s>"), special("w2</s>"), special("<s>w1"))
    texts = ["<s>w3</s>", "<s>w1</s>", "<s>w3w2</s>"]
    assert seen(texts, marks) == texts  # each mark is a part of a longer one
    behind = words(special("<s>"), special("</s>"), special("w2</"))
    texts = ["<s>w3</s>", "<s>w2</s>"]
    assert seen(texts, behind) == ["w3", texts[1]]
