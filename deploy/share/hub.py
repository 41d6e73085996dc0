"""Upload of an exported folder to the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from fedphd.common.errors import ConfigError, ConnectionLostError, FedPhDError

_TOKEN_HELP = (
    "make one with write access at https://huggingface.co/settings/tokens, then `hf auth login`, "
    "or set HF_TOKEN"
)
_UNAUTHORISED, _FORBIDDEN = 401, 403


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


def upload(folder: Path, name: str, *, private: bool) -> str:
    """Upload what is in ``folder`` as the model ``name``, which is made if it is not there.

    The folder is only read. The token is the one of `hf auth login` or ``HF_TOKEN``, the hub that
    of ``HF_ENDPOINT``.

    Returns:
        The model's address.

    Raises:
        ConfigError: the token is missing or refused, the hub refuses the name or a file, the hub
            is switched off by ``HF_HUB_OFFLINE``, or ``private`` is asked for and the model is
            there and public.
        ConnectionLostError: the hub cannot be reached.
    """
    check_name(name)
    check_token()
    api = HfApi(library_name="fedphd")
    with _translated(api.endpoint, folder, name):
        made = api.create_repo(name, private=private or None, exist_ok=True)
        # What exists stays as public as it was.
        if private and not api.model_info(made.repo_id).private:
            raise ConfigError(
                f"--private: the model {made.repo_id} is there already and is public, so nothing "
                "was uploaded; make it private in its settings, or choose another name"
            )
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message="Upload by FedPhD"
        )
    return str(made)


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
        raise _ours(_root(error), endpoint, again) from error


def _root(error: BaseException) -> BaseException:
    """The answer or the break of the connection that an error was made of, or itself."""
    while error.__cause__ is not None and not isinstance(error, httpx.HTTPError):
        error = error.__cause__
    return error


def _ours(error: BaseException, endpoint: str, again: str) -> FedPhDError:
    if isinstance(error, httpx.TransportError):
        return ConnectionLostError(
            f"the Hugging Face hub at {endpoint} cannot be reached ({error}): look at the "
            f"connection, or at HF_ENDPOINT; {again}"
        )
    said = str(error)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = error.server_message or f"status {status}"
        if status in (_UNAUTHORISED, _FORBIDDEN):
            return ConfigError(
                f"the Hugging Face hub at {endpoint} refuses the token ({said}): {_TOKEN_HELP}; "
                f"{again}"
            )
        if status >= 500:
            return ConnectionLostError(
                f"the Hugging Face hub at {endpoint} has a fault of its own ({said}): try later; "
                f"{again}"
            )
    return ConfigError(f"the Hugging Face hub at {endpoint} did not take it ({said}); {again}")
