"""Leases: a name that one process among all hosts holds. Kept by the Prefect server, and free again within a minute of
its holder's death.

Prefect's own `concurrency` fails when the server is away for a moment, and gives a lease up for good after three tries.
These wait for the server, and take the lease again when it has run out meanwhile.
"""

import contextlib
import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.responses import ConcurrencyLimitWithLeaseResponse
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.execution import process
from schemas.errors import StageError

LEASE_SECONDS = 60.0  # the shortest that Prefect grants
RENEW_SECONDS = 10.0
ASK_SECONDS = 2.0
ANSWER_SECONDS = 10.0
HINT_SECONDS = 600.0
STAGE_NAMES = 256

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]
T = TypeVar("T")


@contextlib.contextmanager
def lease(name: str, log: Log | None = None) -> Iterator[None]:
    """Hold a name; waits for it, and for the server. Needs a Prefect server that the other holders share.

    Raises:
        StageError: `process.stop_all` was called while this waited (status `preempted`).
    """
    one = _Lease(name, log or logging.getLogger("alignflow"))
    one.acquire()
    done = threading.Event()
    # The context carries the server's address and the flow run's log.
    keeper = threading.Thread(target=contextvars.copy_context().run, args=(one.keep, done), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        done.set()
        keeper.join()
        one.release()


def stage_lease(key: str, log: Log | None = None) -> contextlib.AbstractContextManager[None]:
    """The lease on the making of a stage's result. Keys share a fixed number of names, so that none are left behind."""
    return lease(f"alignflow-stage-{int(key[:8], 16) % STAGE_NAMES:03d}", log)


class _Lease:
    """A name, and the lease on it while this process holds one."""

    def __init__(self, name: str, log: Log) -> None:
        self.name, self.log = name, log
        self.id: UUID | None = None
        self.away = False

    def ask(self, call: Callable[[SyncPrefectClient], T]) -> T | None:
        """The server's answer, None when it is away; says so once."""
        try:
            with (  # a client that has not been connected, and so says at once when the server is away
                temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
                get_client(httpx_settings={"timeout": ANSWER_SECONDS}, sync_client=True) as client,
            ):
                answer = call(client)
        except httpx.HTTPError as error:
            if not self.away:
                status = f" {error.response.status_code}" if isinstance(error, httpx.HTTPStatusError) else ""
                what = type(error).__name__ + status
                self.log.warning("the Prefect server does not keep leases now (%s); waiting for it", what)
            self.away = True
            return None
        self.away = False
        return answer

    def try_acquire(self) -> bool | None:
        """Acquire the lease if it is free: whether it was, None when the server is away."""
        return self.ask(self._try_acquire)

    def _try_acquire(self, client: SyncPrefectClient) -> bool:
        with contextlib.suppress(ObjectAlreadyExists):  # another was quicker
            client.upsert_global_concurrency_limit_by_name(self.name, 1)
        try:
            answer = client.increment_concurrency_slots_with_lease([self.name], 1, "concurrency", LEASE_SECONDS)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != HTTPStatus.LOCKED:
                raise
            return False
        self.id = ConcurrencyLimitWithLeaseResponse.model_validate(answer.json()).lease_id
        return True

    def acquire(self) -> None:
        """Acquire the lease, however long it takes."""
        began, announced, hinted = time.monotonic(), False, False
        while not (acquired := self.try_acquire()):
            if acquired is False and not announced:
                self.log.info("another host is running the same stage: waiting for its result")
                announced = True
            if acquired is False and not hinted and time.monotonic() - began > HINT_SECONDS:
                free = f"prefect gcl update {self.name} --active-slots 0"
                self.log.warning("still waiting; if no run anywhere makes it, free the lease with: %s", free)
                hinted = True
            if process.stopping():
                raise StageError("stopped while it waited for another host.", status="preempted", kind="preempted")
            time.sleep(ASK_SECONDS)

    def keep(self, done: threading.Event) -> None:
        """Renew the lease until `done`. One that ran out while the server was away is acquired again; where another
        host was first, the work continues, and says so.
        """
        said = False
        while not done.wait(ASK_SECONDS if self.away else RENEW_SECONDS):
            if self.id is not None:
                if self.ask(self._renew) is not False:
                    continue
                self.id, said = None, False
            if self.try_acquire() is False and not said:  # it may be away again before it says so
                said = True
                self.log.warning(
                    "the lease %s ran out while the Prefect server was away, and another host has it now: "
                    "both make the same result. Nothing is lost; one of the two is not needed",
                    self.name,
                )

    def _renew(self, client: SyncPrefectClient) -> bool:
        assert self.id is not None
        try:
            client.renew_concurrency_lease(self.id, LEASE_SECONDS)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != HTTPStatus.GONE:
                raise
            return False
        return True

    def release(self) -> None:
        """Give the lease back; where the server is away, it runs out by itself."""
        lease_id = self.id
        if lease_id is not None:
            self.ask(lambda client: client.release_concurrency_slots_with_lease(lease_id))
