"""Texts from outside in front of a terminal: nothing in them acts, hides, reorders, or passes for a line of ours."""

import io
import re
import subprocess
import sys
import unicodedata

import pytest

from flows.planning import config_file
from schemas import text
from schemas.errors import StageError, refuse
from schemas.text import as_setting
from tests.conftest import ROOT

ACTS = [
    "\x1b]52;c;aGk=\x07",
    "\x1b[2J",
    "\x9b31m",
    "\x1bP0q\x1b\\",
    "a\rb",
    "\x08\x08",
    "\x7f",
    "\u202e",
    "\u2066",
    "\ud800",
]


def acts(shown: str) -> list[str]:
    """What a terminal would act on: control characters but tab and line feed, overrides of direction, surrogates."""
    return [
        c for c in shown if c not in "\t\n" and (unicodedata.category(c) in ("Cc", "Cs") or "\u202a" <= c <= "\u2069")
    ]


@pytest.mark.parametrize("given", ACTS)
def test_nothing_that_a_terminal_acts_on_is_left(given: str) -> None:
    error = refuse(given, given, f"no column {given}", f"map {given}")
    for shown in (text.visible(given), text.one_line(given), text.message(given), text.short(given), str(error)):
        assert not acts(shown) and shown
    assert text.MARK in text.visible(given)


def test_every_control_character() -> None:
    every = "".join(map(chr, [*range(0xA0), 0x2028, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xD800, 0xDFFF]))
    assert not acts(text.visible(every)) and "azAZ" in text.visible("azAZ")
    assert len(text.one_line(every).splitlines()) == 1


def test_what_people_write_stays() -> None:
    for kept in ("naïve café", "שלום", "👩‍👩‍👧 e\u0301", "a\tb\nc", "日本語", "x\u2028y"):
        assert text.visible(kept) == kept


def test_a_line_break_forges_no_message() -> None:
    for line in ("error: all is well", "WARNING: x", " refused: x", "alignflow: done", "Error in x: y"):
        forged = str(refuse("path", f"rows\n{line}", f"it has a\n{line}", "map it"))
        assert not any(
            re.match(r"(error|warning|refused|alignflow|\s?refused)\b", one, re.I) for one in forged.splitlines()
        )
    assert text.message("one mistake\nmodel.path = x: another") == "one mistake\nmodel.path = x: another"


def test_what_is_quoted_is_bounded_before_it_is_made() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, 10**100_000, "x" * 10**8, [[0] * 10**6] * 100, {"a": {1: "b" * 10**6}}):
        assert len(text.short(value)) <= 60
    assert text.short("plain") == "'plain'" and text.short([1, 2.5, None]) == "[1, 2.5, None]"
    assert text.listed(range(1000)).endswith("18, 19 and 980 more") and text.listed("ab") == "a, b"


def test_an_unexpected_error_is_shown_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    text.show_tracebacks()
    sys.excepthook(ValueError, ValueError("row \x1b[2J"), None)
    assert sys.stderr.getvalue() == f"ValueError: row {text.MARK}[2J\n"  # type: ignore[attr-defined]


def test_nothing_is_printed_past_it() -> None:
    """Commands print through `show`; `print` would hand a terminal whatever a model, a row or a name holds."""
    places = (ROOT / "flows" / "cli", ROOT / "flows" / "servers", ROOT / "stages" / "commands")
    files = [file for place in places for file in sorted(place.glob("*.py"))]
    prints = {file.name: re.findall(r"^ *(?:print|typer\.echo)\((.*)", file.read_text(), re.M) for file in files}
    fixed = [line for lines in prints.values() for line in lines]
    assert fixed == [
        '"> ", end="", flush=True, file=out)',
        'f"{start}answers {done}/{total}", end=end, file=sys.stderr, flush=True)',
    ]


def test_an_error_is_one_whatever_its_value_holds() -> None:
    assert str(StageError("plain", fix="do it")) == "plain. Fix: do it"
    assert len(str(refuse("path", "x" * 10**6, "no", "y"))) < 2100


def test_a_reader_who_goes_ends_no_command() -> None:
    """As `head`: the first line comes, and the command finishes its work without a word of the pipe."""
    code = (
        "import sys\n"
        "from schemas.text import show\n"
        "show('first')\n"
        "sys.stdin.read()\n"  # until the reader has gone
        "show('second'), show('third')\n"
        "show('done', sys.stderr)\n"
    )
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) as process:
        assert process.stdin and process.stdout and process.stderr
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == "done\n"
    assert process.returncode == 0


WORDS = ["pairs.jsonl", "/data/a b.jsonl", "a: b", "a:", "x #2", "[x]", "it's", "ä.jsonl", "é:b", "-", "", "\n", "~"]
NO_WORDS = ["true", "Null", "no", "1e5", ".5", "._1", ".inf", ".nan", "=", "<<", 3, 0.5, True, None, {"a": "b"}, ["x"]]


@pytest.mark.parametrize("value", [*WORDS, *NO_WORDS, "./a", "hub:org/name"])
def test_a_setting_is_read_back_as_it_was(value: object) -> None:
    assert config_file.parse(as_setting(value)) == value


def test_a_plain_setting_needs_no_quotes() -> None:
    plain = ["data/pairs-1.jsonl", "hub:org/name"]
    assert [as_setting(value) for value in plain] == plain
