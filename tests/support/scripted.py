"""How tests start the stage `fake` (scripted_stage.py)."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flows.execution import warm
from schemas.stage import Request
from tests.support import forks

HEAVY = "mlflow.store.tracking.sqlalchemy_store mlflow.store.model_registry.sqlalchemy_store"
"""What every run of the stage needs, for FAKE_HEAVY: its forks share it."""

ALONE = [sys.executable, str(Path(__file__).with_name("scripted_stage.py"))]
"""Imports everything anew."""
FAKE = forks.PYTHON
"""The same in a fork; the stage's name and its request follow."""


def fake_request(**params: object) -> Request:
    return Request(stage="fake", version=1, params=dict(params), name="count", experiment="tests")  # type: ignore[arg-type]


@contextmanager
def warmed() -> Iterator[warm.Warm]:
    """A warm process that forks the stage, and has imported what all of its runs need."""
    own = warm.Warm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm, "COMMAND", ALONE)
        asks = own.asks(Request(stage="sft", version=1, params={}), {**os.environ, "FAKE_HEAVY": HEAVY})
    if asks is not None:  # None where a stage is never a fork
        os.close(asks)
    yield own
    own.end()
