"""Prefect's settings files in the working directory, which may name code to run, are not read."""

import os
import subprocess
import sys
from pathlib import Path

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


def level(folder: Path, way: str, *names: str) -> str:
    """The level that Prefect reads in a folder with these files."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text(FILES[name])
    if "mine.toml" in names:
        with (folder / ".env").open("a") as file:
            file.write(f"PREFECT_PROFILES_PATH={folder / 'mine.toml'}\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(folder / "prefect")}
    command = [sys.executable, "-P", "-c", LOOK, way]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert way == "as usual" or not done.stderr  # no warning of what was left out
    return done.stdout.strip()


def test_no_settings_file_of_the_working_directory_counts(tmp_path: Path) -> None:
    """Each would by itself; all at once do not."""
    usual = {name: level(tmp_path / name, "as usual", name) for name in FILES}
    assert usual == dict.fromkeys(FILES, "CRITICAL")
    assert level(tmp_path / "all", "left out", *FILES) == "INFO"
