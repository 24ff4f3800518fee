"""What a run does each time it validates its concept."""

import numpy as np
import pytest
from checkpoints import save_clip
from etils import epath
from fleet_runs import CONFIG, write_inputs

from configs.dog import get_config
from perfusion_jax.learning.loop import AHEAD
from perfusion_jax.learning.losses import Losses
from perfusion_jax.learning.metrics import Evaluator
from perfusion_jax.learning.resources import load_resources
from perfusion_jax.learning.runs import train_one


def test_a_run_embeds_the_own_pictures_of_its_concept_once(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    save_clip(tmp_path / "clip")
    config = get_config(str(tmp_path / "base"))
    config.update(CONFIG, name="rex", pictures=str(tmp_path / "rex"), covariance=str(tmp_path / "covariance.npz"))
    config.update(evaluator=str(tmp_path / "clip"), steps=2, validate_every=1, sampling_steps=2)
    config.update(instance_encoder="", validation_prompts=("a {} on the beach",), pictures_per_prompt=2)
    counts = []

    def embed(evaluator, pictures):
        counts.append(len(pictures))
        return evaluator.clip.images(np.asarray(pictures))

    monkeypatch.setattr(Evaluator, "embed_instances", embed)
    train_one(config, epath.Path(tmp_path / "run"))
    assert sorted(counts) == [2, 2, 3]  # what was drawn at each of two validations, and the three own pictures


@pytest.mark.parametrize(("every", "loaded"), [(0, 0), (1, 1)])
def test_a_run_that_is_never_looked_at_loads_no_evaluator(tmp_path, monkeypatch, every, loaded):
    write_inputs(tmp_path)
    config = get_config(str(tmp_path / "base"))
    config.update(CONFIG, pictures=str(tmp_path / "rex"), covariance=str(tmp_path / "covariance.npz"))
    config.update(validate_every=every, validation_prompts=("a {} on the beach",))
    calls = []
    monkeypatch.setattr("perfusion_jax.learning.resources.load_evaluator", calls.append)
    load_resources(config)
    assert len(calls) == loaded


def test_few_steps_are_under_way_at_once(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    config = get_config(str(tmp_path / "base"))
    config.update(CONFIG, name="rex", pictures=str(tmp_path / "rex"), covariance=str(tmp_path / "covariance.npz"))
    config.update(steps=8, log_every=100, checkpoint_every=100, validate_every=0, validation_prompts=())
    under_way, most = [], []
    add, wait = Losses.add, Losses.wait

    def begun(losses, loss):
        under_way.append(loss)
        most.append(len(under_way))
        add(losses, loss)

    def waited(losses, ahead=0):
        taken = wait(losses, ahead)
        del under_way[:taken]
        return taken

    monkeypatch.setattr(Losses, "add", begun)
    monkeypatch.setattr(Losses, "wait", waited)
    train_one(config, epath.Path(tmp_path / "run"))
    assert len(most) == 8
    assert max(most) == AHEAD + 1 <= 4
