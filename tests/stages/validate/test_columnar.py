"""Plain rows are read as columns: what comes of a file is the same, byte for byte, as when each is read by itself."""

import csv
import hashlib
import json
import random
from pathlib import Path
from typing import Any, get_args

import polars as pl
import pytest

from schemas.config.data import Kind, ValidateParams
from schemas.errors import StageError
from stages.validate import check, readers, reading
from stages.validate.context import Context
from stages.validate.forms.columnar import take
from stages.validate.readers import bounds, json_lines

TEXTS = [
    *["Which way?", "a", "  spaced out  ", "tab\there", 'a "quoted" word', "back\\slash", "new\nline", "\\n", "\\\\"],
    *["é", "数", "\U0001f600 grin", "\u200bunseen", "\u202eturned", "A\u0301", "\x7f", "\x1f", "nul\0", "", " ", "\n"],
    *["\n\nHuman: hi\n\nAssistant: yes", "Human: hi\n\nAssistant: yes", "human: no", "User: a", "### Instruction:\nx"],
    *["<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>", "yes<|im_end|>", "yes</s> \n", "<s>"],
    *["[INST] hi [/INST] yes", "<start_of_turn>user\nhi<end_of_turn>", "\x1c<|im_start|>user\nhi", "A chat between a"],
    *['[{"role": "user", "content": "q"}]', "[{'role': 'user', 'content': 'q'}]", '{"role": "user"}', "[1]", "{"],
    *["array([{'role': 'user'}])", "x" * 20_000, "Straße", "İstanbul", "ﬁ", "2+2", "2-2", "NaN", "null", "1e5", "0"],
]
VALUES = [None, 7, 1.5, -0.0, True, False, [], {}, ["a"], {"b": 1}, float("nan"), float("inf"), 10**400, 1e300]
RAW = [
    *["\\u0041", "\\ud83d\\ude00", "\\ud83d", "\\ude00", "\\ud83d\\u0041", "\\u0000", "\\/", "\\b\\f\\r\\t", "\\x"],
    *["\\", "\t", "\x0b", "\u2028", "\\uD83D\\uDE00", "\\u00e9", "\\u000", "\\\\u0041", "\\\\\\u0041"],
]
COLUMNS: dict[str, list[str]] = {
    "preference": ["prompt", "chosen", "rejected"],
    "sft": ["prompt", "response"],
    "feedback": ["prompt", "completion", "label"],
    "prompt": ["prompt"],
    "ranking": ["prompt", "responses", "order"],
}
LABELS = [True, False, 1, 0, 1.0, "up", "Thumbs down", "true", "", " ", None, "perhaps", "é"]


def line(draw: random.Random, kind: str, number: int, extra: list[str]) -> bytes:
    """One line; most are plain, some are odd in one place, and some are no rows."""

    def some_text() -> Any:
        return draw.choice(TEXTS) if draw.random() < 0.2 else f"{draw.choice(['Say', 'say', 'Tell'])} {number % 97}."

    row: dict[str, Any] = {}
    for name in COLUMNS[kind]:
        row[name] = draw.choice(VALUES) if draw.random() < 0.01 else some_text()
    if kind == "feedback":
        row["label"] = draw.choice(LABELS if draw.random() < 0.05 else [True, False])
    if kind == "ranking":
        row |= {"responses": [some_text(), some_text()], "order": draw.choice([[0, 1], [1, 0]])}
    for name in extra:
        row[name] = draw.choice([None, "", number, "from here", 1.25, True])
    chance = draw.random()
    if chance < 0.02:
        row = dict(sorted(row.items(), reverse=True))
    elif chance < 0.03:
        row["margin"] = draw.choice([1, 0.5, -1, None, "2", 1e400])
    elif chance < 0.04:
        row["system"] = draw.choice(["Be brief.", ""])
    elif chance < 0.05:
        del row[draw.choice(list(row))]
    separators = draw.choice([None, (",", ":"), (" , ", " :\t")])
    text = json.dumps(row, ensure_ascii=draw.random() < 0.5, separators=separators)
    if draw.random() < 0.02:
        text = text.replace("Say", draw.choice(RAW)).replace("Tell", draw.choice(RAW))
    if draw.random() < 0.01:
        twice = text[:-1] + ', "prompt": "p"}'
        text = draw.choice(["", "  ", "{", "[1]", "null", text[:-1], text + ",", f" {text}\r", twice])
    encoded = text.encode(errors="surrogatepass")
    return encoded[:-4] + b"\xff" + encoded[-4:] if draw.random() < 0.002 else encoded


def outcome(file: Path, kind: Any, out: Path, **more: Any) -> dict[str, Any]:
    """Everything that comes of a check: the files' bytes, tables as rows, and the error."""
    error = None
    try:
        check(Context(ValidateParams(path=str(file), kind=kind, **{"max_bad": 1, **more})), out)
    except StageError as refused:
        error = str(refused)
    texts = {name: (out / name).read_text() for name in ("quarantine.jsonl", "report.json")}
    tables = {str(table.relative_to(out)): pl.read_parquet(table).rows() for table in sorted(out.glob("*/*.parquet"))}
    return {"error": error, **texts, **tables}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were taken as columns, chunk after chunk; chunks of 200 lines, so that there are many."""
    counts: list[int] = []

    def counted(*arguments: Any) -> Any:
        taken = take(*arguments)
        counts.append(0 if taken is None else taken[0].height)
        return taken

    monkeypatch.setattr(reading, "take", counted)
    monkeypatch.setattr(json_lines, "_ROWS", 200)
    return counts


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("extra", [[], ["source", "id"], ["input"], ["tools", "a"]])
@pytest.mark.parametrize("seed", [0, 1])
def test_hostile_rows_give_the_same(
    tmp_path: Path, kind: str, extra: list[str], seed: int, plain: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(f"{kind} {extra} {seed}")
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"".join(line(draw, kind, number, extra) + b"\n" for number in range(1500)))
    fast = outcome(file, kind, tmp_path / "out")
    if kind != "ranking" and extra in ([], ["source", "id"]):
        assert sum(plain) > 600
    monkeypatch.setattr(reading, "take", lambda *_: None)
    assert outcome(file, kind, tmp_path / "out") == fast


@pytest.mark.parametrize("columns", [{"prompt": "question", "response": "answer"}, {"response": "prompt"}, {}])
def test_mapped_and_usual_columns_give_the_same(
    tmp_path: Path, plain: list[int], monkeypatch: pytest.MonkeyPatch, columns: dict[str, str]
) -> None:
    """Also where the file has a column of ours that another one is mapped over."""
    rows = [{"question": f"Why {i}?", "answer": f"So {i}.", "prompt": "x", "notes": "n"} for i in range(600)]
    rows += [{"question": f"Why {i}?", "answer": f"Because {i}."} for i in range(600)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fast = outcome(file, "sft", tmp_path / "out", columns=columns)
    assert bool(sum(plain)) == (columns != {"response": "prompt"})
    monkeypatch.setattr(reading, "take", lambda *_: None)
    assert outcome(file, "sft", tmp_path / "out", columns=columns) == fast


@pytest.mark.parametrize("kind", ["preference", "sft", "feedback", "prompt"])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_other_files_give_the_same(
    tmp_path: Path, kind: str, suffix: str, plain: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CSV and Parquet of texts, numbers and words; missing values, texts of every sort, a broken row of CSV."""
    draw = random.Random(f"{kind} {suffix}")
    rows = []
    for number in range(1500):
        row: dict[str, Any] = {name: f"Say {number % 97}." for name in COLUMNS[kind]}
        for name in row:
            if draw.random() < 0.1:
                row[name] = draw.choice([text for text in TEXTS if "\0" not in text or suffix == "parquet"])
        rows.append(row | {"label": "up", "id": number} if kind == "feedback" else row | {"id": number})
    file = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        prompts = [draw.choice([None, *[row["prompt"]] * 50]) for row in rows]
        pl.DataFrame(rows).with_columns(prompt=pl.Series(prompts, dtype=pl.String)).write_parquet(file)
    else:
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows[:1400])
            stream.write("few,cells\n")
            writer.writerows(rows[1400:])
    monkeypatch.setattr(readers, "_ROWS", 200)
    monkeypatch.setattr(readers, "_CHUNK", 200)
    fast = outcome(file, kind, tmp_path / "out")
    assert sum(plain) > 600 and json.loads(fast["report.json"])["rows"] == 1500 + (suffix == "csv")
    monkeypatch.setattr(reading, "take", lambda *_: None)
    assert outcome(file, kind, tmp_path / "out") == fast
    monkeypatch.setattr(readers, "_as_lines", lambda chunk: chunk)
    monkeypatch.setattr(readers, "_SCALARS", ())
    by_row = outcome(file, kind, tmp_path / "out")
    if suffix == "parquet":  # whose digest is that of other bytes
        for outcomes in (fast, by_row):
            outcomes["report.json"] = {**json.loads(outcomes["report.json"]), "sha256": ""}
    assert by_row == fast


def test_rows_that_are_alike_are_all_plain(tmp_path: Path, plain: list[int]) -> None:
    """Line feeds, quotes and letters of any language; a column that is not read, once it has had an example."""
    rows = [{"prompt": f'Line {i}\n"é" 数', "chosen": "a\tb", "rejected": "\U0001f600", "id": i} for i in range(1000)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = outcome(file, "preference", tmp_path / "out", eval_fraction=0)
    assert plain[0] == 0 and sum(plain) == 800
    prompts = [row[1][0]["content"] for row in result["train/preference.parquet"]]
    assert prompts == [row["prompt"] for row in rows]


ENDS = [b"\n", b"\r\n", b" \n\t", b"\n\n", b"\r\n \r\n"]
"""Of these five two make a blank line."""


@pytest.mark.parametrize(("ends", "blank"), [(ENDS, 2), ([b"\r\n"], 0), ([b"\n "], 0)], ids=["all", "behind", "before"])
@pytest.mark.parametrize("block", [300, 1 << 20])
def test_space_between_rows_changes_their_numbers_alone(
    tmp_path: Path, plain: list[int], monkeypatch: pytest.MonkeyPatch, block: int, ends: list[bytes], blank: int
) -> None:
    """A mark before the first, blank lines, space around them, Windows line ends, no end to the last; in blocks."""
    monkeypatch.setattr(bounds, "BLOCK_BYTES", block)
    lines = [json.dumps({"prompt": f"Say {i}", "chosen": "a", "rejected": "b"}).encode() for i in range(900)]
    lines[700:702] = [b"{no row}", b"[]"]
    lines[850] = lines[850].replace(b"Say", b"\xff")
    tidy, loose = tmp_path / "tidy.jsonl", tmp_path / "loose.jsonl"
    tidy.write_bytes(b"".join(line + b"\n" for line in lines))
    spread = b"".join(line + ends[place % len(ends)] for place, line in enumerate(lines))
    loose.write_bytes(b"\xef\xbb\xbf" + spread.rstrip())
    one, two = (outcome(file, "preference", tmp_path / "out", eval_fraction=0.1) for file in (tidy, loose))
    report = json.loads(one["report.json"])
    assert report["sha256"] == hashlib.sha256(b"".join(line + b"\n" for line in lines)).hexdigest()
    assert report["rows"] == 900 and report["quarantined"] == 3 and sum(plain) > 1600
    listed = [result.pop("quarantine.jsonl").splitlines() for result in (one, two)]
    numbers = [[json.loads(entry)["line"] for entry in entries] for entries in listed]
    assert numbers == [[701, 702, 851], [701 + blank * 140, 702 + blank * 140, 851 + blank * 170]]
    assert one == two
