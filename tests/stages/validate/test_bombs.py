"""Small files that stand for gigabytes: each is refused where its bound is passed, and named."""

import gzip
import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.commands import ValidateCommand
from schemas.config.data import ValidateParams
from schemas.errors import StageError
from stages.commands import validate as command
from stages.validate import check, quarantine, reading
from stages.validate.context import Context
from stages.validate.quarantine import Quarantine, Rows
from stages.validate.readers import bounds, chunks, records

KIB = 1 << 10


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows up to 4 KiB; packed files unpack to 64 KiB, or to 64 times their size."""
    monkeypatch.setattr(bounds, "LINE_BYTES", 4 * KIB)
    monkeypatch.setattr(bounds, "UNPACKED_BYTES", 64 * KIB)


def rows_of(file: Path, content: "bytes | str") -> list[object]:
    content = content.encode() if isinstance(content, str) else content
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return [record.row for record in records(ValidateParams(path=str(file), kind="prompt"))]


LONG, ROW = "x" * 4 * KIB, '{"prompt": "%s"}'
SHORT = ROW % ("x" * 4000)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", f"{SHORT}\n{ROW % LONG}\n", "line 2 has"),
        ("a.jsonl.gz", f"{SHORT}\n{ROW % LONG}\n", "line 2 has"),
        ("a.json", f"[{SHORT}, {ROW % (LONG * 20)}]", "element 2 has"),
        ("b.json", " " * 70_000 + f"[{SHORT}, {ROW % (LONG * 20)}", "element 2 has"),
        ("a.csv", f"prompt\nshort\n{LONG}\n", "line 3 has"),
        ("b.csv", "prompt\nshort\n" + '"' + "x\n" * 4 * KIB + '"\n', "the row that ends after line"),
        ("c.csv", "prompt\n" + '"x","\n",' * 2000, "the row that ends after line"),
    ],
)
def test_a_row_that_is_too_long(name: str, content: str, where: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=f"{where}.* 4096 bytes, the most"):
        rows_of(tmp_path / name, content)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_a_packed_file_that_unpacks_to_too_much(name: str, tmp_path: Path) -> None:
    row = {"a.jsonl.gz": f"{SHORT}\n", "a.json.gz": f"{SHORT},\n", "a.csv.gz": f"{'x' * 4000}\n"}[name]
    begin, end = ("[", SHORT + "]") if ".json." in name else ("prompt\n" if "csv" in name else "", "")
    assert len(rows_of(tmp_path / name, begin + row * 12 + end)) in (12, 13)  # 48,000 bytes are few
    with pytest.raises(StageError, match=r"goes beyond 64 KiB|goes beyond 65536 bytes unpacked"):
        rows_of(tmp_path / name, begin + row * 100 + end)


@pytest.mark.usefixtures("small")
def test_a_large_file_may_unpack_to_more(tmp_path: Path) -> None:
    """What does not pack well is no bomb, whatever its size."""
    noise = [bytes(line).hex() for line in np.random.default_rng(0).integers(0, 256, (200, 1000), np.uint8)]
    assert len(rows_of(tmp_path / "a.jsonl.gz", "".join(ROW % text + "\n" for text in noise))) == 200


def parquet(file: Path, table: pa.Table, **options: object) -> Path:
    pq.write_table(table, file, compression="zstd", store_schema=False, write_statistics=False, **options)  # type: ignore[arg-type]
    return file


def repeated(text: str, times: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, np.int32)), pa.array([text]))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("column", "where"),
    [
        (repeated("x" * 1000, 200), "what row group 1 holds"),
        (pa.ListArray.from_arrays(pa.array(range(0, 201)), repeated("x" * 1000, 200)), "what row group 1 holds"),
        (pa.array(["x" * 1000] * 200), "what row group 1 announces"),
        (pa.nulls(20_000, pa.int64()), "what row group 1 announces"),
        (repeated("x" * 5000, 3), "row 0 has more"),
    ],
)
def test_a_parquet_bomb(column: pa.Array, where: str, tmp_path: Path) -> None:
    plain = {"use_dictionary": False} if column.type == pa.string() else {}
    file = parquet(tmp_path / "a.parquet", pa.table({"prompt": column}), **plain)
    with pytest.raises(StageError, match=where):
        list(records(ValidateParams(path=str(file), kind="prompt")))


def test_parquet_by_row_groups(tmp_path: Path) -> None:
    """All rows once and in order, whatever the groups."""
    rows = [{"prompt": f"p{i}", "tags": [str(i)] * (i % 3)} for i in range(1000)]
    for size in (1, 7, 1000, 5000):
        pl.DataFrame(rows).write_parquet(tmp_path / "a.parquet", row_group_size=size)
        read = list(records(ValidateParams(path=str(tmp_path / "a.parquet"), kind="prompt")))
        assert [record.row for record in read] == rows


@pytest.mark.parametrize("text", ["[]", "[1]", ' [ {"a": 1} ,\n{"b": [1, {}]}, "x" , 12345, null]\n', "\ufeff[true]"])
def test_a_json_array_is_read_as_json_reads_it(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = json.loads(text.lstrip("\ufeff"))
    assert rows_of(tmp_path / "a.json", text) == [row if isinstance(row, dict) else None for row in expected]


def test_a_json_array_across_the_pieces_that_are_read(tmp_path: Path) -> None:
    expected = [{"prompt": "é" * n, "n": n} for n in range(0, 3000, 7)]
    text = json.dumps(expected, ensure_ascii=False, indent=1)
    assert len(text.encode()) > 4 << 16 and rows_of(tmp_path / "a.json", text) == expected


@pytest.mark.parametrize(
    "text", ["[", "[1", "[1,", "[1,]", "[1 2]", "[1]x", "[1]]", "[nope]", '["a', "[\xff]", "[" * 9999]
)
def test_a_broken_json_array(text: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"the file is not (JSON|UTF-8)"):
        rows_of(tmp_path / "a.json", text.encode("latin-1"))


def test_very_many_columns(tmp_path: Path) -> None:
    names = ",".join(map(str, range(bounds.COLUMNS + 1)))
    with pytest.raises(StageError, match="10001 cells; 10000 are allowed"):
        rows_of(tmp_path / "a.csv", f"{names}\n{names}\n")


def test_the_quarantine_lists_the_first_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(quarantine, "LISTED", 10)
    (tmp_path / "a.jsonl").write_text('{"prompt": "good"}\n' + "1\n" * 25)
    asked = ValidateCommand(path=str(tmp_path / "a.jsonl"), kind="prompt", out=tmp_path / "out")
    assert command.main(asked) == 65
    *listed, last = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    assert [entry["row"] for entry in listed] == list(range(1, 11))
    assert last["reason"] == "left_out" and last["value"].startswith("15 more entries")  # 25 bad rows, 10 listed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["rows"], report["quarantined"], report["kept"]) == (26, 25, 1)
    assert "(the first 10 entries)" in capsys.readouterr().err


def test_rows_that_are_bad() -> None:
    bad = Rows()
    for row in (5, 0, 5, 100_000):
        bad.add(row)
    assert len(bad) == 3
    assert bad.of(pl.Series([0, 1, 5, 100_000, 999_999])).to_list() == [True, False, True, True, False]
    assert Rows().of(pl.Series([1])).to_list() == [False]


def test_a_value_is_cut_before_it_is_written(tmp_path: Path) -> None:
    for value in ({"a": [1, "x" * 300]}, [1, 2], None, 1.5, {"é": True}, "x" * 300):
        expected = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        assert quarantine._cut(value) == expected[:200]


def test_a_file_of_another_kind_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_HOPELESS", 50)
    monkeypatch.setattr("stages.validate.readers.json_lines._ROWS", 10)
    (tmp_path / "a.jsonl").write_text("1\n" * 500)
    context = Context(ValidateParams(path=str(tmp_path / "a.jsonl"), kind="prompt"))
    with pytest.raises(StageError, match="50 of 50 rows"):
        check(context, tmp_path / "out")


def test_long_rows_are_taken_in_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.validate.readers._ROW_BYTES", 100)
    monkeypatch.setattr(bounds, "BLOCK_BYTES", 100)
    lines = [f'{{"prompt": "{i} {"x" * 80}"}}' for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.json").write_text(f"[{', '.join(lines)}]")
    for name in ("a.jsonl", "a.json"):
        params = ValidateParams(path=str(tmp_path / name), kind="prompt")
        assert len(list(chunks(params))) >= 3
        with closing(Quarantine(tmp_path / "quarantine.jsonl")) as sink:
            assert reading.read(Context(params), sink)["row"].to_list() == [0, 1, 2, 3, 4]


def test_out_of_memory_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("stages.validate.read", no_room)
    with pytest.raises(StageError, match="memory ran out after 0 rows"):
        check(Context(ValidateParams(path="a.jsonl", kind="prompt")), tmp_path / "out")


UNDER = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
from contextlib import closing
from pathlib import Path
from schemas.commands import ValidateCommand
from stages.commands import validate
for file in sys.argv[1:]:
    code = validate.main(ValidateCommand(path=file, kind="prompt", out=Path(file + ".out")))
    print(Path(file).name, code, flush=True)
"""


@pytest.mark.slow
def test_real_bombs_under_six_gigabytes(tmp_path: Path) -> None:
    """Of 3 and 4 GB: none is unpacked as a whole."""
    million = gzip.compress(b"x" * (1 << 20))
    for name, begin in (("line.jsonl.gz", b'{"prompt": "'), ("array.json.gz", b'["'), ("cell.csv.gz", b'prompt\n"')):
        (tmp_path / name).write_bytes(gzip.compress(begin) + million * 3000)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b"1\n" * (1 << 20)) * 1000)
    (tmp_path / "nested.json").write_text("[" + "[[]," * (1 << 20))
    parquet(tmp_path / "texts.parquet", pa.table({"prompt": repeated("x" * 1_000_000, 4000)}))
    files = sorted(path for path in tmp_path.iterdir() if path.is_file())
    command = [sys.executable, "-c", UNDER, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert [line for line in done.stdout.splitlines() if line.endswith(" 65")] == [f"{f.name} 65" for f in files], done
    assert done.returncode == 0 and "Traceback" not in done.stderr
