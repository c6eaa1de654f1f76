"""What others of the machine may read, and what the folder where a command is called may run: nothing."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.execution import process
from schemas.environment import python_path
from schemas.stage import STAGES, Request
from tests.conftest import ROOT
from tests.support.live_servers import ask, request, up
from tests.support.processes import below, left_after

ALIGNFLOW = Path(sys.executable).with_name("alignflow")
STARTS = ["flows", "schemas", "stages", "typer", "queue", "random", "sitecustomize", "usercustomize"]
LATER = ["torch", "numpy", "polars", "yaml", "mlflow", "prefect", "uvicorn", "fastapi", "ruamel", "secrets", "colorsys"]


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Path]:
    """A folder with data and Python files that leave a mark when they are imported."""
    folder, marks = tmp_path / "data", tmp_path / "marks"
    marks.mkdir()
    for name in STARTS + LATER:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"open({str(marks / name)!r}, 'w')\n")
    (folder / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    yield folder
    assert sorted(mark.name for mark in marks.iterdir()) == []


def call(folder: Path, *command: object, **environment: str) -> None:
    paths = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(ROOT)]))
    done = subprocess.run(
        [*map(str, command)],
        cwd=folder,
        env={**os.environ, "ALIGNFLOW_HOME": str(folder.parent / "home"), "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


VALIDATE = ["validate", "rows.jsonl", "--kind", "prompt", "--eval-fraction", "0", "--out", "out"]


@pytest.mark.skipif(not ALIGNFLOW.exists(), reason="no console script alignflow beside this Python")
def test_commands_import_nothing_of_the_working_directory(planted: Path) -> None:
    call(planted, ALIGNFLOW, *VALIDATE)
    call(planted, ALIGNFLOW, "run", "demo", "--dry-run")
    params = {"path": "rows.jsonl", "kind": "prompt", "eval_fraction": 0}
    asked = Request(stage="validate", version=STAGES["validate"].version, params=params)  # type: ignore[arg-type]
    (planted / "request.json").write_text(asked.model_dump_json())
    call(planted, ALIGNFLOW, "stage", "validate", "request.json")
    assert json.loads((planted / "result.json").read_text())["status"] == "done"


def test_nor_where_python_puts_it_first(planted: Path) -> None:
    """`python -m`, and PYTHONPATH with an empty entry: what is imported before our first line is Python's own."""
    for name in STARTS:
        (planted / name / "__init__.py").unlink()
        (planted / name).rmdir()
    call(planted, sys.executable, "-m", "flows.cli", *VALIDATE, PYTHONPATH=":")
    call(planted, sys.executable, "-m", "flows.cli", "run", "demo", "--dry-run", PYTHONPATH=":")


def test_a_stage_of_a_flow(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f":.:relative:{os.pathsep.join(['/one', '', '/two'])}:")
    assert python_path("/ours") == "/ours:/one:/two"
    values = process.environment(Request(stage="validate", version=1, params={}))
    assert values["PYTHONPATH"].split(":")[1:] == ["/one", "/two"] and "-P" in process.COMMAND


@pytest.mark.slow
def test_servers_import_nothing_of_it_and_keep_all_to_their_owner(
    planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = planted.parent / "home"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(planted)
    monkeypatch.setattr("tests.support.live_servers.UP", [sys.executable, "-P", "-m", "flows.cli", "ui"])
    before = os.umask(0o022)
    try:
        with up(home) as (process, where):
            experiments = f"{where.mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
            assert ask(home, "GET", experiments).status_code == 200
            for health in (f"{where.mlflow}/health", f"{where.prefect}/health"):
                assert request("GET", health).status_code == 200
            started = below(process)
            assert len(started) >= 4  # a guard and a process for each
            process.kill()  # the hard way: nobody is told
            assert left_after(started, 30) == []
        assert open_to_others(home) == []
    finally:
        os.umask(before)


def open_to_others(folder: Path) -> list[Path]:
    """What of a folder others may read, were it not for the folder itself."""
    return [path for path in [folder, *folder.rglob("*")] if stat.S_IMODE(path.lstat().st_mode) & 0o077]
