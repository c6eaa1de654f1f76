"""Texts that begin and end alike, as prompts of one template do, tokenized without doing their ends again and again.

A tokenizer splits a text at its added tokens before it does anything else, so that what stands before such a token
and what stands behind it have the ids that they have on their own.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

Encode = Callable[[Sequence[str]], list[list[int]]]


class Cuts(NamedTuple):
    """Where the texts of a tokenizer may be cut."""

    added: re.Pattern[str]
    """Matches any added token, the longest first, as the tokenizer does."""
    tokens: frozenset[str]
    """Those at which a text may be cut."""


def cuts_of(tokenizer: PreTrainedTokenizerBase) -> Cuts:
    """Only tokens that are found whatever stands beside them, and that leave the spaces beside them alone."""
    added = list(tokenizer.added_tokens_decoder.values())
    names = sorted({token.content for token in added}, key=len, reverse=True)
    plain = {t.content for t in added if t.special and not (t.lstrip or t.rstrip or t.normalized)}
    within_others = {name for name in plain if any(name in other for other in names if other != name)}
    by_words = any(token.single_word for token in added)  # found between the borders of words, and a cut is one
    tokens = frozenset() if by_words else frozenset(plain - within_others)
    return Cuts(re.compile("|".join(map(re.escape, names)) or "(?!)"), tokens)


def encode_alike(texts: Sequence[str], encode: Encode, cuts: Cuts) -> list[list[int]]:
    """`encode(texts)`, where `encode` reads special tokens as such: what all texts begin and end with is done once."""
    begin, left = _begin(texts, cuts)
    end, right = _end(texts, cuts)
    # SentencePiece's tokenizers may put a space before the very first word of a text.
    joint, *apart = encode([f"{left}a{right}", left, "a", right])
    if not (begin or end) or joint != [token for ids in apart for token in ids]:
        return encode(texts)
    pieces: list[str] = []
    is_cut: list[bool] = []
    for text in texts:
        stop = len(text) - len(end)
        # A text may hold added tokens of its own, and one of these may reach into the end.
        found = cuts.added.search(text, len(begin))
        is_cut.append(not end or (found is not None and found.start() == stop))
        pieces.append(text[len(begin) : stop] if is_cut[-1] else text)
    first, last = encode([begin, end])
    return [[*first, *ids, *last] if cut else ids for ids, cut in zip(encode(pieces), is_cut, strict=True)]


def _begin(texts: Sequence[str], cuts: Cuts) -> tuple[str, str]:
    """(what all texts begin with, up to a token that they may be cut at; that token). Both empty without one."""
    common = _common(texts)
    found = [match for match in cuts.added.finditer(common) if match.group() in cuts.tokens]
    return (common[: found[-1].end()], found[-1].group()) if found else ("", "")


def _end(texts: Sequence[str], cuts: Cuts) -> tuple[str, str]:
    """(what all texts end with, from a token that they may be cut at; that token). Both empty without one."""
    common = _common([text[::-1] for text in texts])[::-1]
    found = next((match for match in cuts.added.finditer(common) if match.group() in cuts.tokens), None)
    return (common[found.start() :], found.group()) if found else ("", "")


def _common(texts: Sequence[str]) -> str:
    """What all texts begin with: the first and the last in alphabetical order differ from each other the soonest."""
    first, last = min(texts, default=""), max(texts, default="")
    same = next(
        (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
    )
    return first[:same]
