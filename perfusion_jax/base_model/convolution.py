"""Convolutions of the frozen UNet.

On a CPU, XLA's convolution of a small picture with a large kernel is bound by reading the kernel, and its gradient
with respect to the picture first writes a transposed copy of the kernel. As a matrix product over patches neither
is so: the gradient contracts the same kernel along its other axis. On a TPU the compiler does better with the
convolution itself.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Padding = Sequence[tuple[int, int]]


def convolve(inputs: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Padding) -> jax.Array:
    """Returns the two-dimensional convolution.

    Args:
        inputs: [batch, height, width, in_channels].
        kernel: [kernel_height, kernel_width, in_channels, out_channels].
        strides: pixels between outputs, vertically and horizontally.
        padding: pixels of zeros (before, after), vertically and horizontally.

    Returns:
        [batch, out_height, out_width, out_channels].
    """

    def native(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            inputs, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def product(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        patches = _patches(inputs, kernel.shape[:2], strides, padding)
        # All pixels along one axis, as in the transformer blocks (`unet_blocks`), which 1 x 1 kernels stand around.
        flat = jnp.matmul(patches.reshape(-1, patches.shape[-1]), kernel.reshape(-1, kernel.shape[-1]))
        return flat.reshape(*patches.shape[:-1], kernel.shape[-1])

    if kernel.shape[:2] == (1, 1):
        return product(inputs, kernel)
    pixels = inputs.size // inputs.shape[-1] // (strides[0] * strides[1])
    # The patches are as large as the kernel where there are as many pixels as output channels; above that they
    # cost more than they save.
    if pixels > kernel.shape[-1]:
        return native(inputs, kernel)
    return jax.lax.platform_dependent(inputs, kernel, cpu=product, default=native)


def _patches(inputs: jax.Array, window: Sequence[int], strides: Sequence[int], padding: Padding) -> jax.Array:
    """Returns the pixels under the kernel at each output, [batch, out_height, out_width, window size * channels]."""
    padded = jnp.pad(inputs, ((0, 0), *padding, (0, 0)))
    # What is left of each axis once the window has come to its end: where the window's first pixel can stand.
    ends = [size - span + 1 for size, span in zip(padded.shape[1:3], window, strict=True)]
    return jnp.concatenate(
        [
            padded[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]
            for i in range(window[0])
            for j in range(window[1])
        ],
        axis=-1,
    )
