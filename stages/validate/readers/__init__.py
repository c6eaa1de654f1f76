"""Reads rows, one after the other, from files, Hugging Face datasets, the demo, or the stage before. Judges no content.

A line that is not a row is handed on as broken, with its reason; a file that cannot be read at all ends the stage.
"""

import difflib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from schemas.config.data import ValidateParams
from schemas.errors import StageError, refuse
from schemas.source import HOW_TO_PIN, Demo, File, Generated, Hub, Remote, data_source, is_commit
from stages.validate.readers import bounds
from stages.validate.readers.csv_file import from_csv
from stages.validate.readers.files import Record, bytes_of, digestible, text_of
from stages.validate.readers.json_array import Array
from stages.validate.readers.json_lines import Lines, lines_of
from stages.validate.readers.json_rows import other_orientation
from stages.validate.readers.remote import fetched, of_the_address, refuse_other_digest

_FORMATS = ".jsonl, .jsonl.gz, .json, .parquet or .csv"
_CHUNK = 10_000
_ROWS, _ROW_BYTES = 20_000, 32 << 20


Chunk = Lines | list[Record]
"""Rows that follow each other in a source."""


def chunks(params: ValidateParams, rows: Path | None = None, seed: int = 0) -> Iterator[Chunk]:
    """The rows that `params.path` names, up to `params.limit`. Raises StageError when the source cannot be read.

    `rows`: folder of stage `generate`, for `input:rows`. `seed` is the demo's.
    """
    left = params.limit
    for chunk in _open(params, rows, seed):
        size = len(chunk.lines) if isinstance(chunk, Lines) else len(chunk)
        if left is not None and size >= left:
            yield chunk.part(0, left) if isinstance(chunk, Lines) else chunk[:left]
            return
        yield chunk
        left = None if left is None else left - size


def records(params: ValidateParams, rows: Path | None = None, seed: int = 0) -> Iterator[Record]:
    """The same, one row after the other."""
    for chunk in chunks(params, rows, seed):
        yield from chunk.records() if isinstance(chunk, Lines) else chunk


def _open(params: ValidateParams, rows: Path | None, seed: int) -> Iterator[Chunk]:
    source = data_source(params.path)
    if params.sha256 is not None and not isinstance(source, File | Remote):
        message = f"{params.path} is not a file, so that it has no digest"
        fix = "leave it out; a data set of the Hub is pinned by its revision"
        raise refuse("sha256", params.sha256, message, fix, kind="no_file")
    match source:
        case Demo(kind):
            return _in_chunks(_from_demo(kind, seed), params.limit)
        case Hub(name):
            return _from_hub(params, name)
        case File(file):
            if params.sha256 is not None:
                _refuse_other_digest(file, params.sha256)
            return _from_file(file, params.limit)
        case Remote() as remote:
            return _from_remote(remote, params)
        case Generated() if rows is not None:
            return _from_file(rows / "rows.jsonl", params.limit)
        case _:
            message = "the stage has no input `rows` to read"
            fix = "use input:rows after stage `generate` only; elsewhere name a file"
            raise refuse("path", params.path, message, fix, kind="missing_input")


def _in_chunks(rows: Iterator[Record], limit: int | None) -> Iterator[list[Record]]:
    """Of short rows their number bounds a chunk, of long ones their size. No more rows are read than the limit."""
    chunk: list[Record] = []
    size = 0
    for record in itertools.islice(rows, limit):
        chunk.append(record)
        size += len(record.raw)
        if len(chunk) == _ROWS or size > _ROW_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def refuse_moving(params: ValidateParams) -> None:
    """Raise StageError where nothing holds still what `params.path` names: no commit of the Hub, or no digest."""
    source = data_source(params.path)
    if isinstance(source, Remote) and params.sha256 is None:
        message = f"what stands at {params.path} may change: its digest has to be given"
        raise refuse("sha256", None, message, HOW_TO_PIN, kind="no_digest")
    moves = isinstance(source, Hub) and not Path(source.name).expanduser().exists()
    if moves and not is_commit(params.revision):
        message = f"{params.path} changes with time: a branch or tag moves"
        fix = "set it to the full commit that you want, so that the same config means the same rows"
        raise refuse("revision", params.revision, message, fix, kind="no_revision")


def _from_file(file: Path, limit: int | None) -> Iterator[Chunk]:
    _refuse_missing(file)
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind in (".jsonl", ".ndjson"):
        return lines_of(file)
    if kind == ".json":
        return _from_json(file, limit)
    if kind == ".csv":
        return map(_as_lines, _in_chunks(from_csv(file), limit))
    if kind in (".parquet", ".pq"):
        return _from_parquet(file)
    message = f"the format {kind or 'of a file without suffix'} is not known"
    fix = f"give a file that ends in {_FORMATS}"
    raise refuse("path", file, message, fix, kind="unknown_format")


def _from_remote(remote: Remote, params: ValidateParams) -> Iterator[Chunk]:
    refuse_moving(params)
    with fetched(remote, params.sha256) as file:
        try:
            yield from _from_file(file, params.limit)
        except StageError as error:
            raise of_the_address(error, remote, file) from error


def _refuse_other_digest(file: Path, sha256: str) -> None:
    _refuse_missing(file)
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise refuse("path", file, f"the file cannot be read: {error}", None, kind="unreadable_file") from error
    refuse_other_digest(file, sha256, digest)


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


def _from_json(file: Path, limit: int | None) -> Iterator[Chunk]:
    """One JSON array of rows; anything else is taken as JSON lines."""
    with bytes_of(file) as stream, text_of(stream) as text:
        begins = ""
        while not begins and (piece := text.read(1 << 16)):
            begins = piece.lstrip("\ufeff \t\r\n")
    if not begins.startswith("["):
        if error := _one_object(file):
            raise error
        yield from lines_of(file)
    else:
        yield from _in_chunks(_from_array(file), limit)


def _from_array(file: Path) -> Iterator[Record]:
    with bytes_of(file) as stream:
        array = Array(file, stream)
        for row in array.elements():
            reason = "duplicate_key" if array.repeated else ""
            reason = reason if isinstance(row, dict) else "not_an_object"
            yield Record(None if reason else row, digestible(row), reason)


def _one_object(file: Path) -> StageError | None:
    """Why the file, as one object over many lines, holds no rows; None where it is anything else, or too long."""
    with bytes_of(file) as stream, text_of(stream) as text:
        whole = text.read(bounds.LINE_BYTES)
        if text.read(1):
            return None
    try:
        return other_orientation(file, json.loads(whole.removeprefix("\ufeff")))
    except (ValueError, RecursionError):
        return None


def _from_parquet(file: Path) -> Iterator[Chunk]:
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


def _as_lines(chunk: list[Record]) -> Chunk:
    """Rows of CSV as lines of JSON, which can be looked at all at once; as they are where some are broken."""
    lines = [json.dumps(record.row, ensure_ascii=False) for record in chunk if record.row is not None]
    try:
        encoded = [line.encode() for line in lines]
    except UnicodeEncodeError:
        return chunk
    if len(encoded) < len(chunk):
        return chunk
    numbers = [record.line for record in chunk if record.line is not None]
    return Lines(pl.Series(encoded, dtype=pl.Binary), numbers, [record.raw for record in chunk])


_SCALARS = (pl.String, pl.Boolean, pl.Int64, pl.Int32, pl.Int16, pl.Int8, pl.UInt64, pl.UInt32, pl.UInt16, pl.UInt8)
"""Types of columns that JSON has too, so that nothing changes on the way there and back."""


def _from_frame(frame: pl.DataFrame, file: object, begin: int) -> Iterator[Chunk]:
    """The rows of a frame, in which the first is row `begin` of the file; as lines of JSON where that loses nothing."""
    scalars = all(dtype in _SCALARS for dtype in frame.dtypes)
    for part in frame.iter_slices(_CHUNK):
        for piece in _small(part):
            if piece.height == 1 and piece.estimated_size() > bounds.LINE_BYTES:
                raise bounds.refuse_long(Path(str(file)), f"row {begin}")
            if scalars:
                lines = piece.select(pl.struct(pl.all()).struct.json_encode()).to_series()
                yield Lines(lines.cast(pl.Binary))
            else:
                yield [Record(row, digestible(row)) for row in piece.iter_rows(named=True)]
            begin += piece.height


def _small(frame: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """The frame in parts that take no more memory than a long row, once they are Python's."""
    if frame.height < 2 or frame.estimated_size() <= bounds.LINE_BYTES:
        yield frame
    else:
        half = frame.height // 2
        yield from _small(frame.head(half))
        yield from _small(frame.slice(half))


def _from_hub(params: ValidateParams, name: str) -> Iterator[Chunk]:
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
        yield Record(dict(row), digestible(row))
