"""Which encoders judge the pictures of a run, and where they come from."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from perfusion_jax.base_model.clip import load_clip
from perfusion_jax.base_model.instance import load_instance_encoder
from perfusion_jax.base_model.source import find_cached_folder, may_fetch
from perfusion_jax.learning.metrics import Evaluator
from perfusion_jax.learning.workdir import saved_config
from perfusion_jax.pod import distributed
from perfusion_jax.runtime import shipped
from perfusion_jax.runtime.errors import InputError, UnavailableError

# CLIP-I and CLIP-T are reported by ViT-B/32 in this field (textual inversion, arXiv 2208.01618; Custom Diffusion,
# arXiv 2212.04488), it is a third of the download of ViT-L/14, and no part of what it judges: the text encoder of
# Stable Diffusion 1 is that of ViT-L/14. DINOv2's smallest tells individuals apart better than the DINO of DreamBench
# (arXiv 2304.07193, table of instance retrieval).
CLIP_ON_HUB = "openai/clip-vit-base-patch32"
INSTANCE_ENCODER_ON_HUB = "facebook/dinov2-small"

NONE = "none"
"""What a config says to do without."""

Encoder = TypeVar("Encoder")


class Judges(NamedTuple):
    """Both encoders, by the names of their keys: each a folder, a hub id, `none`, or empty where nothing is said."""

    evaluator: str
    instance_encoder: str


DEFAULTS = Judges(CLIP_ON_HUB, INSTANCE_ENCODER_ON_HUB)


class Reach(NamedTuple):
    """What can be had without asking for more than the user has named.

    Attributes:
        fetches: the base model is of the hub, and the hub may be asked.
        evaluator, instance_encoder: the default one is in the hub's cache.
    """

    fetches: bool
    evaluator: bool
    instance_encoder: bool


def choose(given: Judges, base: str, reach: Reach) -> Judges:
    """Chooses the encoders of a run.

    What is given holds. What is empty is what ships on `emoji`; on another base model it is the default of the hub if
    that is cached, or the base model is of the hub as well: nothing is fetched unless the user has named the hub.

    Args:
        given: the values of the keys.
        base: the base model, as the config names it.
        reach: what can be had.

    Returns:
        The same with nothing empty. Without a CLIP nothing is judged.
    """
    if base == "emoji":
        default = Judges(str(shipped.EVALUATOR), NONE)
    else:
        default = Judges(
            *(hub if reach.fetches or here else NONE for hub, here in zip(DEFAULTS, reach[1:], strict=True))
        )
    clip = given.evaluator or default.evaluator
    return Judges(clip, given.instance_encoder or (NONE if clip == NONE else default.instance_encoder))


def find_judges(config: ConfigDict) -> Judges:
    """Chooses the encoders of a config, the same on all processes; all must call it."""
    given = Judges(config.evaluator, config.instance_encoder)
    here = [False] * len(Reach._fields)
    if config.base != "emoji" and not all(given):
        here = [may_fetch(config.base), *(find_cached_folder(hub_id) is not None for hub_id in DEFAULTS)]
    # What one host lacks, none takes: with and without an evaluator, they would not hold the same arrays.
    return choose(given, config.base, Reach(*map(all, zip(*distributed.gather(here), strict=True))))


def name_judges(config: ConfigDict, workdir: epath.Path) -> ConfigDict:
    """Names the encoders that a config leaves open, as it is saved with the run; all processes must call it.

    A run goes on with those that it began with, whatever the cache holds by then: a checkpoint has the best step only
    if there is an evaluator, and scores by two evaluators do not compare. What ships with `emoji` stays unnamed.

    Args:
        config: the run's.
        workdir: where its results go.

    Raises:
        InputError: the run began with an encoder of the cache that is not there any more.
        UnavailableError: the workdir cannot be read.
    """
    if config.base == "emoji" or not config.validation_prompts:
        return config
    before = distributed.from_first(lambda: saved_config(workdir))
    began = {key: before[key] for key in Judges._fields if not config[key] and before.get(key)}
    found = find_judges(config)._asdict()
    for key, name in began.items():
        if name == getattr(DEFAULTS, key) and found[key] == NONE:
            raise InputError(
                f"config.{key}: the run in {workdir} began with {name} of the hub's cache, where it is not any more; "
                f"--config.{key}={name} fetches it"
            )
    lacking = [key for key in Judges._fields if not config[key] and key not in began and found[key] == NONE]
    if lacking and config.evaluator != NONE and distributed.is_first():
        _tell(lacking)
    return ConfigDict({**dict(config.items()), **found, **began})


def _tell(lacking: list[str]) -> None:
    """Says, of keys that are left open and cannot be filled, what is done without them and how to have them."""
    without = (
        "no evaluator: pictures are not scored, and the last step is kept"
        if "evaluator" in lacking
        else "no instance encoder: the CLIP compares pictures with pictures"
    )
    flags = " ".join(f"--config.{key}={getattr(DEFAULTS, key)}" for key in lacking)
    logging.warning(
        "%s; with a new --workdir, %s takes it from the hub; --config.%s=none says that none is wanted",
        *(without, flags, lacking[0]),
    )


def load_evaluator(config: ConfigDict) -> Evaluator | None:
    """Loads what validation pictures are scored by, None to do without; all processes must call it.

    Raises:
        InputError, UnavailableError: an encoder cannot be loaded; its key is named.
    """
    judges = find_judges(config)
    without = f"config.{{key}}: {{error}}; --config.{{key}}={NONE}, with a new --workdir, does without"
    return None if judges.evaluator == NONE else open_judges(judges, config.base, without)


def open_judges(judges: Judges, base: str, message: str) -> Evaluator:
    """Loads the encoders that were chosen, a CLIP among them.

    Args:
        judges: from `choose`.
        base: the base model, as the user names it.
        message: of errors, with {key} and {error}.

    Raises:
        InputError, UnavailableError: one cannot be loaded.
    """

    def opened(key: str, load: Callable[[str], Encoder]) -> Encoder:
        source = getattr(judges, key)
        # Of what is cached the hub need not be asked, and for a folder of the user's it is not to be.
        cached = find_cached_folder(source) if source in DEFAULTS and not may_fetch(base) else None
        try:
            return load(str(cached or source))
        except UnavailableError as error:
            raise UnavailableError(message.format(key=key, error=error)) from error
        except InputError as error:
            raise InputError(message.format(key=key, error=error)) from error

    clip = opened("evaluator", load_clip)
    if judges.instance_encoder == NONE:
        return Evaluator(clip)
    return Evaluator(clip, opened("instance_encoder", load_instance_encoder))
