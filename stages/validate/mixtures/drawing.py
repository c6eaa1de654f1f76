"""Which rows a mixture trains on, and in which order its rows stand."""

import random
from collections.abc import Mapping

import polars as pl


def draw(table: pl.DataFrame, counts: Mapping[str, int], seed: int | None) -> pl.DataFrame:
    """The rows of each source as often as its count asks: all of them so many times, and a part of them once more.

    table: `source` and `row`, its number there, among the columns; the rows of a source are together. counts: by name,
    0 where there is none. Which rows are in the part is a function of the seed, the source's name and the row's number
    alone, so that of all kinds that were derived from the rows the same ones are taken as far as their numbers allow.
    Without a seed the counts have to be multiples of the rows.
    """
    pieces = [table.clear()]
    for (name,), rows in table.group_by("source", maintain_order=True):
        times, rest = divmod(counts.get(str(name), 0), rows.height)
        pieces += [rows] * times
        if rest:
            assert seed is not None, "a part of the rows is drawn, which takes a seed"
            numbers = random.Random(f"draw/{seed}/{name}")  # one in [0, 1) for each row, by its number
            every = pl.Series("lot", [numbers.random() for _ in range(int(str(rows["row"].max())) + 1)])
            lots = every.gather(rows["row"])
            taken = rows.select(pl.int_range(pl.len()).alias("place"), lots).sort("lot", "place")["place"].head(rest)
            pieces.append(rows[taken.sort()])
    return pl.concat(pieces)


def alternate(table: pl.DataFrame) -> pl.DataFrame:
    """The rows so that the sources take turns in proportion: the first n of them are a fair sample of all.

    What takes the first rows of a file only (`limit`) then sees every source.
    """
    place = (pl.int_range(pl.len()) + 0.5).over("source") / pl.len().over("source")
    return table.with_columns(_place=place).sort("_place", maintain_order=True).drop("_place")
