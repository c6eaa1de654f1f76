"""Splits rows by how their prompts begin, derives further kinds so that one data set can feed every method
(`DERIVES`), writes them."""

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from schemas.config.data import Kind, ValidateParams
from schemas.rows import Numbers, may_repeat, without_weights
from stages.validate.together import HEAD, as_one, opposed_thumbs, rankings

PARTS = ("train", "eval", "gold", "test")
_CHUNK = 20_000


def part(params: ValidateParams) -> pl.Expr:
    """A row's part, told by `cluster` alone: prompts that begin alike are on the same side in all data.

    The draws in [0, 1) run eval, gold, train, test. `none`: other data may hold the row's prompt out.
    """
    held, gold, test = params.eval_fraction, params.gold_fraction, params.test_fraction
    below, above = max(held, params.others_eval_fraction), 1 - max(test, params.others_test_fraction)
    draw = pl.col("cluster").str.slice(0, 8).str.to_integer(base=16) / 2**32
    choice = pl.when(draw < held).then(pl.lit("eval")).when(draw >= 1 - test).then(pl.lit("test"))
    choice = choice.when((draw < below) | (draw >= above)).then(pl.lit("none"))
    return choice.when(draw - below < gold * (above - below)).then(pl.lit("gold")).otherwise(pl.lit("train"))


def write(kind: Kind, frame: pl.DataFrame, out: Path) -> dict[str, dict[str, int]]:
    """Write Parquet of every part and kind that has rows; returns part -> kind -> rows. `frame` has column `part`."""
    counts: dict[str, dict[str, int]] = {name: {} for name in PARTS}
    for name in PARTS:
        rows = frame.filter(pl.col("part") == name).drop("part")
        for derived, table in derive(kind, rows):
            if table.height:
                store(table, out / name, derived)
                counts[name][derived] = table.height
    return counts


def store(table: pl.DataFrame, folder: Path, kind: str) -> None:
    """Write the rows of a kind as Parquet."""
    folder.mkdir(exist_ok=True)
    # For every row group polars copies the whole chunk that it is in: small chunks keep that linear.
    pieces = pl.concat(table.iter_slices(_CHUNK), rechunk=False)
    pieces.write_parquet(folder / f"{kind}.parquet", compression_level=1)


def derive(kind: Kind, frame: pl.DataFrame) -> Iterator[tuple[Kind, pl.DataFrame]]:
    """Every kind that these rows give, the source kind too, one after the other: each takes as much memory as the rows.

    Frames may be empty; exact repetitions are left out. A ranking without any comparison (all answers tied) gives its
    prompt only. Weights of messages are for `sft` alone.
    """
    yield "prompt", distinct(without_weights(frame.select(HEAD)), "prompt")
    if kind == "ranking":
        ranked = frame.filter(pl.col("winners").list.len() > 0)
        plain = without_weights(ranked)
        yield "ranking", plain
        yield "preference", distinct(_pairs(plain))
        yield from _liked_of("ranking", ranked)
    elif kind == "preference":
        plain = without_weights(frame)
        yield "preference", plain
        yield "ranking", _as_rankings(plain)
        yield from _liked_of("preference", frame)
    elif kind == "feedback":
        opposed = opposed_thumbs(frame)
        unclear = opposed.filter(pl.col("net") <= 0)["row"].implode()
        liked = frame.filter(pl.col("label") & ~pl.col("row").is_in(unclear))
        yield "feedback", without_weights(frame)
        yield "sft", distinct(liked.select(*HEAD, response="completion"))
    elif kind == "sft":
        yield "sft", frame


def _as_rankings(frame: pl.DataFrame) -> pl.DataFrame:
    margins = pl.when(pl.col("margin").is_not_null()).then(pl.concat_list("margin")).cast(Numbers)
    return rankings("preference", frame).with_columns(frame.select(margins=margins))


def _liked_of(kind: Kind, frame: pl.DataFrame) -> Iterator[tuple[Kind, pl.DataFrame]]:
    """Thumbs, and the answers to imitate. Rows of one prompt that share answers are one ranking for both."""
    alone, joined = as_one(kind, frame)
    thumbs = _thumbs(alone) if kind == "ranking" else _thumbs_of_pairs(alone)
    yield "feedback", without_weights(_in_order(thumbs, _thumbs(joined)))
    best = _best(alone) if kind == "ranking" else alone.select(*HEAD, response="chosen")
    yield "sft", _in_order(best, _best(joined))


def _in_order(alone: pl.DataFrame, joined: pl.DataFrame) -> pl.DataFrame:
    return pl.concat([alone, joined]).sort("row", maintain_order=True) if joined.height else alone


def _thumbs_of_pairs(frame: pl.DataFrame) -> pl.DataFrame:
    """Of two answers one is up and one is down."""
    pieces = [_both(piece) for piece in frame.iter_slices(_CHUNK)] or [_both(frame)]
    return pl.concat(pieces, rechunk=False)


def _both(frame: pl.DataFrame) -> pl.DataFrame:
    up = frame.select(*HEAD, completion="chosen", label=pl.lit(True))
    down = frame.select(*HEAD, completion="rejected", label=pl.lit(False))
    return pl.concat([up, down]).sort("row", maintain_order=True)


def _pairs(frame: pl.DataFrame) -> pl.DataFrame:
    """One row for every comparison."""
    nothing = pl.col("winners").list.eval(pl.lit(None, pl.Float64))
    pairs = frame.with_columns(margins=pl.col("margins").fill_null(nothing)).explode("winners", "losers", "margins")
    return pairs.select(
        *HEAD,
        chosen=pl.col("responses").list.get(pl.col("winners")),
        rejected=pl.col("responses").list.get(pl.col("losers")),
        margin="margins",
    )


def _net_wins(frame: pl.DataFrame) -> pl.DataFrame:
    """(place, answer, net): for every answer that was compared, its comparisons won less those lost.

    Places count the rows of the frame: of one source row several may be made.
    """
    frame = frame.with_row_index("place")
    sides = [frame.select("place", answer=side, net=pl.lit(sign)).explode("answer") for side, sign in _SIGNS]
    return pl.concat(sides).group_by("place", "answer").agg(pl.col("net").sum()).sort("place", "answer")


_SIGNS = (("winners", 1), ("losers", -1))


def _thumbs(frame: pl.DataFrame) -> pl.DataFrame:
    """Thumbs up for answers that won more often than they lost, down for the reverse; none for those in the middle."""
    judged = _net_wins(frame).filter(pl.col("net") != 0)
    judged = judged.join(frame.with_row_index("place"), on="place", maintain_order="left")
    return judged.select(*HEAD, completion=_text_of("answer"), label=pl.col("net") > 0)


def _best(frame: pl.DataFrame) -> pl.DataFrame:
    """The answer with the most wins less losses, of equals the first; none where all have won as often as lost."""
    best = _net_wins(frame).filter(pl.col("net") > 0).sort("place", "net", "answer", descending=[False, True, False])
    first = best.unique("place", keep="first", maintain_order=True)
    first = first.join(frame.with_row_index("place"), on="place", maintain_order="left")
    return first.select(*HEAD, response=_text_of("answer"))


def _text_of(answer: str) -> pl.Expr:
    return pl.col("responses").list.get(pl.col(answer))


def distinct(frame: pl.DataFrame, *content: str) -> pl.DataFrame:
    """The first of rows that are equal in some columns; where none is named, in all but their number."""
    names = content or [name for name in frame.columns if name != "row"]
    maybe = may_repeat(frame, names)
    first = frame.filter(maybe).select(pl.struct(names).is_first_distinct()).to_series()
    return frame.filter((~maybe).scatter(maybe.arg_true(), first)).rechunk()
