"""Splits rows by how their prompts begin, derives further kinds so that one data set can feed every method
(`DERIVES`), writes them."""

from pathlib import Path

import polars as pl

from schemas.config import Kind, ValidateParams
from schemas.rows import Numbers, may_repeat

PARTS = ("train", "eval", "gold", "test")
_HEAD = ["row", "prompt", "prompt_id", "cluster"]
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
    counts: dict[str, dict[str, int]] = {}
    for name in PARTS:
        rows = frame.filter(pl.col("part") == name).drop("part")
        tables = {kind: table for kind, table in derive(kind, rows).items() if table.height}
        counts[name] = {kind: table.height for kind, table in tables.items()}
        for derived in list(tables):
            (out / name).mkdir(exist_ok=True)
            # For every row group polars copies the whole chunk that it is in: small chunks keep that linear.
            pieces = pl.concat(tables.pop(derived).iter_slices(_CHUNK), rechunk=False)
            pieces.write_parquet(out / name / f"{derived}.parquet")
    return counts


def derive(kind: Kind, frame: pl.DataFrame) -> dict[Kind, pl.DataFrame]:
    """Every kind that these rows give, the source kind too. Frames may be empty; exact repetitions are left out.

    A ranking without any comparison (all answers tied) gives its prompt only.
    """
    kinds: dict[Kind, pl.DataFrame] = {"prompt": _distinct(frame.select(_HEAD), "prompt")}
    if kind == "ranking":
        kinds |= _from_ranking(frame.filter(pl.col("winners").list.len() > 0))
    elif kind == "preference":
        kinds |= _from_preference(frame)
    elif kind == "feedback":
        kinds |= {"feedback": frame, "sft": _liked(frame)}
    elif kind == "sft":
        kinds |= {"sft": frame}
    return kinds


def _from_preference(frame: pl.DataFrame) -> dict[Kind, pl.DataFrame]:
    ranking = frame.select(
        *_HEAD,
        responses=pl.concat_list("chosen", "rejected"),
        winners=pl.concat_list(pl.lit(0, pl.Int64)),
        losers=pl.concat_list(pl.lit(1, pl.Int64)),
        margins=pl.when(pl.col("margin").is_not_null()).then(pl.concat_list("margin")).cast(Numbers),
    )
    up = frame.select(*_HEAD, completion="chosen", label=pl.lit(True))
    down = frame.select(*_HEAD, completion="rejected", label=pl.lit(False))
    feedback = _distinct(pl.concat([up, down]).sort("row", maintain_order=True))
    return {"preference": frame, "ranking": ranking, "feedback": feedback, "sft": _liked(feedback)}


def _from_ranking(frame: pl.DataFrame) -> dict[Kind, pl.DataFrame]:
    return {
        "ranking": frame,
        "preference": _distinct(_pairs(frame)),
        "feedback": _distinct(_thumbs(frame)),
        "sft": _distinct(_best(frame)),
    }


def _pairs(frame: pl.DataFrame) -> pl.DataFrame:
    """One row for every comparison."""
    nothing = pl.col("winners").list.eval(pl.lit(None, pl.Float64))
    pairs = frame.with_columns(margins=pl.col("margins").fill_null(nothing)).explode("winners", "losers", "margins")
    return pairs.select(
        *_HEAD,
        chosen=pl.col("responses").list.get(pl.col("winners")),
        rejected=pl.col("responses").list.get(pl.col("losers")),
        margin="margins",
    )


def _net_wins(frame: pl.DataFrame) -> pl.DataFrame:
    """(row, answer, net): for every answer that was compared, its comparisons won less those lost."""
    sides = [frame.select("row", answer=side, net=pl.lit(sign)).explode("answer") for side, sign in _SIGNS]
    return pl.concat(sides).group_by("row", "answer").agg(pl.col("net").sum()).sort("row", "answer")


_SIGNS = (("winners", 1), ("losers", -1))


def _thumbs(frame: pl.DataFrame) -> pl.DataFrame:
    """Thumbs up for answers that won more often than they lost, down for the reverse; none for those in the middle."""
    judged = _net_wins(frame).filter(pl.col("net") != 0).join(frame, on="row", maintain_order="left")
    return judged.select(*_HEAD, completion=_text_of("answer"), label=pl.col("net") > 0)


def _best(frame: pl.DataFrame) -> pl.DataFrame:
    """The answer with the most wins less losses; of equals the first."""
    best = _net_wins(frame).sort("row", "net", "answer", descending=[False, True, False])
    first = best.unique("row", keep="first", maintain_order=True).join(frame, on="row", maintain_order="left")
    return first.select(*_HEAD, response=_text_of("answer"))


def _text_of(answer: str) -> pl.Expr:
    return pl.col("responses").list.get(pl.col(answer))


def _liked(feedback: pl.DataFrame) -> pl.DataFrame:
    return _distinct(feedback.filter("label").select(*_HEAD, response="completion"))


def _distinct(frame: pl.DataFrame, *content: str) -> pl.DataFrame:
    """The first of rows that are equal in some columns; where none is named, in all but their number."""
    names = content or [name for name in frame.columns if name != "row"]
    maybe = may_repeat(frame, names)
    first = frame.filter(maybe).select(pl.struct(names).is_first_distinct()).to_series()
    return frame.filter((~maybe).scatter(maybe.arg_true(), first)).rechunk()
