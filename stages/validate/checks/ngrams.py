"""Rows that say nearly what others say, told by the sequences of n words (n-grams) that they share.

A prompt is a near-duplicate where an earlier prompt, in other words, has most of its n-grams. A row overlaps with the
evaluation where one n-gram of its prompt or answers stands in a prompt of the evaluation; Brown et al. 2020 (GPT-3,
appendix C) take n = 13. Both are counted, and the rows stay: quotations and fixed phrases overlap too.
"""

from collections.abc import Iterator

import polars as pl

from schemas.rows import may_repeat
from stages.validate.checks.table_checks import answers_of, evaluation_prompts, plain_text
from stages.validate.context import Context, Finding, note
from stages.validate.parts import part

NEAR = 0.8
"""Share of a prompt's n-grams that one earlier prompt has, from which on the two count as near-duplicates."""
_SLICE = 50_000
_BASE = 0x9E3779B97F4A7C15  # odd, so that no product of it loses bits
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_CONTENTS = pl.col("prompt").list.eval(pl.element().struct.field("content")).list.join("\n")


def ngrams(texts: pl.DataFrame, n: int) -> pl.DataFrame:
    """(row, gram) of a frame with `row` and `text`: the hashes of all sequences of n words, each once per row.

    Scripts that put no spaces between words count by characters.
    """
    spaced = plain_text(pl.col("text")).str.replace_all(_UNSPACED, " $0 ").str.extract_all(r"\S+")
    words = texts.select("row", word=spaced).explode("word")
    hashed = words.select("row", word=pl.col("word").hash())
    # A polynomial of the words' hashes, modulo 2 ** 64: other words, or the same in another order, are another number.
    gram = pl.lit(0, pl.UInt64)
    for place in range(n):
        gram = gram * pl.lit(_BASE, pl.UInt64) + pl.col("word").shift(-place)
    whole = pl.col("row") == pl.col("row").shift(1 - n)
    grams = hashed.select("row", gram=gram, whole=whole).filter("whole").select("row", "gram")
    return grams.unique(maintain_order=True)


def near_duplicates(frame: pl.DataFrame, context: Context) -> Iterator[Finding]:
    """Notes prompts of which an earlier one, that is not the same, has most n-grams.

    An n-gram counts only for the first prompt that has it, which keeps the work linear and may find too few.
    """
    if context.params.ngrams is None:
        return
    frame = frame.unique("prompt_id", keep="first", maintain_order=True)
    grams = pl.concat(ngrams(piece.select("row", text=_CONTENTS), context.params.ngrams) for piece in _slices(frame))
    sizes = grams.group_by("row").agg(size=pl.len())
    grams = grams.filter(may_repeat(grams, ["gram"]))
    first = grams.group_by("gram").agg(first=pl.col("row").min())
    shared = grams.join(first, on="gram").filter(pl.col("first") < pl.col("row"))
    most = shared.group_by("row", "first").agg(common=pl.len()).join(sizes, on="row")
    near = most.filter(pl.col("common") >= NEAR * pl.col("size"))["row"].unique().sort()
    yield from (note(row, "near_duplicate") for row in near)


def overlaps(frame: pl.DataFrame, context: Context) -> Iterator[Finding]:
    """Notes rows to train on that share an n-gram with a prompt of the evaluation, or with one that is held out."""
    n = context.params.ngrams
    if n is None:
        return
    side = part(context.params)
    held_out = frame.filter(side.is_in(["eval", "test"])).select("row", text=_CONTENTS)
    others = evaluation_prompts(context, "prompt").with_row_index("row")
    texts = [held_out, others.select(pl.col("row").cast(pl.Int64), text=_CONTENTS)] if others.height else [held_out]
    known = pl.concat(ngrams(piece, n)["gram"] for text in texts for piece in _slices(text)).unique()
    for piece in _slices(frame.filter(side.is_in(["train", "gold"]))):
        text = pl.concat_str(_CONTENTS, *answers_of(context.params.kind), separator="\n")
        grams = ngrams(piece.select("row", text=text), n)
        rows = grams.filter(pl.col("gram").is_in(known.implode()))["row"].unique().sort()
        yield from (note(row, "overlaps_evaluation") for row in rows)


def _slices(frame: pl.DataFrame) -> list[pl.DataFrame]:
    return list(frame.iter_slices(_SLICE)) or [frame]
