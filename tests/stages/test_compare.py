"""The comparison: its table, picture and page, and what hostile text can do there (nothing)."""

import base64
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import StageError
from stages import compare
from stages.compare import frontier
from stages.compare.findings import COVERS
from stages.compare.page import render_html
from stages.compare.plots import SPARE_COLOURS, colours, draw
from stages.compare.table import render_text, shown_columns
from stages.engine.scoring.evaluation_record import Evaluation, Sample
from tests.conftest import ROOT
from tests.support import pictures
from tests.support.context import MemoryContext

SETTINGS: dict[str, Any] = {
    "judge": {"judge": "rule"},
    "judge_model": None,
    "temperatures": [1.0],
    "samples_per_prompt": 1,
    "max_new_tokens": 8,
    "seed": 0,
}
HOSTILE = "<script>alert('x')</script><img src=http://evil/x onerror=alert(1)>&\"' $x_1$ \u202edesrever \x00 \u2028 end"


def evaluation(score: float, win: float, kl: float, *, answer: str = "fine", prompt: str = "say it") -> Evaluation:
    samples = [
        Sample(
            prompt=[{"role": "user", "content": f"{prompt} {i}"}],
            answer=f"{answer} {i}",
            score=score + i,
            sft_answer="so",
            sft_score=0.0,
            win=win,
            length=3,
            sft_length=3,
            ended=True,
            kl=kl,
        )
        for i in range(4)
    ]
    metrics = {
        "judge_score": score + 1.5,
        "win_rate_vs_sft": win,
        "win_rate_vs_sft_low": win - 0.1 if kl else win,
        "win_rate_vs_sft_high": win + 0.1 if kl else win,
        "length_controlled_win_rate": win,
        "kl_to_reference": kl,
        "kl_to_reference_se": kl / 10,
        "length": 3.0,
        "distinct_2": 0.25,
        "reference_nll": 1.0,
    }
    named = {f"eval/{name}": value for name, value in metrics.items()} | {"compute/seconds": 1.0}
    return Evaluation(named, samples, SETTINGS)


def evaluations(**changes: Any) -> dict[str, Evaluation]:
    return {
        "kto": evaluation(1.0, 0.55, 2.0),
        "dpo": evaluation(2.0, 0.8, 3.0, **changes),
        "sft": evaluation(0.0, 0.5, 0.0),
        "base": evaluation(-1.0, 0.2, 50.0),
    }


class Page(HTMLParser):
    """What a browser would see: tags, attributes, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_starting_points_come_first_then_the_best_judged() -> None:
    table = compare.compare(evaluations()).table
    assert [row["model"] for row in table] == ["base", "sft", "dpo", "kto"]
    assert table[2]["win_rate_vs_sft"] == 0.8
    # Scores 2, 3, 4, 5: sample variance 5/3, over four answers.
    assert table[2]["judge_score_se"] == pytest.approx((5 / 3 / 4) ** 0.5)
    assert "compute/seconds" not in table[2]


def test_the_order_of_the_inputs_changes_nothing() -> None:
    given = evaluations()
    backwards = dict(reversed(given.items()))
    assert render_html(compare.compare(given)) == render_html(compare.compare(backwards))


def test_evaluations_under_other_conditions_are_refused() -> None:
    given = evaluations()
    other = replace(given["dpo"], settings=SETTINGS | {"seed": 1})
    with pytest.raises(StageError, match=r"with seed = 0, dpo with 1") as error:
        compare.compare(given | {"dpo": other})
    assert error.value.problem.field == "evaluate.seed"
    with pytest.raises(StageError, match="not the same"):
        compare.compare(given | {"dpo": evaluation(2.0, 0.8, 3.0, prompt="other")})
    with pytest.raises(StageError, match="no evaluation"):
        compare.compare({})


def test_the_text_table_lines_up_and_leaves_out_what_no_model_has() -> None:
    table = compare.compare(evaluations()).table
    lines = render_text(table).splitlines()
    assert len(lines) == 2 + len(table)
    assert len({len(line) for line in lines}) == 1
    assert lines[0].startswith("Model") and "Reward score" not in lines[0] and "Preference acc." not in lines[0]
    dpo = next(line for line in lines if line.startswith("dpo"))
    assert "80 % [70, 90]" in dpo and "3.00" in dpo and "3.50" in dpo
    wide = render_text([{**row, "model": "m" * 56} for row in table]).splitlines()
    assert wide[0].split() == ["Model", "Judge", "Win", "vs", "SFT"] and len(wide[0]) <= 80
    assert render_text([{"model": "x", "judge_score": None, "length": 2.0}]).splitlines()[-1].split() == ["x", "2.0"]


def test_the_readme_shows_the_table_as_it_is_printed() -> None:
    (block,) = re.findall(r"^```text\n(Method .*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    head, _, *lines = block.splitlines()
    assert head.split() == " ".join(frontier.HEAD).split()
    assert "\n".join(lines[-len(frontier.BARS.splitlines()) :]) == frontier.BARS


@pytest.mark.parametrize(("answers", "few"), [(1, True), (99, True), (100, False), (250, False)])
def test_table_and_page_say_over_how_many_prompts_and_when_these_are_few(answers: int, few: bool) -> None:
    sample = evaluations()["sft"].samples[0]
    samples = [replace(sample, prompt=[{"role": "user", "content": f"say {i}"}]) for i in range(answers)]
    comparison = compare.compare({name: replace(value, samples=samples) for name, value in evaluations().items()})
    line = next(line for line in compare.text(comparison).splitlines() if line.startswith("Over "))
    count = "1 prompt" if answers == 1 else f"{answers} prompts"
    assert line.startswith(f"Over {count}; in brackets: 95 % intervals over prompts.")
    page = Page(render_html(comparison)).text
    assert f"the same {count}, which" in page
    warning = "With fewer than 100 prompts differences may be chance"
    assert (warning in line, warning in page) == (few, few)


def test_a_win_rate_without_an_interval_can_be_shown() -> None:
    given = compare.compare(evaluations())
    table = [{**row, "win_rate_vs_sft_low": None, "win_rate_vs_sft_high": None} for row in given.table]
    assert "<td>80 %</td>" in render_html(replace(given, table=table))


def test_known_names_keep_their_colour_and_others_get_spare_ones() -> None:
    found = colours(["sft", "dpo", "dpo-2", "mine"])
    assert found["dpo"] == colours(["dpo"])["dpo"]
    assert [found["dpo-2"], found["mine"]] == SPARE_COLOURS[:2]


def test_the_picture_is_a_png_and_bears_odd_numbers_and_names() -> None:
    table = compare.compare(evaluations()).table
    light, dark = draw(table), draw(table, dark=True)
    assert light.startswith(b"\x89PNG") and light != dark
    odd = [{"model": "$\\bad", "judge_score": 1.0, "kl_to_reference": 0.5, "kl_to_reference_se": float("nan")}]
    odd += [{"model": "nan", "judge_score": float("nan"), "kl_to_reference": 1.0, "kl_to_reference_se": 0.1}]
    assert draw(odd).startswith(b"\x89PNG")
    assert draw([]).startswith(b"\x89PNG")


def test_the_page_stands_alone_and_shows_everything() -> None:
    comparison = compare.compare(evaluations())
    text = render_html(comparison)
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    addresses = [value or "" for name, value in page.attributes if name in ("src", "srcset", "href", "action")]
    assert any(value.startswith("data:image/png;base64,") for value in addresses)
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in addresses)
    assert {value[1:] for value in addresses if value[0] == "#"} <= {v for name, v in page.attributes if name == "id"}
    assert not re.search(r"https?://|url\(|@import", re.sub(r"base64,[\w+/=]+", "", text))
    assert ("http-equiv", "Content-Security-Policy") in page.attributes
    images = [value.partition(",")[2] for value in addresses if value.startswith("data:")]
    assert len(set(images)) == 4 and all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    for column in shown_columns(comparison.table):
        assert column.title in page.text and column.meaning in page.text
    for shown in (
        "say it 0",
        "fine 3",
        "80 % [70, 90]",
        "cannot tell dpo from kto",
        "Head to head at temperature 1",
        COVERS.replace("`", ""),  # a command is set as code
    ):
        assert shown in page.text


@pytest.mark.slow
@pytest.mark.skipif(pictures.CHROMIUM is None, reason="chromium is not on this machine")
def test_the_readmes_pictures_are_made_from_a_report(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    compare.write(compare.compare(evaluations()), tmp_path)
    pictures.draw(tmp_path, tmp_path / "pictures")
    for name in ("reward_kl.png", "report.png"):
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")


def test_hostile_text_stays_text_wherever_it_stands() -> None:
    given = evaluations(answer=HOSTILE, prompt="say it")
    renamed = {HOSTILE if name == "kto" else name: value for name, value in given.items()}
    for value in renamed.values():
        value.samples[0].prompt[0]["content"] = HOSTILE
    page = Page(render_html(compare.compare(renamed)))
    calm = Page(render_html(compare.compare(evaluations())))
    assert page.tags == calm.tags
    assert {name for name, _ in page.attributes} == {name for name, _ in calm.attributes}
    assert page.text.count("<script>alert('x')</script>") > 3
    assert "\u202e" not in page.text and "\x00" not in page.text


def test_an_endpoint_is_described_by_its_model() -> None:
    words = compare.describe_judge({"judge": "endpoint", "url": "http://inside/v1", "model": "big"})
    assert "big" in words and "inside" not in words


def test_the_stage_publishes_table_picture_and_page(tmp_path: Path) -> None:
    folders = {}
    for name, value in evaluations(answer="odd \u2028 \u85cf").items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        value.save(folders[name])
    run = MemoryContext(tmp_path, {}, folders, stage="compare")
    final = compare.run(run)
    assert final["win_rate_vs_sft/dpo"] == 0.8 and final["kl_to_reference/base"] == 50.0
    comparison = run.published["comparison"]
    assert {path.name for path in comparison.iterdir()} == run.files
    assert run.files == {"report.html", "comparison.json", "table.json", "table.txt", "reward_kl.png"}
    table = json.loads((comparison / "table.json").read_text())
    assert [row["model"] for row in table] == ["base", "sft", "dpo", "kto"]
    text = (comparison / "table.txt").read_text()
    assert text.startswith(f"{render_text(table)}\nOver 4 prompts")
    written = json.loads((comparison / "comparison.json").read_text())
    assert written["best"] == ["dpo", "kto"]  # four prompts tell nobody apart
    for width, shown in written["tables"].items():
        assert max(map(len, shown.partition("\nOver")[0].splitlines())) <= int(width)
    assert len(written["tables"]["120"].split("\n")[0].split()) > len(written["tables"]["80"].split("\n")[0].split())
    assert "odd \u2028 \u85cf 0" in (comparison / "report.html").read_text()


def test_a_folder_that_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="not an evaluation folder"):
        Evaluation.load(tmp_path)


def test_comparing_imports_no_torch_and_the_text_no_matplotlib() -> None:
    code = "import sys, stages.compare; print(*sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_of_one_seed_only_models_are_spoken_of_and_without_aligned_ones_it_says_so() -> None:
    comparison = compare.compare(evaluations())
    assert "Which aligned model did better?" in Page(render_html(comparison)).text
    starting = compare.text(compare.compare({name: evaluations()[name] for name in ("base", "sft")}))
    assert "No aligned model is among these yet." in starting and "--seeds" not in starting
