"""Where a base model comes from: the package, a folder, or the Hugging Face hub."""

import errno
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from perfusion_jax.base_model.weights import has_variant
from perfusion_jax.runtime import shipped
from perfusion_jax.runtime.errors import InputError, UnavailableError
from perfusion_jax.runtime.files import at_home, is_lasting, storage_errors
from perfusion_jax.runtime.names import SHORT_NAMES

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_SMALL_FILES = ("model_index.json", "*/*config.json", "tokenizer/*", "tokenizer_2/*")


_TRANSFORMERS_FILES = ("*.json", "merges.txt")
# Repositories hold weights for other libraries as well, as safetensors too.
_TRANSFORMERS_WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors")
_TRANSFORMERS_MSGPACK = "flax_model.msgpack"


def full_name(source: str, variant: str | None) -> tuple[str, str | None]:
    """Returns the hub id and the variant that a short name stands for; of other names, what is given."""
    if source in SHORT_NAMES and not Path(source).is_dir():
        there = SHORT_NAMES[source]
        return there.hub_id, variant or there.variant
    return source, variant


def find_folder(source: str, revision: str | None, variant: str | None = None, weights: bool = True) -> Path:
    """Returns the diffusers-layout folder of a base model; downloads it when `source` is a hub id that is not cached.

    Args:
        source: `emoji` for the model inside the package, a folder, or a hub id such as
            `stable-diffusion-v1-5/stable-diffusion-v1-5`.
        revision: branch, tag or commit of a hub id.
        variant: `fp16` or None: which weight files.
        weights: False downloads the configs and the tokenizer alone.

    Raises:
        InputError: there is no such folder or hub id, or it is not in the diffusers layout.
        UnavailableError: the hub cannot be reached.
    """
    if source == "emoji" and not shipped.MODEL.is_dir():
        raise InputError(
            "emoji: the small model that ships with the package is not in this build; name a folder or a hub id"
        )
    folder = shipped.MODEL if source == "emoji" else Path(at_home(source))
    if not folder.is_dir():
        if not is_hub_id(source):
            short = ", ".join(("emoji", *SHORT_NAMES))
            raise InputError(f"{source}: no such folder, and not a hub id (owner/name) or one of {short}")
        folder = _download(source, revision, variant) if weights else _fetch(source, revision)
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder}: no model_index.json: not a model in the diffusers layout")
    return folder


def find_transformers_folder(source: str) -> Path:
    """Returns the folder of a model in transformers' layout; downloads it when `source` is a hub id.

    Weights come as safetensors, or as Flax's msgpack where the hub has none, and never as pickles.

    Raises:
        InputError: there is no such folder or hub id, or the hub has pickled weights alone.
        UnavailableError: the hub cannot be reached.
    """
    folder = Path(at_home(source))
    if folder.is_dir():
        return folder
    if not is_hub_id(source):
        raise InputError(f"{source}: no such folder, and not a hub id (owner/name)")
    with _hub_errors(source):
        folder = Path(snapshot_download(source, allow_patterns=[*_TRANSFORMERS_FILES, *_TRANSFORMERS_WEIGHTS]))
        if not _has_weights(folder):
            snapshot_download(source, allow_patterns=[_TRANSFORMERS_MSGPACK])
    if not _has_weights(folder):
        raise InputError(
            f"{source}: no model.safetensors or {_TRANSFORMERS_MSGPACK} on the hub, or the network failed before all "
            "was fetched. Pickled weights (*.bin) can run code when read, and are never loaded or fetched; convert "
            'them once, where you trust them and have PyTorch, and put the other files beside them: python -c "from '
            f"transformers import AutoModel as M; M.from_pretrained('{source}').save_pretrained('converted')\""
        )
    return folder


def find_cached_folder(hub_id: str) -> Path | None:
    """Returns the folder of a model in transformers' layout in the hub's cache, or None; asks no hub."""
    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    small = (folder / name for name in ("config.json", "preprocessor_config.json"))
    return folder if _has_weights(folder) and all(file.is_file() for file in small) else None


def may_fetch(source: str) -> bool:
    """Whether a base model of that name comes from the hub, and HF_HUB_OFFLINE does not forbid to ask it."""
    on_hub = source in SHORT_NAMES or is_hub_id(source)
    return on_hub and not Path(at_home(source)).exists() and not constants.HF_HUB_OFFLINE


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in (*_TRANSFORMERS_WEIGHTS, _TRANSFORMERS_MSGPACK))


def is_hub_id(source: str) -> bool:
    """Whether a name that is no folder looks like owner/name on the hub."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


@contextmanager
def _hub_errors(hub_id: str, revision: str | None = None) -> Iterator[None]:
    """Translates what the hub's client raises into one line each.

    Raises:
        InputError: there is no such model, or it may not be fetched.
        UnavailableError: the hub cannot be reached, or fails.
    """
    try:
        yield
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise InputError(
                f"{hub_id}: not in the cache, and HF_HUB_OFFLINE forbids to ask the hub: unset it, or fetch the model "
                "once where there is a network"
            ) from error
        reason = str(error).splitlines()[0]
        raise UnavailableError(f"{hub_id}: not in the cache, and the hub cannot be reached: {reason}") from error
    except GatedRepoError as error:
        raise InputError(
            f"{hub_id}: its licence must be accepted first: do so at {constants.ENDPOINT}/{hub_id}, then log in here "
            "with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{hub_id}: no such folder here, and no such model on the hub; if it is private, log in by `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{hub_id}: it has no branch, tag or commit {revision!r} on the hub") from error
    except (HfHubHTTPError, HFValidationError) as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise UnavailableError(f"{hub_id}: the hub said: {str(error).splitlines()[0]}") from error
        reason = str(error).splitlines()[0]
        raise InputError(f"{hub_id}: no such folder here, and the hub said: {reason}") from error
    except OSError as error:  # of the network, as all of requests' errors, or of the disk that it is written to
        reason = f"{error}".splitlines()[0] if f"{error}" else type(error).__name__
        kind = InputError if is_lasting(error) else UnavailableError
        raise kind(f"{hub_id}: cannot be fetched: {reason}{_advice(error)}") from error


def _advice(error: OSError) -> str:
    kind = type(error).__name__  # of requests or another library, by which the hub's client asks
    if kind == "SSLError":
        return ". If a proxy reads along here, name its certificates in REQUESTS_CA_BUNDLE"
    if kind == "ProxyError":
        return ". See to HTTPS_PROXY"
    if error.errno == errno.ENOSPC:
        return f". Models are kept in {constants.HF_HUB_CACHE}: make room, or name another folder in HF_HOME"
    return "" if is_lasting(error) else ". The same command goes on where it was"


def _download(hub_id: str, revision: str | None, variant: str | None) -> Path:
    infix = f".{variant}" if variant else ""
    safetensors = (
        f"{infix}.safetensors",
        f"{infix}-?????-of-?????.safetensors",
        ".safetensors.index*.json",
        f"{infix}.safetensors.index.json",
    )

    def files(components: Sequence[str], stems: Sequence[str], endings: Sequence[str]) -> list[str]:
        return [f"{component}/{stem}{ending}" for component in components for stem in stems for ending in endings]

    def without() -> list[str]:
        present = [component for component in COMPONENTS if (folder / component).is_dir()]
        return [component for component in present if not any((folder / component).glob("*.safetensors"))]

    stems = ("diffusion_pytorch_model", "model")
    folder = _fetch(hub_id, revision, files(COMPONENTS, stems, safetensors))
    if without():
        _fetch(hub_id, revision, files(without(), ("diffusion_flax_model", "flax_model"), (f"{infix}.msgpack",)))
    if variant and without() and has_variant(folder, variant):  # the others are as they are
        plain = (".safetensors", "-?????-of-?????.safetensors", ".safetensors.index.json")
        _fetch(hub_id, revision, files(without(), stems, plain))
    return folder


def _fetch(hub_id: str, revision: str | None, weights: Sequence[str] = ()) -> Path:
    with _hub_errors(hub_id, revision):
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*_SMALL_FILES, *weights]))


def read_index(folder: Path) -> dict[str, Any]:
    """Reads the model_index.json of a folder in the diffusers layout: what the model is made of.

    Returns:
        Its entries, without components that are empty.

    Raises:
        InputError: it is missing, not JSON, or of a model that is none of this kind.
    """
    file = folder / "model_index.json"
    index = {key: value for key, value in read_config(file).items() if value != [None, None]}
    if index.get("requires_aesthetics_score"):
        raise InputError(f"{file}: a refiner, which only finishes the pictures of another model: take that one")
    missing = [component for component in ("unet", "vae", "text_encoder") if component not in index]
    if missing:
        raise InputError(
            f"{file}: {index.get('_class_name', 'this model')} has no {missing[0]}; supported are models with a UNet, "
            "a VAE and CLIP text encoders, such as Stable Diffusion 1.5, 2.1 and XL"
        )
    return index


def read_config(file: Path, *classes: str) -> dict[str, Any]:
    """Reads a component's JSON config.

    Args:
        file: the config.
        classes: names of classes that the project can run; the config must be of one of them, unless none is given.

    Raises:
        InputError: no such file, not JSON, or another class.
        UnavailableError: storage fails.
    """
    with storage_errors(file, "read"):
        try:
            config = json.loads(file.read_text())
        except FileNotFoundError as error:
            raise InputError(f"{file}: missing; the folder is not complete") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"{file}: not a JSON object")
    named = [config["_class_name"]] if "_class_name" in config else config.get("architectures") or [None]
    if classes and not set(named) & set(classes):
        raise InputError(f"{file}: of class {named[0]}, which is not supported; supported: {', '.join(classes)}")
    return config
