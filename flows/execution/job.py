"""What a worker starts for a flow run: Prefect's own engine, in a process that dies with its worker.

    python -P -m flows.job

Prefect's engine alone outlives a worker that was killed, and trains on with nobody to stop it.
"""

import os
import runpy

from schemas.environment import SAFE_PATH, roots
from stages.runtime.process import die_with_parent
from stages.runtime.workspace import PRIVATE

HEARTBEAT_SECONDS = "30"  # the shortest that Prefect takes; a silent run is marked Crashed (deploy/automations.yaml)

RETRIES = "7"  # about four minutes in which the server may be away


def main() -> None:
    """Run the engine for the flow run that the environment names. Relative paths count from the first declared root."""
    die_with_parent()
    os.umask(PRIVATE)
    os.environ.update(SAFE_PATH)
    if folders := roots():
        os.chdir(folders[0])
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", HEARTBEAT_SECONDS)
    os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", RETRIES)
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
