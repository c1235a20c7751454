"""A run's shared adapter on the Hugging Face hub, with its model card and nothing else of the run."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from molehill import files
from molehill.errors import AdapterError, ConfigError, DeployError, first_line
from molehill.molora.adapter import read_manifest
from molehill_simulation.card import MODEL, render

# What an adapter folder may hold; anything else there is somebody's own.
_OURS = re.compile(
    r"molora\.json|router\.safetensors|head\.safetensors"
    r"|experts/[A-Za-z0-9]+/(adapter_config\.json|adapter_model\.safetensors|expert\.safetensors)"
)
_DENIED = (401, 403)
_TAKEN = 409


def push(run: Path, repo: str, *, public: bool = False, api: HfApi | None = None) -> str:
    """Upload the adapter that all owners share, and the model card.

    Personal gates and heads, the other cards, events, checkpoints and rows stay here.

    Args:
        run: Folder of a finished run.
        repo: Its name on the hub, such as ``ORG/NAME``; it is made if there is none, as a private one.
        public: Let everybody read it.
        api: The hub; that of the environment (``HF_ENDPOINT``, ``HF_TOKEN``) when None.

    Returns:
        The address of what was uploaded.

    Raises:
        AdapterError: A file of the adapter was damaged, or its base is nowhere but on this machine.
        ConfigError: The name is none, or the repository is open to everybody and ``public`` is not said.
        DataError: A file of the run cannot be read.
        DeployError: The hub cannot be reached, or refuses it.
        ResumeError: The folder does not hold a finished run.
    """
    operations = _operations(run)
    hub = api or HfApi()
    try:
        try:
            hub.create_repo(repo, private=not public)
        except HfHubHTTPError as error:
            if error.response.status_code != _TAKEN:
                raise
            if not public and not hub.model_info(repo).private:
                raise ConfigError(
                    "the repository is there, and open to everybody", where=repo,
                    mend="Give --public if that is meant, or another name.",
                ) from None  # fmt: skip
        return str(hub.create_commit(repo, operations, commit_message="Adapter and model card").commit_url)
    except HFValidationError as error:
        raise ConfigError(f"no name of a repository: {first_line(error)}", where=repo, mend="Give ORG/NAME.") from None
    except OfflineModeIsEnabled:
        mend = "Unset HF_HUB_OFFLINE, then push again."
        raise DeployError("the hub is switched off here", where=hub.endpoint, mend=mend) from None
    except HfHubHTTPError as error:
        denied = error.response.status_code in _DENIED
        raise DeployError(
            f"the hub refuses it: {first_line(error)}", where=hub.endpoint,
            mend="Log in with `hf auth login`, or set HF_TOKEN to a token that may write there."
            if denied else "Mend that, then push again.",
        ) from None  # fmt: skip
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise DeployError(
            f"the hub cannot be reached, or answers with what is none of its answers: {first_line(error)}",
            where=hub.endpoint, mend="Check the network and HF_ENDPOINT, then push again.",
        ) from None  # fmt: skip


def _operations(run: Path) -> list[CommitOperationAdd]:
    """What is uploaded, every file as its run wrote it."""
    card = render(run)[MODEL].encode()
    folder = run / "adapter"
    manifest = read_manifest(folder)
    base = manifest.base["id"]
    if base.startswith(("local:", "sample:")):
        raise AdapterError(
            f"its base {base} is not on the hub, and nobody else could open the adapter", where=str(folder),
            mend="Train on a base of the hub, or write a whole model: molehill expert RUN --merged --out DIR.",
        )  # fmt: skip
    if not manifest.files:
        raise AdapterError(
            "it has no digests of its files", where=str(folder),
            mend="An older version wrote it: go on with its run, which writes it again.",
        )  # fmt: skip
    found = []
    for name, digest in sorted(manifest.files.items()):
        path = folder / name
        if not _OURS.fullmatch(name):
            raise AdapterError(f"{name} is no file of an adapter", where=str(folder))
        if name != "molora.json" and (not path.is_file() or files.digest_of(path) != digest):
            raise AdapterError("the file was damaged, or is not there", where=str(path), mend="Restore it.")
        found.append(CommitOperationAdd(name, path.read_bytes()))
    return [CommitOperationAdd(MODEL, card), *found]
