"""What other methods add to the UNet, as pure functions of parameter trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perfusion_jax.config import METHODS
from perfusion_jax.method import baselines
from perfusion_jax.method.baselines import BASELINES, FineTuned, LowRank, add
from perfusion_jax.method.surgery import cross_attention_layers


def begin(base, method, rank=2):
    return baselines.begin(method, base.params["unet"], base.super_category_embedding("dog"), jax.random.key(0), rank)


def moved(learnt):
    """A method's parameters somewhere in the middle of training."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.05 * jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), learnt)


def test_configs_know_all_methods():
    assert set(METHODS) == set(BASELINES)


@pytest.mark.parametrize("method", BASELINES)
def test_what_has_learnt_nothing_changes_nothing(small_base, method):
    before = small_base.params["unet"]
    after = add(before, begin(small_base, method))
    assert jax.tree.structure(after) == jax.tree.structure(before)
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize("method", BASELINES)
def test_what_is_added_where(small_base, method):
    before, learnt = small_base.params["unet"], moved(begin(small_base, method))
    once, half = add(before, learnt), add(before, learnt, 0.5)
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree.leaves_with_path(jax.tree.map(lambda a, b: a - b, once, before))
        if np.any(leaf)
    }
    layers = cross_attention_layers(before)
    expected = {
        "textual_inversion": set(),
        "lora": (projections := {f"{layer}/{name}/kernel" for layer in layers for name in ("to_k", "to_v")}),
        "custom_diffusion": projections,
        "dreambooth": {
            jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(before)
        },
    }
    assert changed == expected[method]
    for whole, part, old in zip(*map(jax.tree.leaves, (once, half, before)), strict=True):
        np.testing.assert_allclose(part, (np.asarray(whole) + old) / 2, atol=1e-6)


def test_a_lora_is_the_product_of_its_factors(small_base):
    learnt = moved(begin(small_base, "lora", rank=3))
    assert isinstance(learnt, LowRank)
    after = cross_attention_layers(add(small_base.params["unet"], learnt))
    for layer, weights in cross_attention_layers(small_base.params["unet"]).items():
        for name in ("to_k", "to_v"):
            down, up = (np.asarray(part[f"{layer}/{name}/kernel"], np.float64) for part in (learnt.down, learnt.up))
            assert (down.shape[1], np.linalg.matrix_rank(down @ up)) == (3, 3)
            expected = np.asarray(weights[name]["kernel"], np.float64) + down @ up
            np.testing.assert_allclose(after[layer][name]["kernel"], expected, atol=1e-5)


def test_a_loras_first_factors_are_pefts_gaussian(sd1_base):
    """Standard deviation 1 / rank; and they differ from layer to layer."""
    downs = list(begin(sd1_base, "lora", rank=4).down.values())
    assert np.std(np.concatenate(downs)) == pytest.approx(1 / 4, rel=0.05)
    assert all(np.abs(one - downs[0]).max() > 0.1 for one in downs[1:])


def test_weights_keep_their_dtype_and_the_change_its_precision(small_base):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small_base.params["unet"])
    learnt = moved(begin(small_base, "dreambooth"))
    for new, old in zip(*map(jax.tree.leaves, (add(half, learnt), half)), strict=True):
        assert new.dtype == old.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(learnt))


@pytest.mark.parametrize("method", ["lora", "custom_diffusion", "dreambooth"])
def test_another_unet_is_refused(small_base, sd1_base, method):
    with pytest.raises(ValueError, match=r"learnt on another UNet: it changes .* of shape"):
        add(small_base.params["unet"], begin(sd1_base, method))


def test_stacked_ones_are_added_one_by_one(small_base):
    one, other = (moved(begin(small_base, "custom_diffusion")), begin(small_base, "custom_diffusion"))
    assert isinstance(one, FineTuned)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, other)
    together = jax.vmap(add, in_axes=(None, 0))(small_base.params["unet"], stacked)
    for number, learnt in enumerate((one, other)):
        alone = add(small_base.params["unet"], learnt)
        jax.tree.map(lambda many, single, n=number: np.testing.assert_array_equal(many[n], single), together, alone)
