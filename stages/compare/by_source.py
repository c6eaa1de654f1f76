"""The models by the sources of a mixture that the prompts come from. No torch."""

from collections.abc import Mapping, Sequence

from stages.compare.table import Row, counted, finite, lay_out, number, rate_cell

HEAD = ("Source", "Model", "Judge score", "Win vs SFT")
NOTE = (
    "In brackets: 95 % intervals over the source's prompts, not corrected for the number of sources and models: a "
    "difference that stands here alone may be chance."
)


def lines(table: Sequence[Row], sources: Mapping[str, int]) -> list[tuple[str, ...]]:
    """A line of cells for each source and each model but `base`; none where the prompts are of one source.

    sources: name -> prompts.
    """
    return [
        (
            f"{source} ({counted(prompts)})",
            str(row["model"]),
            number(f"{source}/judge_score", 2)(row),
            rate_cell(f"{source}/win_rate_vs_sft")(row),
        )
        for source, prompts in sources.items()
        for row in table
        if row["model"] != "base" and finite(row, f"{source}/judge_score")
    ]


def render_text(table: Sequence[Row], sources: Mapping[str, int]) -> str:
    """The lines for a terminal; nothing where there are none."""
    every = lines(table, sources)
    return lay_out([HEAD, *every]) if every else ""
