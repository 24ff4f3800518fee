"""The TPU's attention kernel, interpreted on this machine, against softmax attention in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perfusion_jax.base_model.flash_attention import flash_attention


def oracle(query, key, value, cotangent):
    """Softmax attention over [batch, tokens, heads, width], and its gradients."""
    scale = query.shape[-1] ** -0.5
    scores = scale * np.einsum("bqhd,bkhd->bhqk", query, key)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    attended = np.einsum("bhqk,bkhd->bqhd", weights, value)
    d_weights = np.einsum("bqhd,bkhd->bhqk", cotangent, value)
    d_scores = scale * weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True))
    return attended, (
        np.einsum("bhqk,bkhd->bqhd", d_scores, key),
        np.einsum("bhqk,bqhd->bkhd", d_scores, query),
        np.einsum("bhqk,bqhd->bkhd", weights, cotangent),
    )


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "width"),
    [
        (128, 77, 2, 40),
        (256, 256, 1, 160),
        (1024, 1024, 1, 80),
        (1024, 77, 1, 64),
        (640, 640, 1, 64),  # in blocks smaller than the largest
        pytest.param(4096, 4096, 1, 40, marks=pytest.mark.slow),
    ],
)
def test_attention_and_its_gradients_equal_numpy(queries, keys, heads, width, dtype):
    check_against_numpy(queries, keys, heads, width, dtype)


def test_keys_that_do_not_fit_at_once_are_taken_block_by_block(monkeypatch):
    monkeypatch.setattr("perfusion_jax.base_model.flash_attention.KEYS_BYTES", 2**20)
    check_against_numpy(512, 768, 2, 40, jnp.bfloat16)
    check_against_numpy(512, 300, 2, 40, np.float32)


def check_against_numpy(queries, keys, heads, width, dtype):
    rng = np.random.default_rng(0)
    shapes = ((1, n, heads, width) for n in (queries, keys, keys, queries))
    inputs = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    expected, expected_gradients = oracle(*(np.asarray(x, np.float64) for x in inputs))
    *tokens, cotangent = inputs
    ours, pullback = jax.vjp(lambda *tokens: flash_attention(*tokens, interpret=True), *tokens)
    tolerance = 1e-5 if dtype == np.float32 else 2e-2
    for mine, theirs in zip((ours, *pullback(cotangent)), (expected, *expected_gradients), strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(np.asarray(mine, np.float64), theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def test_members_of_a_fleet_are_computed_each_for_itself():
    rng = np.random.default_rng(0)
    tokens = [jnp.asarray(rng.standard_normal((3, 2, 128, 2, 40)), jnp.float32) for _ in range(3)]

    def attend(*tokens):
        return flash_attention(*tokens, interpret=True)

    together = jax.vmap(attend, spmd_axis_name="concept")(*tokens)
    alone = jnp.stack([attend(*(x[i] for x in tokens)) for i in range(3)])
    np.testing.assert_allclose(together, alone, atol=1e-6)
