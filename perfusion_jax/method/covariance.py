"""The metric of the edit: C = E[e e^T], the uncentred covariance of text encodings, and its root C^-1/2.

ROME (arXiv 2202.05262, eq. 2) and Perfusion (arXiv 2305.01644, section 4). C's scale cancels in the edit.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Float64

# C is summed up in float32, so smaller eigenvalues are rounding. The edit itself bears it: with C^-1/2 applied twice in
# float32, similarities are still right to 1e-4 at this condition number.
MAX_CONDITION = 1e7
# The same holds where encodings deviate thirty times as far in a few directions more: SDXL's have gone through no last
# layer norm, and transformers put massive activations there (arXiv 2402.17762).
_OUTLIERS = 0.01  # of the directions
_OUTLYING = 1e3  # in variance


def checked(matrix: Float64[np.ndarray, "context context"]) -> Float64[np.ndarray, "context context"]:
    """Returns a covariance, float64 [context_width, context_width], made exactly symmetric.

    Raises:
        ValueError: it is not finite, not symmetric, or too near to singular to be inverted.
    """
    if not np.isfinite(matrix).all():
        raise ValueError("has values that are not finite")
    if np.abs(matrix - matrix.T).max() > 1e-4 * np.abs(matrix).max():
        raise ValueError("not symmetric, so not a covariance")
    matrix = (matrix + matrix.T) / 2
    eigenvalues = np.linalg.eigvalsh(matrix)
    largest = max(np.quantile(eigenvalues, 1 - _OUTLIERS), eigenvalues[-1] / _OUTLYING)
    if eigenvalues[0] <= largest / MAX_CONDITION:
        raise ValueError(
            f"singular or nearly so (eigenvalues from {eigenvalues[0]:.3g} to {eigenvalues[-1]:.3g}): "
            "make it from more, and more varied, captions"
        )
    return matrix


def whitening_of(covariance: Float64[np.ndarray, "context context"]) -> Float32[Array, "context context"]:
    """Returns C^-1/2, float32 [context_width, context_width], computed in float64.

    It whitens encodings: multiplied by it, they have the identity for their covariance.

    Args:
        covariance: C, symmetric and positive definite, float64 [context_width, context_width].
    """
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    return jnp.asarray((eigenvectors / np.sqrt(eigenvalues)) @ eigenvectors.T, jnp.float32)
