"""Up to the hub and down from it, and what its client's errors mean."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from timm_varchan.errors import ToolError
from timm_varchan.hub.folder import (
    CONFIG,
    WEIGHTS,
    check_weights,
    pickled_error,
    read_config,
    refuse_pickles,
)
from timm_varchan.version import __version__

#: What name, token or network can cure: errors of the hub's client and of the HTTP library below
#: it. Other OSErrors (a full disk, a folder that may not be read) speak for themselves.
CLIENT_ERRORS: tuple[type[Exception], ...] = (
    *(base for base in HfHubHTTPError.__bases__ if base is not OSError),
    HfHubHTTPError, HFValidationError, EntryNotFoundError, FileMetadataError,
    LocalTokenNotFoundError,
    ConnectionError, TimeoutError,
)  # fmt: skip
_UNAUTHORIZED, _FORBIDDEN = 401, 403


def push(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool = True,
    revision: str | None = None,
    commit_message: str = "Add model",
) -> str:
    """Upload a saved folder to the hub in one commit; the repository is made if it is not there.

    Repeated after a failure it goes on: weights that the hub has already are not sent again.

    Args:
        folder: What `save` wrote, and whatever else stands in it.
        repo_id: `"ORG/NAME"`.
        token: A token that may write; by default `HF_TOKEN` or the one of `hf auth login`.
        private: Whether a new repository is private; one that is there stays as it is.
        revision: The branch.
        commit_message: First line of the commit.

    Returns:
        The address of the repository.

    Raises:
        FileNotFoundError: The folder is no saved model.
        ValueError: It holds pickles, or its configuration is broken.
        ToolError: The upload failed; the folder is as it was, and the message holds the command
            that repeats it.
    """
    folder = Path(folder)
    read_config(folder, str(folder))
    check_weights(folder, str(folder))
    refuse_pickles(folder.rglob("*"))
    api = HfApi(token=token, library_name="timm_varchan", library_version=__version__)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
        )
    except CLIENT_ERRORS as error:
        again = ["python", "-m", "timm_varchan", "push", str(folder), repo_id]
        again += [] if private else ["--public"]
        again += [] if revision is None else ["--revision", revision]
        raise ToolError(
            f"Could not push to {repo_id}: {hub_reason(error, repo_id)} Nothing is lost, the model "
            f"is in {folder}; repeat with: {shlex.join(again)}"
        ) from error
    return str(repository)


def download(name: str, cache_dir: str | Path | None) -> Path:
    """Fetch configuration and weights of a repository; the folder they lie in."""
    repo_id, _, revision = name.partition("@")
    where: dict[str, Any] = {"revision": revision or None, "cache_dir": cache_dir}
    try:
        config = hf_hub_download(repo_id, CONFIG, **where)
        try:
            hf_hub_download(repo_id, WEIGHTS, **where)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            for pickled in ("pytorch_model.bin", "model.bin", "pytorch_model.pth"):
                if HfApi().file_exists(repo_id, pickled, revision=where["revision"]):
                    raise pickled_error(f"hf-hub:{name}", pickled) from error
            raise
    except CLIENT_ERRORS as error:
        missing = isinstance(error, (RepositoryNotFoundError, EntryNotFoundError))
        kind = FileNotFoundError if missing and not _is_offline(error) else ToolError
        raise kind(f"Cannot load hf-hub:{name}: {hub_reason(error, repo_id)}") from error
    return Path(config).parent


def _is_offline(error: BaseException) -> bool:
    return isinstance(error, LocalEntryNotFoundError)


def hub_reason(error: BaseException, repo_id: str) -> str:
    """One sentence that says what the hub's client met, and one that says the cure."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    login = "Log in with `hf auth login` or set HF_TOKEN"
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no token. {login}."
    if isinstance(error, GatedRepoError) or status == _FORBIDDEN:
        return f"access to {repo_id} is not granted. {login} of an account that has access."
    if status == _UNAUTHORIZED:
        return f"no valid token, or there is no {repo_id}. {login}, and check the name."
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision. Check what stands after the @."
    if isinstance(error, RepositoryNotFoundError):
        return f"you can see no repository {repo_id}. Check the name. {login} if it is private."
    if isinstance(error, HFValidationError):
        return f"{line}. Give ORG/NAME."
    if isinstance(error, EntryNotFoundError) and not _is_offline(error):
        return f"it lacks {CONFIG} or {WEIGHTS}. Give the repository of a timm model."
    if status is not None:
        return f"the hub answered {status} ({line}). Try again later."
    return f"the hub cannot be reached ({type(error).__name__}). Check the network and HF_ENDPOINT."
