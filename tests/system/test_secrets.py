"""What runs leave: planted secrets nowhere, in logs, databases, artifacts or results, whether they end well or not.

With `log_text: false` neither prompts nor answers, but in the rows.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.execution import process
from schemas.errors import EXIT_CODES
from schemas.stage import STAGES, StageSpec
from stages import tracking
from stages.tracking.problems import first_line
from tests.support import homes, leak_pipeline
from tests.support.leak_pipeline import SECRETS as PLANTED
from tests.support.leak_pipeline import WORD, Run, encoded
from tests.support.scripted import FAKE, fake_request

SECRETS = {
    "HF_TOKEN": "hf_planted0000000000000000000000001",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED000000002",
    "AWS_SECRET_ACCESS_KEY": "planted/aws/key/0000000000000000000003",
    "MLFLOW_TRACKING_PASSWORD": "planted-password-4",
    "PREFECT_API_KEY": "pnu_planted00000000000005",
    "MY_JUDGES_KEY": "sk-planted-judge-000006",
}


def everything_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_secrets_of_the_environment_are_written_nowhere(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process, "COMMAND", FAKE)
    monkeypatch.setitem(STAGES, "fake", StageSpec(1))
    caplog.set_level(logging.DEBUG)
    judge = {"judge": "endpoint", "api_key_env": "MY_JUDGES_KEY"}
    ends = [process.run_stage(fake_request(steps=2, end=end, judge=judge)).status for end in (None, "refuse", "bug")]
    assert ends == ["done", "refused", "failed"]
    found = everything_in(home)
    assert any("mlflow.db" in path.name for path in found) and any("artifacts" in path.parts for path in found)
    assert any(b"MY_JUDGES_KEY" in content for content in found.values())  # the variable's name is no secret
    for value in SECRETS.values():
        assert value not in caplog.text
        assert [path for path, content in found.items() if value.encode() in content] == []


# The rows themselves, and the vocabulary of the test's model.
ROWS = (".parquet", "rows.jsonl", "tokenizer.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, ready: Path) -> Iterator[Callable[..., Run]]:
    """Runs a tiny whole pipeline with planted secrets (tests/support/leak_pipeline.py)."""
    folder = tmp_path_factory.mktemp("whole")
    homes.furnish(folder / "home", ready)
    with leak_pipeline.whole(folder) as run:
        yield run


@pytest.fixture(scope="module")
def quiet_run(whole: Callable[..., Run]) -> Run:
    """All of it, with log_text false. The first run of its home."""
    return whole("log_text=false")


@pytest.fixture(scope="module")
def plain_run(whole: Callable[..., Run], quiet_run: Run) -> Run:
    """Data, evaluation and report, with log_text true."""
    return whole("sft=null", "generate=null", "align={}")


@pytest.fixture(scope="module")
def failed_run(whole: Callable[..., Run], plain_run: Run) -> Run:
    """A judge's endpoint refuses, and quotes the key that it was sent."""
    judge = "{judge: endpoint, url: ENDPOINT_URL, model: m, api_key_env: MY_JUDGES_KEY}"
    return whole("sft=null", "align={}", f"generate.judge={judge}")


@pytest.mark.slow
def test_a_whole_run_shows_no_prompt_and_no_answer(quiet_run: Run) -> None:
    assert quiet_run.code == 0, quiet_run.said
    assert [path for path in quiet_run.holding(WORD) if not path.name.endswith(ROWS)] == []
    assert any(path.name == "rows.jsonl" for path in quiet_run.holding(WORD))  # answers say it, and were searched
    assert WORD not in quiet_run.said
    names = {path.name for path in quiet_run.files}
    assert {"quarantine.jsonl", "samples.jsonl", "report.html", "mlflow.db", "prefect.db"} <= names
    assert "samples.json" not in names


@pytest.mark.slow
def test_a_run_that_may_shows_them(plain_run: Run) -> None:
    """The same search, so that it is known to find."""
    assert plain_run.code == 0, plain_run.said
    found = {path.name for path in plain_run.holding(WORD)}
    assert {"samples.json", "samples.jsonl", "report.html", "quarantine.jsonl"} <= found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quiet_run", "plain_run", "failed_run"])
def test_whole_runs_write_no_secret(name: str, request: pytest.FixtureRequest) -> None:
    """Neither as they are nor as they travel in a header; and the search is known to find."""
    run: Run = request.getfixturevalue(name)
    assert run.code == (EXIT_CODES["refused"] if name == "failed_run" else 0), run.said
    if name == "failed_run":
        assert "bad request with Bearer [key]" in run.said
        assert run.holding("MY_JUDGES_KEY")
    assert run.holding("whole") and any(path.name == "mlflow.log" for path in run.files)
    headers = [encoded("someone", PLANTED["MLFLOW_TRACKING_URI"]), encoded("admin", PLANTED["PREFECT_API_AUTH_STRING"])]
    for secret in (*PLANTED.values(), *headers):
        assert secret not in run.said
        assert run.holding(secret) == []


def test_a_password_in_a_servers_address_is_not_shown(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The stage fails, since nobody listens there; what it says of that names the address without its password."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:planted-password-7@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(Exception, match=r"127\.0\.0\.1") as failed:
        tracking.plain_client().search_experiments()
    assert "planted-password-7" not in first_line(failed.value)
    said = tracking.without_passwords("see http://someone:planted-password-7@127.0.0.1:9/#/x and sqlite:///a@b")
    assert said == "see http://127.0.0.1:9/#/x and sqlite:///a@b"
