"""A stage on two nodes: two torchruns that find each other by PET_* variables, here both on this machine."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from schemas.errors import EXIT_CODES, StageError
from schemas.stage import Placement
from stages import __main__ as entry
from stages.engine import torchrun
from tests.support import homes, node_requests
from tests.support.live_servers import free_port
from tests.support.processes import below, wait_for
from tests.support.scripted import fake_request


class TwoNodes:
    """Two agents with a rank each, which train a request together."""

    def __init__(self, request: Path, home: Path) -> None:
        port, self.processes = free_port(), []
        for node in (0, 1):
            places = {"PET_NNODES": 2, "PET_NODE_RANK": node, "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
            command = [sys.executable, "-P", "-m", "stages", "align", str(request)]
            with request.with_name(f"node-{node}.log").open("ab") as log:
                variables = node_requests.environment(home, **places)
                self.processes.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log))
        self.folder = request.parent

    def ended(self) -> list[int]:
        """Their exit codes."""
        try:
            return [process.wait(300) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def story(self) -> str:
        return "\n".join(file.read_text() for file in sorted(self.folder.glob("*.log")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def given(folder: Path) -> Iterator[dict]:  # type: ignore[type-arg]
    yield node_requests.inputs(folder)


@pytest.mark.slow
def test_two_nodes_save_together_and_end_as_one_node_does(folder: Path, given: dict, ready: Path) -> None:  # type: ignore[type-arg]
    alone = node_requests.ask(folder / "alone", given, devices=2)
    home = homes.furnish(folder / "home-alone", ready)
    command = [sys.executable, "-P", "-m", "stages", "align", str(alone)]
    done = subprocess.run(command, env=node_requests.environment(home), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    request, home = node_requests.ask(folder / "both", given, nodes=2), homes.furnish(folder / "home", ready)
    saved = node_requests.checkpoints(home, request)
    both = TwoNodes(request, home)
    wait_for(lambda: [*saved.glob("step-*")], 300, both.story)
    for process in both.processes:
        process.terminate()
    assert both.ended() == [EXIT_CODES["preempted"]] * 2, both.story()
    assert node_requests.result(request).status == "preempted"
    step, files = node_requests.newest(saved)
    assert 0 < step < node_requests.STEPS and {"shard-0.safetensors", "shard-1.safetensors"} <= files

    both = TwoNodes(request, home)
    assert both.ended() == [0, 0], both.story()
    one, other = node_requests.result(alone), node_requests.result(request)
    assert one.status == other.status == "done" and one.key == other.key
    assert one.outputs["model"].sha256 == other.outputs["model"].sha256  # bit for bit


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_both_nodes(folder: Path, given: dict, ready: Path) -> None:  # type: ignore[type-arg]
    request = node_requests.ask(folder / "killed", given, steps=100_000, seed=1, nodes=2)
    home = homes.furnish(folder / "home-killed", ready)
    both = TwoNodes(request, home)
    wait_for(lambda: [*node_requests.checkpoints(home, request).glob("step-*")], 300, both.story)
    (rank,) = below(both.processes[1])
    subprocess.run(["kill", "-KILL", str(rank)], check=True)
    codes = both.ended()
    assert codes[1] == 128 + signal.SIGKILL and codes[0] != 0, both.story()


def test_other_numbers_of_nodes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    placed = fake_request().model_copy(update={"placement": Placement(nodes=2)})
    for nodes in (None, "3", "1:2"):
        monkeypatch.delenv("PET_NNODES", raising=False) if nodes is None else monkeypatch.setenv("PET_NNODES", nodes)
        with pytest.raises(StageError, match=r"nodes = 2: .* Fix: place it on a pool"):
            entry.become_torchrun(placed, ["fake", "request.json"])


def test_a_node_that_is_silent_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(torchrun, "SILENT_SECONDS", 1.0)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    here = torchrun.Nodes(2, "127.0.0.1", server.port, "a")
    assert here.silent() is None  # nodes may take long to start
    threading.Thread(target=here.count, daemon=True).start()
    other = server.add("alignflow/nodes/a/number", 1) - 1
    server.set(f"alignflow/nodes/a/{other}", "1")  # and never again
    wait_for(lambda: here.silent() == "1 of 2 nodes", 60, here.silent)
    del server
    wait_for(lambda: "the node at 127.0.0.1" in str(here.silent()), 60, here.silent)
