"""Prefect's settings files in the working directory, which may name code to run, are not read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOOK = """
import sys
if sys.argv[1] == "left out":
    from flows.execution import settings_files
    settings_files.leave_out()
from prefect.settings import PREFECT_LOGGING_LEVEL, PREFECT_API_URL, temporary_settings
with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
    print(PREFECT_LOGGING_LEVEL.value())
"""
FILES = {
    "prefect.toml": '[logging]\nlevel = "CRITICAL"\n',
    "pyproject.toml": '[tool.prefect.logging]\nlevel = "CRITICAL"\n',
    ".env": "PREFECT_LOGGING_LEVEL=CRITICAL\n",
    "mine.toml": 'active = "p"\n[profiles.p]\nPREFECT_LOGGING_LEVEL = "CRITICAL"\n',
}


@pytest.mark.parametrize("name", FILES)
def test_no_settings_file_of_the_working_directory_counts(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FILES[name])
    if name == "mine.toml":
        (tmp_path / ".env").write_text(f"PREFECT_PROFILES_PATH={tmp_path / name}\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(tmp_path / "prefect")}
    levels = {}
    for way in ("left out", "as usual"):
        command = [sys.executable, "-P", "-c", LOOK, way]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert way == "as usual" or not done.stderr  # no warning of what was left out
        levels[way] = done.stdout.strip()
    assert levels == {"left out": "INFO", "as usual": "CRITICAL"}
