"""Exported models on the Hugging Face Hub, of which a server on this machine stands in."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from flows.results import export
from schemas.errors import EXIT_CODES, StageError
from schemas.stage import Result
from tests.support import hub as stub
from tests.support.finished import finish
from tests.support.models import model_folder

TOKEN = "hf_thisIsASecretOfSomebody"


@pytest.fixture
def trained(ready_home: Path, tmp_path: Path) -> Result:
    params: Any = {"method": "dpo"}
    return finish({"model": model_folder(tmp_path / "model")}, stage="align", name="dpo", params=params)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[stub.Hub]:
    with stub.serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_a_push_is_private_and_says_where_it_is(trained: Result, hub: stub.Hub, tmp_path: Path) -> None:
    hub.present = ["old-00001-of-00002.safetensors", "adapter_config.json", "notes.md"]
    pushed = export.export("dpo", tmp_path / "out", push="me/mine").pushed
    assert pushed is not None and (pushed.url, pushed.commit, pushed.private) == (
        f"{hub.url}/me/mine",
        stub.COMMIT,
        True,
    )
    assert hub.repos == {"me/mine": True}
    assert hub.files == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert set(hub.deleted) == {"old-00001-of-00002.safetensors", "adapter_config.json"}, "what would be loaded instead"
    assert hub.tokens == {f"Bearer {TOKEN}"} and TOKEN not in repr(pushed)


def test_a_push_without_room_names_what_the_user_can_set(
    trained: Result, hub: stub.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "write", full)
    with pytest.raises(
        StageError, match=r"TMPDIR = .*: No space left on device\. Fix: set TMPDIR to a folder"
    ) as failed:
        export.export("dpo", push="me/mine")
    assert failed.value.problem.value == tempfile.gettempdir() and not hub.files


def test_only_who_asks_for_it_publishes(trained: Result, hub: stub.Hub) -> None:
    hub.repos["me/open"] = False
    with pytest.raises(StageError, match=r"--push = me/open: the repository exists and everybody can read it"):
        export.export("dpo", push="me/open")
    assert not hub.files
    for name in ("me/open", "me/new"):
        pushed = export.export("dpo", push=name, public=True).pushed
        assert pushed is not None and not pushed.private
    assert hub.repos == {"me/open": False, "me/new": False}
    hub.repos["me/closed"] = True
    closed = export.export("dpo", push="me/closed", public=True).pushed
    assert closed is not None and closed.private, "a private repository stays so"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mine", {}, "is not a name on the Hub. Fix: write ORG/NAME"),
        ("me/mi ne", {}, "is not a name on the Hub"),
        ("me/mine", {"HF_TOKEN": ""}, "there is no token for the Hub.*hf auth login"),
        ("me/mine", {"role": "read"}, "the token may only read"),
        ("others/mine", {}, "the token belongs to nobody of that name. Fix: write one of me before the slash"),
        ("me/mine", {"status": {"/api/whoami-v2": 401}}, "the Hub does not take it.*Fix: the token is wrong"),
        ("me/mine", {"endpoint": "http://127.0.0.1:9"}, "the Hub does not take it.*Fix: check the network"),
        ("me/mine", {"offline": True}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(
    trained: Result,
    hub: stub.Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    change: dict[str, Any],
    message: str,
) -> None:
    if "HF_TOKEN" in change:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    hub.who["auth"]["accessToken"]["role"] = change.get("role", "write")
    hub.status = change.get("status", {})
    monkeypatch.setattr(constants, "ENDPOINT", change.get("endpoint", hub.url))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", change.get("offline", False))
    with pytest.raises(StageError, match=message) as refused:
        export.export("dpo", tmp_path / "out", push=name)
    assert TOKEN not in str(refused.value)
    assert not (tmp_path / "out").exists() and not any(asked.startswith("POST") for asked in hub.asked)


def test_a_refusal_on_the_way_keeps_what_was_written(trained: Result, hub: stub.Hub, tmp_path: Path) -> None:
    hub.status = {"/api/repos/create": 403}
    with pytest.raises(StageError, match="Fix: use a token that may write there"):
        export.export("dpo", tmp_path / "out", push="me/mine")
    assert (tmp_path / "out" / "model.safetensors").exists() and not hub.files


def test_a_folder_from_outside_is_pushed_without_what_is_no_model(
    ready_home: Path, hub: stub.Hub, tmp_path: Path
) -> None:
    folder = model_folder(tmp_path / "model")
    for name in ("optimizer.pt", ".env"):
        (folder / name).write_text("SECRET=1")
        with pytest.raises(StageError, match=f"files that are no part of a model: {name}"):
            export.export(str(folder), push="me/mine")
        (folder / name).unlink()
    assert not hub.files
    assert export.export(str(folder), push="me/mine").pushed and "model.safetensors" in hub.files


def test_an_adapter_whose_base_is_only_here_is_not_pushed(ready_home: Path, hub: stub.Hub, tmp_path: Path) -> None:
    made = finish({"model": model_folder(tmp_path / "model")}, stage="sft", name="sft", params={})
    (tmp_path / "model" / "adapter").mkdir()
    for name, text in {"adapter_config.json": "{}", "adapter_model.safetensors": ""}.items():
        (tmp_path / "model" / "adapter" / name).write_text(text)
    finish({"model": tmp_path / "model"}, stage="align", name="kto", params={}, inputs=made.outputs)
    with pytest.raises(StageError, match=rf"--push = kto: .* only here.*alignflow export {made.outputs['model'].uri}"):
        export.export("kto", push="me/mine", adapter=True)
    assert not hub.files
    export.export("kto", push="me/mine", adapter=True, base="me/sft")
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "me/sft"
    assert "model.safetensors" not in hub.files


def test_the_command_prints_url_and_commit_and_no_token(trained: Result, hub: stub.Hub) -> None:
    command = [sys.executable, "-m", "flows.cli", "export", "dpo", "--push", "me/mine"]
    told = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | told)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"dpo is at {hub.url}/me/mine (private), commit {stub.COMMIT}\n"
    hub.who["auth"]["accessToken"]["role"] = "read"
    refused = subprocess.run([*command, "--json"], capture_output=True, text=True, env=os.environ | told)
    assert refused.returncode == EXIT_CODES["refused"] and "the token may only read" in refused.stderr
    assert TOKEN not in done.stdout + done.stderr + refused.stdout + refused.stderr
