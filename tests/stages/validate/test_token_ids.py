"""What the tokenizer makes of texts: answers that become the same tokens, and words that it does not know."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stages.engine.data.codec import Codec
from tests.stages.validate.test_validate import checked, quarantine, refused, write

KNOWN = ["sam", "found", "one", "two", "stones", "and", "was", "glad"]


def lower_casing(model: Any = models.WordLevel, unknown: str = "[UNK]") -> Codec:
    """A tokenizer without bytes for what it does not know, that takes case and accents away."""
    words = {word: number for number, word in enumerate([unknown, "[SEP]", *KNOWN])}
    tokenizer = Tokenizer(model(words, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return Codec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, eos_token="[SEP]"))


CODECS = [lower_casing(), lower_casing(models.WordPiece, "<unknown>")]


def pair(chosen: str, rejected: str, prompt: str = "Sam found") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize("codec", CODECS)
def test_pairs_of_equal_tokens(tmp_path: Path, codec: Codec) -> None:
    """Case and accents go, other words are all one; what differs in a known word or in length is another answer."""
    rows = [
        pair("One stones", "ONE STÔNES"),
        pair("one pebble", "one boulder"),
        pair("one pebble", "one huge boulder"),
        pair("one stones", "two stones"),
        pair("pebbles", "boulders"),
        pair("one", "boulders"),
        pair("one", "two", "wherefore?"),
        pair("one", "two", "Sam, wherefore?"),
    ]
    file = write(tmp_path / "a.jsonl", rows)
    report = checked(file, tmp_path / "out", "preference", codec, max_bad=1, eval_fraction=0)
    entries = [(entry["row"], entry["column"], entry["reason"]) for entry in quarantine(tmp_path / "out")]
    assert sorted(entries) == [
        (0, "rejected", "equal_tokens"),
        (1, "rejected", "equal_tokens"),
        (4, "chosen", "unknown_tokens"),
        (4, "rejected", "unknown_tokens"),
        (5, "rejected", "unknown_tokens"),
        (6, "prompt", "unknown_tokens"),
    ]
    assert report.noted == {"unknown_tokens": [2, 7]}
    assert report.longest is not None and report.kept == 3


def test_rankings_with_equal_tokens(tmp_path: Path) -> None:
    """A ranking stays while some comparison is between different tokens; an uncompared twin is noted."""
    rows = [
        {"prompt": "Sam", "responses": ["one", "One", "two"], "scores": [3, 2, 1]},
        {"prompt": "Sam found", "responses": ["one", "One", "ONE"], "scores": [3, 2, 1]},
        {"prompt": "found", "responses": ["one", "One", "two"], "comparisons": [{"a": 0, "b": 1, "winner": 1}]},
        {"prompt": "found", "responses": ["one", "two"], "scores": [1, 1]},
    ]
    report = checked(write(tmp_path / "a.jsonl", rows), tmp_path / "out", "ranking", CODECS[0], max_bad=1)
    assert [(entry["row"], entry["reason"]) for entry in quarantine(tmp_path / "out")] == [
        (1, "equal_tokens"),
        (2, "equal_tokens"),
    ]
    assert report.noted == {"equal_tokens": [0], "all_tied": [3]}


def test_unknown_words_of_single_answers_and_prompts(tmp_path: Path) -> None:
    """The note counts rows; data of nothing else is refused with what to do about it."""
    rows = [{"prompt": "Sam", "response": text} for text in ("was glad", "was jubilant", "jubilant")]
    report = checked(write(tmp_path / "a.jsonl", rows), tmp_path / "out", "sft", CODECS[0], max_bad=0.5)
    assert (report.reasons, report.notes) == ({"unknown_tokens": 1}, {"unknown_tokens": 1})
    rows = [{"prompt": text} for text in ("was glad", "was jubilant", "jubilant")]
    report = checked(write(tmp_path / "a.jsonl", rows), tmp_path / "out", "prompt", CODECS[0], max_bad=0.5)
    assert (report.checks, report.noted) == ({"prompt: unknown_tokens": 1}, {"unknown_tokens": [1]})
    file = write(tmp_path / "b.jsonl", [{"prompt": "Sam", "response": "jubilant"}])
    message, _ = refused(file, tmp_path / "out", codec=CODECS[0])
    assert "a model whose tokenizer knows" in message


def test_where_the_end_is_declared_as_unknown_nothing_is_noted(tmp_path: Path) -> None:
    """As in GPT-2, whose end is the unknown token too and stands in every prompt of some templates."""
    codec = lower_casing(unknown="[SEP]")
    codec.tokenizer.chat_template = "[SEP]{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = [{"prompt": "Sam", "response": "was glad"}]
    assert checked(write(tmp_path / "a.jsonl", rows), tmp_path / "out", "sft", codec).notes == {}
