"""What takes seconds to import, for the process that forks.py forks. Prefect and MLflow are told first to be silent, as
commands tell them.
"""

import gc
from importlib import import_module

from flows.execution import settings_files
from stages import warm
from stages.tracking import mlflow_client
from tests.support import forks

forks.use_what_is_there()  # a fork that starts others
settings_files.leave_out()
mlflow_client.set_up_mlflow()
for name in (
    *("tests.support.killable_training", "tests.faults.test_kill", *warm._HEAVY),
    *("flows.cli", "flows.pipeline", "flows.retrain", "flows.submit", "flows.servers.deploy", "tests.support.commands"),
    # and of the servers what does not look at the environment while it is imported
    *("prefect.server.api.server", "prefect.cli.server", "mlflow.store.tracking.sqlalchemy_store", "alembic"),
    *("fastapi", "flask_wtf", "graphene"),
):
    import_module(name)
gc.freeze()  # a fork need not look through it, and would copy what it looks at
