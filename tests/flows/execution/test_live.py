"""The view of a run: what it reads from the log, how it fits a terminal, and that nothing else is on the screen."""

import io
import logging
from collections.abc import Iterator

import pytest
from rich.console import Console

from flows.execution import live
from flows.execution.live import Line, Messages, View
from schemas.environment import LIVE
from schemas.stage import Result


def console(width: int = 80, encoding: str = "utf-8") -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    return Console(file=file, width=width, force_terminal=True, color_system=None, highlight=False)


def printed(on: Console) -> list[str]:
    on.file.seek(0)
    return on.file.read().splitlines()


def shown(view: View) -> list[str]:
    """The bars as they would be drawn now."""
    with view.console.capture() as capture:
        view.console.print(view)
    return [line.rstrip() for line in capture.get().splitlines()]


def record(message: str, level: int = logging.INFO, stage: str = "dpo") -> logging.LogRecord:
    made = logging.LogRecord("prefect.task_runs", level, "", 0, message, (), None)
    made.task_run_name = stage
    return made


@pytest.mark.parametrize(
    ("message", "read"),
    [
        ("dpo  62/94 steps  accuracy 0.71  margin 0.31  0:09 left", (62, 94, "steps", "accuracy 0.71  margin 0.31", 9)),
        ("dpo  94/94 steps  loss 0.5", (94, 94, "steps", "loss 0.5", None)),
        ("eval dpo  3/231 answers  1:02:03 left", (3, 231, "answers", "", 3723)),
        ("dpo  3/9 answers scored by the reference", (3, 9, "answers scored by the reference", "", None)),
        ("dpo: on pool gpu as flow run x", (0, 0, "", "on pool gpu as flow run x", None)),
    ],
)
def test_a_bar_is_read_from_the_stages_own_lines(message: str, read: tuple[object, ...]) -> None:
    line = Line("dpo", began=0.0)
    line.read(message, now=100.0)
    assert (line.done, line.total, line.unit, line.what, line.ends and line.ends - 100) == read


def test_other_lines_do_not_hide_the_metrics() -> None:
    line = Line("dpo", began=0.0)
    line.read("dpo  1/2 steps  loss 0.5", now=0.0)
    line.read("an answer ends with '.'", now=1.0)
    assert line.what == "loss 0.5"


@pytest.mark.parametrize("width", [80, 120])
def test_bars_metrics_and_time_fit_the_terminal(width: int) -> None:
    view = View(console(width))
    for name in ("base", "data generated", "ppo"):
        view.names.setdefault(name, None)
    view.begin("ppo").read("ppo  100/128 steps  reward 1.02  KL 5.51  12:45 left", live.time.monotonic())
    blank, bar, whole = shown(view)
    assert blank == "" and all(len(line) <= width for line in (bar, whole))
    assert "ppo " in bar and "100/128 steps  reward 1.02  KL 5.51 " in bar
    assert bar.endswith("12:44 left") or bar.endswith("12:45 left")
    assert "stage 1 of 3" in whole


def test_long_words_give_way_to_numbers() -> None:
    view = View(console())
    view.begin("data generated").read("dpo  1304/3995 answers scored by the reference model  0:06 left", 0.0)
    _, bar, _ = shown(view)
    assert "1304/3995 answers" in bar and "…" in bar and bar.endswith("0:00 left")


def test_what_is_done_stays_above_with_what_came_out() -> None:
    view = View(console())
    view.names.update(dict.fromkeys(["sft", "eval sft", "dpo", "kto"]))
    ends = {
        "sft": Result(status="done", key="k"),
        "eval sft": Result(status="done", key="k", metrics={"eval/judge_score": 0.814, "eval/win_rate_vs_sft": 0.5}),
        "dpo": Result(status="done", key="k", reused=True),
        "kto": Result(status="refused", key="k"),
    }
    for name, result in ends.items():
        line = view.begin(name)
        line.read(f"{name}  5/5 steps  loss 1.25", 0.0)
        line.read(f"{name}  9/9 answers scored", 0.0)  # a piece of work without metrics
        line.result = result
        view.end(line)
    lines = [" ".join(line.split()) for line in printed(view.console)]
    assert lines == [
        "✓ sft 0:00 loss 1.25",
        "✓ eval sft 0:00 score 0.81 win rate 50 %",
        "✓ dpo reused",
        "✗ kto 0:00 refused",
    ]
    assert "stage 4 of 4" in shown(view)[-1]


def test_a_stage_that_was_stopped_is_not_over() -> None:
    view = View(console())
    line = view.begin("dpo")
    line.result = Result(status="preempted", key="k")
    view.end(line)
    assert (view.over, view.running, printed(view.console)) == (set(), {}, [])


def test_a_terminal_without_unicode_gets_none() -> None:
    view = View(console(encoding="ascii"))
    line = view.begin("dpo")
    shown(view)
    line.result = Result(status="done", key="k")
    view.end(line)
    assert printed(view.console)[-1].startswith("+ dpo")


def test_warnings_are_printed_and_what_is_said_elsewhere_is_not() -> None:
    view = View(console())
    handler, line = Messages(view.console, view), view.begin("dpo")
    handler.emit(record("dpo  1/2 steps"))
    handler.emit(record("nearly all is clamped\x1b[2J", logging.WARNING))
    handler.emit(record("refused: path = x: bad", logging.ERROR))  # the command's last line says it
    handler.emit(record("Traceback (most recent call last):", logging.ERROR))
    assert line.done == 1
    assert printed(view.console) == [
        "warning: dpo: nearly all is clamped�[2J",
        "error: dpo: Traceback (most recent call last):",
    ]


@pytest.fixture
def handlers() -> Iterator[list[logging.Handler]]:
    root = logging.getLogger()
    before = root.handlers
    yield before
    root.handlers = before


@pytest.mark.parametrize(
    ("loudness", "terminal", "kind"),
    [("usual", True, "view"), ("usual", False, "lines"), ("verbose", True, "lines"), ("quiet", False, "warnings")],
)
def test_a_view_is_for_terminals(
    monkeypatch: pytest.MonkeyPatch,
    handlers: list[logging.Handler],
    loudness: live.Loudness,
    terminal: bool,
    kind: str,
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with live.watched(loudness):
        ours = [one for one in logging.getLogger().handlers if isinstance(one, Messages)]
        assert len(ours) == (kind != "lines")
        assert [one.view is not None for one in ours] == ([kind == "view"] if ours else [])
        assert (LIVE in live.os.environ) == (kind == "view")
    assert logging.getLogger().handlers is handlers and LIVE not in live.os.environ


def test_the_time_that_is_left_is_said_where_every_stage_has_an_estimate() -> None:
    """dpo says 30 s itself; kto has run 10 of its usual 50 s; ppo takes 100: 170 s of work, two stages at once."""
    view = View(console(120))
    view.names.update({"sft": 500.0, "dpo": 60.0, "kto": 50.0, "ppo": 100.0})
    sft, dpo, kto = (view.begin(name) for name in ("sft", "dpo", "kto"))
    sft.result = Result(status="done", key="k")
    view.end(sft)
    now = live.time.monotonic()
    dpo.ends, kto.began = now + 30, now - 10
    assert view.left(now) == pytest.approx((30 + 40 + 100) / 2)
    assert shown(view)[-1].endswith(("about 1:25 left", "about 1:24 left"))
    view.names["ppo"] = None
    assert view.left(now) is None and not shown(view)[-1].endswith("left")


def test_what_stages_took_is_kept_but_of_those_that_were_reused() -> None:
    live.took.clear()
    for name, reused in (("sft", False), ("dpo", True)):
        with live.stage(name) as line:
            line.began -= 10
            line.result = Result(status="done", key="k", reused=reused)
    assert live.took == {"sft": pytest.approx(10, abs=1)}
