"""What takes seconds to import, for the process that forks.py forks. Prefect and MLflow are told first to be silent, as
commands tell them. All that is started from here is a fork too: servers, stages, and each start of Python.
"""

import gc
import os
import sys
from importlib import import_module

from tests.support import forks

forks.use_what_is_there()
sys.executable = os.environ[forks.PROGRAM]

from flows.execution import settings_files, warm  # noqa: E402 - what is started by that name
from flows.servers import supervisor  # noqa: E402
from stages import warm as stages_warm  # noqa: E402
from stages.tracking import mlflow_client  # noqa: E402

settings_files.leave_out()
mlflow_client.set_up_mlflow()
for name in (
    *("tests.support.killable_training", "tests.faults.test_kill", *stages_warm._HEAVY),
    *("flows.cli", "flows.pipeline", "flows.retrain", "flows.submit", "flows.servers.deploy", "flows.worker"),
    *("tests.support.commands", "tests.support.forked_stages", "tests.support.forked_servers"),
    # and of the servers what does not look at the environment while it is imported
    *("prefect.server.api.server", "prefect.cli.server", "mlflow.store.tracking.sqlalchemy_store", "alembic"),
    *("fastapi", "flask_wtf", "graphene"),
    *("torch.distributed.fsdp", "torch._dynamo", "tests.stages.align.test_four_ranks"),  # what shards weights
):
    import_module(name)
warm.Warm = sys.modules["tests.support.forked_stages"].Warm
supervisor.subprocess = sys.modules["tests.support.forked_servers"].SUBPROCESS
gc.freeze()  # a fork need not look through it, and would copy what it looks at
