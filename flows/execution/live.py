"""A run as a terminal shows it: a line for each stage that is done, a bar for each that runs, how far the whole is.

What the bars say is read from the stages' own lines in the log, so that a stage need not know who looks. Without a
terminal there is no view, and the log's lines are printed as they come.
"""

import contextlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from schemas.environment import LIVE
from schemas.errors import EXIT_CODES
from schemas.stage import Result
from schemas.text import one_line, visible

if TYPE_CHECKING:
    from rich.console import Console, Group

Loudness = Literal["quiet", "usual", "verbose"]

_PROGRESS = re.compile(
    r"(?P<done>\d+)/(?P<total>\d+) (?P<unit>.+?)(?:  (?P<what>(?!\d[\d:]* left$).*?))?(?:  (?P<left>\d[\d:]*) left)?"
)
"""A line of `StageRun.progress`, after the stage's name: `62/94 steps  accuracy 0.71  0:09 left`."""
_SAID = ("Beginning flow run", *(f"{status}: " for status in EXIT_CODES))
"""How lines begin whose content the view shows itself, or the run's last message."""
_SCORES = {
    "eval/judge_score": "score {:.2f}",
    "eval/win_rate_vs_sft": "win rate {:.0%}",
    "eval/kl_to_reference": "KL {:.2f}",
}
"""What is shown of an evaluation that is done."""
_TURNING = ("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "-\\|/")
_BAR = dict.fromkeys(("complete_style", "finished_style", "pulse_style"), "cyan")
_MARKS = {"done": ("✓", "+"), "failed": ("✗", "x")}
"""Each for a terminal that shows Unicode, and for one that does not."""


@dataclass
class Line:
    """A stage that runs."""

    name: str
    began: float
    done: int = 0
    total: int = 0
    unit: str = ""
    what: str = ""
    """Its metrics; before there are any, what it says last."""
    told: str = ""
    """The last metrics that there were."""
    ends: float | None = None
    """When it would be done, by its own estimate."""
    result: Result | None = None

    def read(self, message: str, now: float) -> None:
        """Take in a line of its log."""
        _, _, own = message.partition("  ")  # after its name, which is not always that of its node
        found = _PROGRESS.fullmatch(own)
        if found is None:
            self.what = self.what if self.total else one_line(message.removeprefix(f"{self.name}: "), 200)
            return
        self.done, self.total, self.unit = int(found["done"]), int(found["total"]), found["unit"]
        self.what, self.ends = found["what"] or "", None
        self.told = self.what or self.told
        if found["left"]:
            seconds = 0
            for part in found["left"].split(":"):
                seconds = 60 * seconds + int(part)
            self.ends = now + seconds

    def outcome(self) -> str:
        """What it came to, once it is done."""
        metrics = self.result.metrics if self.result is not None else {}
        scores = [form.format(metrics[name]) for name, form in _SCORES.items() if name in metrics]
        return "  ".join(scores).replace("%", " %") or self.told


class View:
    """The view of one run on a console. The flow tells it of stages that begin and end, the log of all else."""

    def __init__(self, console: "Console") -> None:
        self.console, self.began = console, time.monotonic()
        self.names: dict[str, float | None] = {}
        """Of all stages, in the plan's order; the seconds that each usually takes, where that is known."""
        self.over: set[str] = set()
        """Those that are done or have failed."""
        self.running: dict[str, Line] = {}
        self.guard = threading.RLock()
        self.plain = not console.encoding.lower().startswith("utf")

    def begin(self, name: str) -> Line:
        """A stage starts."""
        with self.guard:
            self.names.setdefault(name, None)
            self.running[name] = Line(name, time.monotonic())
            return self.running[name]

    def end(self, line: Line) -> None:
        """A stage has ended; what it came to stays above the bars. One that was stopped may start again."""
        from rich.text import Text

        result = line.result
        with self.guard:
            self.running.pop(line.name, None)
            if result is None or result.status == "preempted":
                return
            self.over.add(line.name)
        style = "green" if result.status == "done" else "red"
        mark = _MARKS["done" if result.status == "done" else "failed"][self.plain]
        text = Text.assemble((f"{mark} ", style), self.named(line.name))
        if result.reused:
            text.append("  reused", "dim")
        else:
            text.append(f"  {clock(time.monotonic() - line.began):>6}  ", "dim")
            text.append(line.outcome() if result.status == "done" else result.status, "" if style == "green" else style)
        self.console.print(text, no_wrap=True, overflow="ellipsis", crop=True)

    def named(self, name: str) -> str:
        """A name, as wide as the widest."""
        return f"{visible(name):{min(20, max(map(len, self.names), default=0))}}"

    def left(self, now: float) -> float | None:
        """Seconds until all stages are over, by their own estimates and by what they took last time, as many at once as
        now; None where one has neither.
        """
        sum_ = 0.0
        for name, usual in self.names.items():
            line = self.running.get(name)
            if name in self.over:
                continue
            if line is not None and line.ends is not None:
                sum_ += max(0.0, line.ends - now)
            elif usual is None:
                return None
            else:
                sum_ += max(0.0, usual - (0.0 if line is None else now - line.began))
        return sum_ / max(1, len(self.running))

    def __rich__(self) -> "Group":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        with self.guard:
            running, now = list(self.running.values()), time.monotonic()
            over, total, left = len(self.over), max(len(self.names), 1), self.left(now)
        turning, width = _TURNING[self.plain], max(6, min(30, self.console.width - 68))
        grid = Table.grid(padding=(0, 1), expand=True)
        for justify in ("left", "left", "left", "right"):
            grid.add_column(no_wrap=True, justify=justify)
        grid.add_column(no_wrap=True, ratio=1, overflow="ellipsis")
        grid.add_column(no_wrap=True, justify="right")
        for line in running:
            own = "" if line.ends is None else f"{clock(max(0.0, line.ends - now))} left"
            grid.add_row(
                Text(turning[int(8 * now) % len(turning)], "cyan"),
                Text(self.named(line.name)),
                ProgressBar(max(line.total, 1), line.done, width=width, pulse=not line.total, **_BAR),
                Text(f"{line.done}/{line.total}" if line.total else ""),
                Text(f"{line.unit}  {line.what}" if line.total else line.what, "" if line.total else "dim"),
                Text(own, "dim"),
            )
        at = Text(f"stage {min(over + max(len(running), 1), total)} of {total}", "bold")
        whole = ProgressBar(total, over, width=width, complete_style="bold green", finished_style="bold green")
        about = "" if left is None else f"about {clock(left)} left"
        grid.add_row(Text(" "), at, whole, Text(clock(now - self.began), "dim"), Text(), Text(about, "dim"))
        return Group(Text(), grid)


class Messages(logging.Handler):
    """What a terminal gets of the log: warnings and errors; a view also what its stages say."""

    def __init__(self, console: "Console", view: View | None) -> None:
        super().__init__()
        self.console, self.view = console, view

    def emit(self, record: logging.LogRecord) -> None:
        from rich.text import Text

        message = visible(record.getMessage())
        if message.startswith(_SAID):
            return
        stage = str(getattr(record, "task_run_name", ""))
        line = self.view.running.get(stage) if self.view is not None else None
        if record.levelno < logging.WARNING:
            if line is not None:
                line.read(message, time.monotonic())
            return
        level = record.levelname.lower()
        where = f"{stage}: " if stage and not message.startswith(stage) else ""
        style = "yellow" if record.levelno < logging.ERROR else "red"
        self.console.print(
            Text.assemble((f"{level}: ", style), f"{where}{message}"), soft_wrap=not self.console.is_terminal
        )


_view: View | None = None
took: dict[str, float] = {}
"""Seconds of each stage of this process that was not reused."""


def expect(names: Iterable[str], usual: Mapping[str, float]) -> None:
    """Tell the view, if there is one, of stages that are going to run, and what they usually take."""
    if _view is not None:
        with _view.guard:
            _view.names.update({name: usual.get(name) for name in names})


def viewed() -> bool:
    """Whether there is a view, so that lines about stages would only repeat it."""
    return _view is not None


@contextlib.contextmanager
def stage(name: str) -> Iterator[Line]:
    """Around a stage of the flow, whose result the caller puts into the line."""
    view = _view
    line = Line(name, time.monotonic()) if view is None else view.begin(name)
    try:
        yield line
    finally:
        if line.result is not None and line.result.status == "done" and not line.result.reused:
            took[name] = time.monotonic() - line.began
        if view is not None:
            view.end(line)


@contextlib.contextmanager
def watched(loudness: Loudness) -> Iterator[None]:
    """Show what happens in this block as a view, where stderr is a terminal; as lines of the log elsewhere.

    `quiet`: warnings and errors alone. `verbose`: lines, also on a terminal.
    """
    global _view
    if loudness == "verbose" or (loudness == "usual" and not sys.stderr.isatty()):
        yield
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, highlight=False)
    if loudness == "usual" and console.is_dumb_terminal:
        yield
        return
    view = View(console) if loudness == "usual" else None
    root = logging.getLogger()
    before = root.handlers
    root.handlers = [Messages(console, view)]
    try:
        if view is None:
            yield
            return
        os.environ[LIVE], _view = "1", view
        with Live(view, console=console, refresh_per_second=8, transient=True, redirect_stdout=sys.stdout.isatty()):
            yield
    finally:
        if view is not None:
            console.print()  # apart from what the command prints now
        root.handlers, _view = before, None
        os.environ.pop(LIVE, None)


def clock(seconds: float) -> str:
    """Minutes and seconds, and hours where there are any: `0:09`, `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
