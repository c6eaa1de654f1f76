"""The large files of a run, measured and removed: its models and folders. Numbers, request and result stay."""

import shutil
from typing import TYPE_CHECKING

from stages.tracking.mlflow_client import client, pages, tracking_uri
from stages.tracking.store import BAD, entries, local_path, sizes

if TYPE_CHECKING:
    from mlflow.entities import Run

REMOVED = "artifact.removed"
"""Tag of a run whose models and folders were removed to make room."""


def needs_server(run: "Run") -> bool:
    """Whether the files of a run are reached through an MLflow server alone, and none is set."""
    return str(run.info.artifact_uri).startswith("mlflow-artifacts:") and not tracking_uri().startswith("http")


def model_locations() -> dict[str, list[str]]:
    """Run -> where the files of its models are, whole or not."""
    experiments = [experiment.experiment_id for experiment in client().search_experiments()]
    found: dict[str, list[str]] = {}
    for model in pages(lambda token: client().search_logged_models(experiments, page_token=token)):
        found.setdefault(str(model.source_run_id), []).append(str(model.artifact_location))
    return found


def folder_locations(run: "Run") -> list[str]:
    """Where the folders are that a run has stored among its own files."""
    root = str(run.info.artifact_uri)
    return [f"{root}/{entry.path.rpartition('/')[2]}" for entry in entries(root) if entry.is_dir]


def stored_size(location: str) -> int:
    """Bytes of all files at a location; 0 where there are none."""
    return sum(sizes(location).values())


def remove_stored(run: "Run", location: str) -> None:
    """Remove what is at a location, and note on its run that it is gone: the run is not reused from then on."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository  # late: see value_classes

    note = "removed to make room: nothing had used it for long"
    client().set_tag(run.info.run_id, BAD, note)  # first: were this killed, a run without files must not be reused
    path = local_path(location)
    if path is None:
        above, _, name = location.rpartition("/")
        get_artifact_repository(above, tracking_uri=tracking_uri()).delete_artifacts(name)
    else:
        shutil.rmtree(path)
    client().set_tag(run.info.run_id, REMOVED, note)  # last: what is half removed is looked at again
