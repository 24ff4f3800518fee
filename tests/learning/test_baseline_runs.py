"""Whole runs of other methods on a small base model of random weights."""

import contextlib
import json
import threading
from types import SimpleNamespace

import fleet_runs
import numpy as np
import pytest
from etils import epath
from jax import flatten_util
from ml_collections import ConfigDict

from perfusion_jax import generate, load_base_model
from perfusion_jax.config import settle
from perfusion_jax.data.examples import PLACEHOLDER
from perfusion_jax.data.table import Row
from perfusion_jax.formats.concept_file import load_concept
from perfusion_jax.formats.exporting import export
from perfusion_jax.learning.preparation import prepare
from perfusion_jax.learning.prior import draw_prior
from perfusion_jax.learning.rounds import Member, Round, round_settings
from perfusion_jax.learning.runs import train_fleet, train_one
from perfusion_jax.pod import distributed
from perfusion_jax.runtime.errors import InputError, Stopped

PRIOR = {"class_noun": True, "identifier": "sks", "prior_pictures": 3, "sampling_steps": 2}
CONFIGS = {
    "textual_inversion": {"embedding_rate": 0.01},
    "lora": {"rank": 2, "weights_rate": 0.01},
    "custom_diffusion": {"weights_rate": 0.001, **PRIOR},
    "dreambooth": {"weights_rate": 0.001, **PRIOR},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    fleet_runs.write_inputs(folder)
    table = (folder / "concepts.csv").read_text().splitlines()[:3]  # rex and tom
    (folder / "concepts.csv").write_text("\n".join(table) + "\n")
    return folder


def make_config(inputs, method):
    given = {"method": method, "steps": 4, **CONFIGS[method]}
    return settle(fleet_runs.make_config(inputs, **given), given)


@pytest.fixture(scope="module")
def learnt_on(inputs):
    return load_base_model(inputs / "base")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name == "lora" else pytest.mark.slow) for name in CONFIGS]
)
def test_a_fleet_of_another_method_is_learnt_and_drawn(inputs, learnt_on, method, tmp_path):
    config = make_config(inputs, method)
    train_fleet(config, epath.Path(tmp_path / "fleet"))
    saved = json.loads((tmp_path / "fleet" / "config.json").read_text())
    assert (saved["method"], saved["masks"]) == (method, "none")
    file = tmp_path / "fleet" / "concepts" / "rex.safetensors"
    rex = load_concept(file, learnt_on)
    assert (rex.card.method, rex.card.class_noun) == (method, "class_noun" in CONFIGS[method])
    assert all(np.abs(change).max() > 0 for change in rex.concept.changes.values())
    drawn = generate(learnt_on, [f"a photo of a {rex.card.phrase}"], [0], [rex], steps=2, height=16, width=16)
    assert drawn.shape == (1, 16, 16, 3)
    with pytest.raises(InputError, match=f"rex: learnt by {method}, to compare with"):
        export(learnt_on, [rex], "lora", tmp_path / "export")


@pytest.mark.slow
@pytest.mark.parametrize("method", CONFIGS)
def test_alone_a_concept_is_learnt_as_in_a_fleet(inputs, learnt_on, method, tmp_path):
    config = make_config(inputs, method)
    train_fleet(config, epath.Path(tmp_path / "fleet"))
    own = {"concepts": "", "name": "rex", "super_category": "dog", "pictures": str(inputs / "rex")}
    alone = train_one(ConfigDict({**config.to_dict(), **own}), epath.Path(tmp_path / "alone"))
    files = (tmp_path / "fleet" / "concepts" / "rex.safetensors", alone)
    one, other = (flatten_util.ravel_pytree(load_concept(file, learnt_on).concept)[0] for file in files)
    # What has no gradient but rounding, as a bias before a group's normalisation, is moved by Adam all the same.
    assert np.linalg.norm(one - other) <= 0.05 * np.linalg.norm(one)


def test_pictures_of_a_kind_are_those_that_the_frozen_model_draws(learnt_on):
    prior = draw_prior(learnt_on, "teddy bear", ("a photo of a {}", "my {}"), 3, 16, 2, 4.0, threading.Event())
    prompts = ["a photo of a teddy bear", "my teddy bear"]
    pixels = generate(learnt_on, [*prompts, prompts[0]], range(3), steps=2, guidance=4.0, height=16, width=16)
    expected = learnt_on.model.encode_image(learnt_on.params["vae"], pixels.astype(np.float32) / 127.5 - 1)
    np.testing.assert_allclose(prior.mean[:, 0], expected.mean, atol=1e-4)
    assert int(prior.num_pictures) == 3
    assert np.all(np.asarray(prior.masks) == 1)
    for number, prompt in enumerate((*prompts, prompts[0])):  # each is learnt by the prompt that it is drawn by
        of_prompt = learnt_on.model.tokenizer([prompt, prompt], [PLACEHOLDER])
        np.testing.assert_array_equal(prior.prompt_ids[number], of_prompt)
    assert not np.any(np.asarray(prior.prompt_ids) == learnt_on.model.tokenizer.vocabulary_size)


def test_pictures_that_are_not_needed_any_more_are_not_drawn_to_the_end(learnt_on):
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(Stopped):
        draw_prior(learnt_on, "dog", ("a {}",), 1000, 16, 2, 4.0, cancelled)


def test_neither_own_pictures_nor_the_priors_are_mirrored_where_the_config_says_so(learnt_on, inputs):
    config = make_config(inputs, "dreambooth")
    config.update(concepts="", name="rex", super_category="dog", pictures=str(inputs / "rex"), flip=False)
    row = Row("rex", "dog", str(inputs / "rex"), "", "", {}, {}, "")
    resources = SimpleNamespace(
        base=learnt_on,
        whitening=None,
        prior=lambda *arguments: draw_prior(learnt_on, *arguments),
        side_of=lambda config: config.size,
    )
    current = Round((Member(row, config),), round_settings(config))
    prepared = prepare(resources, current, [0], threading.Event())
    assert not prepared.failures
    examples = prepared.examples[0]
    assert examples.prior.mean.shape == (3, 2, 8, 8, 4)
    for some in (examples, examples.prior):
        np.testing.assert_array_equal(some.mean[:, 0], some.mean[:, 1])
    # The concept is called by its kind, and so it is once.
    assert (examples.prompt_ids == learnt_on.model.tokenizer.vocabulary_size).sum(axis=2).tolist() == [[1, 1]] * 3
    ids = learnt_on.model.tokenizer([f"a photo of a {PLACEHOLDER} dog", f"my {PLACEHOLDER} dog"], [PLACEHOLDER])
    np.testing.assert_array_equal(examples.prompt_ids[0], ids)


@pytest.mark.slow
def test_interrupted_it_goes_on_to_the_same_result(inputs, tmp_path, monkeypatch):
    config = make_config(inputs, "custom_diffusion")
    whole = epath.Path(tmp_path / "whole")
    train_fleet(config, whole)
    asked = []

    @contextlib.contextmanager
    def stopping():
        yield lambda: asked.append(0) or len(asked) > 3

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "stopping", stopping)
        with pytest.raises(Stopped):
            train_fleet(config, epath.Path(tmp_path / "parts"))
    train_fleet(config, epath.Path(tmp_path / "parts"))
    for name in ("rex", "tom"):
        one, other = (folder / "concepts" / f"{name}.safetensors" for folder in (whole, tmp_path / "parts"))
        assert one.read_bytes() == other.read_bytes()
