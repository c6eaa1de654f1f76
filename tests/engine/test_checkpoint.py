"""Checkpoints: what is written comes back bit for bit, and what was altered is never used."""

import errno
import shutil
from pathlib import Path

import pytest
import torch

from stages.engine.training import checkpoint

KEY = "k" * 64


def write(folder: Path, step: int) -> Path:
    draft = folder / f".draft-{step}"
    draft.mkdir(parents=True)
    state = {"weights": torch.full((3, 2), float(step)), "list": [1, {"t": torch.arange(3)}], "none": None, "text": "é"}
    checkpoint.write(draft, "model", checkpoint.snapshot(state))
    checkpoint.seal(draft, folder / f"step-{step}", key=KEY, step=step)
    return folder / f"step-{step}"


def test_state_round_trip(tmp_path: Path) -> None:
    state = checkpoint.read_state(write(tmp_path, 7), "model")
    assert torch.equal(state["weights"], torch.full((3, 2), 7.0))
    assert state["list"][0] == 1 and torch.equal(state["list"][1]["t"], torch.arange(3))
    assert state["none"] is None and state["text"] == "é"


def test_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write(tmp_path, step)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-10", "step-2"]
    assert checkpoint.newest(tmp_path, KEY) == tmp_path / "step-10"


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "bit"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.json", checkpoint.MANIFEST])
def test_a_damaged_checkpoint_is_moved_aside_and_the_older_one_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    write(tmp_path, 1)
    damage(write(tmp_path, 2) / name, how)
    # A bit flipped at the manifest's end breaks its JSON; one in the middle is caught by a digest or the key.
    assert checkpoint.newest(tmp_path, KEY) == tmp_path / "step-1"
    assert (tmp_path / "bad" / "step-2").is_dir()
    assert "step-2 was moved" in caplog.text


@pytest.mark.parametrize("name", ["step-3.bak", "step-x", "step-", "step-3 (copy)", "step-3-old", "bad"])
def test_what_has_another_name_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine") if name == "bad" else (tmp_path / name).mkdir(parents=True)
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "step-4").write_text("a file")
    assert checkpoint.newest(tmp_path, KEY) == tmp_path / "step-2"
    write(tmp_path, 5)
    assert sorted(p.name for p in tmp_path.glob("step-[0-9]")) == ["step-2", "step-5"]
    assert (tmp_path / "bad" / "step-4").is_file()
    assert (tmp_path / ("bad.bad" if name == "bad" else name)).exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE, errno.EACCES])
def test_what_cannot_be_read_now_is_not_condemned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    saved = write(tmp_path, 1)

    def fail(*given: object) -> None:
        raise OSError(number, "not now")

    with monkeypatch.context() as away:
        away.setattr("hashlib.file_digest", fail)
        with pytest.raises(OSError, match="not now") as raised:
            checkpoint.newest(tmp_path, KEY)
        assert raised.value.filename == str(saved)
    assert checkpoint.newest(tmp_path, KEY) == saved


def test_a_foreign_checkpoint_is_not_used(tmp_path: Path) -> None:
    write(tmp_path, 1)
    assert checkpoint.newest(tmp_path, "other") is None


def test_a_file_beside_the_manifest_is_noticed(tmp_path: Path) -> None:
    shutil.copy(__file__, write(tmp_path, 1) / "model.pkl")
    assert checkpoint.newest(tmp_path, KEY) is None


def test_a_snapshot_is_of_its_moment(tmp_path: Path) -> None:
    weights = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    state = {"model": weights, "turned": weights.t(), "numbers": [1, 2]}
    taken = checkpoint.snapshot(state)
    with torch.no_grad():
        weights.zero_()
    state["numbers"].append(3)  # type: ignore[union-attr]
    checkpoint.write(tmp_path, "state", taken)
    found = checkpoint.read_state(tmp_path, "state")
    assert torch.equal(found["model"], torch.arange(6.0).view(2, 3))
    assert torch.equal(found["turned"], torch.arange(6.0).view(2, 3).t()) and found["numbers"] == [1, 2]


def test_the_writer_raises_what_its_work_met(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    with checkpoint.Writer() as writer:
        writer.check()  # nothing yet
        writer.start(fail)
        with pytest.raises(OSError, match="No space left"):
            writer.wait()
        writer.wait()  # said once
    with pytest.raises(OSError, match="No space left"), checkpoint.Writer() as writer:
        writer.start(fail)
    with pytest.raises(RuntimeError, match="first"), checkpoint.Writer() as writer:
        writer.start(fail)
        raise RuntimeError("the first error counts")
    assert "a checkpoint could not be written" in caplog.text
