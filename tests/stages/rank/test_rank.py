"""What people say of answers: asked blind and shuffled, kept, and made into rows."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas.commands import RankCommand, RankForm, ValidateCommand
from schemas.errors import EXIT_CODES, StageError
from stages.commands.rank import __main__ as command
from stages.commands.rank import questions, rows, terminal
from stages.commands.validate import main as validate
from tests.support.processes import wait_for
from tests.support.ranking import FRUIT, TREE, say, session, told, write


def items(file: Path, form: RankForm = "ranking") -> list[list[str]]:
    """The texts that each item asks about."""
    asked = questions.read(file, form).items
    return [[item.question.texts[place] for place in item.places] for item in asked]


# --- what is asked ---


def test_what_each_form_asks_of_a_ranking(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [FRUIT, TREE])
    apple, bread, pear, oak, no = *FRUIT["responses"], *TREE["responses"]
    assert items(file) == [[apple, bread, pear], [oak, no]]
    assert items(file, "pairs") == [[apple, bread], [apple, pear], [bread, pear], [oak, no]]
    assert items(file, "thumbs") == [[apple], [bread], [pear], [oak], [no]]


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"question": "Q?", "answers": ["A", "B"]}, ["A", "B"]),
        ({"prompt": "Q?", "chosen": "A", "rejected": "B"}, ["A", "B"]),
        ({"prompt": "Q?", "a": "A", "b": "B", "label": "b"}, ["A", "B"]),
        ({"prompt": [{"role": "user", "content": "Q?"}], "responses": ["A", " A ", "", "B"]}, ["A", "B"]),
        ({"prompt": "Q?", "responses": [{"text": "A", "model": "m"}, {"text": "B", "score": 3}]}, ["A", "B"]),
        ({"prompt": "Q?", "responses": ["A", "B"], "ranks": [2, 1, 7], "order": "nonsense"}, ["A", "B"]),
    ],
)
def test_the_forms_in_which_answers_come(row: dict[str, Any], texts: list[str], tmp_path: Path) -> None:
    """Empty answers and repetitions are not asked about, and no verdict that the file has is looked at."""
    asked = questions.read(write(tmp_path / "rows.jsonl", [row]), "ranking")
    assert [item.question.texts for item in asked.items] == [texts]
    assert asked.items[0].question.prompt == [{"role": "user", "content": "Q?"}]


def test_parquet_and_csv(tmp_path: Path) -> None:
    pl.DataFrame([{"prompt": "Q?", "responses": ["A", "B"]}]).write_parquet(tmp_path / "rows.parquet")
    pl.DataFrame([{"prompt": "Q?", "chosen": "A", "rejected": "B"}]).write_csv(tmp_path / "rows.csv")
    assert items(tmp_path / "rows.parquet") == items(tmp_path / "rows.csv") == [["A", "B"]]


def test_rows_that_ask_nothing_are_counted(tmp_path: Path) -> None:
    same = {"prompt": "Q?", "responses": ["A", "A"]}
    asked = questions.read(write(tmp_path / "rows.jsonl", [FRUIT, same, FRUIT, TREE]), "ranking")
    assert (len(asked.items), asked.repeated, asked.nothing_to_compare) == (2, 1, 1)


@pytest.mark.parametrize(
    ("lines", "form", "message"),
    [
        ('{"prompt": "Q?", "response": "A"}', "ranking", "--form = ranking: .* Fix: use --form thumbs"),
        ('{"prompt": "Q?"}', "ranking", "no column of answers; it has prompt. Fix: name the columns"),
        ('{"prompt": "Q?", "responses": ["A", "A"]}', "ranking", "no row has two different answers"),
        (json.dumps(TREE) + "\nnonsense", "ranking", "row 1 holds no prompt with answers"),
        (json.dumps(TREE) + '\n{"prompt": "Q?", "responses": ["A", 1]}', "pairs", "row 1 .*responses: not_text"),
        ("", "thumbs", "the file holds no rows"),
    ],
)
def test_a_file_that_cannot_be_ranked(lines: str, form: RankForm, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(lines + "\n")
    with pytest.raises(StageError, match=message):
        questions.read(tmp_path / "rows.jsonl", form)


def test_answers_are_shuffled_by_seed_person_and_item(tmp_path: Path) -> None:
    rows_ = [{"prompt": f"Q{number}?", "responses": ["A", "B", "C"]} for number in range(300)]
    file = write(tmp_path / "rows.jsonl", rows_)
    seen = [[person.order(item) for item in person.items] for person in (session(file), session(file))]
    assert seen[0] == seen[1]
    for other in (session(file, "ben"), session(file, seed=1)):
        same = sum(other.order(item) == order for item, order in zip(other.items, seen[0], strict=True))
        assert 20 < same < 90  # one in six of 300 by chance: 50, with a standard deviation of 6.5
    counts = Counter(map(tuple, seen[0]))
    assert set(counts) == set(permutations(range(3))) and min(counts.values()) > 20


def test_nothing_on_the_screen_names_a_model_or_a_place_in_the_file(tmp_path: Path) -> None:
    answers = [{"text": "A\x1b[2J", "model": "secret-model"}, {"text": "B", "model": "other"}]
    file = write(tmp_path / "rows.jsonl", [{"prompt": "Q?", "responses": answers, "source": "secret-source"}])
    view = session(file).view(0)
    assert "secret" not in json.dumps(view)
    assert sorted(view["answers"]) == ["A\ufffd[2J", "B"]  # and acts on no terminal


# --- what is kept ---


def test_a_verdict_is_kept_and_the_last_one_counts(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [FRUIT, TREE])
    anna = session(file)
    say(anna, 0, [[2], [0], [1]])
    say(anna, 0, [[0, 2], [1]])
    say(anna, 1, None)
    again, ben = session(file), session(file, "ben")
    assert (again.next_open(), ben.next_open()) == (None, 0)
    assert [one.verdict for one in told(again)] == [[[0, 2], [1]], None]
    assert again.view(0)["verdict"] == anna.view(0)["verdict"] and again.view(0)["states"] == "js"
    assert len(again.verdicts.file.read_text().splitlines()) == 3


@pytest.mark.parametrize("cut", [b'{"item": "half', "é".encode()[:1]])
def test_a_cut_last_line_is_moved_aside(cut: bytes, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [FRUIT, TREE])
    anna = session(file)
    say(anna, 0, [[0], [1], [2]])
    whole = anna.verdicts.file.read_bytes()
    anna.verdicts.file.write_bytes(whole + cut)
    again = session(file)
    assert again.next_open() == 1 and again.verdicts.file.read_bytes() == whole
    assert again.verdicts.cut is not None and again.verdicts.cut.read_bytes() == cut + b"\n"
    anna.verdicts.file.write_bytes(whole + cut)
    say(anna, 1, [[0], [1]])  # one who has the file open when another dies
    assert len(told(anna)) == 2


def test_a_file_of_another_form_or_of_nonsense_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [FRUIT, TREE])
    say(session(file), 0, [[0], [1], [2]])
    with pytest.raises(StageError, match=r"--form = pairs: .* Fix: use --form ranking, or name another --output"):
        session(file, form="pairs")
    verdicts = session(file).verdicts.file
    verdicts.write_text("[]\n" + verdicts.read_text())
    with pytest.raises(StageError, match=r"line = 1: .* holds a line that is no verdict"):
        session(file)


@pytest.mark.parametrize("verdict", [[[0], [1]], [[0], [1], [1, 2]], [[0], [1], [3]], [[0, 1, 2], []], "up"])
def test_what_is_no_verdict_is_not_saved(verdict: Any, tmp_path: Path) -> None:
    anna = session(write(tmp_path / "rows.jsonl", [FRUIT]))
    with pytest.raises(StageError, match="not a verdict on these answers"):
        anna.judge(0, verdict, "", 1.0)
    assert told(anna) == []


# --- what becomes of it ---


def people(file: Path, verdicts: dict[str, Any], form: RankForm = "ranking") -> list[dict[str, Any]]:
    """The rows after each of some people has judged the first items so, one after the other."""
    person = session(file, "nobody", form)
    for name, own in verdicts.items():
        person = session(file, name, form)
        for number, verdict in enumerate(own):
            say(person, number, verdict)
    return rows.rows_of(person.items, told(person))


def test_one_persons_ranking_is_an_order(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [FRUIT, TREE])
    (row,) = people(file, {"anna": [[[2], [0, 1]], None]})
    prompt = [{"role": "user", "content": "Name a fruit."}]
    assert {**row, "order": [2, sorted(row["order"][1])]} == {**FRUIT, "prompt": prompt, "order": [2, [0, 1]]}


def test_answers_keep_their_models_and_columns_that_would_be_read_get_another_name(tmp_path: Path) -> None:
    answers = [{"text": "A", "model": "m"}, {"text": "B", "model": "n"}]
    pair = {"prompt": "Q?", "chosen": "A", "rejected": "B", "order": [1, 0], "id": 3}
    (row,) = people(write(tmp_path / "rows.jsonl", [{"prompt": "Q?", "responses": answers}]), {"anna": [[[1], [0]]]})
    assert row["responses"] == answers and row["order"] == [1, 0]
    (row,) = people(write(tmp_path / "pairs.jsonl", [pair]), {"anna": [[[0], [1]]]})
    assert (row["order"], row["prompt_order"], row["id"]) == ([0, 1], [1, 0], 3)


def checked(made: list[dict[str, Any]], kind: str, folder: Path) -> tuple[pl.DataFrame, dict[str, Any]]:
    """The rows that `alignflow validate` makes of ours, and its report."""
    rows.write(made, folder / "made.jsonl")
    asked = {"path": str(folder / "made.jsonl"), "kind": kind, "out": folder / "out", "eval_fraction": 0}
    assert validate(ValidateCommand.model_validate(asked)) == 0
    return pl.read_parquet(folder / "out" / "train" / f"{kind}.parquet"), json.loads(
        (folder / "out" / "report.json").read_text()
    )


def test_the_majority_of_several_people_is_what_validate_reads(tmp_path: Path) -> None:
    """Apple before pear for two of three, bread last for all: as rows of their own, equal ones would count once."""
    file = write(tmp_path / "rows.jsonl", [FRUIT, TREE])
    made = people(
        file, {"anna": [[[0], [2], [1]], [[0], [1]]], "ben": [[[0], [2], [1]], [[1], [0]]], "cid": [[[2], [0], [1]]]}
    )
    frame, report = checked(made, "ranking", tmp_path)
    fruit, tree = frame.rows(named=True)
    assert set(zip(fruit["winners"], fruit["losers"], strict=True)) == {(0, 2), (0, 1), (2, 1)}
    assert tree["winners"] == [] and fruit["responses"] == FRUIT["responses"]  # one against one is a tie
    assert report["notes"] == {"contradictory": 2, "all_tied": 1}


def test_pairs_of_one_prompt_become_one_ranking(tmp_path: Path) -> None:
    """Apple beats bread, apple and pear are equal, pear beats bread."""
    made = people(write(tmp_path / "rows.jsonl", [FRUIT]), {"anna": [[[0], [1]], [[0, 2]], [[2], [1]]]}, "pairs")
    frame, report = checked(made, "ranking", tmp_path)
    assert set(zip(*frame.select("winners", "losers").row(0), strict=True)) == {(0, 1), (2, 1)}
    assert report["notes"] == {}
    (row,) = people(write(tmp_path / "more.jsonl", [FRUIT]), {"anna": [[[0], [1]]]}, "pairs")  # the others come later
    assert row["comparisons"] == [{"a": 0, "b": 1, "winner": 0}] and "order" not in row


def test_thumbs_go_by_majority(tmp_path: Path) -> None:
    """The apple is liked by two of three; of bread as many say up as down; the pear was skipped by one."""
    says = {"anna": ["up", "up", "down"], "ben": ["up", "down", None], "cid": ["down"]}
    made = people(write(tmp_path / "rows.jsonl", [FRUIT]), says, "thumbs")
    frame, _ = checked(made, "feedback", tmp_path)
    more = session(write(tmp_path / "rows.jsonl", [TREE]), "anna", "thumbs")  # the file has changed
    assert rows.summary(more.items, told(more)) == ["7 verdicts are on items that the file does not have: left out"]
    assert frame.select("completion", "label").rows() == [("An apple.", True), ("A pear.", False)]


def test_half_an_emoji_is_written(tmp_path: Path) -> None:
    rows.write([{"prompt": "\ud83d", "label": "é"}], tmp_path / "made.jsonl")
    assert (tmp_path / "made.jsonl").read_text() == '{"prompt": "\\ud83d", "label": "é"}\n'


# --- the terminal, and the command ---


@pytest.mark.parametrize(
    ("line", "form", "answers", "verdict"),
    [
        ("2 1=3 4", "ranking", 4, [[1], [0, 2], [3]]),
        ("2143", "ranking", 4, [[1], [0], [3], [2]]),
        ("2>1", "ranking", 3, [[1], [0], [2]]),  # the one that is left is the last
        ("1=2=3", "ranking", 3, [[0, 1, 2]]),
        ("10 1 2 3 4 5 6 7 8 9", "ranking", 10, [[9], *([place] for place in range(9))]),
        ("2", "pairs", 2, [[1], [0]]),
        ("=", "pairs", 2, [[0, 1]]),
        ("-", "thumbs", 1, "down"),
    ],
)
def test_a_line_is_understood(line: str, form: RankForm, answers: int, verdict: Any) -> None:
    assert terminal.understand(line, form, answers) == ("verdict", verdict)


@pytest.mark.parametrize(
    ("line", "form", "message"),
    [
        ("1 1 2 3", "ranking", "twice: 1"),
        ("1 2 4", "ranking", "there is no answer 4"),
        ("0 1 2 3", "ranking", "there is no answer 0"),
        ("1", "ranking", "not named: 2, 3"),
        ("1 2 3=", "ranking", "best first"),
        ("best", "ranking", "best first"),
        ("3", "pairs", "1 or 2"),
        ("1", "thumbs", "+ for a good answer"),
    ],
)
def test_a_line_that_is_no_verdict(line: str, form: RankForm, message: str) -> None:
    what, said = terminal.understand(line, form, 3)
    assert what == "wrong" and message in said


def test_skip_back_note_and_end_in_the_terminal(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{**FRUIT, "prompt": "Name\x1b[2J a fruit."}, TREE])
    anna, out = session(file), io.StringIO()
    terminal.rank(anna, io.StringIO("u\nnonsense\nn worth a look\n1 2\nu\n3 1\ns\n"), out)
    fruit, tree = told(anna)
    assert fruit.verdict == [[fruit.shown[place]] for place in (2, 0, 1)] and fruit.note == "worth a look"
    assert tree.verdict is None and anna.next_open() is None
    assert "All items are judged." in out.getvalue() and "\x1b" not in out.getvalue()
    terminal.rank(session(file, "ben"), io.StringIO("3 1\nq\n2 1\n"), out)
    assert session(file, "ben").next_open() == 1


def rank(*arguments: object, lines: str = "") -> subprocess.CompletedProcess[str]:
    started = [sys.executable, "-m", "flows.cli", "rank", *map(str, arguments)]
    return subprocess.run(started, input=lines, capture_output=True, text=True)


def test_the_command_survives_kill_resumes_and_names_the_next_one(tmp_path: Path) -> None:
    file = write(tmp_path / "to rank.jsonl", [FRUIT, TREE])
    request = tmp_path / "request.json"
    request.write_text(RankCommand(file=file, annotator="anna", terminal=True).model_dump_json())
    verdicts, output = tmp_path / "to rank.ranked.verdicts.jsonl", tmp_path / "to rank.ranked.jsonl"
    started = [sys.executable, "-P", "-m", "stages.commands.rank", str(request)]
    with subprocess.Popen(started, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stdin is not None
        process.stdin.write("1=2 3\n")
        process.stdin.flush()
        wait_for(lambda: verdicts.exists() and verdicts.read_bytes().endswith(b"\n"), 60)
        process.kill()
    assert not output.exists()
    done = rank(file, "--annotator", "anna", "--terminal", lines="12\n1\n")
    assert done.returncode == 0, done.stderr
    assert "2 items, 1 of them judged by anna before" in done.stdout and "1 of 2, 0 judged" not in done.stdout
    assert done.stdout.splitlines()[-1] == (
        f"next      alignflow validate '{output}' --kind ranking --out '{output.with_suffix('')}'"
    )
    assert [len(json.loads(line)["order"]) for line in output.read_text().splitlines()] == [2, 2]


def test_columns_of_other_names_are_mapped_and_the_result_is_json(tmp_path: Path) -> None:
    odd = [{"ask": row["prompt"], "outs": row["responses"][:2], "row": i} for i, row in enumerate((FRUIT, TREE))]
    file = write(tmp_path / "rows.jsonl", odd)
    named = ("--columns", "prompt=ask", "--columns", "responses=outs", "--terminal", "--json")
    asked = questions.read(file, "ranking", {"prompt": "ask", "responses": "outs"}).items
    for name, lines in (("anna", "12\n12\n"), ("ben", "12\n")):
        done = rank(file, *named, "--annotator", name, lines=lines)
        assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["items"], told["shared"], told["rows"]) == (2, 1, 2) and told["out"].endswith("rows.ranked.jsonl")
    assert {name: one["judged"] for name, one in told["people"].items()} == {"anna": 2, "ben": 1}
    made = [json.loads(line) for line in (tmp_path / "rows.ranked.jsonl").read_text().splitlines()]
    assert [row["row"] for row in made] == [0, 1] and [i.question.texts for i in asked] == [
        r["responses"] for r in made
    ]
    wrong = rank(file, "--columns", "prompt", "--annotator", "anna")
    assert wrong.returncode == EXIT_CODES["refused"] and "--columns = prompt: this is not a pair" in wrong.stderr


def test_a_users_mistake_is_one_message_and_a_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", [FRUIT])
    (tmp_path / "rows.verdicts.jsonl").touch()
    (tmp_path / "mine.jsonl").write_text("{}\n")
    for options, message in (
        ({"output": "mine.jsonl"}, "--output = mine.jsonl: the file already exists"),
        ({"output": "rows.jsonl"}, "--output = rows.jsonl: the file already exists"),
        ({"output": "mine.csv"}, "Fix: name a file that ends in .jsonl"),
        ({"file": "gone.jsonl"}, "path = gone.jsonl: there is no such file"),
        ({"port": 1}, "--port = 1: it cannot be used"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        asked = {"file": "rows.jsonl", "annotator": "anna", "open": False, "terminal": "port" not in options, **options}
        if "port" in options and os.geteuid() == 0:  # root may take any port
            continue
        assert command.main(RankCommand.model_validate(asked)) == EXIT_CODES["refused"]
        assert message in capsys.readouterr().err
    refused = rank("rows.jsonl", "--annotator", " ", "--form", "rankings")
    assert refused.returncode == EXIT_CODES["refused"] and "--annotator = ' '" in refused.stderr
    assert "--form = 'rankings': must be 'ranking', 'pairs' or 'thumbs'" in refused.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_writes_the_rows(how: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C goes to the whole group of a terminal; a stop from outside to the command alone."""
    file = write(tmp_path / "rows.jsonl", [FRUIT, TREE])
    say(session(file), 1, [[0], [1]])
    file.with_suffix(".verdicts.jsonl").rename(tmp_path / "rows.ranked.verdicts.jsonl")
    started = [sys.executable, "-m", "flows.cli", "rank", str(file), "--annotator", "anna", "--no-open"]
    with subprocess.Popen(started, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("Ctrl-C"):
            assert process.poll() is None
        os.killpg(process.pid, how) if how == signal.SIGINT else process.send_signal(how)
        try:
            assert "next      alignflow validate" in process.communicate(timeout=60)[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert len((tmp_path / "rows.ranked.jsonl").read_text().splitlines()) == 1
    assert how == signal.SIGTERM or process.returncode == 0
