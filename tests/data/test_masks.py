"""Masks on the grid of latents."""

from functools import partial

import jax
import numpy as np

from perfusion_jax.data.masks import attention_masks, normalise, shrink


def test_shrinking_averages_and_normalising_goes_by_the_whole_picture():
    masks = np.zeros((1, 16, 16), np.float32)
    masks[0, :8, :4] = 0.5
    masks[0, 8:, 8:] = 0.25
    small = shrink(masks, 8)
    np.testing.assert_allclose(small, [[[0.25, 0.0], [0.0, 0.25]]])
    masks[0, 8:, 8:] = 0.5
    # Divided by the picture's largest value, not by each row's.
    np.testing.assert_allclose(normalise(shrink(masks, 8)), [[[0.5, 0.0], [0.0, 1.0]]])


def test_attention_masks_go_from_zero_to_one_and_depend_on_the_word(base):
    latents = jax.random.normal(jax.random.key(0), (2, 16, 16, base.model.latent_channels))
    find = jax.jit(partial(attention_masks, base.model), static_argnames="super_category")
    dog, bear = (
        np.asarray(find(base.params, latents, super_category=word, key=jax.random.key(1)))
        for word in ("dog", "teddy bear")
    )
    for masks in (dog, bear):
        assert masks.shape == (2, 16, 16)
        np.testing.assert_allclose(masks.min(axis=(1, 2)), 0, atol=1e-6)
        np.testing.assert_allclose(masks.max(axis=(1, 2)), 1, atol=1e-6)
    assert np.abs(dog - bear).max() > 0.05
