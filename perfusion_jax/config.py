"""What a run's config may say: each key's meaning stands in `configs/default.py`, what is possible here."""

import json
from collections.abc import Callable
from math import isfinite
from typing import Any

from ml_collections import ConfigDict

from perfusion_jax.base_model.text import PLACEHOLDER
from perfusion_jax.data.table import Row
from perfusion_jax.errors import InputError
from perfusion_jax.training import Settings

Rule = tuple[type, Callable[[Any], bool], str]


def _number(least: float, most: float = float("inf"), above: bool = False) -> Rule:
    """A float from `least` (or above it) to `most`."""
    words = f"{'above' if above else 'at least'} {least:g}" + (f" and at most {most:g}" if most < float("inf") else "")
    return (
        float,
        lambda value: (value > least if above else value >= least) and value <= most and isfinite(value),
        words,
    )


def _whole(least: int, most: int = 2**31) -> Rule:
    return int, lambda value: least <= value <= most, f"at least {least}"


def _one_of(*words: str) -> Rule:
    return str, lambda value: value in words, f"one of {', '.join(map(repr, words))}"


def _text(wanted: str = "", needed: bool = False) -> Rule:
    return str, lambda value: bool(value) or not needed, wanted


def _prompts(least: int) -> Rule:
    return (
        tuple,
        lambda value: len(value) >= least and all(isinstance(p, str) and p.count("{}") == 1 for p in value),
        f"at least {least} prompts, each with one {{}} where the concept's name goes",
    )


_SWITCH: Rule = (bool, lambda value: True, "True or False")

RULES: dict[str, Rule] = {
    "name": (str, lambda value: PLACEHOLDER.fullmatch(f"<{value}>") is not None, "letters, digits, '-' and '_'"),
    "super_category": _text("the word for this kind of thing, such as 'dog'", needed=True),
    "pictures": _text("a folder", needed=True),
    "licence": _text(),
    "masks": _one_of("auto", "files", "segmenter", "attention", "none"),
    "segmenter": _text(),
    "crop": _SWITCH,
    "flip": _SWITCH,
    "templates": _prompts(1),
    "base": _text("a folder or a hub id", needed=True),
    "revision": _text(),
    "variant": _text(),
    "covariance": _text(),
    "size": _whole(0),
    "dtype": _one_of("auto", "float32", "bfloat16"),
    "seed": _whole(0),
    "steps": _whole(1),
    "batch_size": _whole(1),
    "accumulation": _whole(1),
    "values_rate": _number(0),
    "embedding_rate": _number(0),
    "bias": _number(float("-inf")),
    "temperature": _number(0, above=True),
    "target_input_decay": _number(0, 1),
    "lock_keys": _SWITCH,
    "train_embedding": _SWITCH,
    "train_values": _SWITCH,
    "edit": _SWITCH,
    "straight_through": _SWITCH,
    "evaluator": _text(),
    "instance_encoder": _text(),
    "validate_every": _whole(0),
    "validation_prompts": _prompts(0),
    "pictures_per_prompt": _whole(1),
    "sampling_steps": _whole(1),
    "guidance_scale": _number(0),
    "sampling_bias": _number(float("-inf")),
    "sampling_temperature": _number(0, above=True),
    "log_every": _whole(1),
    "checkpoint_every": _whole(1),
    "keep_checkpoints": _whole(1),
}

# What a table says of each concept of a fleet, and what the config of a fleet says instead.
PER_CONCEPT = ("name", "super_category", "pictures")
FLEET_RULES: dict[str, Rule] = {
    "concepts": _text("a table of concepts or a folder of concept folders", needed=True),
    "members": _whole(0),
    "mesh": (
        tuple,
        lambda value: len(value) == 3 and all(type(size) is int and (size > 0 or size == -1) for size in value),
        "three numbers of devices: along concept, data and fsdp; one of them may be -1",
    ),
    "validate_every": (int, lambda value: value == 0, "0: a fleet looks at a concept once, when it is finished"),
}

# What a table may override for a concept: what members of one round may differ in, and what needs a round of its own.
OVERRIDES = (
    *("licence", "crop", "flip", "seed", "steps"),
    *("size", "batch_size", "accumulation", "values_rate", "embedding_rate"),
    *("bias", "temperature", "target_input_decay"),
)

# What may change between two runs in one workdir: none of it touches what was computed already.
FREE = ("keep_checkpoints", "log_every", "steps")
FLEET_FREE = ("keep_checkpoints", "log_every", "checkpoint_every", "members", "mesh")


def check(config: ConfigDict) -> None:
    """Checks every key.

    Raises:
        InputError: a key is unknown or missing, or its value is of another type or impossible; the key is named.
    """
    rules = dict(RULES)
    if is_fleet(config):
        rules = {key: rule for key, rule in (RULES | FLEET_RULES).items() if key not in PER_CONCEPT}
    unknown = sorted(set(config) - set(rules))
    missing = sorted(set(rules) - set(config))
    if unknown or missing:
        problems = [f"{key} is not a key" for key in unknown] + [f"{key} is missing" for key in missing]
        raise InputError(f"config: {'; '.join(problems)}; see configs/default.py")
    for key, (kind, possible, wanted) in rules.items():
        value = config[key]
        right_type = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        if not right_type and not (kind is float and type(value) is int):
            raise InputError(f"config.{key} is {value!r}, of type {type(value).__name__} instead of {kind.__name__}")
        if not possible(value):
            raise InputError(f"config.{key} is {value!r}; it must be {wanted}")
    if config.batch_size % config.accumulation:
        raise InputError(
            f"config.accumulation is {config.accumulation}; it must divide config.batch_size, {config.batch_size}"
        )
    if not (config.train_embedding or (config.edit and (config.train_values or not config.lock_keys))):
        raise InputError("config.train_embedding and config.train_values are False: nothing is left to train")


def is_fleet(config: ConfigDict) -> bool:
    """Whether a config is of many concepts."""
    return "concepts" in config


def member_config(fleet: ConfigDict, row: Row) -> ConfigDict:
    """The config of one concept of a fleet, as if it were learnt alone.

    Raises:
        InputError: the row gives an impossible value; file, line and key are named.
    """
    values = {key: value for key, value in fleet.items() if key not in FLEET_RULES or key in RULES}
    config = ConfigDict({**values, **{key: getattr(row, key) for key in PER_CONCEPT}, **row.overrides})
    try:
        check(config)
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from error
    return config


def settings_of(config: ConfigDict) -> Settings:
    """The part of a config that the training step knows."""
    fields = {
        "embedding": config.train_embedding,
        "value_outputs": config.train_values and config.edit,
        "key_outputs": not config.lock_keys and config.edit,
    }
    return Settings(
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        values_rate=config.values_rate,
        embedding_rate=config.embedding_rate,
        bias=config.bias,
        temperature=config.temperature,
        target_input_decay=config.target_input_decay,
        flip=config.flip,
        trained=tuple(field for field, trained in fields.items() if trained),
        edit=config.edit,
        straight_through=config.straight_through,
    )


def to_json(config: ConfigDict) -> str:
    """The config as it is saved with a run."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def check_same(config: ConfigDict, saved: str, file: object) -> None:
    """Checks that a run goes on as it began.

    Raises:
        InputError: the config differs from the one saved in the workdir, in more than FREE (of a fleet FLEET_FREE); all
            keys are named.
    """
    try:
        before = json.loads(saved)
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: not JSON ({error}); delete the workdir, or take another one") from error
    now = json.loads(to_json(config))
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    free = FLEET_FREE if is_fleet(config) else FREE
    changes = [f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in differing if key not in free]
    if changes:
        raise InputError(f"{file}: this workdir is of another config ({'; '.join(changes)}); take another --workdir")
