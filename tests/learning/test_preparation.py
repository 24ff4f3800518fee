"""What people are told while a concept is prepared."""

import threading
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs.dog import get_config
from perfusion_jax import InputError
from perfusion_jax.data.table import Row
from perfusion_jax.learning.preparation import prepare
from perfusion_jax.learning.rounds import Member, Round, round_settings
from perfusion_jax.learning.scoring import check_validation


def test_a_concept_is_called_by_its_own_name(small_base):
    config = get_config(str(small_base.name))
    config.update(name="rex", validation_prompts=("a {} with <tom>",))
    with pytest.raises(InputError, match=r"config\.validation_prompts: .* names <tom>, .* given are: <rex>"):
        check_validation(config, small_base.model)


def test_super_categories_in_pieces_are_told_of_once_for_each_concept(small_base, small_folder, tmp_path, caplog):
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "0.png")
    members = []
    for name, word in (("rex", "dgo"), ("tom", "teddy bear"), ("zoe", "🐕"), ("bob", "my dog")):
        config = get_config(str(small_folder))
        config.update(
            name=name, super_category=word, pictures=str(tmp_path), masks="none", size=16, templates=("a {}",)
        )
        members.append(Member(Row(name, word, str(tmp_path), "", "", {}, {}, ""), config))
    resources = SimpleNamespace(base=small_base, whitening=jnp.eye(small_base.model.context_width))
    current = Round(tuple(members), round_settings(members[0].config))
    prepared = prepare(resources, current, range(len(members)), threading.Event())
    assert not prepared.failures
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith("rex: the base model has no word 'dgo'")
    assert said[0].endswith("; near words are dog")
    assert said[1].startswith("zoe: the base model has no word '🐕'")
    assert len(said) == 2
