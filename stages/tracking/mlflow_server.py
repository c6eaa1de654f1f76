"""MLflow's server in one process, with users of its own: who they are is set before it starts.

    python -P -m stages.tracking.mlflow_server server ...     the options are those of `mlflow`

MLflow creates its first user with the password that it is given, and takes no notice of that password afterwards.
"""

import gc
import os
import runpy
import sys
from typing import Any

import uvicorn  # first: by it MLflow's application knows that it is served, and guards itself

from schemas import environment

ROLE = "alignflow"
WORKSPACE = "default"
KINDS = ("experiment", "registered_model", "prompt")
"""What our user may do all to, with what belongs to it: runs, models, versions."""


def provide_users() -> None:
    """Give MLflow's admin the password of the environment, and let our own user in, who is no admin. Without either,
    the users are the operator's (a configuration of their own), and are left to MLflow.
    """
    name, _, password = environment.login().partition(":")
    if not name and not os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD"):
        return
    from mlflow.server.auth import auth_config  # late: it takes seconds, and reads the environment
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore()
    store.init_db(auth_config.database_uri)
    if os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD") and auth_config.admin_username and auth_config.admin_password:
        provide(store, auth_config.admin_username, auth_config.admin_password, is_admin=True)
    if name:
        provide(store, name, password, is_admin=False)
        grant(store, name)


def provide(store: Any, name: str, password: str, *, is_admin: bool) -> None:
    """Let the user exist, with this password."""
    if not store.has_user(name):
        store.create_user(name, password, is_admin=is_admin)
    elif not store.authenticate_user(name, password):
        store.update_user(name, password=password)
    if store.get_user(name).is_admin != is_admin:
        store.update_user(name, is_admin=is_admin)


def grant(store: Any, name: str) -> None:
    """Let the user do all to experiments and models: those that are there, and those to come."""
    if not hasattr(store, "create_role"):  # an MLflow without roles
        return grant_each(store, name, os.environ["MLFLOW_BACKEND_STORE_URI"])
    user = store.get_user(name)
    role = next((one for one in store.list_roles([WORKSPACE]) if one.name == ROLE), None)
    role = role or store.create_role(ROLE, WORKSPACE)
    granted = {one.resource_type for one in store.list_role_permissions(role.id)}
    for kind in KINDS:
        if kind not in granted:
            store.add_role_permission(role.id, kind, "*", "MANAGE")
    if role.id not in [one.id for one in store.list_user_roles(user.id)]:
        store.assign_role_to_user(user.id, role.id)


def grant_each(store: Any, name: str, uri: str) -> None:
    """The same by a grant for each one that is there. Those to come are granted to who makes them."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiments = {one.experiment_id for one in client.search_experiments(view_type=3)}
    for number in experiments - {one.experiment_id for one in store.list_experiment_permissions(name)}:
        store.create_experiment_permission(number, name, "MANAGE")
    models = {one.name for one in client.search_registered_models()}
    for model in models - {one.name for one in store.list_registered_model_permissions(name)}:
        store.create_registered_model_permission(model, name, "MANAGE")


def serve_here(command: list[str], *, extra_env: dict[str, str], **_: Any) -> None:
    """Be the server. MLflow would start another process, which would import all that this one has again: three seconds.

    Args:
        command: Python, `-m uvicorn`, and its options.
    """
    os.environ.update(extra_env)
    # Where the database was migrated, alembic has put the working directory before all that Python imports.
    sys.path[:] = [folder for folder in sys.path if os.path.isabs(folder)]
    uvicorn.main(command[3:], prog_name="uvicorn")


def main(options: list[str]) -> None:
    """Set the users, then run MLflow's command line."""
    gc.set_threshold(10_000)  # as in flows/__init__.py
    provide_users()
    from mlflow import server

    if hasattr(server, "_exec_cmd"):
        server._exec_cmd = serve_here
    sys.argv = ["mlflow", *options]
    runpy.run_module("mlflow", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
