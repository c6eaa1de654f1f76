"""The chapter on backup and restore, followed to the letter: nothing that was finished runs again."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.support import commands, models

ROWS = [f'{{"prompt": "red {a}", "response": "yes {a} {b}"}}' for a in "abcdefgh" for b in "abcd"]


def chapter() -> tuple[str, str]:
    """The commands that back up, and those that restore."""
    text = (ROOT / "deploy" / "README.md").read_text().partition("## Backup and restore")[2].partition("\n## ")[0]
    backup, restore = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return backup, restore


@pytest.mark.slow
def test_a_home_that_was_destroyed_and_restored_reuses_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ALIGNFLOW_HOME", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{commands.folder_with(tmp_path / 'bin')}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    rows, sizes = tmp_path / "rows.jsonl", {"max_steps": 1, "batch_size": 8, "max_length": 48}
    rows.write_text("\n".join(ROWS) + "\n")
    config = {
        "name": "kept",
        "model": {"path": str(models.model_folder(tmp_path / "model"))},
        "data": {"sft": {"path": str(rows), "kind": "sft", "eval_fraction": 0.5, "max_length": 48}},
        "sft": sizes,
        "reward": None,
        "align": {},
        "evaluate": {"judge": "sentiment", "min_prompts": 2, "max_new_tokens": 12, "bootstrap": 100},
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))

    def shell(lines: str) -> str:
        done = subprocess.run(["bash", "-euc", lines], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    backup, restore = chapter()
    (stages,) = re.findall(r"kept: (\d+) stages, 0 reused", shell("alignflow run my.yaml"))
    assert int(stages) >= 5
    shell(backup)
    shutil.rmtree(".alignflow")
    shell(restore)
    assert f"kept: {stages} stages, {stages} reused" in shell("alignflow run my.yaml")
    assert Path(".alignflow").stat().st_mode & 0o777 == 0o700
    assert not [path for path in Path("backup").rglob("*") if path.stat().st_mode & 0o077]
