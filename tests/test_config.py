"""Configs: every key is checked, and every config that ships passes."""

import importlib
from pathlib import Path

import pytest

from perfusion_jax import InputError, shipped
from perfusion_jax.config import RULES, check, check_same, settings_of, to_json

CONFIGS = Path(__file__).parents[1] / "configs"


def get(name="dog", *arguments):
    return importlib.import_module(f"configs.{name}").get_config(*arguments)


@pytest.mark.parametrize("name", [file.stem for file in CONFIGS.glob("*.py") if file.stem not in ("default", "fleet")])
@pytest.mark.parametrize("base", ["emoji", "sd15", "sd21", "some/folder"])
def test_configs_that_ship_are_possible(name, base):
    config = get(name, base)
    check(config)
    assert config.base == {"emoji": "emoji", "some/folder": "some/folder"}.get(base, config.base)
    assert (shipped.EXAMPLES / config.pictures.removeprefix("emoji:")).is_dir()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("batch_size", -1),
        ("accumulation", 3),
        ("values_rate", -0.1),
        ("values_rate", float("nan")),
        ("temperature", 0.0),
        ("target_input_decay", 1.5),
        ("name", "my dog"),
        ("super_category", ""),
        ("masks", "maybe"),
        ("dtype", "float16"),
        ("templates", ()),
        ("templates", ("a photo of a dog",)),
        ("validation_prompts", ("a {} and a {}",)),
        ("log_every", 0),
    ],
)
def test_impossible_values_are_named(key, value):
    config = get()
    config[key] = value
    with pytest.raises(InputError, match=rf"config\.{key} is"):
        check(config)


def test_unknown_missing_and_mistyped_keys_are_named():
    config = get()
    config.learning_rate = 0.1
    with pytest.raises(InputError, match="learning_rate is not a key"):
        check(config)
    config = get()
    del config.steps
    with pytest.raises(InputError, match="steps is missing"):
        check(config)
    config = get().to_dict()
    for value in ("400", 400.0, True):
        changed = get().copy_and_resolve_references()
        with changed.ignore_type():
            changed.steps = value
        with pytest.raises(InputError, match=r"config\.steps is .*instead of int"):
            check(changed)


def test_nothing_left_to_train_is_an_error():
    config = get()
    config.train_embedding = config.train_values = False
    with pytest.raises(InputError, match="nothing is left to train"):
        check(config)


def test_every_key_reaches_the_rules():
    assert set(get()) == set(RULES)


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({}, ("embedding", "value_outputs")),
        ({"lock_keys": False}, ("embedding", "value_outputs", "key_outputs")),
        ({"train_embedding": False}, ("value_outputs",)),
        ({"edit": False}, ("embedding",)),
    ],
)
def test_ablations_choose_what_is_trained(changes, trained):
    config = get()
    config.update(changes)
    check(config)
    assert settings_of(config).trained == trained


def test_a_workdir_keeps_its_config():
    before, after = get(), get()
    after.steps, after.log_every = 900, 1
    check_same(after, to_json(before), "config.json")
    after.bias = 0.5
    with pytest.raises(InputError, match=r"another config \(bias was 0.75, is 0.5\)"):
        check_same(after, to_json(before), "config.json")
    with pytest.raises(InputError, match="not JSON"):
        check_same(before, "{", "config.json")
