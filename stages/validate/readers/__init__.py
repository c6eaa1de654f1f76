"""Reads rows, one after the other, from files, Hugging Face datasets, the demo, or the stage before. Judges no content.

A line that is not a row is handed on as broken, with its reason; a file that cannot be read at all ends the stage.
"""

import csv
import difflib
import gzip
import io
import itertools
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import polars as pl

from schemas.config import ValidateParams
from schemas.errors import refuse
from schemas.source import Demo, File, Generated, Hub, data_source, is_commit
from schemas.text import listed
from stages.validate.readers import bounds
from stages.validate.readers.json_array import Array

Row = dict[str, Any]
_FORMATS = ".jsonl, .jsonl.gz, .json, .parquet or .csv"
_CHUNK = 10_000


class Record(NamedTuple):
    """One row as it was read."""

    row: Row | None
    """None when it is broken."""
    raw: bytes
    """What the content digest takes in: the line, or the row as JSON."""
    reason: str = ""
    """Why it is broken."""
    line: int | None = None
    """Line in the file, from 1."""


def records(params: ValidateParams, rows: Path | None = None, seed: int = 0) -> Iterator[Record]:
    """The rows that `params.path` names, up to `params.limit`. Raises StageError when the source cannot be read.

    `rows`: folder of stage `generate`, for `input:rows`. `seed` is the demo's.
    """
    return itertools.islice(_open(params, rows, seed), params.limit)


def _open(params: ValidateParams, rows: Path | None, seed: int) -> Iterator[Record]:
    match data_source(params.path):
        case Demo(kind):
            return _from_demo(kind, seed)
        case Hub(name):
            return _from_hub(params, name)
        case File(file):
            return _from_file(file)
        case Generated() if rows is not None:
            return _from_file(rows / "rows.jsonl")
        case _:
            message = "the stage has no input `rows` to read"
            fix = "use input:rows after stage `generate` only; elsewhere name a file"
            raise refuse("path", params.path, message, fix, kind="missing_input")


def refuse_moving(params: ValidateParams) -> None:
    """Raise StageError where `params.path` is a Hub dataset that no commit holds still."""
    source = data_source(params.path)
    moves = isinstance(source, Hub) and not Path(source.name).expanduser().exists()
    if moves and not is_commit(params.revision):
        message = f"{params.path} changes with time: a branch or tag moves"
        fix = "set it to the full commit that you want, so that the same config means the same rows"
        raise refuse("revision", params.revision, message, fix, kind="no_revision")


def _from_file(file: Path) -> Iterator[Record]:
    _refuse_missing(file)
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind in (".jsonl", ".ndjson"):
        return _from_jsonl(file)
    if kind == ".json":
        return _from_json(file)
    if kind == ".csv":
        return _from_csv(file)
    if kind in (".parquet", ".pq"):
        return _from_parquet(file)
    message = f"the format {kind or 'of a file without suffix'} is not known"
    fix = f"give a file that ends in {_FORMATS}"
    raise refuse("path", file, message, fix, kind="unknown_format")


def _refuse_missing(file: Path) -> None:
    if file.is_file():
        return
    if file.is_dir():
        message = "this is a folder, not a file"
        fix = f"name a file in it ({_FORMATS}), or write hub:{file} for a folder that `datasets` can load"
        raise refuse("path", file, message, fix, kind="not_a_file")
    beside = [path.name for path in file.parent.iterdir()] if file.parent.is_dir() else []
    near = difflib.get_close_matches(file.name, beside, n=1)
    raise refuse(
        "path",
        file,
        "there is no such file" if file.parent.is_dir() else f"there is no folder {file.parent}",
        f"did you mean {file.parent / near[0]}?" if near else "check the path; it counts from where you started",
        kind="missing_file",
    )


@contextmanager
def _bytes_of(file: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked. Errors of reading, also those met later on, name the file."""
    try:
        with file.open("rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            if packed:
                with gzip.open(plain) as unpacked:
                    yield unpacked  # type: ignore[misc]
            elif file.suffix.lower() == ".gz" and file.stat().st_size:
                raise gzip.BadGzipFile("it does not begin like one")
            else:
                yield plain
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        message = f"the gzip file is broken or cut short: {error}"
        fix = "fetch or pack it again; `gzip -t` tells whether it is whole"
        raise refuse("path", file, message, fix, kind="broken_file") from error
    except OSError as error:
        raise refuse("path", file, f"the file cannot be read: {error}", None, kind="unreadable_file") from error


def _from_jsonl(file: Path) -> Iterator[Record]:
    with _bytes_of(file) as stream:
        for number, line in enumerate(bounds.lines(stream, file, stream), 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            line = line.strip(b" \t\r\n")
            if line:
                yield _parse_line(line, number)


def _parse_line(line: bytes, number: int) -> Record:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return Record(None, line, "not_unicode", number)
    except (ValueError, RecursionError):  # RecursionError: thousands of nested brackets
        return Record(None, line, "malformed_json", number)
    if not isinstance(row, dict):
        return Record(None, line, "not_an_object", number)
    return Record(row, line, "", number)


def _from_json(file: Path) -> Iterator[Record]:
    """One JSON array of rows; anything else is taken as JSON lines."""
    with _bytes_of(file) as stream:
        begins = b""
        while not begins and (piece := stream.read(1 << 16)):
            begins = piece.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not begins.startswith(b"["):
        yield from _from_jsonl(file)
        return
    with _bytes_of(file) as stream:
        for row in Array(file, stream).elements():
            known = isinstance(row, dict)
            yield Record(row if known else None, _digestible(row), "" if known else "not_an_object")


def _from_csv(file: Path) -> Iterator[Record]:
    """Cells stay text: what they mean depends on the kind of data. Bytes that are not UTF-8 become lone surrogates."""
    csv.field_size_limit(bounds.LINE_BYTES)
    with _bytes_of(file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        of_row = 0

        def counted() -> Iterator[str]:  # a cell in quotes goes on over lines, and a row over cells
            nonlocal of_row
            for line in bounds.lines(text, file, stream):
                of_row += len(line)
                if of_row > bounds.LINE_BYTES:
                    raise bounds.refuse_long(file, f"the row that ends after line {reader.line_num}")
                yield line

        reader = csv.reader(counted(), strict=True)
        try:
            header: list[str] = []
            for number, cells in enumerate(reader):
                of_row = 0
                if len(cells) > bounds.COLUMNS:
                    message = f"the row at line {reader.line_num} has {len(cells)} cells; {bounds.COLUMNS} are allowed"
                    raise refuse("path", file, message, "leave out the columns that no kind reads", kind="too_large")
                if number == 0:
                    header = cells
                    _refuse_repeated(header, file)
                elif cells:
                    yield _csv_record(header, cells, reader.line_num)
        except csv.Error as error:
            message = f"the CSV is malformed at line {reader.line_num}: {error}"
            fix = 'quote cells that hold commas, quotes or line breaks, and write a quote inside as ""'
            raise refuse("path", file, message, fix, kind="broken_file") from error


def _refuse_repeated(header: list[str], file: Path) -> None:
    repeated = sorted(name for name, times in Counter(header).items() if times > 1)
    if repeated:
        message = f"the CSV's header names {listed(repeated)} more than once"
        fix = "give every column a name of its own"
        raise refuse("path", file, message, fix, kind="broken_file")


def _csv_record(header: list[str], cells: list[str], line: int) -> Record:
    raw = _digestible(cells)
    if len(cells) != len(header):
        return Record(None, raw, "wrong_number_of_cells", line)
    return Record(dict(zip(header, cells, strict=True)), raw, "", line)


def _from_parquet(file: Path) -> Iterator[Record]:
    """Row group by row group. A few bytes may stand for gigabytes: in a dictionary, in runs, or packed."""
    import pyarrow.parquet as pq  # takes a moment, and only this source needs it

    begin, most, unpacked = 0, bounds.most_unpacked(file), 0
    try:
        with pq.ParquetFile(file) as parquet:
            announced = parquet.metadata
            groups = [announced.row_group(place) for place in range(announced.num_row_groups)]
            if announced.num_columns > bounds.COLUMNS:
                message = f"the file has {announced.num_columns} columns; {bounds.COLUMNS} are allowed"
                raise refuse("path", file, message, "leave out those that no kind reads", kind="too_large")
        for place, group in enumerate(groups, 1):
            columns = [group.column(number) for number in range(group.num_columns)]
            announced_bytes = sum(max(column.total_uncompressed_size, 8 * column.num_values) for column in columns)
            if unpacked + announced_bytes > most:
                raise bounds.refuse_unpacked(file, f"what row group {place} announces")
            frame = pl.scan_parquet(file, glob=False).slice(begin, group.num_rows).collect()
            unpacked += frame.estimated_size()  # with what a dictionary stands for, which the file does not announce
            if unpacked > most:
                raise bounds.refuse_unpacked(file, f"what row group {place} holds")
            yield from _from_frame(frame, file, begin)
            begin += group.num_rows
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
        message = f"the Parquet file cannot be read: {error}"
        fix = "write it again; a Parquet file has its table of contents at its end, so a cut copy is unreadable"
        raise refuse("path", file, message, fix, kind="broken_file") from error


def _from_frame(frame: pl.DataFrame, file: object, begin: int) -> Iterator[Record]:
    """The rows of a frame, in which the first is row `begin` of the file."""
    for part in frame.iter_slices(_CHUNK):
        for piece in _small(part):
            if piece.height == 1 and piece.estimated_size() > bounds.LINE_BYTES:
                raise bounds.refuse_long(Path(str(file)), f"row {begin}")
            for row in piece.iter_rows(named=True):
                begin += 1
                yield Record(row, _digestible(row))


def _small(frame: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """The frame in parts that take no more memory than a long row, once they are Python's."""
    if frame.height < 2 or frame.estimated_size() <= bounds.LINE_BYTES:
        yield frame
    else:
        half = frame.height // 2
        yield from _small(frame.head(half))
        yield from _small(frame.slice(half))


def _from_hub(params: ValidateParams, name: str) -> Iterator[Record]:
    """Rows of a Hugging Face dataset: from the Hub, its local cache, or a folder; `datasets` finds out which."""
    import datasets  # takes a second, and only this source needs it
    from datasets.exceptions import DatasetsError

    where = Path(name).expanduser()
    try:
        if (where / "dataset_dict.json").is_file() or (where / "state.json").is_file():
            table = datasets.load_from_disk(str(where))
            table = table[params.split] if isinstance(table, datasets.DatasetDict) else table
        else:
            files = datasets.load_dataset_builder(name, params.subset, revision=params.revision).config.data_files
            _refuse_strays(params, where, [str(file) for part in (files or {}).values() for file in part])
            table = datasets.load_dataset(name, params.subset, split=params.split, revision=params.revision)
    except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:  # RuntimeError: it has a script
        message = f"the dataset cannot be loaded: {error}"
        fix = "check name, subset, split and revision; offline it has to be in the cache of `datasets`"
        raise refuse("path", params.path, message, fix, kind="missing_dataset") from error
    _refuse_other_commit(params, {part for file in table.cache_files for part in Path(file["filename"]).parts})
    for place, part in enumerate(table.with_format("arrow").iter(_CHUNK)):
        frame = pl.from_arrow(part)
        assert isinstance(frame, pl.DataFrame)
        yield from _from_frame(frame, params.path, place * _CHUNK)


def _refuse_strays(params: ValidateParams, where: Path, files: list[str]) -> None:
    """A data set's README may name any file of the disk as its own."""
    inside = os.path.normpath(where.absolute()) if where.is_dir() else "hf://datasets"
    stray = next(
        (file for file in files if not os.path.normpath(file).startswith(os.path.normpath(inside) + "/")), None
    )
    if stray is not None:
        message = f"the dataset's README takes rows from {stray}, which is not part of it"
        fix = "put the file into the dataset's folder, and name it in its README from there"
        raise refuse("path", params.path, message, fix, kind="stray_file")


def _refuse_other_commit(params: ValidateParams, parts: set[str]) -> None:
    """Offline, `datasets` takes the newest commit in its cache, whatever was asked for. Its folder bears its name."""
    if is_commit(params.revision) and params.revision not in parts:
        message = "the cache of `datasets` holds the dataset at another commit only"
        fix = "go online to fetch this commit, or name the one that is cached"
        raise refuse("revision", params.revision, message, fix, kind="other_revision")


def _from_demo(kind: str, seed: int) -> Iterator[Record]:
    from stages.engine import demo  # brings the tokenizer library with it

    for row in demo.rows(kind, seed):
        yield Record(dict(row), _digestible(row))


def _digestible(value: object) -> bytes:
    """JSON with sorted keys; ASCII, so that lone surrogates pass."""
    return json.dumps(value, sort_keys=True, default=str).encode()
