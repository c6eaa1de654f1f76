"""Leases on the Prefect server: one holder at a time, and free again when the holder has been killed."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
from prefect.settings import PREFECT_API_URL

from flows import pipeline
from flows.lease import STAGE_NAMES, lease, stage_lease

HOLD = "import time; from flows.lease import lease\nwith lease('held'): print('held', flush=True); time.sleep(600)"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNFLOW_HOME", str(tmp_path_factory.mktemp("prefect")))
        with pipeline.local_prefect():
            yield str(PREFECT_API_URL.value())


@pytest.mark.slow
def test_one_holder_at_a_time(server: str) -> None:
    environment = {**os.environ, "PREFECT_API_URL": server}
    code = "import sys, time; from flows.lease import lease\nfor _ in range(3):\n with lease('turns'): "
    code += "print(time.time(), flush=True); time.sleep(0.3); print(time.time(), flush=True)"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    stays = []
    for process in processes:
        times = [float(line) for line in process.communicate(timeout=120)[0].split()]
        assert process.returncode == 0
        stays += list(zip(times[::2], times[1::2], strict=True))
    stays.sort()
    assert len(stays) == 6
    assert all(end <= start for (_, end), (start, _) in pairwise(stays))


@pytest.mark.slow
def test_a_killed_holder_frees_the_next(server: str) -> None:
    environment = {**os.environ, "PREFECT_API_URL": server}
    with subprocess.Popen([sys.executable, "-c", HOLD], env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        holder.kill()
    began = time.monotonic()
    with lease("held"):
        assert time.monotonic() - began < 180


def test_keys_share_a_fixed_number_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()
    monkeypatch.setattr("flows.lease.lease", names.add)
    for number in range(2000):
        stage_lease(f"{number * 7919:08x}" + "0" * 56)
    assert len(names) <= STAGE_NAMES
