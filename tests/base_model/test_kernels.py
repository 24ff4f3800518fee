"""Convolution and attention against plain references, at sizes on both sides of every switch in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from perfusion_jax.base_model.attention import QUERY_CHUNK, attend
from perfusion_jax.base_model.convolution import convolve


@pytest.mark.parametrize("out_channels", [4, 500])  # as a convolution, as a matrix product
@pytest.mark.parametrize(("window", "stride", "pad"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (3, 2, 0)])
@pytest.mark.parametrize("height", [8, 9])
def test_convolution_and_its_gradients_equal_pytorch(out_channels, window, stride, pad, height):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2, height, 12, 6)).astype(np.float32)
    kernel = rng.standard_normal((window, window, 6, out_channels)).astype(np.float32)
    x = torch.from_numpy(inputs).permute(0, 3, 1, 2).requires_grad_()
    w = torch.from_numpy(kernel).permute(3, 2, 0, 1).requires_grad_()
    expected = torch.nn.functional.conv2d(x, w, stride=stride, padding=pad)
    expected.square().sum().backward()

    def loss(inputs, kernel):
        outputs = convolve(inputs, kernel, (stride, stride), ((pad, pad), (pad, pad)))
        return jnp.sum(outputs**2), outputs

    (_, ours), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(inputs, kernel)
    np.testing.assert_allclose(ours, expected.detach().permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradients[0], x.grad.permute(0, 2, 3, 1), rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(gradients[1], w.grad.permute(2, 3, 1, 0), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("queries", [5, QUERY_CHUNK, 2 * QUERY_CHUNK, QUERY_CHUNK + 32, QUERY_CHUNK + 1])
@pytest.mark.parametrize("keys", [7, QUERY_CHUNK])
def test_attention_and_its_gradients_equal_jax(queries, keys):
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((2, n, 12)), jnp.float32) for n in (queries, keys, keys))

    def reference(query, key, value):
        split = (tokens.reshape(*tokens.shape[:2], 3, 4) for tokens in (query, key, value))
        return jax.nn.dot_product_attention(*split).reshape(query.shape)

    def ours(query, key, value):
        return attend(query, key, value, heads=3)

    np.testing.assert_allclose(ours(query, key, value), reference(query, key, value), atol=1e-5)

    def gradients(function):
        return jax.grad(lambda *tokens: jnp.sum(function(*tokens) ** 2), argnums=(0, 1, 2))(query, key, value)

    for mine, theirs in zip(gradients(ours), gradients(reference), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * np.abs(theirs).max())


def test_large_scores_do_not_overflow():
    query = key = value = 1e4 * jnp.ones((1, 4, 8))
    np.testing.assert_allclose(attend(query, key, value, heads=2), value, rtol=1e-6)
