"""What a finished comparison and a finished run say to a person at a terminal, in a pipe, or to a program."""

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.style import Style
from rich.text import Text

from flows.results.history import SHORT
from schemas.stage import Result
from schemas.text import visible

WIDEST = 120
"""Columns of text; a wider terminal keeps the rest free."""


@dataclass(frozen=True)
class Compared:
    """What stage `compare` has published."""

    folder: Path

    @property
    def report(self) -> Path:
        """The page."""
        return self.folder / "report.html"

    def numbers(self) -> dict[str, Any]:
        """Everything as JSON: comparison.json, with the rows of the table."""
        found = {name: json.loads((self.folder / f"{name}.json").read_text()) for name in ("comparison", "table")}
        return found["comparison"] | {"table": found["table"], "report": str(self.report)}

    def best(self) -> list[str]:
        """The first model, and those that cannot be told apart from it; of an older version's comparison unknown."""
        return self.numbers().get("best", [])

    def text(self, width: int) -> Text:
        """The finding, the table that fits the width, and what else is to be said of it."""
        numbers, width = self.numbers(), min(width, WIDEST)
        tables = {int(at): table for at, table in numbers.get("tables", {}).items()}
        if not tables:  # an older version's
            return Text(visible((self.folder / "table.txt").read_text().rstrip()))
        first, *others = numbers["findings"]
        table = tables[max((at for at in tables if at <= width), default=min(tables))]
        text = Text.assemble((_wrapped(first, width), "bold"), f"\n\n{visible(table)}\n")
        for sentence in [line for line in others if line != numbers["covers"]]:
            text.append(f"{_wrapped(sentence, width)}\n")
        for sentence in [*numbers["notes"], *(line for line in others if line == numbers["covers"])]:
            text.append(f"{_wrapped(sentence, width)}\n", "dim")
        if numbers["sources"]:
            text.append(f"\n{visible(numbers['sources'])}\n")
        text.rstrip()
        return text


@dataclass(frozen=True)
class Summary:
    """What a run has come to."""

    run: str
    name: str
    results: Mapping[str, Result]
    seconds: float
    compared: Compared | None = None
    tested: str = ""
    """What a sweep's last test says."""
    links: Mapping[str, str] = field(default_factory=dict)
    """What MLflow shows side by side -> the address of its page."""
    first: str = ""
    """What has to be done before a browser finds these."""

    def as_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        stages = {
            name: one.model_dump(mode="json", include={"status", "key", "run_id", "reused", "metrics"})
            for name, one in self.results.items()
        }
        comparison = None if self.compared is None else self.compared.numbers()
        about = {"run": self.run, "name": self.name, "seconds": round(self.seconds, 1), "links": dict(self.links)}
        return about | {"stages": stages, "comparison": comparison, "tested": self.tested}

    def text(self, width: int, terminal: bool) -> Text:
        """Everything, for a person; on a terminal addresses are behind words, since they fill a screen."""
        text = Text() if self.compared is None else self.compared.text(width).append("\n\n")
        if self.tested:
            text.append(f"{visible(self.tested)}\n\n")
        reused = sum(one.reused for one in self.results.values())
        counts = f"{len(self.results)} stages, {reused} reused, {readable_seconds(self.seconds)}"
        lines: list[tuple[str, Text]] = [("run", Text(f"{self.run[:SHORT]}  {visible(self.name)}: {counts}"))]
        if self.compared is not None:
            page = self.compared.report
            shown = Text("alignflow report", Style(link=page.as_uri())) if terminal else Text(visible(page))
            lines.append(("report", shown))
        if terminal and self.links:
            words = [Text(what, Style(link=link, underline=True)) for what, link in self.links.items()]
            lines.append(("MLflow", Text(" and ").join(words).append(f" side by side{self.first}", "dim")))
        best = self.compared.best() if self.compared is not None else []
        if best and best[0] in self.results:  # the first of a sweep's points is no single model
            lines.append(("next", Text(f"alignflow chat {visible(best[0])} --versus sft", "bold")))
        for label, line in lines:
            text.append(f"{label:8}", "dim").append_text(line).append("\n")
        for what, link in self.links.items() if not terminal else ():
            text.append(f"{what} side by side in MLflow: {link}{self.first}\n")
        text.rstrip()
        return text


def readable_seconds(seconds: float) -> str:
    """A duration as people say it: `42 s`, `5 min 26 s`, `3 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _wrapped(sentence: str, width: int) -> str:
    """On lines of a width; no percentage is torn from its sign."""
    joined = visible(sentence).replace(" %", "\u00a0%")
    return "\n".join(textwrap.wrap(joined, width)).replace("\u00a0%", " %")
