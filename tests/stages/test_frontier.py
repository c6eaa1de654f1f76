"""The frontier over seeds: its points, what can be said of them, methods at equal KL, words and pictures."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest

from stages import compare
from stages.compare import frontier
from stages.compare.curve import Gain
from stages.compare.page import render_html
from stages.compare.table import Comparison
from stages.engine.scoring.evaluation_record import Evaluation, Sample
from stages.engine.scoring.intervals import Interval, apart
from tests.stages.test_compare import Page, evaluation
from tests.support.context import MemoryContext


def row(method: str, beta: float, seed: int, score: float, kl: float) -> dict[str, Any]:
    named = {"model": f"{method}-{beta}-s{seed}", "method": method, "beta": beta, "seed": seed}
    return named | {
        "judge_score": score,
        "kl_to_reference": kl,
        "kl_to_reference_se": 0.1,
        "win_rate_vs_sft": score / 4,
    }


TABLE = [
    {"model": "sft", "judge_score": 1.0, "kl_to_reference": 0.0, "kl_to_reference_se": 0.0, "win_rate_vs_sft": 0.5},
    row("ppo", 0.3, 0, 2.0, 3.0),
    row("ppo", 0.3, 1, 2.4, 3.6),
    row("ppo", 0.3, 2, 2.5, 3.3),
    row("ppo", 0.05, 0, 3.0, 9.0),
    row("dpo", 0.1, 0, 2.0, 5.0),
    row("dpo", 0.1, 1, 2.2, 5.0),
]


def test_points_are_means_with_standard_errors_over_the_seeds() -> None:
    low, high, dpo = frontier.points(TABLE)
    assert [(p["method"], p["beta"], p["seeds"]) for p in (low, high, dpo)] == [
        ("ppo", 0.05, [0]),
        ("ppo", 0.3, [0, 1, 2]),
        ("dpo", 0.1, [0, 1]),
    ]
    assert high["judge_score"] == pytest.approx(2.3) and high["kl_to_reference"] == pytest.approx(3.3)
    assert high["judge_score_se"] == pytest.approx(stdev([2.0, 2.4, 2.5]) / math.sqrt(3))
    assert low["judge_score_se"] is None and dpo["kl_to_reference_se"] == 0.0
    # DPO scores 2.1 at distance 5, PPO more at less.
    assert [p["on_frontier"] for p in (low, high, dpo)] == [True, True, False]
    assert frontier.points(TABLE[:1]) == []


def test_the_frontier_in_words_and_pictures() -> None:
    points = frontier.points(TABLE)
    lines = frontier.render_text(points).splitlines()
    assert len(lines) == 2 + 3 + 3 and "standard error over the seeds" in lines[-3]
    assert "2.30 ± 0.15" in lines[3] and "3.30 ± 0.17" in lines[3] and lines[3].endswith("yes")
    assert "±" not in lines[2]
    said = frontier.headline(points)
    assert said.startswith("The highest mean judge score is that of ppo 0.05: 3.00, at KL 9.00;")
    assert said.endswith("from near to far: ppo 0.3, ppo 0.05.") and "one seed it cannot be said" in said
    chosen = frontier.headline(points, chosen="by these numbers")
    assert chosen.endswith(
        "the highest of 3 on the prompts that chose it, so its own number is optimistic; "
        "data.*.test_fraction would give another."
    )
    assert frontier.headline(points, chosen="tested").endswith("optimistic: the test part gives another.")
    light, dark = frontier.draw(points, TABLE), frontier.draw(points, TABLE, dark=True)
    assert light.startswith(b"\x89PNG") and light != dark
    page = Page(render_html(Comparison(TABLE, prompts=[], answers={}, judge="a rule", points=points)))
    assert (
        page.tags.count("tr") == (1 + 3) + (1 + len(TABLE))
        and page.tags.count("img") == 1
        and "2.30 ± 0.15" in page.text
    )


def test_of_equal_points_hardly_any_is_clearly_below_the_highest() -> None:
    """3 methods x 3 betas x 3 seeds, all equal, of equal and unequal spreads: at most 5 % of sweeps say it.

    Twice the standard error of the difference, uncorrected, says it in 71 %. 600 sweeps: standard error .009.
    """
    draw, sweeps = np.random.default_rng(0), 600
    for spreads in ([1.0, 1.0, 1.0], [0.3, 1.0, 2.0]):
        wrong = 0
        for _ in range(sweeps):
            table = [
                row(method, beta, seed, float(draw.normal(2.0, spread)), 1.0)
                for method, spread in zip(("dpo", "kto", "ppo"), spreads, strict=True)
                for beta in (0.1, 0.2, 0.3)
                for seed in (0, 1, 2)
            ]
            wrong += any(point["below"] for point in frontier.points(table))
        assert wrong / sweeps <= 0.05 + 2 * 0.009


def test_a_point_far_below_is_said_to_be_and_prompts_count_as_seeds_do() -> None:
    """Seeds agree to 0.01: a gap of 1 is clear; not where the prompts disagree about it, and not by a single seed."""
    table = [row(method, 0.1, seed, score + 0.01 * seed, 1.0) for method, score in HEIGHTS for seed in (0, 1, 2)]
    below = {point["method"]: point["below"] for point in frontier.points(table)}
    assert below == {"dpo": False, "kto": True}
    single = [r for r in table if r["method"] == "dpo" or r["seed"] == 0]
    assert [point["below"] for point in frontier.points(single)] == [False, None]
    # 4 prompts: KTO wins one by 8 and loses three by 4, the mean gap is 1 with a standard error of 3.
    by_prompt = {"dpo": [0.0, 4.0, 4.0, 4.0], "kto": [8.0, 0.0, 0.0, 0.0]}
    one = [{"role": "user", "content": "p"}]
    for spread, told in ((1.0, False), (0.0, True)):
        given = {}
        for r in table:
            scores = [r["judge_score"] + spread * (s - fmean(by_prompt[r["method"]])) for s in by_prompt[r["method"]]]
            samples = [
                Sample(one, "a", s, "b", 0.0, 1.0, 1, 1, True, 0.0, cluster=str(i)) for i, s in enumerate(scores)
            ]
            given[r["model"]] = Evaluation({}, samples, {})
        dpo, kto = frontier.points(table, given)
        assert kto["below"] is told and dpo["judge_score_covers"] == "seeds and prompts"
        assert dpo["judge_score_low"] < dpo["judge_score"] < dpo["judge_score_high"]


HEIGHTS = (("dpo", 3.0), ("kto", 2.0))


def test_kl_costs_are_on_one_scale_and_methods_are_matched_by_kl() -> None:
    """PPO's kl_coef acts on scores divided by their spread; DPO's and KTO's beta on the log-ratios themselves."""
    table = [row("dpo", b, s, score, kl) for b, score, kl in ((0.1, 3.0, 6.0), (0.3, 2.0, 2.0)) for s in (0, 1)]
    table += [row("ppo", b, s, score + s, kl) for b, score, kl in ((0.1, 3.0, 5.0), (0.3, 1.0, 1.0)) for s in (0, 1)]
    points = frontier.points(table, score_std=1.71)
    assert [point["kl_cost"] for point in points] == pytest.approx([0.1, 0.3, 0.1 * 1.71, 0.3 * 1.71])
    assert frontier.label(points[2]) == "ppo 0.1 (KL cost 0.17)" and frontier.label(points[0]) == "dpo 0.1"
    assert "0.171" in frontier.render_text(points)
    assert frontier.cells(frontier.points(table)[2])[2] == "-", "the spread is not known"
    # At KL 3: DPO a quarter of the way from 2 to 3, PPO half of the way from 1.5 to 3.5, errors of .5 at both ends.
    same = frontier.matched(points, 3.0)
    assert same["dpo"] == pytest.approx((2.25, 0.0)) and same["ppo"] == pytest.approx((2.5, math.hypot(0.25, 0.25)))
    assert set(frontier.matched(points, 5.5)) == {"dpo"}
    assert "at KL 3.50: ppo 2.75 ± 0.36, dpo 2.38 ± 0.00" in frontier.render_text(points)
    apart = [r | {"kl_to_reference": r["kl_to_reference"] + 10 * (r["method"] == "ppo")} for r in table]
    assert "reach no common distance" in frontier.render_text(frontier.points(apart))


def test_learning_rates_make_curves_of_their_own() -> None:
    table = [row("dpo", 0.1, 0, 2.0 + r, 1.0) | {"learning_rate": r, "group": f"dpo-{r}"} for r in (0.5, 1.0)]
    points = frontier.points(table)
    assert [point["learning_rate"] for point in points] == [0.5, 1.0]
    assert list(frontier.curves(points)) == ["dpo lr 0.5", "dpo lr 1"]


def test_the_comparison_of_a_sweep_has_the_frontier(tmp_path: Path) -> None:
    variants: Any = {
        f"dpo-{beta}-s{seed}": {"method": "dpo", "beta": beta, "seed": seed} for beta in (0.1, 0.3) for seed in (0, 1)
    }
    given = {name: evaluation(1.0 + v["beta"] + v["seed"], 0.7, 2.0, answer=name) for name, v in variants.items()}
    folders = {}
    others = {"champion": evaluation(0.5, 0.6, 1.0), "sft": evaluation(0.0, 0.5, 0.0)}
    for name, value in {**given, **others}.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        value.save(folders[name])
    run = MemoryContext(tmp_path / "work", {"variants": variants}, folders, stage="compare")
    compare.run(run)
    comparison = run.published["comparison"]

    points = json.loads((comparison / "frontier.json").read_text())
    assert [point["models"] for point in points] == [["dpo-0.1-s0", "dpo-0.1-s1"], ["dpo-0.3-s0", "dpo-0.3-s1"]]
    # judge_score of `evaluation(score)` is score + 1.5: 2.6 and 3.6, then 2.8 and 3.8.
    assert [point["judge_score"] for point in points] == pytest.approx([3.1, 3.3])
    table = json.loads((comparison / "table.json").read_text())
    written = json.loads((comparison / "comparison.json").read_text())
    assert written["findings"] == [frontier.headline(points)]
    assert written["best"][0] == frontier.label(max(points, key=lambda point: point["judge_score"]))
    assert written["tables"]["80"].startswith(frontier.render_text(points))
    assert [r["model"] for r in table] == ["sft", *variants, "champion"] and table[2]["seed"] == 1
    assert (comparison / "table.txt").read_text().startswith("Method")
    page = Page((comparison / "report.html").read_text())
    assert "The highest mean judge score is that of dpo 0.3: 3.30 [" in page.text
    assert "cannot be told apart from it: dpo 0.1" in page.text
    assert "dpo-0.3-s0 0" in page.text and "dpo-0.3-s1 0" not in page.text, "answers of the first seed"
    assert page.tags.count("img") == 1


def test_two_means_alone_are_told_apart_by_t() -> None:
    """Of two, the studentized range / sqrt 2 is Student's t: 2.776 at 4 degrees of freedom, 97.5 %."""
    assert apart(2.79, [(1.0, 4)], 2) and not apart(2.76, [(1.0, 4)], 2)
    assert not apart(2.79, [(1.0, 4)], 3)
    # Variances .5 and .5 with 4 each: 8 degrees of freedom, 2.306. Without any error nothing can be said.
    assert apart(2.32, [(0.5, 4), (0.5, 4)], 2) and not apart(2.29, [(0.5, 4), (0.5, 4)], 2)
    # Unequal ones count by their squares: (.9 + .1)^2 / (.81 / 2 + .01 / 20) = 2.466, rounded down to 2.25: t = 3.88.
    assert apart(3.9, [(0.9, 2), (0.1, 20)], 2) and not apart(3.8, [(0.9, 2), (0.1, 20)], 2)
    assert not apart(1.0, [(0.0, 4)], 2)
    # Two points of three seeds, .1 apart: their means have errors of .1 / sqrt 3, the difference one of .0816.
    for gap, below in ((0.24, True), (0.21, False)):
        table = [row("dpo", 0.1, seed, 3.0 + 0.1 * seed, 1.0) for seed in (0, 1, 2)]
        table += [row("kto", 0.1, seed, 3.0 - gap + 0.1 * seed, 1.0) for seed in (0, 1, 2)]
        assert frontier.points(table)[1]["below"] is below, "2.776 x .0816 = .227"


def test_what_is_said_of_a_method_covers_its_seeds() -> None:
    """KTO's seeds gain 1.0 and -0.4 over the baselines: each is clear over prompts, and the method is not; DPO's is."""
    prompts = [[{"role": "user", "content": f"p{i}"}] for i in range(50)]
    table = [row(method, 0.1, seed, 2.0, 1.0) for method in ("dpo", "kto") for seed in (0, 1)]
    gained, given, gains = {"dpo": (1.0, 0.9), "kto": (1.0, -0.4)}, {}, {}
    for r in table:
        name, mean = r["model"], gained[r["method"]][r["seed"]]
        win = [float(i % 10 < (8 if mean > 0 else 2)) for i in range(50)]
        samples = [Sample(p, "a", 2.0, "b", 0.0, w, 1, 1, True, 0.0) for p, w in zip(prompts, win, strict=True)]
        given[name] = Evaluation({}, samples, {})
        rows = np.array([mean + 0.1 * (-1) ** i for i in range(50)])
        gains[name] = Gain(name, 1.0, mean, Interval(mean - 0.03, mean + 0.03), ("sft",), rows)
    dpo, kto = frontier.points(table, given, gains=gains)
    assert (dpo["gain"], kto["gain"]) == pytest.approx((0.95, 0.3))
    assert dpo["gain_low"] > 0 > kto["gain_low"] and kto["win_rate_vs_sft_low"] < 0.5 < dpo["win_rate_vs_sft_low"]
    said = frontier.headline([dpo, kto])
    assert "Clearly better than SFT over seeds and prompts: dpo 0.1." in said
    assert said.endswith("Not clearly more than sharpening SFT or selecting among its answers gives: kto 0.1.")
    logged = frontier.logged([dpo, kto])
    assert logged[f"eval/{dpo['group']}/gain"] == dpo["gain"] and f"eval/{kto['group']}/gain_low" in logged
    assert kto["win_rate_vs_sft_low"] == 0 and kto["win_rate_vs_sft_high"] == 1, "a share has bounds"
    assert all(len(line) <= 82 for line in frontier.render_text([dpo, kto]).splitlines())
    # A mean rate above one half, .6, is not clear where the seeds disagree by as much: .7 and .5.
    rates = {"dpo": (7, 7), "kto": (7, 5)}
    for r in table:
        wins = [float(i % 10 < rates[r["method"]][r["seed"]]) for i in range(50)]
        samples = [replace(s, win=w) for s, w in zip(given[r["model"]].samples, wins, strict=True)]
        given[r["model"]] = Evaluation({}, samples, {})
        r["win_rate_vs_sft"] = fmean(wins)
    points = frontier.points(table, given)
    assert [point["win_rate_vs_sft"] for point in points] == pytest.approx([0.7, 0.6])
    assert "Clearly better than SFT over seeds and prompts: dpo 0.1." in frontier.headline(points)
