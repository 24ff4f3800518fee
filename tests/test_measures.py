"""Measures of pictures and attention, against values worked out by hand."""

import sys

import jax
import numpy as np
import pytest
from exported import learnt
from fleet_runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import measures


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_variety_is_the_mean_distance_of_pairs_of_one_prompt():
    embedded = unit(np.random.default_rng(0).normal(size=(3, 4, 5)))
    pairs = [
        1 - embedded[prompt, one] @ embedded[prompt, other]
        for prompt in range(3)
        for one in range(4)
        for other in range(one + 1, 4)
    ]
    assert measures.variety(embedded) == pytest.approx(np.mean(pairs))
    assert measures.variety(np.repeat(embedded[:, :1], 3, axis=1)) == pytest.approx(0)


def test_likeness_leaves_a_picture_with_itself_out():
    own = unit(np.random.default_rng(0).normal(size=(3, 5)))
    assert measures.likeness(own) == pytest.approx((own[0] @ own[1] + own[0] @ own[2] + own[1] @ own[2]) / 3)
    assert measures.likeness(own[:1]) == 1


def test_windows_cover_a_picture():
    picture = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    assert measures.windows(picture, 1.0).shape == (1, 16, 16, 3)
    parts = measures.windows(picture, 0.5)
    assert parts.shape == (25, 8, 8, 3)
    np.testing.assert_array_equal(parts[0], picture[:8, :8])
    np.testing.assert_array_equal(parts[-1], picture[8:, 8:])


def colours(pictures):
    """An encoder that sees nothing but the mean colour."""
    return unit(pictures.reshape(len(pictures), -1, 3).mean(axis=1) + 1e-6)


def test_things_are_found_where_they_are():
    known = {"red": unit(np.array([[1, 0, 0.0], [1, 0.1, 0]])), "green": unit(np.array([[0.1, 1, 0], [0, 1, 0.1]]))}
    pictures = np.zeros((4, 32, 32, 3), np.uint8)
    pictures[..., 2] = 200  # blue: nothing that is known
    pictures[1, 4:20, 8:24] = (200, 0, 0)
    pictures[2, 4:20, 0:16] = (200, 0, 0)
    pictures[2, 12:28, 16:32] = (0, 200, 0)
    pictures[3] = (0, 200, 0)
    found = measures.presence(colours, pictures, known)
    assert found["red"].tolist() == [False, True, True, False]
    assert found["green"].tolist() == [False, False, True, True]


def test_good_pictures_are_good_in_both():
    found = measures.good_pictures(np.array([0.5, 0.4, 0.5]), np.array([0.3, 0.3, 0.2]), 0.45, 0.25)
    assert found.tolist() == [True, False, False]


def test_the_share_of_attention_inside():
    attention = np.array([[[1.0, 3.0], [0.0, 4.0]]])
    masks = np.array([[[0.0, 1.0], [1.0, 0.5]]])
    np.testing.assert_allclose(measures.share_inside(attention, masks), [(3 + 2) / 8])


def test_gates_by_position_are_those_of_the_formula(small_base):
    concept, card = learnt(small_base, "rex", "dog")
    prompts = ["a photo of a {}", "my {} on the beach"]
    found = measures.gates_by_position(small_base, concept, card, prompts)
    assert sorted(found) == [-5, -4, -3, -2, -1, 0, 1, 2, 3, 4]
    assert [len(found[place]) for place in (-5, -2, 0, 1, 4)] == [1, 2, 2, 2, 1]
    ids = small_base.model.tokenizer([prompt.replace("{}", "<rex>") for prompt in prompts], ["<rex>"])
    encodings = np.asarray(small_base.model.encode(small_base.params, ids, concept.embedding[None]).tokens, np.float64)
    i, dual = (np.asarray(jax.device_get(array), np.float64) for array in (concept.target_input, concept.dual))
    similarity = encodings @ dual / (i @ dual)
    gate = 1 / (1 + np.exp(-(similarity - card.bias) / card.temperature))
    np.testing.assert_allclose(found[0], [gate[0, 5], gate[1, 2]], atol=1e-4)
    np.testing.assert_allclose(found[1], [gate[0, 6], gate[1, 3]], atol=1e-4)
