"""Leases on the Prefect server: one holder at a time, taken again when they ran out. Deaths: test_faults_race.py."""

import logging
import os
import subprocess
import threading
from itertools import pairwise
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import get_client

from flows.execution import lease as leases
from flows.execution import process as execution_process
from flows.execution.lease import STAGE_NAMES, lease, stage_lease
from schemas.errors import StageError
from tests.support.forks import PYTHON
from tests.support.processes import wait_for


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(leases, "ASK_SECONDS", 0.2)


@pytest.mark.slow
def test_one_holder_at_a_time(server: str) -> None:
    environment = {**os.environ, "PREFECT_API_URL": server}
    code = "import sys, time; from flows.execution.lease import lease\nfor _ in range(3):\n with lease('turns'): "
    code += "print(time.time(), flush=True); time.sleep(0.3); print(time.time(), flush=True)"
    processes = [
        subprocess.Popen([*PYTHON, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    stays = []
    for process in processes:
        times = [float(line) for line in process.communicate(timeout=120)[0].split()]
        assert process.returncode == 0
        stays += list(zip(times[::2], times[1::2], strict=True))
    stays.sort()
    assert len(stays) == 6
    assert all(end <= start for (_, end), (start, _) in pairwise(stays))


def take_away(lease_id: UUID) -> None:
    """What the server does with a lease that has run out."""
    with get_client(sync_client=True) as client:
        client.release_concurrency_slots_with_lease(lease_id)


def held(name: str) -> bool:
    with get_client(sync_client=True) as client:
        limit = client.read_global_concurrency_limit_by_name(name)
        return limit.active_slots == 1


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[leases._Lease]:
    """The leases that are made in the test."""
    found: list[leases._Lease] = []
    inner = leases._Lease.__init__

    def init(self: leases._Lease, name: str, log: leases.Log) -> None:
        inner(self, name, log)
        found.append(self)

    monkeypatch.setattr(leases._Lease, "__init__", init)
    return found


@pytest.mark.slow
def test_one_that_ran_out_is_taken_again(server: str, impatient: None, made: list[leases._Lease]) -> None:
    with lease("again"):
        first = made[0].id
        assert first is not None
        take_away(first)
        wait_for(lambda: made[0].id not in (None, first))
        assert held("again")
    assert not held("again")


@pytest.mark.slow
def test_one_that_another_took_meanwhile_is_said(
    server: str, made: list[leases._Lease], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEW_SECONDS", 2.0)
    with lease("lost"):
        first = made[0].id
        assert first is not None
        take_away(first)
        other = leases._Lease("lost", logging.getLogger("other"))
        assert other.try_acquire() is True
        wait_for(lambda: "another host has it now" in caplog.text)
        other.release()  # that one is done: the first takes the lease again
        wait_for(lambda: made[0].id not in (None, first))
    assert not held("lost")


def test_it_is_said_once_also_where_the_server_is_away_in_between(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost; no answer; another has it; another has it; taken again, lost again, another has it; and no more answers."""
    one, done = leases._Lease("lost", logging.getLogger("one")), threading.Event()
    one.id = uuid4()
    answers = iter((None, False, False, True, False))
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.0)
    monkeypatch.setattr(one, "ask", lambda call: False)

    def acquired() -> bool | None:
        answer = next(answers)
        one.id = uuid4() if answer else None
        return answer

    monkeypatch.setattr(one, "try_acquire", acquired)
    with pytest.raises(StopIteration):
        one.keep(done)
    assert [record.getMessage()[:14] for record in caplog.records if record.name == "one"] == ["the lease lost"] * 2


@pytest.mark.slow
def test_a_wait_ends_when_the_run_is_stopped(server: str, impatient: None) -> None:
    with lease("stopped"):
        execution_process.stop_all()
        try:
            with pytest.raises(StageError) as stopped, lease("stopped"):
                pass
        finally:
            execution_process.begin()
    assert stopped.value.status == "preempted"


def test_keys_share_a_fixed_number_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()
    monkeypatch.setattr("flows.execution.lease.lease", lambda name, log: names.add(name))
    for number in range(2000):
        stage_lease(f"{number * 7919:08x}" + "0" * 56)
    assert len(names) <= STAGE_NAMES
