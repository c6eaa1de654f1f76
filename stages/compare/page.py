"""The comparison as one HTML file that needs no network: what the template `report.html.j2` shows. No torch.

Texts come from models and data: all that enters the page is escaped, and its policy forbids scripts and network.
"""

import base64
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from schemas.text import visible
from stages.compare import by_source, frontier, plots
from stages.compare.findings import findings
from stages.compare.head_to_head import STARTING_POINTS, cell
from stages.compare.plots import colours, colours_of
from stages.compare.table import (
    Column,
    Comparison,
    Row,
    caution,
    counted,
    finite,
    kl_cell,
    number,
    shown_columns,
    verdict,
    win_rate_cell,
)

SAMPLES = 20

PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: value if hasattr(value, "__html__") else visible(value),  # a macro gives markup
)


def render_html(comparison: Comparison) -> str:
    """The whole report as one page: findings, table, picture, what each number means, answers side by side.

    Of a sweep its frontier takes the place of the picture.
    """
    table, columns, colour = comparison.table, shown_columns(comparison.table), colours_of(comparison.table)
    points = comparison.points
    draw = partial(frontier.draw, points) if points else partial(plots.draw, baselines=comparison.baselines)
    light, dark = (base64.b64encode(draw(table, dark=dark)).decode() for dark in (False, True))
    method_colour = colours([point["method"] for point in points])
    measured = [f"{frontier.label(p)}: score {p['judge_score']:.2f}, KL {p['kl_to_reference']:.2f}" for p in points]
    measured = measured or [f"{r['model']}: score {number('judge_score', 2)(r)}, KL {kl_cell(r)}" for r in table]
    return PAGES.get_template("report.html.j2").render(
        vars(comparison),
        several=any(len(point["seeds"]) > 1 for point in points),
        counted=counted(len(comparison.prompts)),
        findings=findings(comparison),
        matrices=[] if points else _matrices(comparison),
        caution=caution(len(comparison.prompts)),
        light=light,
        dark=dark,
        says=f"Judge score against KL{', by method and beta' if points else ''}. {'; '.join(measured)}",
        points=[{"colour": method_colour[p["method"]], "cells": frontier.cells(p)} for p in points],
        point_head=frontier.HEAD,
        point_note=frontier.BARS,
        columns=columns,
        rows=[
            {"model": row["model"], "colour": colour[row["model"]], "cells": [_cell(column, row) for column in columns]}
            for row in table
        ],
        source_head=by_source.HEAD,
        source_note=by_source.NOTE,
        source_lines=by_source.lines(table, comparison.sources),
        shown=comparison.prompts[:SAMPLES],
    )


def _cell(column: Column, row: Row) -> dict[str, Any]:
    """A cell's text; of a win rate with its interval the verdict too, and where on a bar of 120 pixels it lies."""
    text = column.cell(row)
    ends = [f"win_rate_vs_sft{end}" for end in ("_low", "", "_high")]
    if column.cell is not win_rate_cell or not all(finite(row, end) for end in ends):
        return {"text": text, "verdict": "", "bar": []}
    return {"text": text, "verdict": verdict(row), "bar": [f"{2 + 116 * row[end]:.1f}" for end in ends]}


def _matrices(comparison: Comparison) -> list[dict[str, Any]]:
    """Per temperature: the models but `base`, and a line of cells for each, its win rate against each of them."""
    models = [row["model"] for row in comparison.table if row["model"] != STARTING_POINTS[0]]
    if len(models) < 2:
        return []
    return [
        {
            "temperature": f"{temperature:g}",
            "models": models,
            "lines": [(one, [cell(duels.get((one, other))) for other in models]) for one in models],
            "reasons": sorted({duel.reason for duel in duels.values() if duel.reason}),
        }
        for temperature, duels in comparison.duels.items()
    ]
