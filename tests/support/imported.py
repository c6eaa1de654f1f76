"""What takes a command seconds to import, for the process that commands.py forks; told first to be silent, as there."""

from importlib import import_module

from flows.execution import settings_files
from stages.tracking import mlflow_client

settings_files.leave_out()
mlflow_client.set_up_mlflow()
for name in (
    *("flows.cli", "flows.pipeline", "flows.retrain", "flows.submit", "flows.servers.deploy"),
    *("mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store"),
    "tests.support.commands",
):
    import_module(name)
