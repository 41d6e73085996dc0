"""Upload of an exported folder to the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import HfApi, RepoUrl, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from fedphd.common.errors import ConfigError, ConnectionLostError, FedPhDError
from fedphd.deploy.share.places import ONNX, SCHEDULER, UNET

_TOKEN_HELP = (
    "make one with write access at https://huggingface.co/settings/tokens, then `hf auth login`, "
    "or set HF_TOKEN"
)
_UNAUTHORISED, _FORBIDDEN, _SERVERS_FAULT = 401, 403, 500
# It waited too long, somebody else committed meanwhile, or there were too many requests.
_PASSING = (408, 412, 429)
# What of a former upload must not stay beside another network.
_REPLACED = [f"{part}/*" for part in (UNET, SCHEDULER, ONNX)]


def check_name(name: str) -> None:
    """Raise ConfigError unless a model on the hub may be called ``name``."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"NAME = {name}: {error}; write USER/MODEL") from error


def check_token() -> None:
    """Raise ConfigError unless there is a token for the hub."""
    if not get_token():
        raise ConfigError(f"there is no token for the Hugging Face hub: {_TOKEN_HELP}")


def make(folder: Path, name: str, *, private: bool) -> RepoUrl:
    """Make the model ``name`` for what comes of ``folder``, if it is not there.

    The token is the one of `hf auth login` or ``HF_TOKEN``, the hub that of ``HF_ENDPOINT``.

    Returns:
        The model's address; its ``repo_id`` has the user, whom ``name`` may leave out.

    Raises:
        ConfigError: the token is missing or refused, the hub refuses the name or a file, the hub
            is switched off by ``HF_HUB_OFFLINE``, or ``private`` is asked for and the model is
            there and public.
        ConnectionLostError: the hub cannot be reached.
        FedPhDError: it failed otherwise.
    """
    check_name(name)
    check_token()
    api = _api()
    with _translated(api.endpoint, folder, f"{name} --private" if private else name):
        made: RepoUrl = api.create_repo(name, private=private or None, exist_ok=True)
        # What exists stays as public as it was.
        if private and not api.model_info(made.repo_id).private:
            raise ConfigError(
                f"--private: the model {made.repo_id} is there already and is public, so nothing "
                "was uploaded; make it private in its settings, or choose another name"
            )
    return made


def upload(folder: Path, name: str) -> None:
    """Upload what is in ``folder``, which is only read, into the model ``name``.

    What an earlier upload left of the network, and this one has not, is removed.

    Raises as ``make``.
    """
    api = _api()
    with _translated(api.endpoint, folder, name):
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Upload by FedPhD",
            delete_patterns=_REPLACED,
        )


def _api() -> HfApi:
    return HfApi(library_name="fedphd")


@contextmanager
def _translated(endpoint: str, folder: Path, name: str) -> Iterator[None]:
    """Errors of the hub's library as ours, which say what to do and where the folder is."""
    again = f"nothing is lost: {folder} is as it was; then `fedphd push {folder} {name}`"
    try:
        yield
    except FedPhDError:
        raise
    except OfflineModeIsEnabled as error:
        raise ConfigError(
            f"HF_HUB_OFFLINE keeps the Hugging Face hub from being asked: unset it; {again}"
        ) from error
    # The library raises a RuntimeError for a file whose upload failed, and a ValueError for an
    # answer that it does not understand, or a card that the hub does not take.
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _ours(error, endpoint, again) from error


def _ours(error: Exception, endpoint: str, again: str) -> FedPhDError:
    """The error for people; ``again`` says how to go on once its cause is mended."""
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, httpx.HTTPError):
        cause = cause.__cause__
    hub, said = f"the Hugging Face hub at {endpoint}", str(error)
    if isinstance(cause, httpx.TransportError):
        return ConnectionLostError(
            f"{hub} cannot be reached ({cause}): look at the connection, or at HF_ENDPOINT; {again}"
        )
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        if status in (_UNAUTHORISED, _FORBIDDEN):
            said = cause.server_message or f"status {status}"
            return ConfigError(f"{hub} refuses the token ({said}): {_TOKEN_HELP}; {again}")
        if status >= _SERVERS_FAULT:
            return ConnectionLostError(
                f"{hub} has a fault of its own (status {status}): try later; {again}"
            )
        if status in _PASSING:
            said = cause.server_message or said
            return ConnectionLostError(
                f"{hub} does not take it now (status {status}, {said}): try later; {again}"
            )
        # Of a card, the hub's library says more than the hub's status.
        said = (cause.server_message or said) if cause is error else said
        return ConfigError(f"{hub} did not take it ({said}): {again}")
    if isinstance(error, ValueError):
        return ConfigError(f"{hub} did not take it ({said}): {again}")
    why = said if cause is error else f"{said} {cause}"
    return FedPhDError(f"the upload to {hub} failed ({why}): {again}")
