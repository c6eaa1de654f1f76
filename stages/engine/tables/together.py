"""Rows of one prompt that speak of the same answers, seen together: what they say as one, and where they contradict.

Pairs that were made of a ranking, or a pair that two people judged, stand in rows of their own. An answer that won in
one row and lost in another is in the middle, which no row says by itself.
"""

from collections.abc import Iterator
from typing import Any

import polars as pl

from schemas.config.data import Kind
from schemas.rows import may_repeat

HEAD = ["row", "prompt", "prompt_id", "cluster"]
_Ranking = dict[str, Any]
"""A row of kind `ranking` without margins, and its `place` in the frame: of one source row several may be made."""


def rankings(kind: Kind, frame: pl.DataFrame) -> pl.DataFrame:
    """Rows of kind `preference` or `ranking` as rankings without margins."""
    if kind == "ranking":
        return frame.select(*HEAD, "responses", "winners", "losers")
    return frame.select(
        *HEAD,
        responses=pl.concat_list("chosen", "rejected"),
        winners=pl.concat_list(pl.lit(0, pl.Int64)),
        losers=pl.concat_list(pl.lit(1, pl.Int64)),
    )


def groups(kind: Kind, frame: pl.DataFrame) -> Iterator[list[_Ranking]]:
    """The rankings of one prompt that share answers, directly or over others; only where there are two or more."""
    frame = frame.with_row_index("place")
    frame = frame.filter(may_repeat(frame, ["prompt_id"]))  # many times as fast as by the prompts
    answers = pl.concat_list("chosen", "rejected") if kind == "preference" else pl.col("responses")
    each = frame.select("place", "prompt", answer=answers).explode("answer")
    shares = each.filter(may_repeat(each, ["prompt", pl.col("answer").str.strip_chars()]))["place"].unique()
    first: dict[tuple[Any, str], int] = {}
    group: dict[int, list[_Ranking]] = {}  # place -> the group that it is in, one list for all of its rows
    sharing = frame.filter(pl.col("place").is_in(shares.implode()))
    for row in rankings(kind, sharing).with_columns(sharing["place"]).iter_rows(named=True):
        prompt = tuple(tuple(message.values()) for message in row["prompt"])
        mine = group[row["place"]] = [row]
        for answer in row["responses"]:
            other = group[first.setdefault((prompt, answer.strip()), row["place"])]
            if other is not mine:
                more, mine = sorted((mine, other), key=len)
                mine += more
                group.update((member["place"], mine) for member in more)
    once = {
        id(members): sorted(members, key=lambda row: (row["row"], row["place"]))
        for members in group.values()
        if members[1:]
    }
    yield from once.values()


def pairs(group: list[_Ranking]) -> list[tuple[int, str, str]]:
    """(row, better, worse) of every comparison, the answers without the space around them."""
    return [
        (row["row"], row["responses"][winner].strip(), row["responses"][loser].strip())
        for row in group
        for winner, loser in zip(row["winners"], row["losers"], strict=True)
    ]


def joined(group: list[_Ranking]) -> _Ranking:
    """The one ranking that a group makes, with the number of its first row. A pair goes by the majority of its rows."""
    texts: dict[str, str] = {}
    for answer in (answer for row in group for answer in row["responses"]):
        texts.setdefault(answer.strip(), answer)
    places = {answer: place for place, answer in enumerate(texts)}
    votes: dict[tuple[int, int], int] = {}
    for _, better, worse in pairs(group):
        i, j = places[better], places[worse]
        votes[min(i, j), max(i, j)] = votes.get((min(i, j), max(i, j)), 0) + (1 if i < j else -1)
    decided = [(i, j) if net > 0 else (j, i) for (i, j), net in votes.items() if net]
    sides = {"winners": [winner for winner, _ in decided], "losers": [loser for _, loser in decided]}
    return {**{name: group[0][name] for name in HEAD}, "responses": list(texts.values()), **sides}


def as_one(kind: Kind, frame: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(rows that stand alone, as they are; the rankings that the others make)."""
    found = list(groups(kind, frame))
    made = rankings(kind, frame.clear())
    if not found:
        return frame, made
    members = pl.Series([row["place"] for group in found for row in group])
    made = pl.DataFrame([joined(group) for group in found], schema=made.schema)
    return frame.filter(~pl.int_range(pl.len()).is_in(members.implode())), made.filter(pl.col("winners").list.len() > 0)


def opposed_thumbs(frame: pl.DataFrame) -> pl.DataFrame:
    """(row, net) of the rows of kind `feedback` whose answer has thumbs both up and down; net: ups less downs."""
    answer = ["prompt", pl.col("completion").str.strip_chars()]
    frame = frame.filter(may_repeat(frame, answer))
    votes: dict[tuple[Any, str], list[int]] = {}
    keys: list[tuple[Any, str]] = []
    for prompt, completion, label in frame.select("prompt", "completion", "label").iter_rows():
        key = tuple(tuple(message.values()) for message in prompt), completion.strip()
        votes.setdefault(key, []).append(1 if label else -1)
        keys.append(key)
    opposed = [min(votes[key]) < max(votes[key]) for key in keys]
    net = [sum(votes[key]) for key in keys]
    return frame.select("row", net=pl.Series(net, dtype=pl.Int64)).filter(pl.Series(opposed, dtype=pl.Boolean))
