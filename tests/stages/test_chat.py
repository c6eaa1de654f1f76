"""Talking to models through a pipe: history, reset, two side by side, clear errors."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from schemas.commands import ChatCommand
from schemas.config import BaseParams
from stages import base
from stages.commands import chat as chat_command

PROMPT = "write a polite note to the baker about the bread."


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folders = [tmp_path_factory.mktemp("models") / name for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        scratch = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32, "max_length": 48}
        base.build(BaseParams.model_validate({"scratch": scratch}), seed, folder)
    return [str(folder) for folder in folders]


def say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: str, **options: Any
) -> tuple[int, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code = chat_command.main(ChatCommand(max_new_tokens=8, **options))
    return code, capsys.readouterr().out


def test_one_line_one_answer_and_the_seed_decides(monkeypatch, capsys, models) -> None:
    code, out = say(monkeypatch, capsys, f"{PROMPT}\n\n{PROMPT}\n", model=models[0])
    assert code == 0
    assert len(out.splitlines()) == 2
    assert say(monkeypatch, capsys, f"{PROMPT}\n\n{PROMPT}\n", model=models[0])[1] == out
    assert say(monkeypatch, capsys, f"{PROMPT}\n\n{PROMPT}\n", model=models[0], seed=1)[1] != out


def test_quit_ends_and_reset_forgets(monkeypatch, capsys, models) -> None:
    _, out = say(monkeypatch, capsys, f"{PROMPT}\n/quit\n{PROMPT}\n", model=models[0])
    assert len(out.splitlines()) == 1
    lines = f"{PROMPT}\n/reset\n{PROMPT}\n/what\n"
    _, out = say(monkeypatch, capsys, lines, model=models[0], temperature=0)
    first, forgotten, again, help_line = out.splitlines()
    assert first == again
    assert forgotten == "(forgotten)"
    assert help_line == chat_command.HELP


def test_history_reaches_the_model_and_old_turns_make_room(models) -> None:
    talker = chat_command.load(models[0], system="be kind.")
    lengths = []
    for _ in range(6):
        talker.answer(PROMPT, 0, ChatCommand(model=models[0], max_new_tokens=4))
        lengths.append(len(talker.messages))
        assert talker.messages[0]["role"] == "system"
        assert len(talker.codec.prompt(talker.messages[:-1])) <= 48 - 4
    assert lengths[:2] == [3, 5]
    assert max(lengths) < 13


def test_a_message_that_cannot_fit_is_told_and_forgotten(monkeypatch, capsys, models) -> None:
    code, out = say(monkeypatch, capsys, f"{'bread ' * 60}\n{PROMPT}\n", model=models[0])
    assert code == 0
    assert "write a shorter message" in out
    assert len(out.splitlines()) == 2


def test_two_models_side_by_side(monkeypatch, capsys, models) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out = say(monkeypatch, capsys, f"{PROMPT}\n", model=models[0], versus=models[1])
    head = out.splitlines()[0]
    assert "one" in head.split("|")[0]
    assert "two" in head.split("|")[1]
    assert all("|" in line and len(line) <= 80 for line in out.splitlines())


def test_as_json_each_message_is_one_object_and_nothing_else_is_on_stdout(monkeypatch, capsys, models) -> None:
    lines = f"{PROMPT}\n/reset\n/what\n{'bread ' * 60}\nna\udcefve\n"
    _, plain = say(monkeypatch, capsys, f"{PROMPT}\n", model=models[0])
    _, out = say(monkeypatch, capsys, lines, model=models[0], name="a", versus=models[1], versus_name="b", as_json=True)
    first, long, unread = map(json.loads, out.splitlines())
    assert first["message"] == PROMPT and [one["model"] for one in first["answers"]] == ["a", "b"]
    assert first["answers"][0]["answer"] == plain.removesuffix("\n")
    assert [one["answer"] for one in long["answers"]] == [None, None]
    assert unread["message"] is None and "not UTF-8" in unread["problem"]
    assert all("write a shorter message" in one["problem"] for one in long["answers"])


def test_columns() -> None:
    text = chat_command.side_by_side(["a", "b"], ["x" * 25, "one\ntwo three"], 43)
    assert text.splitlines() == [
        f"{'a':<20} | b",
        f"{'-':<20} | -",
        f"{'x' * 20} | one",
        f"{'x' * 5:<20} | two three",
    ]


def test_a_missing_model_is_a_clear_error(monkeypatch, capsys, home: Path) -> None:
    for uri in ("/no/such/folder", "models:/nobody@champion", "runs:/0123/model"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        assert chat_command.main(ChatCommand(model=uri)) == 65
        error = capsys.readouterr().err
        assert uri in error
        assert "Fix:" in error


@pytest.mark.parametrize(
    ("option", "value"), [("temperature", t) for t in (-1, "nan", "inf")] + [("max_new_tokens", 0)]
)
def test_settings_out_of_range_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=option):
        ChatCommand.model_validate({"model": "x", option: value})


def test_an_answer_reaches_the_terminal_as_text(monkeypatch, capsys, models) -> None:
    """A model may write what a terminal acts on: here the clipboard, the screen, an override, and a bare return."""
    monkeypatch.setattr(chat_command.Talker, "answer", lambda *_: "a\x1b]52;c;aGk=\x07\x1b[2J\x9b2J\u202eb\rc\nd")
    for options in ({"model": models[0]}, {"model": models[0], "name": "\x1b[1mone", "versus": models[1]}):
        _, out = say(monkeypatch, capsys, "hello\n", **options)
        assert not set(out) & set("\x1b\x07\x9b\u202e\r") and "[2J" in out
