"""A stage's lines: all in its file, a bounded number in the flow's log; and whether a silent stage still works."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from flows.execution import output
from flows.execution.output import LAST, LINES, PIECE, Output, Watch

LOG = logging.getLogger("alignflow")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def messages(said: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in said.records]


def test_a_flood_goes_to_the_file(said: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    file, now = tmp_path / "output.log", [0.0]
    with Output(LOG, file, clock=lambda: now[0]) as out:
        for number in range(5000):
            out.add(f"line {number}\n".encode())
        assert messages(said) == [f"line {number}" for number in range(LINES)]
        out.add(b"error: it fails\n")  # what is grave has room of its own
        assert (said.records[-1].levelno, messages(said)[-1]) == (logging.ERROR, "it fails")
        now[0] += 2.5 * output.LINE_SECONDS
        for number in (1, 2, 3):
            out.add(f"later {number}\n".encode())
        assert messages(said)[-2:] == ["later 1", "later 2"]  # room for two has come back
        before = len(said.records)
    # Left out: 4,000 of the flood and one later; the last of them are shown, with how many are not.
    assert messages(said)[before] == f"{4001 - LAST} lines left out: see {file}"
    assert messages(said)[before + 1 :] == [*(f"line {n}" for n in range(5001 - LAST, 5000)), "later 3"]
    assert file.read_text().splitlines()[4999:] == ["line 4999", "error: it fails", "later 1", "later 2", "later 3"]


def test_a_line_longer_than_memory(said: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with Output(LOG, tmp_path / "output.log") as out:
        for _ in range(10):
            out.add(b"x" * PIECE)
        out.add(b"end\n")
        out.add("é\x1b[2J\r\n".encode())
    long, short = messages(said)
    assert long.startswith("x" * output.SHOWN + "... (cut: see ") and len(long) < output.SHOWN + 200
    assert short == "é�[2J"
    assert (tmp_path / "output.log").read_text() == "x" * 10 * PIECE + "end\né�[2J\n"


def test_the_file_is_bounded(said: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "FILE_BYTES", 1 << 20)
    with Output(LOG, tmp_path / "output.log") as out:
        for _ in range(2000):
            out.add(b"x" * 1023 + b"\n")
    assert (tmp_path / "output.log").stat().st_size == (1 << 20) + 1024  # the line that goes beyond is the last
    assert messages(said)[-1].endswith("output.log ends after 1 MB; the stage has printed more")


def test_a_file_that_cannot_be_written_stops_nothing(said: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with Output(LOG, tmp_path / "missing" / "output.log") as out:
        out.add(b"a\n")
    with Output(LOG, Path("/dev/full")) as out:
        out.add(b"b\n")
        out.add(b"c\n")
    assert messages(said) == ["a", "b", "c"]


SLEEPS = "import sys; sys.stdin.read()"
COPIES = "import os, sys; data = open('/dev/zero', 'rb').read(3 << 20); open('/dev/null', 'wb').write(data); "


def test_what_counts_as_progress(tmp_path: Path) -> None:
    """A line, a change in the work folder, or much read or written; a process that only waits shows none."""
    work = tmp_path / "work"
    (work / "checkpoints").mkdir(parents=True)
    code = f"print('ready', flush=True); sys.stdin.readline(); {COPIES}print('done', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", f"import sys; {code}"]
    with (
        Output(LOG, tmp_path / "output.log") as out,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        watch = Watch(process, out, work, 1)
        watch._progress()
        assert not watch._progress()
        out.add(b"step 1\n")
        assert watch._progress() and not watch._progress()
        (work / "checkpoints" / "step-1").write_text("weights")
        assert watch._progress() and not watch._progress()
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        assert watch._progress() and not watch._progress()
        process.stdin.close()


def test_what_a_fork_reads_is_progress(tmp_path: Path) -> None:
    """It is in the group of its stand-in, and not below it."""
    code = f"import sys; {COPIES}print('done', flush=True); sys.stdin.read()"
    waits = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with (
        Output(LOG, tmp_path / "output.log") as out,
        subprocess.Popen(waits, stdin=subprocess.PIPE, process_group=0) as stand_in,
    ):
        watch = Watch(stand_in, out, tmp_path, 1)
        watch._progress()
        assert not watch._progress()
        for group in (0, stand_in.pid):
            command = [sys.executable, "-c", code]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=group) as other:
                assert other.stdout is not None
                other.stdout.readline()
                assert watch._progress() is (group != 0)


def test_a_process_that_hangs_is_stopped_and_one_that_ends_is_not(tmp_path: Path) -> None:
    for code, hangs in ((SLEEPS, True), ("pass", False)):
        with (
            Output(LOG, tmp_path / "output.log") as out,
            subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process,
        ):
            watch = Watch(process, out, tmp_path / "work", 0.02 if hangs else 60.0)
            with watch.calling(lambda process: process.kill()):
                process.wait(60)
            assert watch.hangs is hangs
