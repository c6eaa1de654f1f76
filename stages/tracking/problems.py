"""What MLflow's own errors mean: which may pass, which say that something is missing, and the others in our words."""

import os
import re

from schemas.errors import StageError, refuse

URI = "MLFLOW_TRACKING_URI"
START = "start it (alignflow up)"

# Errors of a locked database, and of a server that is away or busy.
TRANSIENT = (
    r"database (table )?is locked|error code (429|502|503|504)|too many (429|502|503|504) error|max retries exceeded"
    r"|connection (refused|reset|aborted|timed out)|failed to establish|read timed out"
)
_IN_TRASH = r"The (run|experiment) '?([\w-]+)'? must be in the 'active'"
_NO_ANSWER = r"API request to \S+ failed with exception"
_NOT_MLFLOW = r"failed with error code 40[045]|response body was not in a valid JSON"
_ADDRESSES = r"(https?|sqlite|postgresql|mysql|mssql)(\+\w+)?://"


def is_transient(error: Exception) -> bool:
    """Whether trying again can help: a locked database, a server that is away."""
    if isinstance(error, StageError):
        return error.problem.kind == "server"
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return re.search(TRANSIENT, str(error), re.IGNORECASE) is not None


def is_missing(error: Exception) -> bool:
    """Whether MLflow says that there is no such run, model or artifact, or that none can have this name.

    Everything else, a 404 of whatever answers in MLflow's place included, says nothing about them.
    """
    missing = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE")
    return getattr(error, "error_code", None) in missing


def check_address(uri: str) -> None:
    """Raise StageError for a store that alignflow does not use: MLflow's folders of files, and Databricks."""
    if re.match(_ADDRESSES, uri):
        return
    if uri.startswith("databricks"):
        message = "Databricks keeps runs and models in its own way, which alignflow does not speak."
    elif re.match(r"file:|[^:]*$", uri):
        message = "this is a folder of files (./mlruns), in which MLflow no longer keeps runs."
    else:
        message = "this is neither a database nor an http(s) address."
    fix = "unset it, then runs are kept in the home folder; or name an MLflow server (http://HOST:5000)"
    raise refuse(URI, without_passwords(uri), message, fix, kind="server")


def in_our_words(error: Exception, uri: str, first: bool) -> StageError | None:
    """The problem behind an error that is not worth another try; None where it is none that we know.

    `first`: the server has not answered this process before, so that nothing is lost and the address may be wrong.
    """
    code, text = getattr(error, "error_code", None), str(error)
    if code == "UNAUTHENTICATED":
        return not_let_in()
    if code == "PERMISSION_DENIED":
        user = os.environ.get("MLFLOW_TRACKING_USERNAME")
        fix = "let an administrator of that server grant it to this user, or set another one"
        return refuse("MLFLOW_TRACKING_USERNAME", user, f"MLflow forbids it: {first_line(error)}", fix, kind="access")
    if trash := re.search(_IN_TRASH, text):
        return in_trash(trash[1], trash[2], trash[2])
    if not uri.startswith("http"):
        return None
    away = is_transient(error) or re.search(_NO_ANSWER, text)
    other = type(error).__name__ == "MlflowException" and re.search(_NOT_MLFLOW, text)
    if not away and not other:
        return None
    message = "MLflow does not answer" if away else "something else than MLflow is there"
    fix = f"{START}; or correct {URI}; or unset it, then runs are kept in the home folder"
    return refuse(
        URI,
        without_passwords(uri),
        f"{message}: {first_line(error)}",
        fix if first else f"{START} and run this again: it resumes",
        kind="server",
        status="refused" if first else "failed",
    )


def in_trash(what: str, name: str, number: str) -> StageError:
    """A run or an experiment that was deleted in MLflow, where it keeps its name until it is purged."""
    fix = f"restore it in MLflow's UI, or by: mlflow {what}s restore --{what}-id {number}"
    if what == "experiment":
        fix += "; or give the config another `name`"
    return refuse(what, name, f"this {what} is in MLflow's trash.", fix, kind="deleted")


def not_let_in() -> StageError:
    """The problem of a server that refuses our user and password, or asks for some where we have none."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    fix = "set both to those of a user of that server (of `alignflow`: in passwords.json of its home)"
    field = "MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD"
    return refuse(field, f"{user}, ***", "MLflow refuses them.", fix, kind="access")


def without_passwords(text: str) -> str:
    """The text with its addresses as they may be shown: credentials before `@` are stripped."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def first_line(error: Exception) -> str:
    return without_passwords((str(error).splitlines() or [type(error).__name__])[0])[:200]
