"""Configs: every key is checked, and every config that ships passes."""

import importlib
import re
from pathlib import Path

import pytest

from perfusion_jax import InputError
from perfusion_jax.config import KEYS, METHODS, check, check_same, make_config, settle, to_json
from perfusion_jax.learning.step import Settings
from perfusion_jax.runtime import shipped

CONFIGS = Path(__file__).parents[1] / "configs"


def get(name="dog", *arguments):
    return importlib.import_module(f"configs.{name}").get_config(*arguments)


@pytest.mark.parametrize("name", [file.stem for file in CONFIGS.glob("*.py") if file.stem != "fleet"])
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
        ("exports", (["lora"],)),
    ],
)
def test_impossible_values_are_named(key, value):
    config = get()
    config[key] = value
    with pytest.raises(InputError, match=rf"config\.{key} is"):
        check(config)


def test_unknown_missing_and_mistyped_keys_are_named():
    config = get()
    config.stepz = 3
    with pytest.raises(InputError, match=r"stepz is not a key, as steps is; docs/training\.md names every key"):
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


def test_every_key_says_what_it_means():
    assert set(get()) == set(make_config()) == set(KEYS)
    assert all(key.meaning for key in KEYS.values())


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({}, ("embedding", "value_outputs")),
        ({"lock_keys": False}, ("embedding", "value_outputs", "key_outputs")),
        ({"train_embedding": False}, ("value_outputs",)),
        ({"method": "textual_inversion"}, ("embedding",)),
        ({"method": "lora"}, ("embedding", "down", "up")),
        ({"method": "custom_diffusion"}, ("embedding", "added")),
        ({"method": "dreambooth"}, ("added",)),
    ],
)
def test_ablations_choose_what_is_trained(changes, trained):
    config = get()
    config.update(changes)
    config = settle(config, changes)
    check(config)
    assert Settings.of(config).trained == trained


def test_a_method_has_its_own_defaults_where_nothing_else_is_said():
    config = get()
    config.update(method="dreambooth", steps=123, prior_pictures=0)
    settled = settle(config, {"method", "steps", "prior_pictures"})
    own = {name: settled[name] for name in METHODS["dreambooth"]}
    assert own == {**METHODS["dreambooth"], "steps": 123, "prior_pictures": 0}  # that it is given, though the default
    assert (settled.masks, settled.name, config.masks) == ("none", config.name, "auto")
    assert settle(get()).to_dict() == get().to_dict()
    made = make_config("emoji", method="dreambooth", steps=400)
    assert (made.steps, made.weights_rate) == (400, METHODS["dreambooth"]["weights_rate"])


@pytest.mark.parametrize("before", ["emoji", "sd15", "a/folder"])
@pytest.mark.parametrize("after", ["emoji", "sdxl", "another/folder"])
def test_a_base_that_a_flag_names_brings_what_it_wants(before, after):
    config = make_config(before, name="rex", steps=123)
    config.base = after
    assert settle(config, {"base"}) == make_config(after, name="rex", steps=123)
    config.guidance_scale = 2.5
    assert settle(config, {"base", "guidance_scale"}).guidance_scale == 2.5
    config.guidance_scale = 3.5  # as the config's file says
    assert settle(config, {"base"}).guidance_scale == 3.5


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("perfusion", {"rank": 4}, "config.rank plays no part in config.method='perfusion'"),
        ("perfusion", {"class_noun": True}, "config.class_noun plays no part"),
        ("lora", {"lock_keys": False}, "config.lock_keys plays no part in config.method='lora'"),
        ("dreambooth", {"exports": ("lora",)}, "config.exports plays no part"),
        ("perfusion", {"members": 4}, "config.members plays no part without config.concepts"),
        ("textual_inversion", {"train_embedding": False}, "has nothing else to train"),
        ("ti", {}, "config.method is 'ti'; it must be one of 'perfusion'"),
        ("dreambooth", {"rank": 4}, "config.rank plays no part"),
        ("textual_inversion", {"weights_rate": 0.1}, "config.weights_rate plays no part"),
        ("lora", {"weights_rate": 0.0}, "config.weights_rate is 0: lora would learn nothing of the UNet"),
        ("lora", {"prior_weight": 0.5}, "config.prior_weight plays no part without config.prior_pictures"),
    ],
)
def test_keys_that_play_no_part_in_a_method_are_refused(method, changes, message):
    config = get()
    config.update(method=method, **changes)
    with pytest.raises(InputError, match=re.escape(message)):
        check(settle(config, {"method", *changes}))


def test_a_workdir_keeps_its_config():
    before, after = get(), get()
    after.steps, after.log_every = 900, 1
    check_same(after, to_json(before), "config.json")
    after.bias = 0.5
    with pytest.raises(InputError, match=r"another config \(bias was 0.75, is 0.5\)"):
        check_same(after, to_json(before), "config.json")
    for broken, problem in (("{", "not JSON"), ("[]", "not the config of a run")):
        with pytest.raises(InputError, match=rf"config.json: {problem}"):
            check_same(before, broken, "config.json")


@pytest.mark.parametrize("name", ["dog", "fleet"])
def test_what_touches_nothing_that_was_computed_may_change(name):
    before, after = get(name), get(name)
    after.update(checkpoint_every=7, log_every=3, keep_checkpoints=1, mesh=(1, 1), members=2)
    check_same(after, to_json(before), "config.json")


def test_a_fleet_does_not_change_its_steps():
    before, after = get("fleet"), get("fleet")
    after.steps = 900
    with pytest.raises(InputError, match="steps was 400, is 900"):
        check_same(after, to_json(before), "config.json")
