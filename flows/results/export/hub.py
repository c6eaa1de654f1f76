"""An exported folder on the Hugging Face Hub. Whatever would stop it is said before a file is sent."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from flows.results.export.origins import Pinned
from flows.results.lookup import Model
from schemas.errors import StageError, refuse
from schemas.source import hub_errors
from schemas.text import one_line

KINDS = {".json", ".jsonl", ".safetensors", ".jinja", ".model", ".txt", ".md", ".gguf", ".tiktoken", ".yaml", ".py"}
"""Of files that belong to a model. Others in a folder from outside may be a training state, or nobody's business."""
STALE = ["*.safetensors", "*.safetensors.index.json", "*.gguf", "adapter_config.json"]
"""What an earlier push may have left that would be loaded in place of this one's files."""


@dataclass(frozen=True)
class Pushed:
    """Where a model is on the Hub."""

    url: str
    commit: str
    private: bool


@dataclass(frozen=True)
class Door:
    """A repository that may be written to."""

    name: str
    private: bool
    api: HfApi = field(repr=False)

    def push(self, folder: Path) -> Pushed:
        """Make the repository where it does not exist, and send the folder as one commit.

        Raises:
            StageError: the Hub refuses, or cannot be reached.
        """
        try:
            made = self.api.create_repo(self.name, private=self.private, exist_ok=True)
            message = "Upload from alignflow"
            sent = self.api.upload_folder(
                repo_id=self.name, folder_path=folder, commit_message=message, delete_patterns=STALE
            )
        except hub_errors() as error:
            raise _refusal(self.name, error) from error
        return Pushed(str(made), sent.oid, self.private)


def door(name: str, public: bool) -> Door:
    """The repository `name`, with the token of HF_TOKEN or of `hf auth login`, after all checks that need no model.

    Raises:
        StageError: the name is none, there is no token that may write, the Hub cannot be reached, or the repository is
            public and nobody asked for that.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise refuse("--push", name, f"is not a name on the Hub: {one_line(error, 200)}", "write ORG/NAME") from None
    if name.count("/") != 1:
        raise refuse("--push", name, "is not a name on the Hub.", "write ORG/NAME", kind="export")
    if constants.is_offline_mode():
        raise refuse("--push", name, "HF_HUB_OFFLINE is set.", "unset it for this command", kind="export")
    token = get_token()
    if not token:
        fix = (
            "make one with write access at https://huggingface.co/settings/tokens and set HF_TOKEN, or `hf auth login`"
        )
        raise refuse("--push", name, "there is no token for the Hub.", fix, kind="export")
    api = HfApi(token=token, endpoint=constants.ENDPOINT)
    try:
        _check_role(name, api.whoami())
        existing = api.repo_info(name)
    except RepositoryNotFoundError:
        return Door(name, not public, api)
    except hub_errors() as error:
        raise _refusal(name, error) from error
    if not public and not existing.private:
        message = "the repository exists and everybody can read it."
        raise refuse("--push", name, message, "name another one, make it private, or add --public", kind="export")
    return Door(name, bool(existing.private), api)


def _check_role(name: str, who: dict[str, Any]) -> None:
    """Raises StageError where the token only reads, or belongs to nobody of that name."""
    role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        fix = "make one with write access at https://huggingface.co/settings/tokens"
        raise refuse("--push", name, "the token may only read.", fix, kind="export")
    names = [str(who.get("name")), *(str(org.get("name")) for org in who.get("orgs") or [])]
    if role == "write" and name.partition("/")[0] not in names:  # a fine-grained one may know more than it lists
        fix = f"write one of {', '.join(names)} before the slash"
        raise refuse("--push", name, "the token belongs to nobody of that name.", fix, kind="export")


def check(chosen: Model, adapter: Pinned | None) -> None:
    """Raises StageError where the model is nothing to push.

    `adapter`: the base of its adapter, which is pushed alone.
    """
    if adapter is not None and not adapter.name and chosen.request is not None:
        below = chosen.request.inputs["model"].uri
        message = "the adapter's base is only here, so nobody could use it."
        fix = f"push the base first (`alignflow export {below} --push ORG/BASE`) and add --base ORG/BASE; or push the "
        raise refuse("--push", chosen.name, message, fix + "whole model", kind="export")
    inner = [file.relative_to(chosen.folder) for file in filter(Path.is_file, chosen.folder.rglob("*"))]
    odd = [str(file) for file in inner if file.suffix not in KINDS or any(part[0] == "." for part in file.parts)]
    if odd and chosen.request is None:  # a folder from outside: what stages publish is known
        message = f"the folder holds files that are no part of a model: {', '.join(sorted(odd)[:5])}."
        raise refuse("--push", chosen.folder, message, "take them out, or name a model of a run", kind="export")


def _refusal(name: str, error: Exception) -> StageError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    fix = {
        401: "the token is wrong or has run out: make another one, and set HF_TOKEN",
        403: "use a token that may write there: https://huggingface.co/settings/tokens",
    }.get(status or 0, "check the network, and try again")
    message = f"the Hub does not take it: {one_line(error, 300)}."
    return refuse("--push", name, message, fix, kind="export")
