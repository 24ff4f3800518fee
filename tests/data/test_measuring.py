import dataclasses
import os

import numpy as np
import pytest

from perfusion_jax import InputError
from perfusion_jax.data import measuring
from perfusion_jax.data.text_covariance import BATCH, accumulate, partial_file
from perfusion_jax.formats.covariance_file import load_covariance


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "perfusion_jax" / "covariance"


def refuse(*_, **__):
    raise AssertionError("it was measured again")


def test_made_up_captions_are_measured_once_and_then_found(small_base, cache, monkeypatch, capsys):
    file = measuring.find_or_measure(small_base, "")
    assert file.parent == cache
    width = small_base.model.context_width
    matrix = load_covariance(file, width)
    assert f"in {measuring.CAPTIONS_PER_DIMENSION * width:,} captions, condition number" in capsys.readouterr().out
    monkeypatch.setattr(measuring, "measure", refuse)
    assert measuring.find_or_measure(small_base, "") == file
    np.testing.assert_array_equal(load_covariance(file, width), matrix)


def test_other_captions_and_other_encoders_are_measured_apart(small_base, cache, tmp_path):
    captions = tmp_path / "mine.txt"
    captions.write_text(measuring.own_captions(small_base).replace("dog", "cat"))
    made_up, mine = (measuring.find_or_measure(small_base, given) for given in ("", str(captions)))
    assert made_up != mine
    weights = dict(small_base.params)
    encoder = weights["text_encoder"]["text_model"]
    norm = {name: 2 * leaf for name, leaf in encoder["final_layer_norm"].items()}
    weights["text_encoder"] = {"text_model": {**encoder, "final_layer_norm": norm}}
    other = dataclasses.replace(small_base, params=weights)
    scaled = measuring.find_or_measure(other, "")
    width = small_base.model.context_width
    np.testing.assert_allclose(load_covariance(scaled, width), 4 * load_covariance(made_up, width), rtol=1e-4)


def test_an_interrupted_measurement_is_gone_on_with(small_base, cache, monkeypatch, capsys):
    def interrupted(*arguments):
        for number, progress in enumerate(accumulate(*arguments)):
            if number == 2:
                raise KeyboardInterrupt
            yield progress

    monkeypatch.setattr(measuring, "accumulate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measuring.find_or_measure(small_base, "")
    assert [file.suffixes for file in sorted(cache.iterdir())] == [[".npz", ".partial", ".npz"], [".txt"]]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    file = measuring.find_or_measure(small_base, "")
    assert f"going on after {2 * BATCH} captions" in capsys.readouterr().out
    assert not partial_file(file).exists()


@pytest.mark.parametrize(("folder", "message"), [("/dev/null", "cannot be "), ("", "this user has no home folder")])
def test_a_cache_folder_that_cannot_be_had_is_named_with_what_names_another(small_base, monkeypatch, folder, message):
    monkeypatch.setenv("XDG_CACHE_HOME", folder)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does where a user has no home
    with pytest.raises(InputError, match=f"{message}.*XDG_CACHE_HOME"):
        measuring.find_or_measure(small_base, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no such file of captions"), ("", "no captions in it"), ("a dog\n", "needs more than that")],
)
def test_captions_that_will_not_do_are_named(small_base, cache, tmp_path, text, message):
    captions = tmp_path / "mine.txt"
    if text is not None:
        captions.write_text(text)
    with pytest.raises(InputError, match=f"mine.txt: .*{message}"):
        measuring.find_or_measure(small_base, str(captions))
