"""Which encoders judge the pictures of a run, and where they come from."""

from pathlib import Path

from absl import logging
from ml_collections import ConfigDict

from perfusion_jax.base_model.clip import load_clip
from perfusion_jax.base_model.instance import load_instance_encoder
from perfusion_jax.base_model.source import find_cached_folder, is_hub_id
from perfusion_jax.learning.metrics import Evaluator
from perfusion_jax.runtime import shipped
from perfusion_jax.runtime.errors import InputError, UnavailableError
from perfusion_jax.runtime.names import SHORT_NAMES

# CLIP-I and CLIP-T are reported by ViT-B/32 in this field (textual inversion, arXiv 2208.01618; Custom Diffusion,
# arXiv 2212.04488), and it is a third of the download of ViT-L/14. DINOv2's smallest tells individuals apart better
# than the DINO of DreamBench (arXiv 2304.07193, table of instance retrieval).
CLIP_ON_HUB = "openai/clip-vit-base-patch32"
INSTANCE_ENCODER_ON_HUB = "facebook/dinov2-small"

NONE = "none"
"""What a config says to do without."""


def choose(given: str, base: str, ships: Path | None, on_hub: str) -> str | Path | None:
    """Chooses an encoder.

    Args:
        given: what the config says: a folder, a hub id, `none`, or empty for the default.
        base: the base model, as the config names it.
        ships: the encoder that ships for the embedded model, if one does.
        on_hub: the default for other models.

    Returns:
        A folder or a hub id. None to do without: it is wished so, or the base model is a folder or a file of the user's
        and the default is not in the hub's cache; nothing is fetched unless the user has named the hub.
    """
    if given:
        return None if given == NONE else given
    if base == "emoji":
        return ships
    from_hub = not Path(base).expanduser().exists() and (base in SHORT_NAMES or is_hub_id(base))
    return on_hub if from_hub else find_cached_folder(on_hub)


def load_evaluator(config: ConfigDict) -> Evaluator | None:
    """Loads what validation pictures are scored by; None to do without.

    Raises:
        InputError, UnavailableError: an encoder cannot be loaded.
    """
    clip = choose(config.evaluator, config.base, shipped.EVALUATOR, CLIP_ON_HUB)
    if clip is None:
        if not config.evaluator:
            logging.warning(
                "no evaluator: pictures are not scored, and the last step is kept; --config.evaluator=%s fetches one "
                "from the hub, --config.evaluator=none says that none is wanted",
                CLIP_ON_HUB,
            )
        return None
    instance = choose(config.instance_encoder, config.base, None, INSTANCE_ENCODER_ON_HUB)
    try:
        return Evaluator(load_clip(clip), None if instance is None else load_instance_encoder(instance))
    except UnavailableError as error:
        raise UnavailableError(f"{error}; {_hint(config)}") from error
    except InputError as error:
        raise InputError(f"{error}; {_hint(config)}") from error


def _hint(config: ConfigDict) -> str:
    return "--config.evaluator=none learns without scores" + (
        "" if config.instance_encoder else ", --config.instance_encoder=none with a CLIP alone"
    )
