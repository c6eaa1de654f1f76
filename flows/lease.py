"""Leases: a name that one process among all hosts holds. Kept by the Prefect server, and free again within a minute of
its holder's death.
"""

import contextlib
import logging
from collections.abc import Iterator

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists

LEASE_SECONDS = 60.0  # the shortest that Prefect grants; renewed while the holder lives
STAGE_NAMES = 256

Log = logging.Logger | logging.LoggerAdapter[logging.Logger]


@contextlib.contextmanager
def lease(name: str, slots: int = 1) -> Iterator[None]:
    """Hold one of a name's slots; waits for it. Needs a Prefect server that the other holders share."""
    with get_client(sync_client=True) as client, contextlib.suppress(ObjectAlreadyExists):  # another was quicker
        client.upsert_global_concurrency_limit_by_name(name, slots)
    with concurrency(name, lease_duration=LEASE_SECONDS, strict=True, raise_on_lease_renewal_failure=False):
        yield


def stage_lease(key: str) -> contextlib.AbstractContextManager[None]:
    """The lease on the making of a stage's result. Keys share a fixed number of names, so that none are left behind."""
    return lease(f"alignflow-stage-{int(key[:8], 16) % STAGE_NAMES:03d}")
