"""Whole runs of other methods on a small base model of random weights."""

import json

import fleet_runs
import numpy as np
import pytest
from etils import epath
from jax import flatten_util
from ml_collections import ConfigDict

from perfusion_jax import generate, load_base_model
from perfusion_jax.data.examples import PLACEHOLDER
from perfusion_jax.formats.concept_file import load_concept
from perfusion_jax.formats.exporting import export
from perfusion_jax.learning.preparation import draw_prior
from perfusion_jax.learning.runs import train_fleet, train_one
from perfusion_jax.runtime.errors import InputError

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


@pytest.fixture(scope="module")
def learnt_on(inputs):
    return load_base_model(inputs / "base")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name == "dreambooth" else pytest.mark.slow) for name in CONFIGS]
)
def test_a_fleet_of_another_method_is_learnt_and_drawn(inputs, learnt_on, method, tmp_path):
    config = fleet_runs.make_config(inputs, method=method, covariance="", **CONFIGS[method])
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
    config = fleet_runs.make_config(inputs, method=method, covariance="", **CONFIGS[method])
    train_fleet(config, epath.Path(tmp_path / "fleet"))
    own = {"concepts": "", "name": "rex", "super_category": "dog", "pictures": str(inputs / "rex")}
    alone = train_one(ConfigDict({**config.to_dict(), **own}), epath.Path(tmp_path / "alone"))
    files = (tmp_path / "fleet" / "concepts" / "rex.safetensors", alone)
    one, other = (flatten_util.ravel_pytree(load_concept(file, learnt_on).concept)[0] for file in files)
    # What has no gradient but rounding, as a bias before a group's normalisation, is moved by Adam all the same.
    assert np.linalg.norm(one - other) <= 0.05 * np.linalg.norm(one)


def test_pictures_of_a_kind_are_those_that_the_frozen_model_draws(learnt_on):
    prior = draw_prior(learnt_on, "teddy bear", ("a photo of a {}", "my {}"), 3, 16, 2, 4.0)
    prompts = ["a photo of a teddy bear", "my teddy bear"]
    pixels = generate(learnt_on, [*prompts, prompts[0]], range(3), steps=2, guidance=4.0, height=16, width=16)
    expected = learnt_on.model.encode_image(learnt_on.params["vae"], pixels.astype(np.float32) / 127.5 - 1)
    np.testing.assert_allclose(prior.mean[:, 0], expected.mean, atol=1e-4)
    assert int(prior.num_pictures) == 3
    assert np.all(np.asarray(prior.masks) == 1)
    np.testing.assert_array_equal(prior.prompt_ids[2], learnt_on.model.tokenizer(prompts, [PLACEHOLDER]))
    assert not np.any(np.asarray(prior.prompt_ids) == learnt_on.model.tokenizer.vocabulary_size)
