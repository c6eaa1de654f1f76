"""Where runs, metrics and artifacts are kept: the one place that talks to MLflow.

`StageRun` is a stage's context on MLflow (`runtime/context.py`). Training never waits here: metrics go to a journal
file, and a side thread ships them. `find` looks up a finished run by its key, `fetch` brings an artifact, and both
check its digest.
"""

from stages.tracking.flavour import FOR_MLFLOW, load_pipeline
from stages.tracking.journal import close_left
from stages.tracking.mlflow_client import (
    answer_soon,
    as_default,
    behind_server,
    client,
    clock,
    existing_experiment,
    experiment,
    experiment_name,
    plain_client,
    retrying,
    runs,
    setup,
    tracking_uri,
)
from stages.tracking.names import TAG_LENGTH, acceptable_name, flatten, shortened
from stages.tracking.problems import not_let_in, without_passwords
from stages.tracking.reuse import compare_link, find, note_reuse
from stages.tracking.run import StageRun, Told, code_version, user
from stages.tracking.store import (
    REMOVED,
    digest,
    fetch,
    folder_locations,
    locate,
    model_locations,
    needs_server,
    portable,
    registered,
    remove_stored,
    stored_size,
)

__all__ = [
    "FOR_MLFLOW",
    "REMOVED",
    "TAG_LENGTH",
    "StageRun",
    "Told",
    "acceptable_name",
    "answer_soon",
    "as_default",
    "behind_server",
    "client",
    "clock",
    "close_left",
    "code_version",
    "compare_link",
    "digest",
    "existing_experiment",
    "experiment",
    "experiment_name",
    "fetch",
    "find",
    "flatten",
    "folder_locations",
    "load_pipeline",
    "locate",
    "model_locations",
    "needs_server",
    "not_let_in",
    "note_reuse",
    "plain_client",
    "portable",
    "registered",
    "remove_stored",
    "retrying",
    "runs",
    "setup",
    "shortened",
    "stored_size",
    "tracking_uri",
    "user",
    "without_passwords",
]
