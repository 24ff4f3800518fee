import shutil

import pytest
from checkpoints import save_clip, save_dinov2
from ml_collections import ConfigDict

from perfusion_jax import InputError
from perfusion_jax.learning import judges
from perfusion_jax.runtime import shipped


@pytest.fixture
def cached(monkeypatch):
    """The folders in the hub's cache, by id: what a test puts there."""
    folders = {}
    monkeypatch.setattr(judges, "find_cached_folder", folders.get)
    return folders


@pytest.mark.parametrize(
    ("given", "base", "chosen"),
    [
        ("", "emoji", shipped.EVALUATOR),
        ("", "sd15", "hub/clip"),
        ("", "owner/model", "hub/clip"),
        ("", "a/folder", None),
        ("", "a_file.safetensors", None),
        ("none", "sd15", None),
        ("none", "emoji", None),
        ("mine", "emoji", "mine"),
        ("owner/clip", "a/folder", "owner/clip"),
    ],
)
def test_the_default_is_of_the_hub_only_if_the_user_has_named_it(given, base, chosen, cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/folder").mkdir(parents=True)
    (tmp_path / "a_file.safetensors").touch()
    assert judges.choose(given, base, shipped.EVALUATOR, "hub/clip") == chosen
    cached["hub/clip"] = tmp_path / "cache"
    if not given and base[0] == "a":  # what is in the cache is used: nothing is fetched
        assert judges.choose(given, base, shipped.EVALUATOR, "hub/clip") == tmp_path / "cache"


def config_of(**keys):
    return ConfigDict({"base": "a/folder", "evaluator": "", "instance_encoder": "", **keys})


def test_without_an_evaluator_one_line_says_how_to_get_one(cached, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/folder").mkdir(parents=True)
    assert judges.load_evaluator(config_of()) is None
    assert "--config.evaluator=openai/clip-vit-base-patch32 fetches one" in caplog.text
    caplog.clear()
    assert judges.load_evaluator(config_of(evaluator="none")) is None
    assert not caplog.text


def test_both_encoders_are_found_in_the_cache(cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/folder").mkdir(parents=True)
    cached[judges.CLIP_ON_HUB] = save_clip(tmp_path / "clip")
    assert judges.load_evaluator(config_of()).instance is None
    cached[judges.INSTANCE_ENCODER_ON_HUB] = save_dinov2(tmp_path / "dinov2")
    assert judges.load_evaluator(config_of()).instance is not None
    assert judges.load_evaluator(config_of(instance_encoder="none")).instance is None


def test_an_encoder_that_cannot_be_loaded_is_named_with_a_way_out(cached, tmp_path):
    clip = save_clip(tmp_path / "clip")
    (clip / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"clip: no weights .*; --config\.evaluator=none learns without scores"):
        judges.load_evaluator(config_of(evaluator=str(clip)))
    shutil.rmtree(clip)
    with pytest.raises(InputError, match="clip: no such folder, and not a hub id"):
        judges.load_evaluator(config_of(evaluator=str(clip)))
