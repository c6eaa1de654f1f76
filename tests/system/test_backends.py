"""What a team uses: Postgres under both servers, artifacts in an S3-compatible store; both real, on this machine."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import live_servers
from tests.support.commands import alignflow
from tests.support.processes import below, wait_for

pytestmark = pytest.mark.slow

PASSWORD = "hidden-in-the-database"
KEYS = {
    "AWS_ACCESS_KEY_ID": "store-user",
    "AWS_SECRET_ACCESS_KEY": "hidden-in-the-store",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def postgres_folder() -> Path:
    """Where Debian keeps the newest Postgres's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[4]))
    if not found:
        pytest.skip("no Postgres here: apt install postgresql")
    if os.geteuid() == 0 and shutil.which("runuser") is None:
        pytest.skip("Postgres does not run as root, and there is no runuser")
    return found[-1].parent


def as_postgres(*command: object) -> list[str]:
    """A command as a user that Postgres agrees to run as."""
    before = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    return [*before, *map(str, command)]


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """USER:PASSWORD@HOST:PORT of a Postgres server with the databases `mlflow` and `prefect`."""
    programs, folder = postgres_folder(), Path(f"/tmp/alignflow-postgres-{os.getpid()}")
    folder.mkdir(mode=0o700)  # not below pytest's folder, into which another user may not look
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
    secret = folder / "secret"
    secret.write_text(PASSWORD)
    secret.chmod(0o644)
    port = live_servers.free_port()
    try:
        access = ["--auth=scram-sha-256", f"--pwfile={secret}", "--username=ada", "--encoding=UTF8", "--no-sync"]
        subprocess.run(as_postgres(programs / "initdb", folder / "data", *access), check=True, capture_output=True)
        options = ["-k", str(folder), "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        with live_servers.ended(as_postgres(programs / "postgres", "-D", folder / "data", *options)):
            environment = {**os.environ, "PGPASSWORD": PASSWORD}
            address = ["--host=127.0.0.1", f"--port={port}", "--username=ada"]
            for name in ("mlflow", "prefect"):
                create = [str(programs / "createdb"), *address, name]
                wait_for(
                    lambda create=create: subprocess.run(create, env=environment, capture_output=True).returncode == 0
                )
            yield f"ada:{PASSWORD}@127.0.0.1:{port}"
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def store() -> Iterator[tuple[str, Any]]:
    """Address of an S3-compatible server, and a client of it; it has the bucket `alignflow`."""
    import boto3
    from botocore.exceptions import BotoCoreError

    port = live_servers.free_port()
    with live_servers.ended([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]):
        url = f"http://127.0.0.1:{port}"
        names = ("aws_access_key_id", "aws_secret_access_key", "region_name")
        client = boto3.client("s3", endpoint_url=url, **dict(zip(names, KEYS.values(), strict=True)))

        def create() -> bool:
            try:
                client.create_bucket(Bucket="alignflow")
            except BotoCoreError:
                return False
            return True

        wait_for(create)
        yield url, client


def test_a_stage_over_postgres_and_s3_is_there_after_a_restart_and_elsewhere(
    postgres: str, store: tuple[str, Any], tmp_path: Path
) -> None:
    url, bucket = store
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    settings = KEYS | {
        "MLFLOW_BACKEND_STORE_URI": f"postgresql://{postgres}/mlflow",
        "MLFLOW_ARTIFACTS_DESTINATION": "s3://alignflow/artifacts",
        "MLFLOW_S3_ENDPOINT_URL": url,
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{postgres}/prefect",
    }
    with live_servers.up(home, "--pool", "cpu", **settings) as (process, where):
        answer = alignflow("deploy", ALIGNFLOW_HOME=str(home))
        assert answer.returncode == 0, answer.stderr
        ended = live_servers.run_stage(home)
        assert ended["state"] == "Completed", ended
        before = live_servers.fetch(
            ended["key"], elsewhere, MLFLOW_TRACKING_URI=where.mlflow, **live_servers.keys(home)
        )
        assert before["location"].startswith("mlflow-artifacts:")
        stored = [one["Key"] for one in bucket.list_objects_v2(Bucket="alignflow")["Contents"]]
        assert {Path(key).name for key in stored} >= set(before["files"])
        lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in below(process)]
        assert lines and not any(PASSWORD.encode() in line for line in lines)
        workers = [pid for pid in below(process) if b"flows.worker\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(workers) == 4  # of runs and of stages: a guard, and what it guards
        assert not any(PASSWORD.encode() in Path(f"/proc/{pid}/environ").read_bytes() for pid in workers)
    with live_servers.forked_up(home, "--pool", "cpu", **settings) as there:
        third = tmp_path / "third"
        assert (
            live_servers.fetch(ended["key"], third, MLFLOW_TRACKING_URI=there.mlflow, **live_servers.keys(home))[
                "sha256"
            ]
            == before["sha256"]
        )
        again = live_servers.run_stage(home)  # the deployment is still there, and the result is taken again
        assert again["state"] == "Completed" and "reused" in again["message"]
    assert not (home / "mlflow.db").exists() and not (home / "artifacts").exists()
    assert not list((home / "prefect").glob("*.db"))
    assert not any(PASSWORD in file.read_text(errors="replace") for file in (home / "logs").iterdir())
