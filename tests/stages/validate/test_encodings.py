"""Files as other programs write them: every encoding that can be told is read, the others are refused by name; CSV with
other delimiters; JSON that holds its rows in another way than one after the other."""

import gzip
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.stages.validate.test_validate import checked, quarantine, refused, start
from tests.support.models import given

ROWS = [{"prompt": f"Où est le café n° {i} ?", "response": f"À côté, 数 {i}"} for i in range(12)]
CSV = "prompt,response\n" + "".join(f'{row["prompt"]},"{row["response"]}"\n' for row in ROWS)
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
ARRAY = json.dumps(ROWS, ensure_ascii=False, indent=1)
TEXTS = {"csv": CSV, "jsonl": JSONL, "json": ARRAY}


def responses(out: Path) -> list[str]:
    return given(out, "train", "sft")["response"].to_list()


@pytest.mark.parametrize("suffix", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_unicode_in_any_form_is_read(tmp_path: Path, suffix: str, encoding: str, mark: str) -> None:
    """With a byte order mark and, where two bytes make a character, without one; packed too; equal digests."""
    if mark and encoding in ("utf-8-sig", "utf-16", "utf-32"):
        mark = ""  # they write their own
    plain, other = tmp_path / f"plain.{suffix}", tmp_path / f"other.{suffix}.gz"
    plain.write_text(TEXTS[suffix], encoding="utf-8")
    other.write_bytes(gzip.compress((mark + TEXTS[suffix]).encode(encoding)))
    reports = [checked(file, tmp_path / f"out-{file.stem}", eval_fraction=0) for file in (plain, other)]
    assert [report.kept for report in reports] == [12, 12]
    assert reports[0].sha256 == reports[1].sha256
    assert responses(tmp_path / f"out-{other.stem}") == [row["response"] for row in ROWS]


@pytest.mark.parametrize("suffix", TEXTS)
def test_windows_1252_is_refused_with_a_command_that_works(tmp_path: Path, suffix: str) -> None:
    """The command that the error names makes a file that is read, with the texts as they were meant."""
    file = tmp_path / f"old.{suffix}"
    file.write_text(TEXTS[suffix].replace("数", "§"), encoding="cp1252")
    message, report = refused(file, tmp_path / "out")
    assert "UTF-8" in message and report.kept == 0
    command = re.search("`(.*)`", message)
    assert command is not None
    subprocess.run(command[1], shell=True, check=True)
    assert checked(tmp_path / f"old-utf8.{suffix}", tmp_path / "out", eval_fraction=0).kept == 12
    assert responses(tmp_path / "out") == [row["response"].replace("数", "§") for row in ROWS]


def test_old_encodings_that_show_in_the_header_or_after_packing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("prompt,réponse\nq,a\n".encode("cp1252"))
    message, _ = refused(tmp_path / "a.csv", tmp_path / "out")
    assert "column 2" in message and "iconv -f WINDOWS-1252" in message
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(JSONL.replace("数", "").encode("cp1252")))
    command = re.search("`(.*)`", refused(packed, tmp_path / "out")[0])
    assert command is not None
    subprocess.run(command[1], shell=True, check=True)
    assert checked(tmp_path / "b-utf8.jsonl", tmp_path / "out").kept == 12


def test_half_characters_are_no_encoding(tmp_path: Path) -> None:
    """An emoji that was cut as JSON escapes: no conversion would help."""
    file = tmp_path / "cut.jsonl"
    file.write_text('{"prompt": "q", "response": "a \\ud83d"}\n' * 3)
    message, _ = refused(file, tmp_path / "out")
    assert "take out half characters" in message and "iconv" not in message


def test_utf16_that_is_cut_is_refused(tmp_path: Path) -> None:
    """Half a character at the end; in the JSON array it is inside a text."""
    for suffix, text in TEXTS.items():
        (tmp_path / f"cut.{suffix}").write_bytes(text.encode("utf-16")[:-1] if suffix != "json" else b"\xff\xfe[")
        message, _ = refused(tmp_path / f"cut.{suffix}", tmp_path / "out")
        assert "Fix: " in message or "not JSON" in message, message


@pytest.mark.parametrize(
    ("line", "kind", "kept"),
    [
        ('{"prompt": "p", "response": "r", "\\ud83d": 1}', "sft", 1),
        ('{"prompt": "p", "response": "r", "more": {"\\udc00": ["\\ud83d"]}}', "sft", 1),
        ('{"prompt": [{"role": "\\ud83d", "content": "c"}], "response": "r"}', "sft", 0),
        ('{"prompt": [{"role": "user", "content": "c\\udfff"}], "response": "r"}', "sft", 0),
        ('{"prompt": "p", "responses": ["a", {"text": "b", "model": "\\ud83d"}], "order": [0, 1]}', "ranking", 1),
        ('{"prompt": "p", "responses": ["a", "b"], "order": ["\\ud83d", 0]}', "ranking", 0),
        ('{"prompt": "p", "completion": "c", "label": "\\ud83d"}', "feedback", 0),
        ('{"prompt": "p", "chosen": "c", "rejected": "r", "margin": "\\ud83d"}', "preference", 0),
    ],
)
def test_lone_surrogates_crash_nothing(tmp_path: Path, line: str, kind: Any, kept: int) -> None:
    """Half of an emoji in a key, a name or a value: the row goes aside where it needs it. Through the real process."""
    (tmp_path / "a.jsonl").write_text(line + "\n")
    done = start(tmp_path, path=str(tmp_path / "a.jsonl"), kind=kind, out=str(tmp_path / "out"), as_json=True)
    assert done.returncode == (0 if kept else 65), done.stderr
    assert json.loads(done.stdout)["kept"] == kept
    assert len(quarantine(tmp_path / "out")) == 1 - kept
    assert "Traceback" not in done.stderr


def test_an_unused_csv_column_may_hold_any_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"prompt,response,note\nq,a,caf\xe9\n")
    assert checked(tmp_path / "a.csv", tmp_path / "out").kept == 1


@pytest.mark.parametrize(
    "text",
    [
        'prompt;response\n"one, two";a\nthree;"b;c"\n',
        'prompt\tresponse\none, two\ta\nthree\t"b;c"\n',
        "prompt|response\none, two|a\nthree|b;c\n",
        'sep=;\nprompt;response\n"one, two";a\nthree;"b;c"\n',
        'sep=,\r\nprompt,response\r\n"one, two",a\r\nthree,b;c\r\n',
        'prompt, response\n"one, two", a\nthree, "b;c"\n',
        '\ufeff"prompt"; "response"\n"one, two";a\nthree;"b;c"\n',
        '"prompt","response","a;b;c;d"\n"one, two",a,\nthree,b;c,\n',
    ],
)
def test_csv_of_other_spreadsheets(tmp_path: Path, text: str) -> None:
    """Semicolons, tabs, bars, an announced delimiter, blanks after commas; commas win where the header has them."""
    (tmp_path / "a.csv").write_text(text, newline="")
    assert checked(tmp_path / "a.csv", tmp_path / "out", eval_fraction=0).kept == 2
    prompts = [prompt[0]["content"] for prompt in given(tmp_path / "out", "train", "sft")["prompt"].to_list()]
    assert (prompts, responses(tmp_path / "out")) == (["one, two", "three"], ["a", "b;c"])


def test_lines_are_counted_with_what_comes_before_the_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sep=;\nprompt;response\nq;a\nfew\n")
    checked(tmp_path / "a.csv", tmp_path / "out", max_bad=1)
    [entry] = quarantine(tmp_path / "out")
    assert (entry["reason"], entry["line"]) == ("wrong_number_of_cells", 4)


def test_a_csv_of_one_column_is_not_split(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\nWhat is a|b?\n")
    assert checked(tmp_path / "a.csv", tmp_path / "out", "prompt").kept == 1


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"prompt": {"0": "p", "1": "q"}, "response": {"0": "a", "1": "b"}}, ["column after column", "orient="]),
        ({"prompt": ["p", "q"], "response": ["a", "b"]}, ["each a list", "orient="]),
        ({"columns": ["prompt", "response"], "index": [0], "data": [["p", "a"]]}, ["split", "orient="]),
        ({"schema": {"fields": []}, "data": [{"prompt": "p", "response": "a"}]}, ["table", "orient="]),
        ({"version": 1, "data": [{"prompt": "p", "response": "a"}]}, ["list under `data`", "jq -c '.data[]'"]),
    ],
)
def test_json_of_another_orientation_is_refused_by_name(
    tmp_path: Path, value: dict[str, Any], words: list[str], suffix: str, indent: int | None
) -> None:
    if suffix == "jsonl" and indent:
        return  # lines that are not JSON: refused as such
    file = tmp_path / f"a.{suffix}"
    file.write_text(json.dumps(value, indent=indent))
    message, _ = refused(file, tmp_path / "out")
    assert all(word in message for word in words), message


def test_rows_with_a_list_of_objects_are_rows(tmp_path: Path) -> None:
    """Many of them hold no table each, whatever their columns are called."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({**row, "examples": [{"in": "a", "out": "b"}]}) + "\n" for row in ROWS))
    report = checked(file, tmp_path / "out", eval_fraction=0)
    assert report.kept == len(ROWS) and list(report.unused) == ["examples"]


@pytest.mark.parametrize("orient", ["columns", "split", "index", "table"])
def test_the_advice_for_pandas_tables_works(tmp_path: Path, orient: Any) -> None:
    """What pandas wrote is read by pandas as the error says, and then by us."""
    pandas = pytest.importorskip("pandas")
    file = tmp_path / "rows.json"
    pandas.DataFrame(ROWS).to_json(file, orient=orient)
    message, _ = refused(file, tmp_path / "out")
    read = re.search(r"read it with pandas\.read_json(?:\(\.\.\., orient=\"(\w+)\"\))?", message)
    assert read is not None, message
    frame = pandas.read_json(file, **({"orient": read[1]} if read[1] else {}))
    frame.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    assert checked(tmp_path / "rows.jsonl", tmp_path / "out", eval_fraction=0).kept == 12
    assert responses(tmp_path / "out") == [row["response"] for row in ROWS]


def test_rows_that_look_like_columns_are_rows(tmp_path: Path) -> None:
    """Lists of equal length make a conversation or the levels of answers too."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for kind, row in {
        "ranking": {"prompt": [messages[0]], "responses": ["a"] * 1 + ["b"], "scores": [1, 2]},
        "preference": {"chosen": messages, "rejected": [messages[0], {"role": "assistant", "content": "b"}]},
        "prompt": {"turns": ["first", "second"]},
    }.items():
        (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
        assert checked(tmp_path / "a.jsonl", tmp_path / "out", kind).kept == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "p", "response": "a", "response": "b"}',
        '{"prompt": [{"role": "user", "content": "a", "content": "b"}], "response": "c"}',
        '{"prompt": "p", "response": "a", "meta": {"id": 1, "id": 1}}',
        '{"prompt": "p", "respons\\u0065": "a", "response": "b"}',
    ],
)
def test_an_object_that_has_a_key_twice_is_put_aside(tmp_path: Path, line: str) -> None:
    """At any depth, in lines and in arrays; whether the values agree is not asked."""
    good = '{"prompt": "p", "response": "a"}'
    (tmp_path / "a.jsonl").write_text(f'{good}\n{line}\n{good[:-2]}z"}}\n')
    (tmp_path / "a.json").write_text(f'[{good}, {line}, {good[:-2]}z"}}]')
    for name in ("a.jsonl", "a.json"):
        report = checked(tmp_path / name, tmp_path / "out", max_bad=1)
        assert (report.kept, report.reasons) == (2, {"duplicate_key": 1})
        assert quarantine(tmp_path / "out")[0]["row"] == 1
