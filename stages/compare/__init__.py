"""Stage `compare`: the evaluations of all models in one table, one picture and one HTML page. No torch.

Who is ahead is told head to head, on the same prompts, draws and temperature (head_to_head.py), and what a model has
gained beside baselines that cost no training (curve.py).
"""

import json
import math
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from schemas.errors import refuse
from schemas.stage import BASELINES, PEOPLE
from stages.compare import by_source, curve, frontier, head_to_head, origin, people
from stages.compare.findings import COVERS, best, findings, pair_lines
from stages.compare.head_to_head import STARTING_POINTS, Ask, percent
from stages.compare.page import render_html
from stages.compare.plots import draw
from stages.compare.table import WIDTH, WIDTHS, Comparison, over, render_text
from stages.engine.scoring.evaluation_record import Evaluation, check_comparable, load_all, text_of
from stages.engine.scoring.intervals import Interval, clustered_error
from stages.engine.scoring.paired import scores_alone, wins_between
from stages.runtime.context import StageContext

BASELINE_CONDITIONS = ("judge", "judge_model", "max_new_tokens", "seed")

LOGGED = ("judge_score", "win_rate_vs_sft", "kl_to_reference")

INDEPENDENT = (
    "It is independent of the policies only in that they never train on its rows or its scores; a gold reward model "
    "starts from the same SFT model and learns from the same source and labellers, so that they may err alike."
)

JUDGES = {
    "rule": "a rule, the demo's programmed ground truth",
    "sentiment": "vaderSentiment, a lexicon that scores how positive a text is",
    "reward": "a reward model that no policy was trained on",
}
DOUBTS = {
    "rule": "It counts what it was programmed to count: it shows that the methods work, not that an answer is good.",
    "sentiment": "It measures how cheerful the words are: not whether an answer is right, useful or to the point.",
    "reward": "It has learned from preferences like those that the policies have learned from, and may have picked up "
    "the same habits, such as a liking for long answers.",
    "endpoint": "Language models as judges tend to like long and confident answers, and those like their own. Both "
    "orders were asked, so that the place of an answer decides nothing.",
}
"""Of each kind of judge: what its verdicts do not show."""


def run(context: StageContext) -> dict[str, float]:
    """Compare the evaluations that the inputs bring (model name -> evaluation) and publish `comparison`.

    Raises StageError when there is none, or when they were not made under the same conditions.
    """
    request = context.request
    models = [name for name in request.inputs if name not in (BASELINES, PEOPLE)]
    evaluations = {name: Evaluation.load(context.input(name)) for name in models}
    baselines = load_all(context.input(BASELINES)) if context.has(BASELINES) else {}
    std = request.params.get("score_std")
    assert std is None or isinstance(std, float)
    chosen = str(request.params.get("chosen", ""))
    variants = request.params.get("variants", {})  # of several seeds: model -> group, method, beta, rate and seed
    assert isinstance(variants, dict)
    comparison = compare(
        evaluations,
        variants,
        request.log_text,
        baselines=baselines,
        ask=None if variants else asking(context),  # of many seeds no pair is shown, and a judge may cost money
        score_std=std,
        chosen=chosen,
        made=origin.origin(context, models, drawn=not variants),
        said=people.read(context.input(PEOPLE)) if context.has(PEOPLE) else (),
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(comparison, folder)
        for file in sorted(folder.iterdir()):
            context.file(file)  # at the run's top, where MLflow's UI shows picture and page at a click
        context.publish("comparison", folder)
    values = {f"{key}/{row['model']}": row[key] for row in comparison.table for key in LOGGED}
    if comparison.points:  # of many seeds the pairs are too many to look at, and say less
        values |= frontier.logged(comparison.points)
    else:
        for number, duels in enumerate(comparison.duels.values()):
            values |= head_to_head.logged(duels, first=number == 0)
    for name, gain in comparison.gains.items():
        values |= {f"eval/{name}/over_curve": gain.gain, f"eval/{name}/over_curve_low": gain.interval.low}
        values[f"eval/{name}/over_curve_high"] = gain.interval.high
    return values


def asking(context: StageContext) -> Ask | None:
    """How a judge that only compares is asked about two models; None where the request names no such judge.

    It is the request's: an address in a stored evaluation has not been checked by whoever started this.
    """
    judge = context.request.params.get("judge")
    if not isinstance(judge, dict):
        return None
    return partial(
        wins_between, judge=judge, progress=lambda done, total: context.progress(done, total, "answers judged")
    )


def compare(
    evaluations: Mapping[str, Evaluation],
    variants: Mapping[str, Any] | None = None,
    log_text: bool = True,
    *,
    baselines: Mapping[str, Evaluation] | None = None,
    ask: Ask | None = None,
    score_std: float | None = None,
    chosen: str = "",
    made: origin.Origin | None = None,
    said: Sequence[people.People] = (),
) -> Comparison:
    """The comparison of evaluations made under the same conditions; raises StageError otherwise.

    Without `log_text`, or where an evaluation has kept no texts, no answers are shown. Of several seeds the models
    stand in the order of the variants, and each group shows the first seed's answers. `ask`: a judge that only
    compares. `score_std`: as in `frontier.points`; `chosen`, `made`, `said`: as in Comparison, the last
    two there `origin` and `people`.
    """
    if not evaluations:
        message = "there is no evaluation to compare."
        fix = "give the outputs `evaluation` of stage evaluate, by the models' names"
        raise refuse("inputs", "none", message, fix, kind="missing_input")
    names = sorted(evaluations)
    first = evaluations[names[0]]
    for name in names[1:]:
        check_comparable(names[0], first.settings, first.prompts, name, evaluations[name])
    for name, other in (baselines or {}).items():
        check_comparable(names[0], first.settings, first.prompts, name, other, BASELINE_CONDITIONS)
    evaluations = {name: evaluations[name] for name in names}
    duels = {temperature: head_to_head.matrix(evaluations, temperature, ask) for temperature in first.temperatures}
    aligned = [name for name in names if name not in STARTING_POINTS]
    known = baselines and "sft" in names and 1.0 in first.temperatures
    corners = curve.points(evaluations["sft"], baselines) if baselines and known else []
    gains = curve.gains(evaluations, aligned, curve.hull(corners)) if corners else {}
    table = [row_of(name, evaluations[name], duels, gains) for name in names]
    order = head_to_head.ranked(duels[first.temperatures[0]], aligned, {r["model"]: r["judge_score"] for r in table})
    place = {name: number for number, name in enumerate([*STARTING_POINTS, *order])}
    points: list[dict[str, Any]] = []
    if variants:
        place = {model: number for number, model in enumerate([*STARTING_POINTS, *variants])}
        table = [row | variants.get(row["model"], {}) for row in table]
        table.sort(key=lambda row: place.get(row["model"], len(place)))
        points = frontier.points(table, evaluations, score_std, gains)
        unseen = {model for point in points for model in point["models"][1:]}
        names = [name for name in names if name not in unseen]
    table.sort(key=lambda row: place.get(row["model"], len(place)))
    shown = log_text and all(s.answer is not None for name in names for s in evaluations[name].first)
    return Comparison(
        table=table,
        prompts=[text_of(prompt) for prompt in first.prompts],
        answers={
            name: [
                {"answer": s.answer, "score": s.score, "length": s.length}
                for s in evaluations[name].first
                if s.draw == 0
            ]
            for name in names
        }
        if shown
        else {},
        judge=describe_judge(first.settings["judge"]),
        settings={
            "sampling temperatures": ", ".join(f"{temperature:g}" for temperature in first.temperatures),
            "at most": f"{first.settings['max_new_tokens']} new tokens",
            "seed": str(first.settings["seed"]),
        },
        agreement=agreement_of(evaluations.get("sft")),
        duels=duels,
        gains=gains,
        baselines=corners,
        points=points,
        chosen=chosen,
        sources=first.settings.get("sources", {}),
        samples={name: evaluations[name].first for name in names},
        alone=scores_alone(first.settings["judge"]),
        doubt=DOUBTS[first.settings["judge"]["judge"]],
        origin=made or origin.Origin(),
        people=[one for one in said if {one.model, one.other} <= set(evaluations)],
    )


def row_of(
    name: str, evaluation: Evaluation, duels: Mapping[float, head_to_head.Matrix], gains: Mapping[str, curve.Gain]
) -> dict[str, Any]:
    """One line of the table: the model's name and its `eval/` metrics, with the judge score's standard error.

    Where they are known, the verdict head to head with SFT and the gain over the curve too.
    """
    values = {key.removeprefix("eval/"): value for key, value in evaluation.metrics.items() if key.startswith("eval/")}
    error = clustered_error([sample.score for sample in evaluation.first], [s.cluster for s in evaluation.first])
    row = {"model": name, **values, "judge_score_se": error}
    duel = next(iter(duels.values())).get((name, "sft"))
    if duel is not None and duel.win_rate is not None and name not in STARTING_POINTS:
        row["verdict"] = "level" if not duel.clear else "better" if duel.beats else "worse"
    if name in gains:
        gain = gains[name]
        row |= {"gain": gain.gain, "gain_low": gain.interval.low, "gain_high": gain.interval.high}
    return row


def agreement_of(sft: Evaluation | None) -> str:
    """How often the judge is right on held-out pairs, and what makes it independent; empty where it is not known."""
    if sft is None or not math.isfinite(rate := sft.metrics.get("judge/accuracy", math.nan)):
        return ""
    low, high = (sft.metrics[f"judge/accuracy_{end}"] for end in ("low", "high"))
    agreed = percent(rate, Interval(low, high))
    said = f"On held-out pairs the judge prefers the chosen answer in {agreed} (95 % interval over prompts)"
    return f"{said}. {INDEPENDENT if sft.settings['judge']['judge'] == 'reward' else ''}".rstrip()


def describe_judge(judge: Mapping[str, Any]) -> str:
    """A judge's config in words."""
    if judge["judge"] == "endpoint":
        return f"the model {judge['model']}, asked which of two answers is better, in both orders"
    return JUDGES[judge["judge"]]


def text(comparison: Comparison) -> str:
    """The table for people, over how many prompts it is, and what it says; of several seeds their means first."""
    points = comparison.points
    lines = findings(comparison)
    above = f"{frontier.render_text(points)}\n{textwrap.fill(lines.pop(), WIDTH)}\n\n" if points else ""
    said = [line for line in lines if line != COVERS]
    said += [*notes(comparison), *(line for line in lines if line == COVERS)]
    below = "".join(f"\n{line}" for sentence in said for line in textwrap.wrap(sentence, WIDTH))
    each = sources_text(comparison)
    sources = f"\n\n{each}" if each else ""
    return f"{above}{render_text(comparison.table)}\n{over(len(comparison.prompts))}{below}{sources}"


def notes(comparison: Comparison) -> list[str]:
    """What stands beside the findings: other pairs of models, the baselines, how far the judge can be trusted."""
    pairs = [] if comparison.points else pair_lines(comparison)
    baselines = [f"{p.name} {p.height:.2f} (KL {p.kl:.1f})" for p in comparison.baselines if p.name != "sft"]
    if baselines and not comparison.points:
        pairs.append(f"SFT without alignment: {', '.join(baselines)}. !: not clearly above these.")
    told = [sentence for one in comparison.people for sentence in one.sentences]
    return [*pairs, *filter(None, [comparison.agreement]), *told]


def sources_text(comparison: Comparison) -> str:
    """The table by the sources of a mixture; empty without one, and of several seeds."""
    each = "" if comparison.points else by_source.render_text(comparison.table, comparison.sources)
    return f"{each}\n{textwrap.fill(by_source.NOTE, WIDTH)}" if each else ""


def table_text(comparison: Comparison, width: int) -> str:
    """What a terminal of this width shows: of several seeds their means, else the models; and over how many prompts."""
    points, prompts = comparison.points, over(len(comparison.prompts))
    shown = frontier.render_text(points) if points else render_text(comparison.table, width)
    return f"{shown}\n{prompts}"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """comparison.json: every pair once per temperature, the gains, the baselines, and what is said of them."""
    pairs = [
        duel.as_json() for duels in comparison.duels.values() for (one, other), duel in duels.items() if one < other
    ]
    return {
        "pairs": pairs,
        "gains": [gain.as_json() for gain in comparison.gains.values()],
        "baselines": [{"name": p.name, "kl": p.kl, "height": p.height} for p in comparison.baselines],
        "findings": findings(comparison),
        "notes": notes(comparison),
        "sources": sources_text(comparison),
        "best": best(comparison),
        "tables": {str(width): table_text(comparison, width) for width in WIDTHS},
        "judge": comparison.agreement,
        "people": [one.model_dump() for one in comparison.people],
        "covers": COVERS,
    }


def write(comparison: Comparison, folder: Path) -> None:
    """comparison.json, table.json, table.txt, reward_kl.png, report.html; of several seeds frontier.json too."""
    table, points = comparison.table, comparison.points
    (folder / "comparison.json").write_text(json.dumps(as_json(comparison), indent=2), encoding="utf-8")
    (folder / "table.json").write_text(json.dumps(list(table), indent=2), encoding="utf-8")
    (folder / "table.txt").write_text(text(comparison) + "\n", encoding="utf-8")
    if points:
        (folder / "frontier.json").write_text(json.dumps(points, indent=2), encoding="utf-8")
    picture = frontier.draw(points, table) if points else draw(table, baselines=comparison.baselines)
    (folder / "reward_kl.png").write_bytes(picture)
    (folder / "report.html").write_text(render_html(comparison), encoding="utf-8")
