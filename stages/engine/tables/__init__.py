"""The tables of a data folder: `validate` writes the rows of their own kind, and what they give besides is derived when
it is read. One of another kind is written where it cannot be: what a mixture has drawn.
"""

from pathlib import Path

import polars as pl

from schemas.config.data import DERIVES, Kind
from stages.engine.tables.derive import derive
from stages.engine.tables.together import HEAD

PARTS = ("train", "eval", "gold", "test")


def table(folder: Path, part: str, kind: Kind) -> pl.DataFrame | None:
    """All rows of one kind in a part of a data folder; None where there are none."""
    if kind == "prompt" and (folder / part / "prompt.parquet").is_file():
        return pl.read_parquet(folder / part / "prompt.parquet", glob=False)  # of a mixture too, with its sources
    sources: list[Kind] = [kind, *(source for source, given in DERIVES.items() if kind in given)]
    for source in sources:
        file = folder / part / f"{source}.parquet"
        if file.is_file():
            if kind == "prompt":
                return derive(kind, pl.read_parquet(file, columns=HEAD, glob=False))[kind]()
            found = derive(source, pl.read_parquet(file, glob=False))[kind]()
            return found if found.height else None
    return None


def kinds(folder: Path, part: str) -> set[str]:
    """The kinds that a part of a data folder has rows of, or that those can give."""
    return {kind for source in DERIVES if (folder / part / f"{source}.parquet").is_file() for kind in DERIVES[source]}
