"""The gated rank-1 edit of a cross-attention projection, on plain arrays.

Perfusion (arXiv 2305.01644), section 4 and appendix B. A concept j has a target input i_j, an encoding of its
word, and a target output o_j for every projection W. Under the metric <a, b> = a^T C^-1 b, where C is the
uncentred covariance of text encodings, the edited projection of an encoding e is

    h(e) = W (e - sum_j g_j c_j(e) i_j) + sum_j g_j sigmoid((s_j(e) - beta_j) / tau_j) o_j

    s_j(e) = <i_j, e> / <i_j, i_j>          how much of e is concept j
    c(e)   = G^-1 [<i_k, e>]_k              coordinates of e in the span of the concepts, G_jk = <i_j, i_k>

With one concept c = s. The strength g_j = 1 is the paper's edit. The first term needs no knowledge of the layer,
so everything but the two dense products is computed once per prompt and shared by all layers.

C^-1 enters only through the duals d_j = C^-1 i_j: <i_j, e> = d_j . e. All of this runs in float32 at full precision,
whatever the dtype of the network: on a TPU a default float32 product is rounded to bfloat16 first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

# Concepts whose normalised Gram matrix has an eigenvalue below this share of the largest are treated as sharing a
# direction: float32 cannot tell them apart (its rounding, 1e-7, is divided by that eigenvalue).
PARALLEL_TOLERANCE = 1e-5


class Gate(NamedTuple):
    """Run-time controls of a concept; each field a float32 scalar, or [num_concepts] when stacked.

    Attributes:
        bias: beta, the similarity at which the gate is half open.
        temperature: tau > 0, how sharply it opens.
        strength: g, 1 for the paper's edit, 0 to leave the model alone.
    """

    bias: Float[Array, "*concepts"] | float
    temperature: Float[Array, "*concepts"] | float
    strength: Float[Array, "*concepts"] | float = 1.0


class Edit(NamedTuple):
    """What an edit needs to know of its concepts, the same for every layer.

    Attributes:
        target_inputs: i*, float32 [num_concepts, context_width]. A row of zeros is an empty slot and has no effect.
        duals: C^-1 i*, float32 [num_concepts, context_width].
        gates: bias, temperature and strength, float32 [num_concepts] each.
    """

    target_inputs: Float32[Array, "concepts context"]
    duals: Float32[Array, "concepts context"]
    gates: Gate


class Factors(NamedTuple):
    """A change of a kernel of low rank: W' = W + down^T up.

    Attributes:
        down: float32 [num_concepts, context_width].
        up: float32 [num_concepts, out_width].
    """

    down: Float32[Array, "concepts context"]
    up: Float32[Array, "concepts out"]


class EditedInput(NamedTuple):
    """A prompt's encodings, split into what every edited projection reads.

    Attributes:
        perpendicular: the encodings without their part in the span of the concepts, [..., context_width], the
            encodings' dtype.
        activations: g_j sigmoid((s_j - beta_j) / tau_j), the weight of each concept's target output, float32 [...,
            num_concepts].
    """

    perpendicular: Float[Array, "*batch context"]
    activations: Float32[Array, "*batch concepts"]


def _dot(a: Float32[Array, "*rows inner"], b: Float32[Array, "inner columns"]) -> Float32[Array, "*rows columns"]:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def dual(
    whitening: Float32[Array, "context context"], target_input: Float32[Array, "*concepts context"]
) -> Float32[Array, "*concepts context"]:
    """Returns C^-1 i*, the covector that measures similarity to i*.

    Args:
        whitening: C^-1/2, the symmetric root of the metric, float32 [context_width, context_width]. Applied twice
            it loses only the square root of C's condition number in precision; one product with C^-1 would lose
            all of it.
        target_input: i*, float32 [..., context_width].
    """
    return _dot(_dot(target_input, whitening), whitening)


def _exact(edit: Edit) -> Edit:
    return jax.tree.map(lambda field: jnp.asarray(field, jnp.float32), edit)


def _squared_norms(edit: Edit) -> Float32[Array, " concepts"]:
    """<i_j, i_j>, [num_concepts]; 0 for an empty slot."""
    return jnp.sum(edit.target_inputs * edit.duals, axis=-1)


def _or_one(
    values: Float32[Array, "*concepts"] | float, present: Bool[Array, " concepts"]
) -> Float32[Array, " concepts"]:
    """Replaces the values of empty slots, by which nothing can be divided."""
    return jnp.where(present, values, 1.0)


def similarity(edit: Edit, encodings: Float[Array, "*batch context"]) -> Float32[Array, "*batch concepts"]:
    """Returns s_j(e), how much of each encoding is concept j: 1 at e = i_j, 0 where the metric calls them unrelated.

    Args:
        edit: the concepts.
        encodings: text encodings, [..., context_width], any float dtype.

    Returns:
        float32 [..., num_concepts].
    """
    edit = _exact(edit)
    norms = _squared_norms(edit)
    return _dot(encodings.astype(jnp.float32), edit.duals.T) / _or_one(norms, norms > 0)


def gate(similarities: Float32[Array, "*batch concepts"], gates: Gate) -> Float32[Array, "*batch concepts"]:
    """Returns sigmoid((s - beta) / tau), float32, of the shape of `similarities` ([..., num_concepts])."""
    return jax.nn.sigmoid((similarities - gates.bias) / gates.temperature)


def dual_basis(edit: Edit) -> Float32[Array, "concepts context"]:
    """Returns u = G^-1 d, such that c_j(e) = u_j . e are the coordinates of e in the span of the concepts.

    Near-parallel concepts count as one direction, shared evenly between them (the pseudo-inverse of G): the result is
    finite for any concepts, the same one twice included, and does not depend on their order. (Their target outputs are
    still added: two concepts, however alike, are two edits.)

    Returns:
        float32 [num_concepts, context_width].
    """
    edit = _exact(edit)
    squared_norms = _squared_norms(edit)
    norms = jnp.sqrt(_or_one(squared_norms, squared_norms > 0))
    gram = _dot(edit.target_inputs, edit.duals.T)
    correlation = gram / norms[:, None] / norms[None, :]
    if correlation.shape[-1] == 1:  # the coordinate of a single concept is its similarity
        return edit.duals / norms[:, None] ** 2
    # Rounding leaves G slightly asymmetric; the pseudo-inverse reads one triangle, which would depend on the order.
    correlation = (correlation + correlation.T) / 2
    inverse = jnp.linalg.pinv(correlation, rtol=PARALLEL_TOLERANCE, hermitian=True)
    return _dot(inverse / norms[None, :], edit.duals) / norms[:, None]


def edited_input(edit: Edit, encodings: Float[Array, "*batch context"]) -> EditedInput:
    """Splits encodings into what every edited projection reads; done once per prompt, for all layers.

    Args:
        edit: the concepts and their gates.
        encodings: text encodings, [..., context_width], any float dtype.
    """
    edit = _exact(edit)
    exact = encodings.astype(jnp.float32)
    coordinates = _dot(exact, dual_basis(edit).T)
    perpendicular = exact - _dot(coordinates * edit.gates.strength, edit.target_inputs)
    present = _squared_norms(edit) > 0
    gates = edit.gates._replace(temperature=_or_one(edit.gates.temperature, present))
    activations = jnp.where(present, gates.strength * gate(similarity(edit, exact), gates), 0.0)
    return EditedInput(perpendicular.astype(encodings.dtype), activations)


def project(
    kernel: Float[Array, "context out"], edited: EditedInput, target_outputs: Float[Array, "concepts out"]
) -> Float[Array, "*batch out"]:
    """Returns h(e), the edited projection of a prompt.

    Args:
        kernel: W as Flax stores it, [context_width, out_width].
        edited: the prompt, from `edited_input`, [..., context_width].
        target_outputs: o*, float32 [num_concepts, out_width].

    Returns:
        [..., out_width], the dtype of the prompt's encodings.
    """
    dtype = edited.perpendicular.dtype
    dense = jnp.matmul(edited.perpendicular, kernel.astype(dtype), preferred_element_type=jnp.float32)
    return (dense + _dot(edited.activations, target_outputs.astype(jnp.float32))).astype(dtype)


def baked_change(
    kernel: Float[Array, "context out"], edit: Edit, target_outputs: Float[Array, "concepts out"]
) -> Factors:
    """Returns what the ungated edit adds to a plain kernel, where the similarity stands for the gate.

    For one concept, W' = W + g (o* - W i*) (C^-1 i*)^T / <i*, i*> (ROME, arXiv 2202.05262, eq. 2). Several share the
    span of their target inputs as `edited_input` does.

    Args:
        kernel: W as Flax stores it, [context_width, out_width].
        edit: the concepts; of their gates only the strength is used.
        target_outputs: o*, float32 [num_concepts, out_width].
    """
    edit = _exact(edit)
    change = target_outputs.astype(jnp.float32) - _dot(edit.target_inputs, kernel.astype(jnp.float32))
    return Factors(dual_basis(edit) * jnp.reshape(edit.gates.strength, (-1, 1)), change)


def bake(
    kernel: Float[Array, "context out"], edit: Edit, target_outputs: Float[Array, "concepts out"]
) -> Float[Array, "context out"]:
    """Folds the ungated edit into a plain kernel.

    Args:
        kernel, edit, target_outputs: as for `baked_change`.

    Returns:
        [context_width, out_width], the kernel's dtype.
    """
    factors = baked_change(kernel, edit, target_outputs)
    return (kernel.astype(jnp.float32) + _dot(factors.down.T, factors.up)).astype(kernel.dtype)
