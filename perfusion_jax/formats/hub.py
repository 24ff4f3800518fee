"""Uploading an export to the Hugging Face hub; done where the user asks for it, and never otherwise."""

from http import HTTPStatus
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from perfusion_jax.runtime.errors import InputError, UnavailableError

_FORBIDDEN = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


def push(folder: Path, files: list[str], hub_id: str, public: bool) -> str:
    """Uploads files; makes the repository if there is none.

    Args:
        folder: on this machine.
        files: of it, by their names.
        hub_id: owner and name, `owner/name`.
        public: whether anybody may see the repository. One that everybody sees already takes nothing unless this is
            asked for; one that exists keeps who may see it.

    Returns:
        The repository's address.

    Raises:
        InputError: the name is none, nobody is logged in, or the hub does not allow it.
        UnavailableError: the hub cannot be reached, or fails.
    """
    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        url = api.create_repo(hub_id, private=not public, exist_ok=True)
        if not public and not api.model_info(hub_id).private:
            raise InputError(f"{hub_id}: everybody can see this repository; give --public if that is meant")
        api.upload_folder(
            repo_id=hub_id, folder_path=folder, allow_patterns=files, commit_message="Export by perfusion_jax"
        )
    except LocalTokenNotFoundError as error:
        raise InputError(f"{hub_id}: nobody is logged in here: do so with `hf auth login`") from error
    except (HfHubHTTPError, HFValidationError) as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        reason = str(error).strip().splitlines()[0]
        if status in _FORBIDDEN:
            advice = "log in with `hf auth login`, with a token that may write"
            raise InputError(f"{hub_id}: the hub does not allow it ({reason}): {advice}") from error
        if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise UnavailableError(f"{hub_id}: the hub said: {reason}") from error
        raise InputError(f"{hub_id}: the hub said: {reason}") from error
    except OSError as error:  # no network
        raise UnavailableError(f"{hub_id}: the hub cannot be reached: {error}") from error
    except InputError:
        raise
    except ValueError as error:  # the hub's client, of a card that the hub does not take
        raise InputError(f"{hub_id}: the hub said: {' '.join(str(error).split())}") from error
    return str(url)
