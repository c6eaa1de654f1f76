"""What the rows of one kind give of another (`DERIVES`), so that one data set can feed every method."""

from collections.abc import Callable
from functools import cache

import polars as pl

from schemas.config.data import Kind
from schemas.rows import Numbers, may_repeat, without_weights
from stages.engine.tables.together import HEAD, as_one, opposed_thumbs, rankings

_CHUNK = 20_000


def derive(kind: Kind, frame: pl.DataFrame) -> dict[Kind, Callable[[], pl.DataFrame]]:
    """Every kind that these rows give, the source kind too, each as a call: it takes as much memory as the rows.

    Frames may be empty; exact repetitions are left out. A ranking without any comparison (all answers tied) gives its
    prompt only. Weights of messages are for `sft` alone.
    """
    makes: dict[Kind, Callable[[], pl.DataFrame]] = {
        "prompt": lambda: distinct(without_weights(frame.select(HEAD)), "prompt")
    }
    if kind == "ranking":
        ranked = frame.filter(pl.col("winners").list.len() > 0)
        makes["ranking"] = lambda: without_weights(ranked)
        makes["preference"] = lambda: distinct(_pairs(without_weights(ranked)))
        makes |= _liked_of("ranking", ranked)
    elif kind == "preference":
        makes["preference"] = lambda: without_weights(frame)
        makes["ranking"] = lambda: _as_rankings(without_weights(frame))
        makes |= _liked_of("preference", frame)
    elif kind == "feedback":
        makes["feedback"] = lambda: without_weights(frame)
        makes["sft"] = lambda: distinct(_clearly_liked(frame).select(*HEAD, response="completion"))
    elif kind == "sft":
        makes["sft"] = lambda: frame
    return makes


_OF_ONE: dict[Kind, dict[Kind, int]] = {
    "preference": {"prompt": 1, "preference": 1, "ranking": 1, "feedback": 2, "sft": 1},
    "sft": {"prompt": 1, "sft": 1},
    "prompt": {"prompt": 1},
}
"""What every row of a kind gives where no other one has its prompt. Of the other kinds it depends on the row."""


def counted(kind: Kind, frame: pl.DataFrame, own: pl.Series, shared: pl.Series) -> dict[Kind, int]:
    """The heights of what `derive` makes of some rows of a frame, without making most of it.

    own: which rows, with all that share a prompt. shared: at least the rows whose prompt another row has.
    """
    each = _OF_ONE.get(kind, {})
    some = frame.filter(own & shared if each else own)
    alone = int(own.sum()) - some.height
    return {given: make().height + alone * each.get(given, 0) for given, make in derive(kind, some).items()}


def _clearly_liked(frame: pl.DataFrame) -> pl.DataFrame:
    """Thumbs up, without answers that have as many thumbs down."""
    opposed = opposed_thumbs(frame)
    unclear = opposed.filter(pl.col("net") <= 0)["row"].implode()
    return frame.filter(pl.col("label") & ~pl.col("row").is_in(unclear))


def _as_rankings(frame: pl.DataFrame) -> pl.DataFrame:
    margins = pl.when(pl.col("margin").is_not_null()).then(pl.concat_list("margin")).cast(Numbers)
    return rankings("preference", frame).with_columns(frame.select(margins=margins))


def _liked_of(kind: Kind, frame: pl.DataFrame) -> dict[Kind, Callable[[], pl.DataFrame]]:
    """Thumbs, and the answers to imitate. Rows of one prompt that share answers are one ranking for both."""
    apart = cache(lambda: as_one(kind, frame))

    def feedback() -> pl.DataFrame:
        alone, joined = apart()
        thumbs = _thumbs(alone) if kind == "ranking" else _thumbs_of_pairs(alone)
        return without_weights(_in_order(thumbs, _thumbs(joined)))

    def sft() -> pl.DataFrame:
        alone, joined = apart()
        best = _best(alone) if kind == "ranking" else alone.select(*HEAD, response="chosen")
        return _in_order(best, _best(joined))

    return {"feedback": feedback, "sft": sft}


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
