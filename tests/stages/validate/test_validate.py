"""Stage `validate`: every source, every way in which data can be bad, the split, leaks, and the real files."""

import csv
import gc
import gzip
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from jinja2 import TemplateError
from pydantic import ValidationError

from flows.planning import config_file
from schemas.commands import ValidateCommand
from schemas.config.data import DERIVES, Kind, ValidateParams
from schemas.errors import StageError
from schemas.rows import prompt_id
from schemas.rows.models import problems
from schemas.stage import STAGES, Artifact, Request
from stages import tracking
from stages.commands.validate import main
from stages.engine.data.codec import Codec
from stages.engine.tables import PARTS, kinds
from stages.validate import check, run
from stages.validate.checks.token_checks import prompt_tokens_differ
from stages.validate.context import Context, note
from stages.validate.quarantine import Report
from stages.validate.readers import records
from tests.support.forks import PYTHON
from tests.support.models import given

ROWS = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(20)]


def write(file: Path, rows: Iterable[Any]) -> Path:
    """JSON lines; texts are written as they stand."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    file.write_text("".join(line + "\n" for line in lines))
    return file


def checked(path: Path | str, out: Path, kind: Kind = "sft", codec: Codec | None = None, **more: Any) -> Report:
    inputs = {name: more.pop(name) for name in ("evaluation", "rows", "seed") if name in more}
    return check(Context(ValidateParams(path=str(path), kind=kind, **more), codec, **inputs), out)


def refused(path: Path | str, out: Path, kind: Kind = "sft", **more: Any) -> tuple[str, Report]:
    """The message of the refusal, and the report that was written all the same."""
    with pytest.raises(StageError) as caught:
        checked(path, out, kind, **more)
    assert caught.value.status == "refused"
    report = Report.model_validate_json((out / "report.json").read_text())
    assert report.error == str(caught.value)
    assert len({entry["row"] for entry in quarantine(out)}) == report.quarantined
    return str(caught.value), report


def quarantine(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


def start(folder: Path, environment: dict[str, str] | None = None, **request: Any) -> subprocess.CompletedProcess[str]:
    """The command's process, as `alignflow validate` starts it."""
    file = folder / "request.json"
    file.write_text(ValidateCommand(**request).model_dump_json())
    command = [*PYTHON, "-m", "stages.commands.validate", file]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


# --- sources


def test_all_formats_are_the_same_rows(tmp_path: Path) -> None:
    """JSONL, gzipped, a JSON array, Parquet and CSV (with a byte order mark) give equal tables."""
    rows = [*ROWS, {"prompt": 'with "quotes", commas\nand lines', "response": "é 数"}]
    files = [write(tmp_path / "a.jsonl", rows), tmp_path / "b.jsonl.gz", tmp_path / "c.json", tmp_path / "d.parquet"]
    files[1].write_bytes(gzip.compress(files[0].read_bytes()))
    files[2].write_text(json.dumps(rows))
    pl.DataFrame(rows).write_parquet(files[3])
    files.append(tmp_path / "e.csv")
    with files[4].open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(rows)
    tables = []
    for file in files:
        out = tmp_path / file.name.replace(".", "_")
        report = checked(file, out, eval_fraction=0)
        assert (report.rows, report.kept, report.quarantined) == (21, 21, 0)
        tables.append(given(out, "train", "sft"))
    assert all(other.equals(tables[0]) for other in tables)
    assert tables[0]["response"].to_list() == [row["response"] for row in rows]


def test_limit_and_digest(tmp_path: Path) -> None:
    """The digest covers all rows that were read, the bad ones too, and not how the file is packed."""
    plain = write(tmp_path / "a.jsonl", ROWS)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    spoilt = write(tmp_path / "c.jsonl", [*ROWS, "{"])
    whole = checked(plain, tmp_path / "a")
    assert checked(packed, tmp_path / "b").sha256 == whole.sha256
    assert checked(spoilt, tmp_path / "c").sha256 != whole.sha256
    assert checked(spoilt, tmp_path / "d", limit=20).sha256 == whole.sha256
    assert checked(plain, tmp_path / "e", limit=19).rows == 19


def test_equal_rows_make_equal_folders(tmp_path: Path) -> None:
    """The folder's digest is what later stages are keyed by: no path, no time may stand in it."""
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        checked(write(tmp_path / place / f"{place}.jsonl", [*ROWS, "{"]), tmp_path / place / "out")
    assert tracking.digest(tmp_path / "a" / "out") == tracking.digest(tmp_path / "b" / "out")


def test_columns_are_mapped(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": r["prompt"], "prompt": 1, "output": r["response"]} for r in ROWS])
    checked(file, tmp_path / "out", columns={"prompt": "question", "response": "output"}, eval_fraction=0)
    assert given(tmp_path / "out", "train", "sft")["response"].to_list() == [row["response"] for row in ROWS]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `datasets` cache that holds team/rows at one commit, as if it had been fetched from the Hub before."""
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "train.jsonl", ROWS)
    table = datasets.load_dataset(str(tmp_path / "rows"), split="train")
    made = Path(table.cache_files[0]["filename"]).parent
    made.rename(tmp_path / "moved")
    target = tmp_path / "cache" / "team___rows" / "default" / "0.0.0" / ("1" * 40)
    target.parent.mkdir(parents=True)
    (tmp_path / "moved").rename(target)
    return tmp_path


def test_hub_dataset_from_the_cache(cache: Path) -> None:
    """Offline the cached commit is read; asking for another is refused rather than answered with the wrong rows."""
    report = checked("hub:team/rows", cache / "out", revision="1" * 40, eval_fraction=0)
    assert report.kept == 20
    assert given(cache / "out", "train", "sft")["response"].to_list() == [row["response"] for row in ROWS]
    message, _ = refused("hub:team/rows", cache / "out", revision="2" * 40)
    assert "another commit" in message
    message, _ = refused("hub:team/nothing", cache / "out", revision="1" * 40)
    assert "hub:team/nothing" in message
    message, _ = refused("hub:team/rows", cache / "out", split="tset")
    assert "tset" in message


def test_local_dataset_folders(cache: Path) -> None:
    """Folders of data files and folders that `save_to_disk` wrote, with or without splits."""
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(str(cache / "saved"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(cache / "splits"))
    for name in ("rows", "saved", "splits"):
        assert checked(f"hub:{cache / name}", cache / "out").kept == 20


def test_demo_and_generated_rows(tmp_path: Path) -> None:
    """The demo's rows depend on the seed; `input:rows` reads the folder of stage `generate`."""
    assert checked("demo:prompt", tmp_path / "out", "prompt", limit=50).kept == 50
    one, two = (checked("demo:sft", tmp_path / "out", limit=50, seed=seed).sha256 for seed in (1, 2))
    assert one != two
    asked = [{"role": "user", "content": "u"}]
    made = [
        {"prompt": asked, "responses": ["a", "b", ""], "scores": [1, 2, 3]},
        {"prompt": asked, "responses": ["a", "a"], "scores": [1, 1]},
    ]
    write(tmp_path / "rows.jsonl", made)
    report = checked("input:rows", tmp_path / "out", "ranking", rows=tmp_path, eval_fraction=0)
    assert (report.kept, report.quarantined) == (2, 0)
    assert report.notes == {"empty_answers": 1, "identical_answers": 1, "all_tied": 1}
    assert report.parts["train"] == {"prompt": 1, "ranking": 1, "preference": 1, "feedback": 2, "sft": 1}
    message, _ = refused("input:rows", tmp_path / "out", "ranking")
    assert "input:rows" in message


# --- files that cannot be read


def test_unreadable_files(tmp_path: Path) -> None:
    """Each error names the file and what to do."""
    good = write(tmp_path / "rows.jsonl", ROWS)
    packed = gzip.compress(good.read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "not.jsonl.gz").write_bytes(b"plain text")
    (tmp_path / "garbled.jsonl.gz").write_bytes(packed[:12] + b"\xff" * 30 + packed[42:])
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "empty.jsonl.gz").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b"\n \n")
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "head.csv").write_bytes(b"prompt,response\n")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "twice.csv").write_bytes(b"prompt,prompt\na,b\n")
    (tmp_path / "open.csv").write_bytes(b'prompt,response\na,"b\n')
    (tmp_path / "half.json").write_bytes(b'[{"prompt": ')
    (tmp_path / "rows.docx").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    expected = {
        **{"row.jsonl": "no such file", "nowhere/rows.jsonl": "no folder", "folder": "a folder", "rows.docx": "format"},
        **{"cut.jsonl.gz": "broken", "not.jsonl.gz": "broken", "garbled.jsonl.gz": "broken", "half.json": "not JSON"},
        **dict.fromkeys(("empty.jsonl", "empty.jsonl.gz", "blank.jsonl", "empty.csv", "head.csv"), "no rows"),
        **{"cut.parquet": "cannot be read", "twice.csv": "more than once", "open.csv": "malformed"},
    }
    for name, words in expected.items():
        message, report = refused(tmp_path / name, tmp_path / "out")
        assert str(tmp_path / name) in message and words in message, name
        assert report.kept == 0
    assert f"did you mean {good}" in refused(tmp_path / "row.jsonl", tmp_path / "out")[0]


# --- columns and kinds


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        (
            {"prompt": "p", "response": "r"},
            "preference",
            ["`chosen` and no `rejected`", "has prompt, response", "kind sft"],
        ),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "feedback", ["`completion`", "`label`", "kind preference"]),
        ({"prompt": "p", "completion": "c", "label": True}, "sft", ["`response`", "kind feedback"]),
        ({"prompt": "p", "respones": "r"}, "sft", ["no column `response`", "--columns response=respones"]),
        ({"prompt": "p", "responses": ["a", "b"]}, "ranking", ["`comparisons`", "scores", "order", "ranks"]),
        ({"chosen": "c", "rejected": "r"}, "preference", ["no column `prompt`", "has chosen, rejected"]),
        ({"text": "t"}, "prompt", ["no column `prompt`", "has text"]),
    ],
)
def test_wrong_columns(tmp_path: Path, row: dict, kind: Kind, words: list[str]) -> None:
    """A file of another kind is refused with what it has, what is missing, and the kind that fits."""
    file = write(tmp_path / "a.jsonl", [row] * 3)
    message, report = refused(file, tmp_path / "out", kind)
    assert str(file) in message and all(word in message for word in words), message
    assert (report.kept, report.quarantined) == (0, 3)


def test_wrong_mappings(tmp_path: Path) -> None:
    """A mapped column that the file lacks, and a name of ours that the kind lacks, with the nearest of each."""
    file = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}] * 3)
    message, _ = refused(file, tmp_path / "out", columns={"prompt": "qestion", "response": "answer"})
    assert "no column `qestion`" in message and "question, answer" in message and "did you mean `question`" in message
    message, _ = refused(file, tmp_path / "out", columns={"promt": "question"})
    assert "no column `promt`" in message and "did you mean `prompt`" in message


@pytest.mark.parametrize(
    ("row", "kind", "fix"),
    [
        ({"messages": [{"role": "user", "content": "q"}] * 2}, "sft", "end every conversation with the assistant's"),
        ({"prompt": [{"role": "user", "content": "q"}] * 2, "response": "a"}, "sft", "speak in turn"),
        ({"prompt": "p", "responses": ["a", "b"], "order": [1, 2]}, "ranking", "numbers, from 0"),
        ({"prompt": "p", "responses": ["a", "b"], "order": [1]}, "ranking", "name every answer once"),
        ({"prompt": "p", "responses": ["a", "b"], "comparisons": [[0, 1]]}, "ranking", '"winner": 0'),
    ],
)
def test_what_to_do_about_rows(tmp_path: Path, row: dict, kind: Kind, fix: str) -> None:
    message, _ = refused(write(tmp_path / "a.jsonl", [row]), tmp_path / "out", kind)
    assert fix in message.split("Fix: ")[1], message


@pytest.mark.parametrize(
    ("row", "kind", "mapping"),
    [
        (
            {"prompt": "p", "model_a": "m", "model_b": "n", "response_a": "r", "response_b": "s", "verdict": "model_a"},
            "preference",
            "`--columns a=response_a --columns b=response_b --columns label=YOUR_COLUMN`",
        ),
        ({"prompt": "p", "Response1": "r", "Response2": "s"}, "preference", "--columns a=Response1 --columns b=Respo"),
        ({"Prompt": "p", "Chosen": "c", "Rejected": "r"}, "preference", "chosen=Chosen --columns rejected=Rejected"),
        ({"prompt": "p", "responses": ["a", "b"], "rating": [1, 2]}, "ranking", "`--columns scores=YOUR_COLUMN`"),
        ({"prompt": "p", "responses": ["a", "b"], "rank": [1, 2]}, "ranking", "`--columns ranks=rank`"),
    ],
)
def test_the_mapping_to_write(tmp_path: Path, row: dict, kind: Kind, mapping: str) -> None:
    """Two answers beside a verdict are no chosen and rejected, and a ranking can be told in four ways."""
    message, _ = refused(write(tmp_path / "a.jsonl", [row] * 3), tmp_path / "out", kind)
    assert mapping in message, message
    if kind == "ranking":
        assert "`order`" in message.split("will do too")[0].split("; ")[-1]


def test_no_column_is_guessed(tmp_path: Path) -> None:
    """Chosen and rejected the wrong way round would invert every preference: only a placeholder is suggested."""
    file = write(tmp_path / "a.jsonl", [{"question": "q", "better": "b", "worse": "w"}] * 3)
    message, _ = refused(file, tmp_path / "out", "preference")
    assert "no column `chosen` and no `rejected`. It has question, better, worse." in message
    assert "`--columns chosen=YOUR_COLUMN --columns rejected=YOUR_COLUMN`" in message
    assert "(config: `columns: {chosen: YOUR_COLUMN, rejected: YOUR_COLUMN}`)" in message
    near = write(tmp_path / "b.jsonl", [{"prompt": "p", "unchosen": "b", "rejectd": "w"}] * 3)
    message, _ = refused(near, tmp_path / "out", "preference")
    assert "chosen=YOUR_COLUMN" in message and "rejected=YOUR_COLUMN" in message
    message, _ = refused(near, tmp_path / "out", "preference", columns={"chosen": "chosen", "rejected": "rejectd"})
    assert "did you mean" not in message and "--columns chosen=YOUR_COLUMN" in message
    message, _ = refused(near, tmp_path / "out", "preference", columns={"prompt": "nope"})
    assert "did you mean" not in message and "--columns prompt=YOUR_COLUMN" in message
    message, _ = refused(near, tmp_path / "out", "preference", columns={"unchosn": "unchosen"})
    assert "did you mean" not in message and "--columns OURS=unchosen" in message
    message, _ = refused(near, tmp_path / "out", "preference", columns={"rejectd": "rejected"})
    assert "did you mean `rejected`? Write our name first: `--columns rejected=rejectd`" in message


def test_unranked_file(tmp_path: Path) -> None:
    """A file that nobody has ranked says so, and how it is done."""
    rows = [{"prompt": f"p{i}", "responses": ["a", "b"], "order": []} for i in range(3)]
    message, _ = refused(write(tmp_path / "a.jsonl", rows), tmp_path / "out", "ranking")
    assert "no line has an order yet" in message and "map" not in message
    assert "fill in `order` on each line (numbers of the answers from 0, best first)" in message


@pytest.mark.parametrize("text", [json.dumps(ROWS), json.dumps(ROWS, indent=2), json.dumps(ROWS[0], indent=2)])
def test_json_that_is_no_jsonl(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    message, _ = refused(tmp_path / "a.jsonl", tmp_path / "out")
    assert "write one JSON object per line (JSONL)" in message
    assert ("name the file .json" in message) == text.startswith("[")


# --- rows


def test_hostile_rows(tmp_path: Path) -> None:
    """Each bad line is put aside with its number, column and reason; the good ones beside it stay, in order."""
    bad = [
        ('{"prompt": "p", "response": ', "", "malformed_json"),
        ("[1, 2]", "", "not_an_object"),
        ("[" * 100_000, "", "malformed_json"),
        ('{"prompt": "p", "response": true}', "response", "not_text"),
        ('{"prompt": true, "response": "r"}', "prompt", "not_text"),
        ('{"prompt": "p", "response": 7}', "response", "not_text"),
        ('{"prompt": "p", "response": NaN}', "response", "not_text"),
        ('{"prompt": "p", "response": null}', "response", "missing"),
        ('{"prompt": "p"}', "response", "missing"),
        ('{"prompt": "p", "response": ""}', "response", "empty"),
        ('{"prompt": "  ", "response": "r"}', "prompt", "empty"),
        ('{"prompt": "p", "response": "a\\u0000b"}', "response", "contains_nul"),
        ('{"prompt": "p", "response": "\\ud83d"}', "response", "not_unicode"),
        ('{"prompt": [{"role": "assistant", "content": "x"}], "response": "r"}', "prompt", "roles_out_of_order"),
        (json.dumps({"prompt": "p", "response": "x" * 10_000_000}), "response", "too_long"),
        (json.dumps(ROWS[0]), "response", "duplicate"),
    ]
    file = write(tmp_path / "a.jsonl", [*ROWS, *(line for line, _, _ in bad)])
    file.write_bytes(file.read_bytes() + b'{"prompt": "p", "response": "\xff"}\n')
    report = checked(file, tmp_path / "out", max_bad=0.5, eval_fraction=0)
    assert (report.rows, report.kept, report.quarantined) == (37, 20, 17)
    found = {entry["row"]: (entry["column"], entry["reason"]) for entry in quarantine(tmp_path / "out")}
    expected = {20 + i: (column, reason) for i, (_, column, reason) in enumerate(bad)}
    assert found == expected | {36: ("", "not_unicode")}
    assert all(set(entry) >= {"row", "column", "reason", "value"} for entry in quarantine(tmp_path / "out"))
    assert all(len(entry["value"]) <= 200 for entry in quarantine(tmp_path / "out"))
    assert [entry["line"] for entry in quarantine(tmp_path / "out") if entry["row"] == 20] == [21]
    assert report.reasons == Counter(reason for _, reason in found.values())
    assert given(tmp_path / "out", "train", "sft")["row"].to_list() == list(range(20))


def test_bad_pairs(tmp_path: Path) -> None:
    """chosen == rejected, an empty answer, and prompts that differ between the two."""
    said = [{"role": "assistant", "content": "a"}]
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        {"prompt": "p", "chosen": "", "rejected": "a"},
        {"chosen": [{"role": "user", "content": "x"}, *said], "rejected": [{"role": "user", "content": "y"}, *said]},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ]
    report = checked(write(tmp_path / "a.jsonl", rows), tmp_path / "out", "preference", max_bad=0.75)
    assert report.reasons == {"prompts_differ": 1, "empty": 1, "chosen_equals_rejected": 1}
    assert report.checks.keys() == {"rejected: prompts_differ", "chosen: empty", "rejected: chosen_equals_rejected"}


def test_csv_rows(tmp_path: Path) -> None:
    """A row of too few cells and one of broken bytes are put aside; labels are words."""
    file = tmp_path / "a.csv"
    good = "".join(f"question {i},answer,{label}\n" for i, label in enumerate(["true", "False", "1", "0"]))
    file.write_bytes(b"prompt,completion,label\n" + good.encode() + b"few,cells\nq,\xff\xfe,1\nq,a,perhaps\n")
    report = checked(file, tmp_path / "out", "feedback", max_bad=0.5, eval_fraction=0)
    assert report.reasons == {"wrong_number_of_cells": 1, "not_unicode": 1, "not_a_label": 1}
    assert given(tmp_path / "out", "train", "feedback")["label"].to_list() == [True, False, True, False]


def test_look_alikes_are_counted_and_kept(tmp_path: Path) -> None:
    """Rows that differ in width, case or marks only are noted; they are not the same bytes."""
    rows = [{"prompt": "What is 2?", "response": "Two."}, {"prompt": "what is ２", "response": "two"}]
    report = checked(write(tmp_path / "a.jsonl", rows), tmp_path / "out")
    assert (report.kept, report.notes, report.noted) == (2, {"look_alike": 1}, {"look_alike": [1]})


def test_notes_stand_in_one_order(tmp_path: Path) -> None:
    """The report, and with it the data's digest, is the same in every process, however Python hashes its texts."""
    votes = [{"a": 0, "b": 1, "winner": winner} for winner in (0, 1)]
    ranks: list[dict[str, Any]] = [{"scores": [1, 0]}, {"scores": [0, 0]}, {"scores": []}, {"comparisons": votes}]
    ranks.append({"responses": ["x", "x", "z"], "scores": [0, 0, 1]})
    rows = [{"prompt": f"p{i}", "responses": ["x", "y"], **rank} for i, rank in enumerate(ranks)]
    file = write(tmp_path / "a.jsonl", rows)
    reports = []
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        start(tmp_path, environment, path=str(file), kind="ranking", out=tmp_path / seed).check_returncode()
        reports.append((tmp_path / seed / "report.json").read_text())
    assert reports == reports[:1] * 3
    assert len(json.loads(reports[0])["notes"]) == 4


def test_cycles_are_reported(tmp_path: Path) -> None:
    """A row whose comparisons run in a circle is kept, counted and named."""
    circle = [{"a": i, "b": j, "winner": i} for i, j in ((0, 1), (1, 2), (2, 0))]
    rows = [
        {"prompt": "p", "responses": ["a", "b"], "comparisons": circle[:1]},
        {"prompt": "q", "responses": ["a", "b", "c"], "comparisons": circle},
    ]
    report = checked(write(tmp_path / "a.jsonl", rows), tmp_path / "out", "ranking", eval_fraction=0)
    assert (report.notes, report.noted) == ({"cycle": 1}, {"cycle": [1]})
    assert report.parts["train"]["preference"] == 4


# --- refusals


def test_too_many_bad_rows(tmp_path: Path) -> None:
    """2 bad rows of 20 are 10 %: allowed at max_bad 0.1, refused below, naming file, checks, counts and quarantine."""
    rows = [*ROWS[:18], {"prompt": "p", "response": ""}, {"prompt": "p", "response": True}]
    file = write(tmp_path / "a.jsonl", rows)
    assert checked(file, tmp_path / "out", max_bad=0.1).kept == 18
    message, report = refused(file, tmp_path / "out", max_bad=0.09)
    assert (report.rows, report.kept, report.quarantined) == (20, 18, 2)
    for words in (
        str(file),
        "2 of 20",
        "10.0%",
        "9.0%",
        "response: empty (1)",
        "response: not_text (1)",
        "quarantine.jsonl",
    ):
        assert words in message
    assert not list((tmp_path / "out").rglob("*.parquet")), "what an earlier check wrote must not stay"


def test_nothing_left(tmp_path: Path) -> None:
    """Even with every bad row allowed, no rows or only ties are nothing to learn from."""
    file = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": ""}] * 3)
    message, report = refused(file, tmp_path / "out", max_bad=1)
    assert "nothing is left" in message and "3 of 3" in message and report.kept == 0
    file = write(tmp_path / "b.jsonl", [{"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}])
    message, _ = refused(file, tmp_path / "out", "ranking")
    assert "none of the other 1 prefers" in message


# --- split and leaks


def test_split_by_prompt(tmp_path: Path) -> None:
    """Parts are told by the hash alone: u < eval -> eval, u >= 1 - test -> test, then gold, else train."""
    rows = [{"prompt": f"question {i % 150}", "response": f"answer {i}"} for i in range(300)]
    fractions: dict[str, Any] = {"eval_fraction": 0.3, "gold_fraction": 0.4, "test_fraction": 0.2}
    checked(write(tmp_path / "a.jsonl", rows), tmp_path / "out", **fractions)
    seen: dict[str, set[str]] = {}
    for part in PARTS:
        frame = given(tmp_path / "out", part, "sft")
        seen[part] = set(frame["prompt_id"])
        for name, messages in frame.select("prompt_id", "prompt").iter_rows():
            assert name == prompt_id(messages)
            draw = int(name[:8], 16) / 2**32
            rest = (draw - 0.3) / 0.5
            held_out = "eval" if draw < 0.3 else "test" if draw >= 0.8 else None
            assert part == (held_out or ("gold" if rest < 0.4 else "train"))
    assert sum(map(len, seen.values())) == len(set().union(*seen.values())) == 150
    shares = {part: len(ids) / 150 for part, ids in seen.items()}
    expected = {"eval": 0.3, "test": 0.2, "gold": 0.5 * 0.4, "train": 0.5 * 0.6}
    assert shares == pytest.approx(expected, abs=0.12)


def test_all_for_evaluation(tmp_path: Path) -> None:
    """eval_fraction 1 holds every prompt out."""
    report = checked(write(tmp_path / "a.jsonl", ROWS), tmp_path / "out", eval_fraction=1)
    assert report.parts == {"train": {}, "eval": {"prompt": 20, "sft": 20}, "gold": {}, "test": {}}


def test_too_few_prompts_to_evaluate_on(tmp_path: Path) -> None:
    """Said by the first stage, not after training; all prompts are held out here, and they are as many as the rows."""
    file = write(tmp_path / "a.jsonl", ROWS)
    said, _ = refused(file, tmp_path / "out", eval_fraction=1.0, min_eval_prompts=len(ROWS) + 1)
    assert f"evaluate.min_prompts = {len(ROWS) + 1}: {file}: {len(ROWS)} of {len(ROWS)} prompts are held out" in said
    assert checked(file, tmp_path / "out2", eval_fraction=1.0, min_eval_prompts=len(ROWS)).kept == len(ROWS)


def test_too_few_prompts_may_be_a_warning_but_none_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path / "a.jsonl", ROWS)
    asked: dict[str, Any] = {"min_eval_prompts": len(ROWS) + 1, "few_prompts": "warn"}
    assert checked(file, tmp_path / "out", eval_fraction=1.0, **asked).kept == len(ROWS)
    assert f"{len(ROWS)} of {len(ROWS)} prompts are held out, {len(ROWS) + 1} are asked for" in caplog.text
    said, _ = refused(file, tmp_path / "out2", eval_fraction=0.0, **asked)
    assert f"0 of {len(ROWS)} prompts are held out, too few to evaluate on" in said


def test_leaks_into_evaluation(tmp_path: Path) -> None:
    """Rows to train on whose prompts are asked in the evaluation are put aside, also when they only look alike."""
    asked = write(tmp_path / "e.jsonl", [{"prompt": "Question 3?"}, {"prompt": "something else"}])
    checked(asked, tmp_path / "asked", "prompt", eval_fraction=1)
    rows = write(tmp_path / "a.jsonl", ROWS)
    report = checked(rows, tmp_path / "out", eval_fraction=0, gold_fraction=0.5, evaluation=tmp_path / "asked")
    assert report.reasons == {"leaks_into_evaluation": 1}
    assert [entry["row"] for entry in quarantine(tmp_path / "out")] == [3]
    held = checked(rows, tmp_path / "out", eval_fraction=1, evaluation=tmp_path / "asked")
    assert held.quarantined == 0, "what is held out is not trained on"


def test_what_is_written_is_clean(tmp_path: Path) -> None:
    """Rows of every kind satisfy the model of that kind; on disk are those of the file's own."""
    rows = [{"prompt": f"p{i}", "responses": ["a", "b", "c"], "scores": [i, 1, 2]} for i in range(40)]
    checked(write(tmp_path / "a.jsonl", rows), tmp_path / "out", "ranking", gold_fraction=0.5)
    assert {file.name for file in (tmp_path / "out").rglob("*.parquet")} == {"ranking.parquet"}
    for part in ("train", "eval", "gold"):
        assert kinds(tmp_path / "out", part) == set(DERIVES["ranking"])
        for kind in DERIVES["ranking"]:
            assert problems(kind, given(tmp_path / "out", part, kind)).height == 0  # type: ignore[arg-type]


# --- with a tokenizer


@pytest.fixture(scope="module")
def codec(tinystories: Path) -> Codec:
    return Codec.load(tinystories)


def test_lengths_are_the_codecs(tmp_path: Path, codec: Codec) -> None:
    """A row passes at exactly its length, prompt and answer with its end, and not one below."""
    row = {"prompt": "Once upon a time", "response": "there was a </s> dog."}
    length = len(codec.prompt([{"role": "user", "content": row["prompt"]}])) + len(codec.answer(row["response"]))
    file = write(tmp_path / "a.jsonl", [row])
    report = checked(file, tmp_path / "out", codec=codec, max_length=length)
    assert (report.kept, report.longest) == (1, length)
    _, report = refused(file, tmp_path / "out", codec=codec, max_length=length - 1)
    assert report.checks == {"response: too_long": 1}


def test_no_label_survives(tmp_path: Path, codec: Codec) -> None:
    """A prompt that fills the whole length leaves no token to learn from; so do answers far too long to tokenize."""
    rows = [
        {"prompt": "a story " * 30, "chosen": "yes", "rejected": "no"},
        {"prompt": "a story " * 1_000_000, "chosen": "yes", "rejected": "no"},
        {"prompt": "a", "chosen": "yes " * 1_000_000, "rejected": "no"},
        {"prompt": "a", "chosen": "yes", "rejected": "no " * 40},
        {"prompt": "a", "chosen": "yes", "rejected": "no"},
    ]
    file = write(tmp_path / "a.jsonl", rows)
    report = checked(file, tmp_path / "out", "preference", codec=codec, max_length=24, max_bad=0.8)
    found = [(entry["row"], entry["column"], entry["reason"]) for entry in quarantine(tmp_path / "out")]
    assert sorted(found) == [
        (0, "prompt", "no_label_survives"),
        (1, "prompt", "no_label_survives"),
        (2, "chosen", "too_long"),
        (3, "rejected", "too_long"),
    ]
    assert report.kept == 1


def test_prompts_tokenized_together(tinystories: Path) -> None:
    """Tokenizing many prompts at once gives what tokenizing each gives: plain ones, spelled-out tokens, refusals."""
    codec = Codec.load(tinystories)
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    codec.tokenizer.chat_template = refuse + str(codec.tokenizer.chat_template)
    special = codec.tokenizer.all_special_tokens[0]
    said = ["Hello there.", f"What is {special}?", "", "Ünï\u4e2d  \n\n x", "Hello there.", special]
    chats = [[{"role": "user", "content": text}] for text in said]
    system = [{"role": "system", "content": "Be brief."}, *chats[0]]
    found = codec.prompts([*chats, system])
    assert found[:-1] == [codec.prompt(chat) for chat in chats]
    assert isinstance(found[-1], TemplateError) and str(found[-1]) == "no system"
    assert codec.prompts(chats) == found[:-1]
    assert codec.prompts([]) == []
    assert codec.answers(said) == [codec.answer(text)[:-1] for text in said]


def test_template_that_refuses(tmp_path: Path, tinystories: Path) -> None:
    """A template without system messages refuses a row that has one, not the whole file."""
    codec = Codec.load(tinystories)
    inner = codec.tokenizer.chat_template
    codec.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + str(inner)
    )
    told = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    file = write(tmp_path / "a.jsonl", [*ROWS, {"prompt": told, "response": "Hi."}])
    report = checked(file, tmp_path / "out", codec=codec)
    assert report.reasons == {"template_refuses": 1}
    assert quarantine(tmp_path / "out")[0]["value"] == "no system here"
    message, _ = refused(
        write(tmp_path / "b.jsonl", [{"prompt": told, "response": "Hi."}]), tmp_path / "b", codec=codec
    )
    assert "Fix: take out what it refuses (a system message" in message


def test_template_that_leaves_system_messages_out(tmp_path: Path, tinystories: Path) -> None:
    """The rows stay, and are counted: they say something else to the model than they do to a reader."""
    codec = Codec.load(tinystories)
    file = write(tmp_path / "a.jsonl", [*ROWS, {"prompt": "Hello", "response": "Hi.", "system": "Be kind."}])
    assert checked(file, tmp_path / "whole", codec=codec).notes == {}
    codec.tokenizer.chat_template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}\n{% endfor %}"
    report = checked(file, tmp_path / "out", codec=codec)
    assert (report.quarantined, report.notes) == (0, {"system_left_out": 1})


@pytest.mark.parametrize("before", [None, "true"])
def test_what_tokenizing_turns_off_comes_back(
    before: str | None, tmp_path: Path, tinystories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "TOKENIZERS_PARALLELISM"
    monkeypatch.setenv(name, before or "")
    if before is None:
        monkeypatch.delenv(name)
    file = write(tmp_path / "a.jsonl", [{"prompt": "Say it:", "chosen": "a dog", "rejected": "no"}])
    checked(file, tmp_path / "out", "preference", eval_fraction=0, codec=Codec.load(tinystories))
    assert gc.isenabled() and os.environ.get(name) == before


def test_merges_across_the_border_are_counted(tmp_path: Path, tinystories: Path) -> None:
    """A template that ends in a letter lets the tokenizer merge prompt and answer, and not for both answers alike."""
    codec = Codec.load(tinystories)
    codec.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %} th"
    rows = [
        {"prompt": "Say it:", "chosen": "e dog", "rejected": "? no"},
        {"prompt": "x", "chosen": "?", "rejected": "!"},
    ]
    file = write(tmp_path / "a.jsonl", rows)
    checked(file, tmp_path / "out", "preference", eval_fraction=0)
    context = Context(ValidateParams(path=str(file), kind="preference"), codec)
    frame = given(tmp_path / "out", "train", "preference")
    assert list(prompt_tokens_differ(frame, context)) == [note(0, "prompt_tokens_differ")]


# --- the real files


@pytest.mark.parametrize(
    ("name", "kind", "rows", "reasons"),
    [
        ("polite_pairs", "preference", 991, {"chosen_equals_rejected": 5}),
        ("hh_harmless_pairs", "preference", 2086, {"prompts_differ": 5, "empty": 4, "roles_out_of_order": 2}),
        ("sft_mix", "sft", 8014, {}),
        ("ranked_pandalm_human", "ranking", 147, {"empty": 2}),
        ("kto_xstest", "feedback", 1883, {"duplicate": 9}),
        ("kto_gsm8k_solutions", "feedback", 4732, {"duplicate": 6}),
        ("eval_prompts", "prompt", 154, {}),
        ("judge_pairs", "preference", 640, {}),
    ],
)
def test_real_files(shared: Path, tmp_path: Path, name: str, kind: Kind, rows: int, reasons: dict[str, int]) -> None:
    """Every file of the shared data, with what is wrong in it."""
    report = checked(shared / "data" / f"{name}.jsonl.gz", tmp_path / "out", kind)
    assert (report.rows, report.kept) == (rows, rows - sum(reasons.values()))
    assert report.reasons == reasons


def test_real_pairs_agree_with_a_plain_reading(shared: Path, tmp_path: Path) -> None:
    """HH transcripts, split by hand at their last "Assistant:", give the same answers."""
    file = shared / "data" / "hh_harmless_pairs.jsonl.gz"
    checked(file, tmp_path / "out", "preference", eval_fraction=0)
    raw = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    for row, chosen, rejected in (
        given(tmp_path / "out", "train", "preference").select("row", "chosen", "rejected").rows()
    ):
        for side, text in (("chosen", chosen), ("rejected", rejected)):
            assert raw[row][side].rpartition("\n\nAssistant:")[2].strip() == text


# --- as a program and as a stage


def test_command(tmp_path: Path) -> None:
    """One JSON object on stdout, whatever comes; exit code 0 or 65."""
    good, bad = write(tmp_path / "a.jsonl", ROWS), tmp_path / "missing.jsonl"
    for file, code in ((good, 0), (bad, 65)):
        done = start(tmp_path, path=str(file), kind="sft", out=tmp_path / "out", as_json=True)
        assert done.returncode == code, done.stderr
        said = json.loads(done.stdout)
        assert said.keys() >= {"rows", "kept", "quarantined", "reasons", "error"}
        assert (said["rows"], said["error"] is None) == ((20, True) if code == 0 else (0, False))


def test_command_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options reach the check; errors in them are JSON too."""
    file = write(tmp_path / "a.jsonl", [{"q": row["prompt"], "a": row["response"]} for row in ROWS])
    options: dict[str, Any] = {"path": str(file), "kind": "sft", "out": tmp_path / "out", "as_json": True}
    command = ValidateCommand(**options, columns={"prompt": "q", "response": "a"}, limit=5, eval_fraction=1)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["parts"]["eval"] == {"prompt": 5, "sft": 5}
    assert main(command.model_copy(update={"model": tmp_path / "none"})) == 65
    said = json.loads(capsys.readouterr().out)
    assert said["rows"] == 0 and f"model = {tmp_path / 'none'}" in said["error"]
    for wrong in ({"columns": "prompt"}, {"max_bad": 2}, {"kind": "preferences"}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            ValidateCommand.model_validate(options | wrong)


def test_start_imports_no_torch() -> None:
    """A check without a model starts fast: neither torch nor transformers nor MLflow."""
    code = (
        "import sys, stages.validate; print(sorted({'torch', 'transformers', 'mlflow', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_stage(home: Path, tmp_path: Path) -> None:
    """As a stage: the data is published, counts and tags are logged; a refusal logs its report all the same."""
    tracking.setup()
    file = write(tmp_path / "a.jsonl", [*ROWS, {"prompt": "p", "response": ""}])
    source = Artifact(uri=str(file), sha256=tracking.digest(file))
    params = ValidateParams(path=str(file), kind="sft").model_dump(mode="json")
    request = Request(stage="validate", version=STAGES["validate"].version, params=params, inputs={"source": source})
    with tracking.StageRun(request) as stage:
        metrics = run(stage)
        stage.finish(metrics)
    assert metrics["data/rows"] == 21 and metrics["data/kept"] == 20 and metrics["quarantined/empty"] == 1
    assert stage.outputs["data"].uri.endswith("/data")
    folder = tracking.fetch(stage.outputs["data"])
    assert {path.name for path in folder.iterdir()} == {"train", "eval", "quarantine.jsonl", "report.json"}
    logged = tracking.client().get_run(stage.run_id).data
    assert logged.tags["data.version"] == stage.outputs["data"].sha256[:16]
    assert logged.tags["data.sha256"] == checked(file, tmp_path / "out").sha256
    strict = request.model_copy(update={"params": params | {"max_bad": 0.0}})
    with pytest.raises(StageError), tracking.StageRun(strict) as stage:
        run(stage)
    assert tracking.client().get_run(stage.run_id).data.metrics["input/quarantined"] == 1


def test_a_moving_dataset_is_refused_as_a_stage(home: Path) -> None:
    """A branch of a Hub dataset is no input that can be keyed; the check alone may read it."""
    params = ValidateParams(path="hub:team/rows", kind="sft", revision="main").model_dump(mode="json")
    request = Request(stage="validate", version=STAGES["validate"].version, params=params)
    with pytest.raises(StageError, match="full commit"):
        run(tracking.StageRun(request))


def test_records_are_read_as_they_come(tmp_path: Path) -> None:
    """A limit reads no further than it must: what is broken behind it does not matter."""
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS * 5000).encode())
    file = tmp_path / "cut.jsonl.gz"
    file.write_bytes(packed[: len(packed) // 2])
    assert len(list(records(ValidateParams(path=str(file), kind="sft", limit=3)))) == 3


def test_the_command_says_what_came_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was read as what, what was not, split, lengths, files, and the next command with the options of this one."""
    rows = [{"question": f"q{i}", "answer": "a" * i, "id": i} for i in range(1, 41)]
    file = write(tmp_path / "two words.jsonl", rows)
    out = tmp_path / "out"
    assert main(ValidateCommand(path=str(file), kind="sft", out=out, limit=39, columns={"response": "answer"})) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{file}: 39 rows, 39 kept, 0 quarantined"
    said = dict(line.split(maxsplit=1) for line in lines[1:] if not line.startswith("read as"))
    report = Report.model_validate_json((out / "report.json").read_text())
    held, trained = report.parts["eval"]["sft"], report.parts["train"]["sft"]
    assert lines[1] == "read as   `question` as prompt" and lines[2] == "not used  id (1)"
    assert said["split"] == f"train {trained} rows of {trained} prompts, eval {held} rows of {held} prompts"
    assert said["note"].startswith(f"{held} prompts are held out: with 100 or more, models can be told apart")
    # The question `q20` and 20 letters are 23; 37 is the 0.95 * 38 = 36th after the first, and the last is 39.
    assert said["lengths"] == "median 23, 95 % at most 40, longest 42 characters; --model counts tokens"
    assert said["files"] == f"{out}: eval, train, quarantine.jsonl, report.json"
    settings = [word for word in shlex.split(said["next"]) if word.startswith("data.")]
    assert settings == [
        f'data.sft.path="{file}"',
        "data.sft.kind=sft",
        'data.sft.columns={"response": "answer"}',
        "data.sft.limit=39",
    ]
    raw: dict[str, Any] = {}
    for setting in settings:
        config_file.apply(raw, setting)
    again = ValidateParams.model_validate(raw["data"]["sft"])
    assert (again.path, again.columns) == (str(file), {"response": "answer"})


def test_other_data_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same rows may be checked again; other rows, another kind or files of somebody else need `force`."""
    out = tmp_path / "out"
    first = ValidateCommand(path=str(write(tmp_path / "a.jsonl", ROWS)), kind="sft", out=out)
    other = first.model_copy(update={"path": str(write(tmp_path / "b.jsonl", ROWS[:9]))})
    assert main(first) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    missing = first.model_copy(update={"path": str(tmp_path / "missing.jsonl")})
    for command, words in (
        (other, "made of other data"),
        (first.model_copy(update={"kind": "prompt"}), "made of other data"),
        (missing, "no such file"),
    ):
        assert main(command) == 65
        assert words in capsys.readouterr().err
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert main(first) == 0 and main(other.model_copy(update={"force": True})) == 0
    assert Report.model_validate_json((out / "report.json").read_text()).rows == 9
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("mine")
    assert main(first.model_copy(update={"out": theirs})) == 65
    assert "add --force" in capsys.readouterr().err and [path.name for path in theirs.iterdir()] == ["notes.txt"]


def test_the_command_holds_no_pandas_and_reads_data_sets_all_the_same(tmp_path: Path) -> None:
    """In a process of its own, where neither has been imported: rows of a file, then those of `datasets` by Arrow."""
    import datasets

    datasets.disable_progress_bars()
    rows = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    script = """
import sys
from pathlib import Path
from stages.commands.validate import main
from schemas.commands import ValidateCommand
folder = Path(sys.argv[1])
for path, out in ((str(folder / "pairs.jsonl"), "a"), (f"hub:{folder / 'saved'}", "b")):
    assert main(ValidateCommand(path=path, kind="preference", out=folder / out)) == 0
    print([name in sys.modules for name in ("pandas", "pyarrow")], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "[False, False]" and done.stdout.count("20 kept") == 2
