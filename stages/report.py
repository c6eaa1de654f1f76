"""How a comparison is shown: as text, as a picture, and as one HTML file that needs no network. No torch.

Texts come from models and data, so everything that enters the page is escaped, and the page's own policy forbids
scripts and network besides.
"""

import base64
import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from schemas.config import EvaluateConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
"""One model's line of the table: `model`, and the metrics by their names without `eval/`; None where there is none."""

COLOURS = {"base": "#9aa1ac", "sft": "#64748b", "dpo": "#3b82f6", "kto": "#f59e0b", "ppo": "#10b981"}
SPARE_COLOURS = ["#ec4899", "#8b5cf6", "#ef4444", "#14b8a6", "#a16207", "#6366f1"]
MARKERS = {"base": "s", "sft": "D"}
STARTING_POINTS = ("base", "sft")
SAMPLES, OPEN_SAMPLES = 20, 3
Z95 = 1.96  # standard errors to each side of a 95 % interval
ENOUGH_PROMPTS = EvaluateConfig().min_prompts
OFF_PICTURE = 3.0  # a base model that many times as far away as the farthest other would squeeze them together


@dataclass(frozen=True)
class Comparison:
    """All that a report shows. `answers`: model -> its samples, one per prompt, in one order for all models; models
    whose answers are not shown are left out, and without any model no prompt is shown either."""

    table: Sequence[Row]
    prompts: Sequence[str]
    answers: Mapping[str, Sequence[Mapping[str, Any]]]
    judge: str
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A column of the table: how its cell reads, and what it means in one line."""

    title: str
    cell: Callable[[Row], str]
    meaning: str


def number(key: str, digits: int) -> Callable[[Row], str]:
    """Writes row[key] with so many decimals, `-` where there is none."""
    return lambda row: "-" if row.get(key) is None else f"{row[key]:.{digits}f}"


def percent(key: str) -> Callable[[Row], str]:
    """Writes row[key] as a percentage, `-` where there is none."""
    return lambda row: "-" if row.get(key) is None else f"{100 * row[key]:.0f} %"


def _win_rate(row: Row) -> str:
    if row.get("win_rate_vs_sft") is None:
        return "-"
    if not _bounded(row):
        return percent("win_rate_vs_sft")(row)
    low, high = row["win_rate_vs_sft_low"], row["win_rate_vs_sft_high"]
    return f"{100 * row['win_rate_vs_sft']:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def _kl(row: Row) -> str:
    if row.get("kl_to_reference") is None:
        return "-"
    return f"{row['kl_to_reference']:.2f} ± {row['kl_to_reference_se']:.2f}"


COLUMNS = [
    Column("Judge score", number("judge_score", 2), "Mean score that the judge gave the answers; higher is better."),
    Column(
        "Win rate vs SFT",
        _win_rate,
        "Share of prompts on which the judge prefers this model's answer to the SFT model's, ties counted half, with "
        "its 95 % interval. 50 % means no difference; an interval that keeps clear of 50 % is a real one.",
    ),
    Column(
        "At equal length",
        percent("length_controlled_win_rate"),
        "The win rate that is left when the effect of longer or shorter answers is taken out.",
    ),
    Column(
        "KL to SFT",
        _kl,
        "How far the model has moved from the SFT model, in nats per answer (mean ± standard error). "
        "Equal gains at a smaller distance are the better bargain.",
    ),
    Column("Length", number("length", 1), "Mean length of an answer in tokens."),
    Column(
        "Distinct-2",
        number("distinct_2", 2),
        "Share of word pairs that are unique over all answers; a sharp fall means the model repeats itself.",
    ),
    Column(
        "Reference NLL",
        number("reference_nll", 2),
        "How surprising the answers are to the SFT model, in nats per token; a sharp rise hints at broken language.",
    ),
    Column(
        "Preference acc.",
        percent("preference_accuracy"),
        "Share of held-out pairs on which the model raised the preferred answer more than the other one, ties half.",
    ),
    Column(
        "Reward score",
        number("reward_score", 2),
        "Mean score by the reward model that PPO was trained on. Rising while the judge's falls means it was gamed.",
    ),
]


def shown_columns(table: Sequence[Row]) -> list[Column]:
    """The columns in which at least one model has a value."""
    return [column for column in COLUMNS if any(column.cell(row) != "-" for row in table)]


def render_text(table: Sequence[Row]) -> str:
    """The table for a terminal, in plain characters."""
    columns = shown_columns(table)
    lines = [["Model", *(column.title for column in columns)]]
    return lay_out(lines + [[str(row["model"]), *(column.cell(row) for column in columns)] for row in table])


def over(prompts: int) -> str:
    """The line under a table: over how many prompts its numbers are, and a caution where these are few."""
    return f"Over {counted(prompts)}; in brackets: 95 % intervals. {caution(prompts)}".strip()


def counted(prompts: int) -> str:
    return "1 prompt" if prompts == 1 else f"{prompts} prompts"


def caution(prompts: int) -> str:
    """What numbers over few prompts cannot tell; nothing where there are enough."""
    if prompts >= ENOUGH_PROMPTS:
        return ""
    return f"With fewer than {ENOUGH_PROMPTS} prompts differences may be chance, whatever the intervals say."


def lay_out(lines: Sequence[Sequence[str]]) -> str:
    """A head and lines of cells as plain text in columns, the first one to the left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    texts = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


def colours(models: Sequence[str]) -> dict[str, str]:
    """A colour per model, the same one in picture and table: fixed for the known names, then the spare ones in turn."""
    spare = [model for model in dict.fromkeys(models) if model not in COLOURS]
    return {m: COLOURS.get(m) or SPARE_COLOURS[spare.index(m) % len(SPARE_COLOURS)] for m in models}


def colours_of(table: Sequence[Row]) -> dict[str, str]:
    """A colour per model of a table: in a sweep, whose rows name their method, that of the method."""
    named = {row["model"]: row.get("method", row["model"]) for row in table}
    colour = colours(list(named.values()))
    return {model: colour[name] for model, name in named.items()}


def verdict(row: Row) -> str:
    """`better`, `worse` or `level`: which side of 1/2 the interval of the win rate lies on."""
    if row["win_rate_vs_sft_low"] > 0.5:
        return "better"
    return "worse" if row["win_rate_vs_sft_high"] < 0.5 else "level"


# Control characters, lone surrogates, and the characters that reorder text around them.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(value: object) -> str:
    """Text with a mark in the place of every character that could hide or reorder it."""
    return UNSEEN.sub("\ufffd", str(value))


# --- the picture ---


def canvas(dark: bool) -> "tuple[Figure, Axes, str]":
    """An empty picture of judge score against KL to the SFT model; the last is the colour of its text."""
    # Imported here: it takes a second, and whoever wants only the text should not wait for it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink, paper, faint = ("#e5e7eb", "#16181d", "#3a3f49") if dark else ("#1f2937", "#ffffff", "#e5e7eb")
    figure = Figure(figsize=(8.2, 4.6), dpi=150, facecolor=paper)
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
    axes.set_title("Judge score against distance from the SFT model", color=ink, loc="left", fontsize=12, pad=12)
    return figure, axes, ink


def png(figure: "Figure") -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()


def draw(table: Sequence[Row], dark: bool = False) -> bytes:
    """PNG of judge score against KL to the SFT model, one point per model with its 95 % intervals."""
    figure, axes, ink = canvas(dark)
    inside, outside = _split_far(table)
    colour = colours_of(table)
    for row in inside:
        _point(axes, row, colour[row["model"]], ink)
    for i, row in enumerate(outside):
        note = f"off the picture: {row['model']} at KL {row['kl_to_reference']:.1f}, score {row['judge_score']:.2f}"
        axes.text(0.99, 0.02 + 0.06 * i, note, transform=axes.transAxes, ha="right", color=ink, fontsize=9, alpha=0.8)
    return png(figure)


def _split_far(table: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows to draw, and a base model too far away to be drawn to scale."""
    rows = [row for row in table if _finite(row, "judge_score") and _finite(row, "kl_to_reference")]
    reach = max((row["kl_to_reference"] for row in rows if row["model"] != "base"), default=math.inf)
    far = [row for row in rows if row["model"] == "base" and row["kl_to_reference"] > OFF_PICTURE * max(reach, 0.1)]
    return [row for row in rows if row not in far], far


def _finite(row: Row, key: str) -> bool:
    return row.get(key) is not None and math.isfinite(row[key])


def _point(axes: "Axes", row: Row, colour: str, ink: str) -> None:
    x, y = row["kl_to_reference"], row["judge_score"]
    across, up = (Z95 * row[k] if _finite(row, k) else 0.0 for k in ("kl_to_reference_se", "judge_score_se"))
    marker = MARKERS.get(row["model"], "o")
    axes.errorbar(x, y, up, across, fmt=marker, color=colour, markersize=9, elinewidth=1.6, capsize=3, zorder=3)
    # No mathtext: a `$` in a model's name is a character like any other.
    axes.annotate(
        visible(row["model"]),
        (x, y),
        (9, 7),
        textcoords="offset points",
        color=ink,
        fontsize=11,
        parse_math=False,
        zorder=4,
    )


# --- the page ---

STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #5b6472; --paper: #ffffff; --card: #f7f8fa; --line: #e3e6eb;
  --good: #067a54; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --soft: #a0a8b5; --paper: #16181d; --card: #1e2128;
  --line: #333842; --good: #4fd1a1; --bad: #ff8f85; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 44px 0 12px; }
p { max-width: 72ch; margin: 8px 0; }
.soft { color: var(--soft); }
.finding { font-size: 18px; margin: 18px 0; max-width: 68ch; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 10px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tbody tr:last-child th, tbody tr:last-child td { border-bottom: 0; }
thead th { font-weight: 600; font-size: 13px; color: var(--soft); background: var(--card); vertical-align: bottom;
  white-space: normal; line-height: 1.3; min-width: 84px; }
th:first-child { text-align: left; }
td svg { display: block; margin: 4px 0 0 auto; }
.better { color: var(--good); } .worse { color: var(--bad); }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px; }
picture img { width: 100%; max-width: 820px; height: auto; display: block; border: 1px solid var(--line);
  border-radius: 10px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 8px 20px; font-size: 15px; margin: 0; }
dt { font-weight: 600; } dd { margin: 0; color: var(--soft); max-width: 72ch; }
@media (max-width: 640px) { dl { grid-template-columns: 1fr; gap: 2px; } dd { margin-bottom: 10px; } }
details { border: 1px solid var(--line); border-radius: 10px; margin: 10px 0; }
summary { cursor: pointer; padding: 12px 16px; font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(190px, 100%), 1fr)); gap: 12px;
  padding: 0 16px 16px; }
.card { background: var(--card); border-radius: 8px; border-top: 4px solid; padding: 10px 12px; min-width: 0; }
.card header { display: flex; flex-wrap: wrap; justify-content: space-between; column-gap: 8px; font-size: 13.5px;
  margin-bottom: 6px; }
.card pre { margin: 0; font: inherit; font-size: 14.5px; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 18em; overflow-y: auto; unicode-bidi: isolate; }
""".strip()

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def escape(value: object) -> str:
    """Text for the page: visible, and its markup escaped."""
    return html.escape(visible(value), quote=True)


def render_html(comparison: Comparison, finding: str = "", frontier: str = "") -> str:
    """The whole report as one page: findings, table, picture, what each number means, answers side by side.

    Of a sweep come its own finding and, as markup, its frontier, which takes the place of the picture.
    """
    names = ", ".join(str(row["model"]) for row in comparison.table)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>Alignment report: {escape(names)}</title>
<style>
{STYLE}
</style>
</head>
<body>
<main>
<h1>Which alignment method did better?</h1>
{_intro(comparison)}
<p class="finding">{escape(finding or headline(comparison.table))} {caution(len(comparison.prompts))}</p>
{frontier}
<h2>The models side by side</h2>
{_table(comparison.table)}
{"" if frontier else _gained(comparison.table)}
<h2>What the numbers mean</h2>
{_meanings(comparison.table)}
<h2>Answers to the same prompts</h2>
{_samples(comparison)}
</main>
</body>
</html>
"""


def _intro(comparison: Comparison) -> str:
    settings = " · ".join(f"{escape(name)}: {escape(value)}" for name, value in comparison.settings.items())
    return (
        "<p>Every aligned model below started from the same fine-tuned model, called SFT, and was then taught from "
        f"preferences by another method. All models answered the same {counted(len(comparison.prompts))}, which "
        "none of them had trained on, under the same random seeds. Judge of the answers: "
        f"{escape(comparison.judge)}.</p>" + (f'<p class="soft">{settings}</p>' if settings else "")
    )


def headline(table: Sequence[Row]) -> str:
    """One or two sentences: the highest win rate, which models are not clearly apart from it, how many beat SFT.

    Two models are clearly apart where their 95 % intervals do not overlap; of those that are not, the one nearest to
    SFT is named.
    """
    aligned = [row for row in table if row["model"] not in STARTING_POINTS]
    rated = [row for row in aligned if _finite(row, "win_rate_vs_sft")]
    if not rated:
        return "No aligned model has a win rate yet." if aligned else "No aligned model is among these yet."
    best = max(rated, key=lambda row: row["win_rate_vs_sft"])
    others = [row for row in rated if row is not best]
    bounded = [row for row in rated if _bounded(row)]
    rate = f"{best['model']} has the highest win rate against SFT, {100 * best['win_rate_vs_sft']:.0f} %"
    if len(bounded) < len(rated):
        return f"{rate}; without all 95 % intervals it cannot be said which models are clearly apart."
    low, high = best["win_rate_vs_sft_low"], best["win_rate_vs_sft_high"]
    rate += f" (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"
    level = [row for row in others if row["win_rate_vs_sft_high"] >= low]
    if level:
        rate += f", but is not clearly apart from {_listed(level)}{_nearest([best, *level])}"
    elif others:
        rate += f", clearly above {_listed(others)}, at KL {number('kl_to_reference', 1)(best)}"
    better = sum(verdict(row) == "better" for row in rated)
    models = f"aligned model{'s' if len(rated) > 1 else ''}"
    count = f"{better} of {len(rated)} {models} {'is' if better == 1 else 'are'}" if better else "No aligned model is"
    return f"{rate}. {count} clearly better than SFT."


def _listed(rows: Sequence[Row]) -> str:
    *first, last = [str(row["model"]) for row in rows]
    return f"{', '.join(first)} and {last}" if first else last


def _nearest(rows: Sequence[Row]) -> str:
    """Which of these models is nearest to SFT; empty where a distance is missing."""
    if not all(_finite(row, "kl_to_reference") for row in rows):
        return ""
    nearest, *rest = sorted(rows, key=lambda row: row["kl_to_reference"])
    distances = ", ".join(f"{row['model']} {row['kl_to_reference']:.1f}" for row in rest)
    return f"; nearest to SFT of these is {nearest['model']} (KL {nearest['kl_to_reference']:.1f}; {distances})"


def _bounded(row: Row) -> bool:
    return _finite(row, "win_rate_vs_sft_low") and _finite(row, "win_rate_vs_sft_high")


def _table(table: Sequence[Row]) -> str:
    columns = shown_columns(table)
    colour = colours_of(table)
    head = "".join(f'<th scope="col" title="{escape(c.meaning)}">{escape(c.title)}</th>' for c in columns)
    body = "\n".join(
        f'<tr><th scope="row">{_name(row["model"], colour)}</th>'
        + "".join(_cell(column, row, colour[row["model"]]) for column in columns)
        + "</tr>"
        for row in table
    )
    return (
        f'<div class="scroll"><table>\n<thead><tr><th scope="col">Model</th>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _name(model: str, colour: Mapping[str, str]) -> str:
    return f'<span class="swatch" style="background:{colour[model]}"></span>{escape(model)}'


def _cell(column: Column, row: Row, colour: str) -> str:
    text = escape(column.cell(row))
    if column.cell is not _win_rate or text == "-" or not _bounded(row):
        return f"<td>{text}</td>"
    if row["model"] in STARTING_POINTS:
        return f"<td>{text}{_interval(row, colour)}</td>"
    found = verdict(row)
    note = {"better": "clearly better than SFT", "worse": "clearly worse than SFT"}.get(
        found, "no clear difference from SFT"
    )
    return f'<td title="{note}"><span class="{found}">{text}</span>{_interval(row, colour)}</td>'


def _interval(row: Row, colour: str) -> str:
    """The win rate and its interval drawn on a line from 0 to 100 %, with a mark at 50 %."""
    low, mid, high = (2 + 116 * row[key] for key in ("win_rate_vs_sft_low", "win_rate_vs_sft", "win_rate_vs_sft_high"))
    return (
        '<svg width="120" height="10" viewBox="0 0 120 10" aria-hidden="true">'
        '<path d="M2 5H118M60 1V9" stroke="currentColor" stroke-opacity=".25"/>'
        f'<path d="M{low:.1f} 5H{high:.1f}" stroke="{colour}" stroke-width="3" stroke-linecap="round"/>'
        f'<circle cx="{mid:.1f}" cy="5" r="4" fill="{colour}"/></svg>'
    )


def _gained(table: Sequence[Row]) -> str:
    points = "; ".join(f"{r['model']}: score {number('judge_score', 2)(r)}, KL {_kl(r)}" for r in table)
    return f"""<h2>What was gained, and at what distance</h2>
<p class="soft">Higher is better; farther right is farther from the SFT model. Bars are 95 % intervals. The best
place is the upper left: much gained, little lost of what the model was before.</p>
{picture(draw(table), draw(table, dark=True), f"Judge score against KL. {points}")}"""


def picture(light: bytes, dark: bytes, says: str) -> str:
    """Markup of a PNG for light and one for dark pages; `says` tells the same in words."""
    light_data, dark_data = (base64.b64encode(data).decode() for data in (light, dark))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark_data}">'
        f'<img src="data:image/png;base64,{light_data}" alt="{escape(says)}"></picture>'
    )


def _meanings(table: Sequence[Row]) -> str:
    lines = (f"<dt>{escape(c.title)}</dt><dd>{escape(c.meaning)}</dd>" for c in shown_columns(table))
    return "<dl>\n" + "\n".join(lines) + "\n</dl>"


def _samples(comparison: Comparison) -> str:
    if not comparison.answers:
        return '<p class="soft">Prompts and answers are not shown: log_text is false.</p>'
    models = [row["model"] for row in comparison.table if row["model"] in comparison.answers]
    colour = colours_of(comparison.table)
    blocks = [
        f'<p class="soft">The first {min(SAMPLES, len(comparison.prompts))} of {len(comparison.prompts)} prompts, in '
        "the order of the data: none was picked by hand.</p>"
    ]
    for i, prompt in enumerate(comparison.prompts[:SAMPLES]):
        cards = "\n".join(_card(model, comparison.answers[model][i], colour) for model in models)
        opened = " open" if i < OPEN_SAMPLES else ""
        blocks.append(
            f'<details{opened}><summary dir="auto">{escape(prompt)}</summary>\n'
            f'<div class="cards">\n{cards}\n</div></details>'
        )
    return "\n".join(blocks)


def _card(model: str, sample: Mapping[str, Any], colour: Mapping[str, str]) -> str:
    answer = sample["answer"]
    text = escape(answer) if answer.strip() else '<em class="soft">(empty)</em>'
    notes = f"score {sample['score']:.2f} · {sample['length']} tokens"
    return (
        f'<article class="card" style="border-color:{colour[model]}"><header><strong>{escape(model)}</strong>'
        f'<span class="soft">{notes}</span></header><pre dir="auto">{text}</pre></article>'
    )
