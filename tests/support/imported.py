"""What takes seconds to import, for the process that forks.py forks. Prefect and MLflow are told first to be silent, as
commands tell them. What a fork starts is a fork too: servers, stages, and Python as far as stand_in.py goes.
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
from tests.support import forked_servers, forked_stages  # noqa: E402

settings_files.leave_out()
mlflow_client.set_up_mlflow()
for name in (
    *("tests.support.killable_training", "tests.faults.test_kill", *stages_warm._HEAVY),
    *("flows.cli", "flows.pipeline", "flows.retrain", "flows.submit", "flows.servers.deploy", "flows.worker"),
    "tests.support.commands",
    # and of the servers what does not look at the environment while it is imported
    *("prefect.server.api.server", "prefect.cli.server", "mlflow.store.tracking.sqlalchemy_store", "alembic"),
    *("fastapi", "flask_wtf", "graphene"),
    *("torch.distributed.fsdp", "torch._dynamo", "tests.stages.align.test_four_ranks"),  # what shards weights
):
    try:
        import_module(name)
    except ImportError as error:  # which multiprocessing would pass over in silence
        raise RuntimeError(f"{name} cannot be imported") from error
warm.Warm = forked_stages.Warm
supervisor.subprocess = forked_servers.SUBPROCESS
gc.freeze()  # a fork need not look through it, and would copy what it looks at
