"""What the report shows beside the table: curves, spreads, prompts worth a look, and where the models come from."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages import compare
from stages.compare.origin import Training, clock, origin
from stages.compare.page import charts, render_html
from stages.compare.page.groups import EXAMPLES, groups
from stages.engine.scoring.evaluation_record import Sample, without_text
from stages.runtime.context import Recorded
from tests.stages.test_compare import HOSTILE, Page, evaluations
from tests.support import pictures
from tests.support.context import MemoryContext
from tests.support.evaluations import ENDPOINT, N, made

SHA = "d" * 64


def sample(number: int, score: float, win: float, length: int = 3, ended: bool = True) -> Sample:
    prompt = [{"role": "user", "content": f"say {number}"}]
    return Sample(prompt, f"answer {number}", score, "so", 1.0, win, length, 3, ended, 1.0)


def test_prompts_are_grouped_by_the_stated_rules() -> None:
    """SFT has 1 everywhere. Worked by hand: dpo loses 0 and 2 (2 by more); dpo and kto disagree on 2 and 1; one answer
    was cut; dpo and kto have the means 1, 2, 0.75 and 1, so that only 2 is below SFT."""
    sft = [sample(i, 1.0, 0.5) for i in range(4)]
    dpo = [sample(0, 0.5, 0), sample(1, 3, 1), sample(2, -1, 0, 9), sample(3, 1, 0.5)]
    kto = [sample(0, 1.5, 0.5), sample(1, 1, 0, 5), sample(2, 2.5, 1), sample(3, 1, 0.5, 7, ended=False)]
    made = {group.title: list(group.places) for group in groups({"sft": sft, "dpo": dpo, "kto": kto}, alone=True)}
    assert made == {
        "dpo loses to SFT": [2, 0],
        "kto loses to SFT": [1],
        "Methods disagree": [2, 1],  # 3.5 apart, and 2
        "Answers cut off": [3],
        "Longest answers": [2, 3, 1, 0],
        "Worst answers": [2],
    }
    compared = {group.title for group in groups({"sft": sft, "dpo": dpo}, alone=False)}
    assert compared == {"dpo loses to SFT", "Answers cut off", "Longest answers"}
    assert groups({"sft": sft}, alone=True) == [] == groups({"dpo": dpo}, alone=True)


def test_the_page_counts_each_group_and_shows_its_first_prompts() -> None:
    scores = [-1.0] * 7 + [1.0] * (N - 7)
    comparison = compare.compare({"sft": made([0.0] * N), "dpo": made(scores)})
    text = render_html(comparison)
    assert "their methods; <code>alignflow run --seeds 0,1,2</code> or a sweep compares methods.</p>" in text
    assert "dpo loses to SFT · 7 of 120 prompts" in re.sub(r"</?span[^>]*>", "", text)
    group = text.partition("dpo loses to SFT <span")[2].partition("</details>")[0]
    assert group.count('class="example"') == EXAMPLES and "say 4<" in group and "say 5<" not in group
    assert group.count("loses to SFT") == EXAMPLES and group.count("best score") == EXAMPLES


def test_without_texts_groups_are_counted_and_no_prompt_is_shown() -> None:
    bare = {name: replace(one, samples=list(map(without_text, one.samples))) for name, one in evaluations().items()}
    text = render_html(compare.compare(bare, log_text=False))
    assert "dpo loses to SFT" in text and 'class="example"' not in text and 'class="card"' not in text


def test_a_judge_that_only_compares_has_no_histogram_of_scores() -> None:
    given = {"sft": made([0.0] * N, ENDPOINT), "dpo": made([1.0] * N, ENDPOINT)}
    page = Page(render_html(compare.compare(given))).text
    assert "Lengths, in tokens" in page and "Judge scores" not in page and "score 1.00" not in page
    assert "Both orders were asked" in " ".join(page.split())


def test_histograms_have_the_same_axes_and_lose_no_value() -> None:
    low, high = charts.histograms({"a": [0.0, 0.0, 24.0], "b": [1.0, 23.9, float("nan")]}, "score")
    # bins of width 1: a has 2 in the first and 1 in the last, b one each in the second and the last
    assert [bar["height"] for bar in low["bars"]] == [122.0, 61.0]  # of 122 pixels, the highest count is 2
    assert [bar["height"] for bar in high["bars"]] == [61.0, 61.0]
    step = (charts.WIDTH - charts.LEFT - charts.RIGHT) / 24
    assert [bar["x"] for bar in high["bars"]] == pytest.approx([44.5 + step, 44.5 + 23 * step], abs=0.1)
    assert low["rows"] == high["rows"] and low["columns"] == high["columns"]
    assert low["mean"] == pytest.approx(44 + 8 / 24 * 248, abs=0.1) and "mean 12.45" in high["says"]
    assert charts.histograms({"a": [2.0, 2.0]}, "tokens")[0]["bars"][0]["height"] == 122.0
    assert charts.histograms({"a": []}, "tokens") == []


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((0, 1), [0, 0.5, 1]),
        ((0.31, 0.58), [0.35, 0.4, 0.45, 0.5, 0.55]),
        ((0, 231), [0, 100, 200]),
        ((5, 5), [5]),
        ((-3, 7), [-2, 0, 2, 4, 6]),
    ],
)
def test_ticks_are_round_numbers_within_the_ends(ends: tuple[float, float], expected: list[float]) -> None:
    assert charts.ticks(*ends) == pytest.approx(expected)


def training(model: str, method: str | None, **more: Any) -> Training:
    params = {"learning_rate": "0.001", "beta": "0.1", "lora": "null"} | ({"method": method} if method else {})
    curves = {"train/loss": [(step, 1 / step) for step in range(1, 251)], "train/score": [(1, 0.0), (2, 1.0)]}
    return Training(model, Recorded("r" * 32, "align" if method else "sft", 0.0, params=params, curves=curves, **more))


def test_a_long_curve_is_thinned_to_means_and_a_held_out_value_stands_beside_it() -> None:
    sft = training("sft", None, metrics={"eval/loss": 1.5})
    (what, points, held_out), _ = sft.curves
    chart = charts.line(sft, what, points, held_out)
    assert (what, held_out, chart["each"]) == ("loss", 1.5, 3)  # 250 steps as 84 means of three
    assert len(chart["path"].split("L")) == 84
    assert chart["ring"] == {"x": 292.0, "y": 8.0, "text": "held out 1.5"}  # the highest value is at the top
    assert chart["path"].startswith("M44.0 ") and chart["path"].endswith(" 130.0")
    assert "from 0.611 at step 1" in chart["says"]  # (1 + 1/2 + 1/3) / 3


def test_the_loss_of_ppo_is_not_drawn_and_settings_are_named() -> None:
    assert [what for what, _, _ in training("mine", "ppo").curves] == ["reward"]
    assert [what for what, _, _ in training("mine", "dpo").curves] == ["loss", "reward"]
    assert training("mine", "dpo").settings == "beta 0.1, learning_rate 0.001"


def test_what_made_the_models_is_read_from_the_runs_behind_the_evaluations(tmp_path: Path) -> None:
    context = MemoryContext(tmp_path, {}, {}, stage="compare", experiment="mine", pipeline_run="run 7")
    inputs = {name: {"uri": f"runs:/e-{name}/evaluation", "sha256": name} for name in ("dpo", "sft", "gone")}
    context.request = context.request.model_validate(context.request.model_dump() | {"inputs": inputs})
    sft = training("sft", None, metrics={"compute/train_tokens": 1000.0, "compute/stage_seconds": 30.0}).run
    dpo = replace(
        training("dpo", "dpo", metrics={"compute/train_tokens": 234.0, "compute/stage_seconds": 40.0}).run,
        tags={"input.data": SHA, "code.version": "1+a"},
    )
    context.records = {
        "e-sft": Recorded("e-sft", "evaluate", 90.0, params={"train.run_id": "t-sft"}, tags={"input.reward": "rew"}),
        "e-dpo": Recorded("e-dpo", "evaluate", 90.0, params={"train.run_id": "t-dpo"}, tags={"input.reward": "rew"}),
        "t-sft": replace(sft, began=60.0),
        "t-dpo": replace(dpo, began=70.0),
        "rew": Recorded("r", "reward", 65.0),
        SHA: Recorded("d", "validate", 50.0, datasets=["/home/me/secret/pairs.jsonl", "hub:a/b"]),
    }
    known = origin(context, ["dpo", "gone", "sft"])
    assert [one.model for one in known.trainings] == ["sft", "reward", "dpo"]
    assert known.trainings[2].data == "pairs.jsonl, hub:a/b, sha256 dddddddddddd"
    assert known.facts["Tokens"] == "1,234 trained on, 0 generated" and known.facts["Cost"].startswith("1 min 10 s ")
    assert known.facts["First stage began"] == "1970-01-01 00:01 UTC" and known.facts["Code"] == "1+a"
    page = Page(render_html(compare.compare(evaluations(), made=known)))
    for shown in ("Pipeline: mine", "run 7", "dpo: loss", "pairs.jsonl, hub:a/b", "beta 0.1", "1 min 10 s"):
        assert shown in page.text
    assert "secret" not in page.text


def test_hostile_names_and_data_stay_text() -> None:
    known = training(HOSTILE, HOSTILE)
    calm = compare.origin.Origin([replace(training("x", "dpo"), data="data")], {"Run": "r"})
    wild = compare.origin.Origin([replace(known, data=HOSTILE)], {"Run": HOSTILE})
    page, plain = (Page(render_html(compare.compare(evaluations(), made=made))) for made in (wild, calm))
    assert page.tags == plain.tags and page.text.count("<script>alert('x')</script>") > 3
    assert "\u202e" not in page.text and "\x00" not in page.text


@pytest.mark.parametrize(("seconds", "said"), [(45.4, "45 s"), (200, "3 min 20 s"), (3840, "1 h 04 min")])
def test_seconds_are_said_in_words(seconds: float, said: str) -> None:
    assert clock(seconds) == said


@pytest.mark.slow
@pytest.mark.skipif(pictures.CHROMIUM is None, reason="chromium is not on this machine")
def test_a_phone_scrolls_tables_and_never_the_page(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    wide = {f"{'long-' * 8}{name}": value for name, value in evaluations(answer="w" * 900).items()}
    known = compare.origin.Origin([replace(training("sft", None), data="d" * 200)], {"Run": "r" * 300})
    (tmp_path / "report.html").write_text(render_html(compare.compare({**evaluations(), **wide}, made=known)))
    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=pictures.CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.goto((tmp_path / "report.html").as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        moved = page.evaluate(
            "[...document.querySelectorAll('.scroll')].slice(0, 2).map(box => { box.scrollLeft = 200;"
            " const cell = box.querySelector('tbody th');"
            " return [box.scrollLeft, cell.getBoundingClientRect().left - box.getBoundingClientRect().left]; })"
        )
        assert [scrolled > 0 and abs(left) < 2 for scrolled, left in moved] == [True, True]  # the models stay in sight
        browser.close()
