"""Data files at addresses: fetched from a real S3 server, or by fsspec; refused where they are another file."""

import gzip
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.planning.allowed_paths import check_request_roots
from flows.planning.config_checks import check as check_config
from schemas.config import PipelineConfig
from schemas.config.data import ValidateParams
from schemas.errors import StageError
from schemas.stage import STAGES, Request
from tests.stages.validate.test_validate import ROWS, checked, refused
from tests.support.models import given

CONTENT = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode())
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of an S3 server of this process; the bucket `rows` holds data/pairs.jsonl.gz."""
    boto3 = pytest.importorskip("boto3")
    from moto.server import ThreadedMotoServer

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "store-user")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://{host}:{port}")
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="rows")
    client.put_object(Bucket="rows", Key="data/pairs.jsonl.gz", Body=CONTENT)
    yield client
    client.close()
    server.stop()


def test_a_file_of_an_s3_store(tmp_path: Path, bucket: Any) -> None:
    """Read like the same file on the disk; one that has changed since is refused, with its new digest."""
    (tmp_path / "pairs.jsonl.gz").write_bytes(CONTENT)
    local = checked(tmp_path / "pairs.jsonl.gz", tmp_path / "local", eval_fraction=0)
    report = checked("s3://rows/data/pairs.jsonl.gz", tmp_path / "out", sha256=DIGEST, eval_fraction=0)
    assert report == local and report.kept == 20
    assert given(tmp_path / "out", "train", "sft").equals(given(tmp_path / "local", "train", "sft"))
    changed = gzip.compress(b'{"prompt": "p", "response": "r"}\n')
    bucket.put_object(Bucket="rows", Key="data/pairs.jsonl.gz", Body=changed)
    message, _ = refused("s3://rows/data/pairs.jsonl.gz", tmp_path / "out", sha256=DIGEST)
    now = hashlib.sha256(changed).hexdigest()
    assert now in message
    assert checked("s3://rows/data/pairs.jsonl.gz", tmp_path / "out", sha256=now).kept == 1
    message, _ = refused("s3://rows/nothing.jsonl", tmp_path / "out", sha256=DIGEST)
    assert "cannot be fetched: NoSuchKey" in message and "Fix: " in message


def test_other_addresses_are_opened_by_fsspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store in memory stands for that of gs://, which needs a package of its own."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    with monkeypatch.context() as patch:
        patch.setattr("fsspec.open", lambda url, mode: MemoryFileSystem().open(f"/{url.partition('://')[2]}", mode))
        fsspec.filesystem("memory").pipe("/bucket/rows.jsonl.gz", CONTENT)
        assert checked("gs://bucket/rows.jsonl.gz", tmp_path / "out", sha256=DIGEST).kept == 20
        message, _ = refused("gs://bucket/none.jsonl", tmp_path / "out", sha256=DIGEST)
        assert "cannot be fetched: FileNotFoundError" in message
    message, _ = refused("https://127.0.0.1:1/rows.jsonl", tmp_path / "out", sha256=DIGEST)
    assert "cannot be fetched" in message and "https://127.0.0.1:1/rows.jsonl" in message


def test_errors_name_the_address_and_not_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is gone when the error is read: what is to be done is done to a copy of the user's own."""
    from fsspec.implementations.memory import MemoryFileSystem

    content = "prompt,naïve\np,r\n".encode("cp1252")
    MemoryFileSystem().pipe("/bucket/rows.csv", content)
    monkeypatch.setattr("fsspec.open", lambda url, mode: MemoryFileSystem().open(f"/{url.partition('://')[2]}", mode))
    message, _ = refused("gs://bucket/rows.csv", tmp_path / "out", sha256=hashlib.sha256(content).hexdigest())
    assert message.startswith("path = gs://bucket/rows.csv: ") and tempfile.gettempdir() not in message
    assert "iconv -f WINDOWS-1252 -t UTF-8 'rows.csv' > 'rows-utf8.csv'" in message


def test_a_digest_of_a_file_on_this_disk_is_held_against_it(tmp_path: Path) -> None:
    """What is no file has none."""
    file = tmp_path / "pairs.jsonl.gz"
    file.write_bytes(CONTENT)
    assert checked(file, tmp_path / "out", sha256=DIGEST).kept == 20
    message, _ = refused(file, tmp_path / "out", sha256="0" * 64)
    assert DIGEST in message and str(file) in message
    message, _ = refused("demo:sft", tmp_path / "out", sha256=DIGEST)
    assert "demo:sft is not a file" in message and "leave it out" in message


def test_a_digest_is_required_before_anything_starts(tmp_path: Path) -> None:
    """By the check of a config and by the reader; a deployed run may fetch nothing."""
    where = "s3://rows/pairs.jsonl"
    message, _ = refused(where, tmp_path / "out")
    assert "sha256" in message and "sha256sum" in message
    config = {"name": "n", "model": {"scratch": {}}, "align": {}}
    data = {"path": where, "kind": "sft"}
    problems = check_config(PipelineConfig.model_validate({**config, "data": {"sft": data}}))
    assert [problem.field for problem in problems] == ["data.sft.sha256"]
    pinned = PipelineConfig.model_validate({**config, "data": {"sft": {**data, "sha256": DIGEST}}})
    assert not list(check_config(pinned))
    params = ValidateParams(path=where, kind="sft", sha256=DIGEST).model_dump(mode="json")
    request = Request(stage="validate", version=STAGES["validate"].version, params=params)
    with pytest.raises(StageError, match="fetch the file"):
        check_request_roots(request, deployed=True)
