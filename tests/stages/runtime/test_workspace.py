"""The home is its owner's alone: one that is made, and one that an older version has left open."""

import os
import stat
from pathlib import Path

import pytest

from stages.runtime import workspace


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the home is to be; nothing is there yet."""
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_new_home(at: Path) -> None:
    for use in (
        lambda: workspace.write_whole(at / "work" / "x" / "request.json", "{}"),
        lambda: workspace.lock(at / "cache" / "x.lock").__enter__(),
        lambda: workspace.lock_if_free(at / "x.lock").__enter__(),
    ):
        use()
        assert mode(at) == 0o700
        at.rename(at.with_name(f"home-{len(list(at.parent.iterdir()))}"))


def test_an_older_home_is_closed(at: Path) -> None:
    at.mkdir(mode=0o755)
    at.chmod(0o2775)
    for name in ("mlflow-auth.db", "mlflow-auth.ini", "mlflow.db"):
        (at / name).write_text("x")
        (at / name).chmod(0o644)
    assert workspace.open_home() == at
    assert mode(at) == 0o2700 and mode(at / "mlflow-auth.db") == mode(at / "mlflow-auth.ini") == 0o600
    assert mode(at / "mlflow.db") == 0o644  # nobody reaches it


def test_what_is_more_than_a_home_stays_open(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at.mkdir()
    at.chmod(0o1777)
    workspace.open_home()
    assert mode(at) == 0o1777  # as /tmp
    at.chmod(0o755)
    monkeypatch.setenv("HOME", str(at / "user"))
    workspace.open_home()
    assert mode(at) == 0o755  # the user's own home is below


def test_other_files_keep_the_users_umask(at: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        workspace.write_whole(tmp_path / "asked" / "out.json", "{}")
    finally:
        os.umask(before)
    assert mode(tmp_path / "asked") == 0o755 and not at.exists()
