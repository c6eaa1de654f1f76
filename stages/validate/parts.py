"""Splits rows by how their prompts begin, and writes them."""

from pathlib import Path

import polars as pl

from schemas.config.data import Kind, ValidateParams
from schemas.rows import may_repeat
from stages.engine.tables import PARTS
from stages.engine.tables.derive import counted

_AT_ONCE, _GROUP = 10_000, 50_000  # rows


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
    """Write the rows of every part as Parquet, of their own kind alone: `engine.tables` derives the others as they are
    read. Returns part -> kind -> rows that it gives. `frame` has column `part`.
    """
    counts: dict[str, dict[str, int]] = {name: {} for name in PARTS}
    shared = may_repeat(frame, ["prompt_id"])
    for name in PARTS:
        own = frame["part"] == name
        if own.any():
            store(frame.lazy().filter(pl.col("part") == name).drop("part"), out / name, kind)
            heights = counted(kind, frame, own, shared)
            counts[name] = {given: height for given, height in heights.items() if height}
    return counts


def store(table: pl.LazyFrame, folder: Path, kind: str) -> None:
    """Write the rows of a kind as Parquet. They are never in memory a second time."""
    folder.mkdir(exist_ok=True)
    with pl.Config(streaming_chunk_size=_AT_ONCE):
        table.sink_parquet(folder / f"{kind}.parquet", compression_level=1, row_group_size=_GROUP)
