"""The pictures of a comparison, as PNG. No torch."""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from schemas.colours import COLOURS, SPARE_COLOURS
from schemas.text import one_line
from stages.compare.curve import Point, hull
from stages.compare.table import Row, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


CURVE_COLOUR = "#8a93a0"

MARKERS = {"base": "s", "sft": "D"}

Z95 = 1.96  # standard errors to each side of a 95 % interval

NAME = 28  # characters of a model's name

OFF_PICTURE = 3.0  # a base model that many times as far away as the farthest other would squeeze them together


def colours(models: Sequence[str]) -> dict[str, str]:
    """A colour per model, the same one in picture and table: fixed for the known names, then the spare ones in turn."""
    spare = [model for model in dict.fromkeys(models) if model not in COLOURS]
    return {m: COLOURS.get(m) or SPARE_COLOURS[spare.index(m) % len(SPARE_COLOURS)] for m in models}


def colours_of(table: Sequence[Row]) -> dict[str, str]:
    """A colour per model of a table: in a sweep, whose rows name their method, that of the method."""
    named = {row["model"]: row.get("method", row["model"]) for row in table}
    colour = colours(list(named.values()))
    return {model: colour[name] for model, name in named.items()}


def canvas(dark: bool, small: bool = False) -> "tuple[Figure, Axes, str]":
    """An empty picture of judge score against KL to the SFT model; the last is the colour of its text.

    small: for a screen of about 360 pixels, which shows a point of text as a pixel.
    """
    # Imported here: it takes a second, and whoever wants only the text should not wait for it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink, paper, faint = ("#e5e7eb", "#16181d", "#3a3f49") if dark else ("#1f2937", "#ffffff", "#e5e7eb")
    figure = Figure(figsize=(4.6, 4.6) if small else (8.2, 4.6), dpi=150, facecolor=paper)
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.15)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=paper)
    axes.grid(color=faint, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(0.1, 0.14)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(faint)
    axes.tick_params(colors=ink, length=0)
    axes.set_xlabel("distance from the SFT model: KL, nats per answer", color=ink)
    axes.set_ylabel("judge score", color=ink)
    if not small:
        axes.set_title("Judge score against distance from the SFT model", color=ink, loc="left", fontsize=12, pad=12)
    return figure, axes, ink


def png(figure: "Figure") -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()


def draw(table: Sequence[Row], dark: bool = False, baselines: Sequence[Point] = (), small: bool = False) -> bytes:
    """PNG of judge score against KL to the SFT model, one point per model with its 95 % intervals.

    The baselines are small grey points under their curve (stages/compare/curve.py).
    """
    figure, axes, ink = canvas(dark, small)
    rows = [row for row in table if finite(row, "judge_score") and finite(row, "kl_to_reference")]
    reach = max((row["kl_to_reference"] for row in rows if row["model"] != "base"), default=math.inf)
    far = OFF_PICTURE * max(reach, 0.1)  # a base model beyond it is named, and not drawn to scale
    outside = [row for row in rows if row["model"] == "base" and row["kl_to_reference"] > far]
    inside = [row for row in rows if row not in outside]
    colour = colours_of(table)
    draw_curve(axes, baselines, ink, max((row["kl_to_reference"] for row in inside), default=0.0))
    for row in inside:
        _point(axes, row, colour[row["model"]], ink)
    for i, row in enumerate(outside):
        note = f"off the picture: {row['model']} at KL {row['kl_to_reference']:.1f}, score {row['judge_score']:.2f}"
        axes.text(0.99, 0.02 + 0.06 * i, note, transform=axes.transAxes, ha="right", color=ink, fontsize=9, alpha=0.8)
    return png(figure)


def draw_curve(axes: "Axes", baselines: Sequence[Point], ink: str, reach: float) -> None:
    """The baselines and their curve, flat from the highest one on as far as the models are."""
    if len(baselines) < 2:
        return
    corners = hull(baselines)
    x, y = [*(corner.kl for corner in corners)], [*(corner.height for corner in corners)]
    axes.plot([*x, max(reach, x[-1])], [*y, y[-1]], "--", color=CURVE_COLOUR, linewidth=1.4, zorder=2)
    for point in baselines:
        if point.name != "sft":
            axes.plot(point.kl, point.height, ".", color=CURVE_COLOUR, markersize=8, zorder=2)
            axes.annotate(
                point.name,
                (point.kl, point.height),
                (6, -11),
                textcoords="offset points",
                color=ink,
                fontsize=8,
                alpha=0.8,
                zorder=2,
            )


def _point(axes: "Axes", row: Row, colour: str, ink: str) -> None:
    x, y = row["kl_to_reference"], row["judge_score"]
    across, up = (Z95 * row[k] if finite(row, k) else 0.0 for k in ("kl_to_reference_se", "judge_score_se"))
    marker = MARKERS.get(row["model"], "o")
    axes.errorbar(x, y, up, across, fmt=marker, color=colour, markersize=9, elinewidth=1.6, capsize=3, zorder=3)
    # No mathtext: a `$` in a model's name is a character like any other.
    axes.annotate(
        one_line(row["model"], NAME),
        (x, y),
        (9, 7),
        textcoords="offset points",
        color=ink,
        fontsize=11,
        parse_math=False,
        zorder=4,
    )
