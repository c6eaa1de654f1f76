"""A file at an address: fetched whole, and held against the config's digest, before a row of it is read."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO, Any
from urllib.parse import urlsplit

from schemas.errors import StageError, refuse
from schemas.source import Remote
from schemas.text import one_line

_PIECE = 1 << 20


@contextmanager
def fetched(source: Remote, sha256: str | None) -> Iterator[Path]:
    """The file, on this disk for as long as it is read.

    Raises:
        StageError: it cannot be fetched, or is another file than the digest says.
    """
    address = urlsplit(source.url)
    with TemporaryDirectory(prefix="alignflow-") as folder:
        file = Path(folder) / (PurePosixPath(address.path).name or "rows")
        digest = hashlib.sha256()
        try:
            with _opened(source) as stream, file.open("wb") as copy:
                while piece := stream.read(_PIECE):
                    digest.update(piece)
                    copy.write(piece)
        except StageError:
            raise
        except Exception as error:  # every store raises errors of its own
            message = f"the file cannot be fetched: {type(error).__name__}: {one_line(error, 300)}"
            fix = "check the address and the credentials in the environment, or fetch the file and name the copy"
            raise refuse("path", source.url, message, fix, kind="unreachable") from error
        refuse_other_digest(source.url, sha256, digest.hexdigest())
        yield file


def of_the_address(error: StageError, source: Remote, file: Path) -> StageError:
    """An error of the fetched file in the words of its address, since the file is gone once it is read."""
    named = error.problem
    folder = f"{file.parent}/"
    words = {name: str(getattr(named, name) or "").replace(folder, "") or None for name in ("message", "fix")}
    value = source.url if named.value == str(file) else named.value
    return StageError(named.model_copy(update={**words, "value": value}), status=error.status)


def refuse_other_digest(where: object, wanted: str | None, digest: str) -> None:
    """Raise StageError where a file is another than the one that the config names."""
    if digest != wanted:
        message = f"the file at {where} has another digest: {digest}"
        fix = "if this file is the one that you want, set sha256 to its digest"
        raise refuse("sha256", wanted, message, fix, kind="other_digest")


@contextmanager
def _opened(source: Remote) -> Iterator[IO[bytes]]:
    """The bytes at an address. S3 is read as MLflow's artifacts are, all else by fsspec."""
    if source.scheme == "s3":
        with _s3(source) as stream:
            yield stream
        return
    import fsspec  # takes a moment, and only this source needs it

    try:
        opened: Any = fsspec.open(source.url, "rb")
    except ImportError as error:
        package = {"gs": "gcsfs"}.get(source.scheme, "aiohttp")
        message = f"{source.scheme}:// needs the package {package}"
        raise refuse("path", source.url, message, f"pip install {package}", kind="missing_package") from error
    with opened as stream:
        yield stream


@contextmanager
def _s3(source: Remote) -> Iterator[Any]:
    try:
        import boto3  # takes a second, and only this source needs it
    except ImportError as error:
        fix = "pip install 'alignflow[server]'"
        raise refuse("path", source.url, "s3:// needs the package boto3", fix, kind="missing_package") from error
    address = urlsplit(source.url)
    # MLflow's variable for a store of one's own; boto3 itself reads AWS_ENDPOINT_URL.
    client = boto3.client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL"))
    body = client.get_object(Bucket=address.netloc, Key=address.path.removeprefix("/"))["Body"]
    with body:
        yield body
