"""Every key of a run, once: its default, what is possible, its meaning and unit, and where its value comes from.

A config file is a few lines (`configs/dog.py`):

    from perfusion_jax.config import make_config


    def get_config(base="emoji"):
        return make_config(base, name="rex", super_category="dog", pictures="photos/rex")

What follows its name and a colon is `base`: `--config my_dog.py:sd15`.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from typing import Any

from ml_collections import ConfigDict

from perfusion_jax.data.table import PER_CONCEPT, Row
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.names import CONCEPT_EXPORTS, NAME_RULE, PLACEHOLDER, SHORT_NAMES


@dataclass(frozen=True)
class Rule:
    """What values are possible: of a type, for which `possible` holds; `wanted` says so in words."""

    kind: type
    possible: Callable[[Any], bool]
    wanted: str


@dataclass(frozen=True)
class Key:
    """A key of the config.

    Attributes:
        default: its value where nothing else is said.
        rule: what is possible.
        meaning: in words.
        may_change: whether a run may go on in its workdir with another value: it touches nothing that was computed.
        in_tables: whether a table may override it for a concept.
    """

    default: Any
    rule: Rule
    meaning: str
    may_change: bool = False
    in_tables: bool = False


def _number(least: float, most: float = float("inf"), above: bool = False) -> Rule:
    """A float from `least` (or above it) to `most`."""
    words = f"{'above' if above else 'at least'} {least:g}" + (f" and at most {most:g}" if most < float("inf") else "")
    return Rule(
        float,
        lambda value: (value > least if above else value >= least) and value <= most and isfinite(value),
        words,
    )


def _whole(least: int, most: int = 2**31) -> Rule:
    return Rule(int, lambda value: least <= value <= most, f"at least {least}")


def _one_of(*words: str) -> Rule:
    return Rule(str, lambda value: value in words, f"one of {', '.join(map(repr, words))}")


def _prompts(least: int) -> Rule:
    return Rule(
        tuple,
        lambda value: len(value) >= least and all(isinstance(p, str) and p.count("{}") == 1 for p in value),
        f"at least {least} prompts, each with one {{}} where the concept's name goes",
    )


_ANY_NUMBER = _number(float("-inf"))
_SWITCH = Rule(bool, lambda value: True, "True or False")
_TEXT = Rule(str, lambda value: True, "text")
_NAME = Rule(str, lambda value: PLACEHOLDER.fullmatch(f"<{value}>") is not None, NAME_RULE)
_MESH = Rule(
    tuple,
    lambda value: (
        not value or (len(value) == 2 and all(type(size) is int and (size > 0 or size == -1) for size in value))
    ),
    "empty, or two numbers of devices: along concept and data; one of them may be -1",
)

KEYS: dict[str, Key] = {
    # The concept.
    "name": Key("concept", _NAME, "prompts call it <name>; the file is NAME.safetensors"),
    "super_category": Key("", _TEXT, "the word for this kind of thing, such as 'dog'; the keys are locked to it"),
    "pictures": Key(
        "",
        _TEXT,
        "a folder of pictures, local or gs://; tfds:FOLDER#NAME for a dataset (perfusion_jax.data.dataset); or "
        "emoji:NAME for an example that ships with the package",
    ),
    "licence": Key("", _TEXT, "of the pictures; goes into the concept's file", in_tables=True),
    "masks": Key(
        "auto",
        _one_of("auto", "files", "segmenter", "attention", "none"),
        "where the loss looks: 'files' are masks beside the pictures, or their transparency; 'segmenter' is CLIPSeg, "
        "asked for the super-category; 'attention' is the frozen UNet's own; 'none' is everywhere; 'auto' is the "
        "first there is",
    ),
    "segmenter": Key("", _TEXT, "folder or hub id of a CLIPSeg"),
    "crop": Key(
        True, _SWITCH, "cut pictures to a square; False pads them with white, which the loss leaves out", in_tables=True
    ),
    "flip": Key(
        True, _SWITCH, "mirror half of the samples; False for things that have a left and a right", in_tables=True
    ),
    "templates": Key(
        (
            "a photo of a {}",
            "a picture of a {}",
            "an image of a {}",
            "a rendering of a {}",
            "a rendition of a {}",
            "a depiction of a {}",
            "the photo of a {}",
            "a good photo of a {}",
            "a nice picture of a {}",
        ),
        _prompts(1),
        "training prompts of pictures without a caption (textual inversion's, arXiv 2208.01618)",
    ),
    # Many concepts.
    "concepts": Key(
        "",
        _TEXT,
        "learn many: a .csv or .jsonl table, or a folder of concept folders, local or gs:// "
        "(perfusion_jax.data.table); emoji for the examples that ship. It takes the place of name, super_category and "
        "pictures",
    ),
    "members": Key(
        0,
        _whole(0),
        "concepts at once; 0: rounds as equal as can be, of at most as many as fit the chips' memory by the "
        "compiler's report, or where the device does not tell its memory, as a CPU, of at most 8 for each place along "
        "the mesh's axis concept",
        may_change=True,
    ),
    "mesh": Key(
        (),
        _MESH,
        "devices along concept and data (samples of one concept's batch); one of them may be -1; empty: all along "
        "concept, or for one concept as many along data as divide its batch. Nothing is sent along concept: keep data "
        "at 1 unless one concept does not fit on a chip",
        may_change=True,
    ),
    # The frozen model.
    "base": Key("emoji", _TEXT, "emoji, a folder in the diffusers layout, a .safetensors file, or a hub id"),
    "revision": Key("", _TEXT, "branch, tag or commit of a hub id"),
    "variant": Key("", _TEXT, "weight files of a hub id, such as fp16"),
    "covariance": Key(
        "",
        _TEXT,
        "file of C (perfusion_jax.covariance); empty: the one that came with the model, else one that is measured on "
        "first use and kept in the cache folder",
    ),
    "captions": Key(
        "",
        _TEXT,
        "text file, one caption on a line, to measure C on; empty: captions are made up (perfusion_jax.data."
        "caption_source)",
    ),
    "size": Key(0, _whole(0), "side of the training pictures in pixels; 0: the model's own", in_tables=True),
    "dtype": Key(
        "auto",
        _one_of("auto", "float32", "bfloat16"),
        "of the network; auto: float32 on a CPU, bfloat16 elsewhere; the edit is always float32",
    ),
    "seed": Key(0, _whole(0), "a concept's result depends on its name, data, config and seed alone", in_tables=True),
    # Learning (Perfusion, arXiv 2305.01644, and its public implementations).
    "method": Key(
        "perfusion",
        _one_of("perfusion", "textual_inversion", "lora", "custom_diffusion", "dreambooth"),
        "what is learnt: Perfusion's edit, or what another method learns, to compare with (docs/evaluation.md); keys "
        "that nobody gives then take that method's own values (METHODS in perfusion_jax/config.py)",
    ),
    "steps": Key(400, _whole(1), "optimiser steps", may_change=True, in_tables=True),
    "batch_size": Key(16, _whole(1), "samples per optimiser step", in_tables=True),
    "accumulation": Key(1, _whole(1), "parts that a batch is computed in, to save memory", in_tables=True),
    "values_rate": Key(0.03, _number(0), "Adam's learning rate of the target outputs o*_V", in_tables=True),
    "embedding_rate": Key(0.006, _number(0), "Adam's learning rate of the word embedding", in_tables=True),
    "bias": Key(0.75, _ANY_NUMBER, "beta of the gate in training", in_tables=True),
    "temperature": Key(0.1, _number(0, above=True), "tau of the gate in training", in_tables=True),
    "snr_gamma": Key(
        0.0,
        _number(0),
        "gamma of min-SNR weights of the loss (arXiv 2303.09556), for models that were trained with them; 0: every "
        "timestep counts alike",
        in_tables=True,
    ),
    "target_input_decay": Key(0.99, _number(0, 1), "of the moving average of the target input i*", in_tables=True),
    # Other methods.
    "weights_rate": Key(0.0, _number(0), "Adam's learning rate of what other methods add to the UNet", in_tables=True),
    "rank": Key(1, _whole(1), "of a LoRA"),
    "identifier": Key("", _TEXT, "a rare word that the embedding begins as; empty: the super-category's"),
    "class_noun": Key(False, _SWITCH, "True puts the super-category's word after the concept's: 'a <rex> dog'"),
    "prior_pictures": Key(
        0,
        _whole(0),
        "pictures of its kind that the frozen model draws first and that are learnt beside a concept's own (prior "
        "preservation)",
    ),
    "prior_weight": Key(1.0, _number(0), "of their loss"),
    # Ablations.
    "lock_keys": Key(True, _SWITCH, "False trains the target outputs o*_K too"),
    "train_embedding": Key(True, _SWITCH, "False leaves the word embedding at the super-category's"),
    "train_values": Key(True, _SWITCH, "False leaves the target outputs o*_V at the super-category's"),
    "straight_through": Key(False, _SWITCH, "gradient through i*, as if it were the batch's mean encoding"),
    # Looking and choosing.
    "evaluator": Key(
        "",
        _TEXT,
        "folder or hub id of a CLIP that pictures are scored by; 'none' does without, and the last step is kept; "
        "empty: the one that ships with emoji, openai/clip-vit-base-patch32 for a model from the hub, and the same for "
        "a folder or a file if it is in the hub's cache",
    ),
    "instance_encoder": Key(
        "",
        _TEXT,
        "folder or hub id of a DINO or DINOv2, for image similarity; 'none': the CLIP; empty: the CLIP for emoji, "
        "facebook/dinov2-small for other models, as above",
    ),
    "validate_every": Key(
        25,
        _whole(0),
        "steps between sample grids and scores, of which the best step is kept (paper); 0: never, and the last step "
        "is kept; many concepts are then looked at once each, when they are finished",
    ),
    "validation_prompts": Key(
        (
            "a photo of a {} on the beach",
            "a photo of a {} in the snow",
            "a photo of a {} under water",
            "a photo of a {} in the city",
        ),
        _prompts(0),
        "to choose the kept step by; training learns from none of them",
    ),
    "pictures_per_prompt": Key(2, _whole(1), "of each validation prompt"),
    "sampling_steps": Key(
        20, _whole(1), "of those pictures, and of the prior's, by the sampler of the base model's scheduler config"
    ),
    "guidance_scale": Key(6.0, _number(0), "likewise (implementations)"),
    "sampling_bias": Key(0.6, _ANY_NUMBER, "beta of the gate when drawing: local lock 0.6 to 0.75 (paper)"),
    "sampling_temperature": Key(0.15, _number(0, above=True), "tau of the gate when drawing (paper)"),
    # Keeping.
    "exports": Key(
        (),
        Rule(
            tuple,
            lambda value: all(isinstance(kind, str) and kind in CONCEPT_EXPORTS for kind in value),
            f"any of {', '.join(map(repr, CONCEPT_EXPORTS))}",
        ),
        "what else is written of a concept when it is finished, for other tools: exports/NAME/KIND in the workdir",
        may_change=True,
    ),
    "log_every": Key(10, _whole(1), "steps between lines of metrics.jsonl", may_change=True),
    "checkpoint_every": Key(50, _whole(1), "steps between checkpoints", may_change=True),
    "keep_checkpoints": Key(3, _whole(1), "how many of the newest are kept", may_change=True),
}

BASES: dict[str, dict[str, Any]] = {
    "emoji": {"guidance_scale": 2.5},  # by eye: a learnt thing glares at more
    **{
        name: {
            "base": there.hub_id,
            "variant": there.variant,
            "segmenter": "CIDAS/clipseg-rd64-refined",
        }
        for name, there in SHORT_NAMES.items()
    },
}
"""What a base model wants otherwise, by the name that a config's argument calls it."""

METHODS: dict[str, dict[str, Any]] = {
    # As for Stable Diffusion: the paper's of Custom Diffusion, those of diffusers' examples of the others (Textual
    # Inversion's rate times the four samples of its step). All learn batches of one size.
    "textual_inversion": {"masks": "none", "embedding_rate": 2e-3, "steps": 3000},
    "lora": {"masks": "none", "weights_rate": 1e-4, "embedding_rate": 2e-3, "steps": 500},
    "custom_diffusion": {
        "masks": "none",
        "weights_rate": 8e-5,
        "embedding_rate": 8e-5,
        "steps": 250,
        "identifier": "ktn",
        "class_noun": True,
        "prior_pictures": 200,
    },
    "dreambooth": {
        "masks": "none",
        "weights_rate": 5e-6,
        "train_embedding": False,
        "steps": 800,
        "identifier": "sks",
        "class_noun": True,
        "prior_pictures": 200,
    },
}
"""What other methods want otherwise."""

# Keys that a method does not read, and that would change what is learnt or written: to give them is a mistake.
_OF_PERFUSION = ("lock_keys", "train_values", "straight_through", "exports")
_IDLE = {
    "perfusion": ("weights_rate", "rank", "identifier", "class_noun"),
    "textual_inversion": (*_OF_PERFUSION, "weights_rate", "rank"),
    "lora": _OF_PERFUSION,
    "custom_diffusion": (*_OF_PERFUSION, "rank"),
    "dreambooth": (*_OF_PERFUSION, "rank"),
}

MEMORY_ADVICE = (
    "raise config.accumulation, or in a fleet lower config.members or split over more chips by the axis data of "
    "config.mesh"
)
"""What to do where the memory of a device does not suffice."""


OVERRIDES = tuple(name for name, key in KEYS.items() if key.in_tables)
"""Keys that a table may override for a concept."""


def make_config(base: str = "emoji", **values: Any) -> ConfigDict:
    """The config of a run.

    Args:
        base: a key of BASES, a folder in the diffusers layout, a .safetensors file, or a hub id.
        values: of keys, where they are not the default.
    """
    defaults = {name: key.default for name, key in KEYS.items()}
    of_method = METHODS.get(values.get("method", ""), {})
    return ConfigDict({**defaults, "base": base, **BASES.get(base, {}), **of_method, **values})


get_config = make_config  # this module is the config file of a run that has none


def settle(config: ConfigDict, given: Collection[str] = ()) -> ConfigDict:
    """The config where its base or its method was changed after it was made, as by a flag.

    Args:
        config: as it was made, with another base or method.
        given: keys that were given after it was made. They stay, and so do those that have no longer the default that
            they have with some other base, or with Perfusion.
    """
    result = dict(config.items())
    if "base" in given:
        wanted, others = make_config(result["base"]), [make_config(base) for base in BASES]
        for name in {name for values in BASES.values() for name in values} - set(given) | {"base"}:
            if name == "base" or result.get(name) in [other[name] for other in others]:
                result[name] = wanted[name]
    own, defaults = METHODS.get(result.get("method", ""), {}), make_config(result.get("base", ""))
    result |= {name: own[name] for name in own if name not in given and result.get(name) == defaults[name]}
    return ConfigDict(result)


def check(config: ConfigDict) -> None:
    """Checks every key.

    Raises:
        InputError: a key is unknown or missing, or its value is of another type or impossible; the key is named.
    """
    unknown = sorted(set(config) - set(KEYS))
    missing = sorted(set(KEYS) - set(config))
    if unknown or missing:
        near = {name: get_close_matches(name, KEYS, 1) for name in unknown}
        problems = [f"{name} is not a key" + "".join(f", as {key} is" for key in near[name]) for name in unknown]
        problems += [f"{name} is missing" for name in missing]
        raise InputError(f"config: {'; '.join(problems)}; docs/training.md names every key")
    for name, key in KEYS.items():
        value, kind = config[name], key.rule.kind
        right_type = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        if not right_type and not (kind is float and type(value) is int):
            raise InputError(f"config.{name} is {value!r}, of type {type(value).__name__} instead of {kind.__name__}")
        if not key.rule.possible(value):
            raise InputError(f"config.{name} is {value!r}; it must be {key.rule.wanted}")
    for name in ("base",) if is_fleet(config) else ("base", "super_category", "pictures"):
        if not config[name]:
            raise InputError(f"config.{name} is empty; it must be {KEYS[name].meaning}")
    if config.batch_size % config.accumulation:
        raise InputError(
            f"config.accumulation is {config.accumulation}; it must divide config.batch_size, {config.batch_size}"
        )
    if config.covariance and config.captions:
        raise InputError("config.covariance and config.captions are both given: C is read, or measured; leave one out")
    defaults = make_config(config.base)
    idle = dict.fromkeys(_IDLE[config.method], f"in config.method={config.method!r}")
    if not config.prior_pictures:
        idle["prior_weight"] = "without config.prior_pictures"
    if is_fleet(config):
        idle |= dict.fromkeys(PER_CONCEPT, "where config.concepts names a table, which says it of each concept")
    else:
        idle["members"] = "without config.concepts, in a run of one concept"
    for name, why in idle.items():
        if config[name] != defaults[name]:
            raise InputError(f"config.{name} plays no part {why}: leave it out")
    if config.method in METHODS:
        if not config.train_embedding and config.method == "textual_inversion":
            raise InputError("config.train_embedding is False: textual inversion has nothing else to train")
        if not config.weights_rate and "weights_rate" in METHODS[config.method]:
            raise InputError(
                f"config.weights_rate is 0: {config.method} would learn nothing of the UNet; the flag --config.method, "
                "and make_config(method=...), give it a rate"
            )
    elif not (config.train_embedding or config.train_values or not config.lock_keys):
        raise InputError("config.train_embedding and config.train_values are False: nothing is left to train")


def is_fleet(config: ConfigDict) -> bool:
    """Whether a config is of many concepts."""
    return bool(config.concepts)


def member_config(fleet: ConfigDict, row: Row) -> ConfigDict:
    """The config of one concept of a fleet, as if it were learnt alone.

    Raises:
        InputError: the row gives an impossible value; file, line and key are named.
    """
    own = {name: getattr(row, name) for name in PER_CONCEPT} | row.overrides
    config = ConfigDict({**dict(fleet.items()), "concepts": "", "members": KEYS["members"].default, **own})
    try:
        check(config)
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from error
    return config


def to_json(config: ConfigDict) -> str:
    """The config as it is saved with a run."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def parse_saved(saved: str, file: object) -> dict[str, Any]:
    """The config that a run saved in its workdir.

    Args:
        saved: what stands in `file`.
        file: its name, for the message.

    Raises:
        InputError: it is something else, as the config.json of a model.
    """
    try:
        config = json.loads(saved)
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: not JSON ({error}); take another --workdir") from error
    if not isinstance(config, dict) or not {"base", *PER_CONCEPT} <= config.keys():
        raise InputError(f"{file}: not the config of a run; take another --workdir")
    return config


def check_same(config: ConfigDict, saved: str, file: object) -> None:
    """Checks that a run goes on as it began.

    Args:
        config: of the run now.
        saved: what stands in `file`. Keys of later versions are not in it; they had what is their default now.
        file: its name, for the message.

    Raises:
        InputError: the config differs from the one saved in the workdir, in more than what may change; all keys are
            named.
    """
    defaults, now = (json.loads(to_json(each)) for each in (make_config(config.base), config))
    before = {**defaults, **parse_saved(saved, file)}
    differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    # Concepts of a fleet that are done would have taken other numbers of steps than the rest.
    free = {name for name, key in KEYS.items() if key.may_change} - ({"steps"} if is_fleet(config) else set())
    gone = [name for name in differing if name not in now]
    if gone:
        raise InputError(
            f"{file}: this workdir was begun by another version, which had the keys {', '.join(gone)}; take another "
            "--workdir"
        )
    changes = [f"{name} was {before[name]!r}, is {now[name]!r}" for name in differing if name not in free]
    if changes:
        raise InputError(f"{file}: this workdir is of another config ({'; '.join(changes)}); take another --workdir")
