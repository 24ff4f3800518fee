import sys
from pathlib import Path
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from perfusion_jax.method import edit as edit_lib
from perfusion_jax.method.covariance import whitening_of
from perfusion_jax.method.edit import Edit, Gate

D_CTX, D_OUT, TOKENS = 24, 10, 7


class Problem:
    """A random projection, prompt and concepts, float64; the prompt's first tokens are the concepts' encodings."""

    def __init__(self, seed: int, num_concepts: int, condition: float = 1e3):
        rng = np.random.default_rng(seed)
        rotation, _ = np.linalg.qr(rng.standard_normal((D_CTX, D_CTX)))
        self.covariance = rotation @ np.diag(np.geomspace(1, 1 / condition, D_CTX)) @ rotation.T
        self.W = rng.standard_normal((D_OUT, D_CTX))
        root = np.linalg.cholesky(self.covariance)
        self.inputs = rng.standard_normal((num_concepts, D_CTX)) @ root.T
        self.outputs = rng.standard_normal((num_concepts, D_OUT))
        self.e = np.concatenate([self.inputs, rng.standard_normal((TOKENS, D_CTX)) @ root.T])
        self.bias = rng.uniform(0.3, 0.8, num_concepts)
        self.temperature = rng.uniform(0.08, 0.2, num_concepts)
        self.strength = rng.uniform(0.0, 1.5, num_concepts)

    def edit(self, strength=1.0, order=None) -> Edit:
        order = np.arange(len(self.inputs)) if order is None else order
        inputs = jnp.asarray(self.inputs[order], jnp.float32)
        gates = Gate(*(jnp.asarray(v[order], jnp.float32) for v in (self.bias, self.temperature)))
        strength = jnp.broadcast_to(jnp.asarray(strength, jnp.float32), (len(self.inputs),))[order]
        return Edit(inputs, edit_lib.dual(whitening_of(self.covariance), inputs), gates._replace(strength=strength))

    def project(self, edit: Edit, outputs=None) -> jax.Array:
        outputs = self.outputs if outputs is None else outputs
        edited = edit_lib.edited_input(edit, jnp.asarray(self.e, jnp.float32))
        return edit_lib.project(jnp.asarray(self.W.T, jnp.float32), edited, jnp.asarray(outputs, jnp.float32))


def relative_error(ours, reference):
    return np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max()


@pytest.mark.parametrize("seed", range(5))
def test_one_concept_equals_the_paper(seed):
    p = Problem(seed, 1)
    reference = oracle.single(p.W, p.e, p.inputs[0], p.outputs[0], p.covariance, p.bias[0], p.temperature[0])
    assert relative_error(p.project(p.edit()), reference) < 1e-5


@pytest.mark.parametrize("num_concepts", [2, 3, 5])
def test_several_concepts_equal_the_orthonormal_basis_of_appendix_b(num_concepts):
    p = Problem(num_concepts, num_concepts)
    reference = oracle.several(p.W, p.e, p.inputs, p.outputs, p.covariance, p.bias, p.temperature)
    assert relative_error(p.project(p.edit()), reference) < 1e-5


@pytest.mark.parametrize("num_concepts", [1, 3])
def test_strengths_scale_each_concepts_correction(num_concepts):
    p = Problem(17, num_concepts)
    reference = oracle.several_with_strength(
        p.W, p.e, p.inputs, p.outputs, p.covariance, p.bias, p.temperature, p.strength
    )
    assert relative_error(p.project(p.edit(p.strength)), reference) < 1e-5


def test_equals_perfusion_pytorch_with_the_covariance_of_clip(monkeypatch):
    # Its __init__ imports open_clip, and with it a torchvision that has no CPU build; the edit itself uses neither.
    monkeypatch.setitem(sys.modules, "open_clip", MagicMock())
    from perfusion_pytorch.perfusion import DATA_DIR, Rank1EditModule

    covariance = torch.load(Path(DATA_DIR) / "covariance_CLIP_ViT-L-14.pt", weights_only=True)
    root = np.linalg.cholesky(covariance.double().numpy())
    rng = np.random.default_rng(0)
    encodings = rng.standard_normal((2, 77, 768)) @ root.T  # encodings with exactly this covariance
    linear = torch.nn.Linear(768, 320, bias=False)
    theirs = Rank1EditModule(linear, C=covariance, text_seq_len=77).eval()
    encodings[0, 5] = 0.9 * encodings[0, 0] + 0.1 * encodings[0, 5]
    target_input, target_output = encodings[0, 0], rng.standard_normal(320)
    theirs.ema_concept_text_encs.copy_(torch.tensor(target_input)[None])
    theirs.concept_outputs.data.copy_(torch.tensor(target_output)[None])
    theirs.initted.fill_(True)
    with torch.no_grad():
        # In float64: we ask whether the formulas agree, not how their float32 rounds.
        reference = theirs.double()(torch.tensor(encodings)).numpy()

    i = jnp.asarray(target_input, jnp.float32)[None]
    gates = Gate(jnp.array([theirs.eval_beta]), jnp.array([theirs.eval_temperature]), jnp.ones(1))
    edited = edit_lib.edited_input(
        Edit(i, edit_lib.dual(whitening_of(covariance.double().numpy()), i), gates), jnp.asarray(encodings, jnp.float32)
    )
    kernel = jnp.asarray(linear.weight.detach().numpy().T, jnp.float32)
    ours = edit_lib.project(kernel, edited, jnp.asarray(target_output, jnp.float32)[None])
    assert relative_error(ours, reference) < 1e-5
    plain = encodings @ linear.weight.detach().numpy().T
    assert relative_error(plain, reference) > 0.1  # the edit does something to compare


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), num_concepts=st.integers(1, 4))
def test_order_of_concepts_does_not_matter(seed, num_concepts):
    p = Problem(seed, num_concepts, condition=50)
    order = np.random.default_rng(seed).permutation(num_concepts)
    expected = p.project(p.edit(p.strength))
    assert relative_error(p.project(p.edit(p.strength, order), p.outputs[order]), np.asarray(expected)) < 1e-4


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), num_concepts=st.integers(1, 4))
def test_strength_zero_is_the_identity(seed, num_concepts):
    p = Problem(seed, num_concepts)
    plain = jnp.asarray(p.e, jnp.float32) @ jnp.asarray(p.W.T, jnp.float32)
    np.testing.assert_array_equal(p.project(p.edit(0.0)), plain)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31))
def test_a_shut_gate_leaves_unrelated_encodings_alone(seed):
    p = Problem(seed, 1, condition=50)
    s = oracle.similarity(p.e, p.inputs[0], p.covariance)
    p.e = (p.e - s[:, None] * p.inputs[0])[1:]  # orthogonal to i* under the metric
    p.temperature = np.array([1e-3])
    p.bias = np.array([0.75])
    assert relative_error(p.project(p.edit()), p.e @ p.W.T) < 1e-5


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), num_concepts=st.integers(1, 3))
def test_baking_equals_the_edit_with_the_gate_held_at_the_coordinates(seed, num_concepts):
    p = Problem(seed, num_concepts, condition=50)
    edit = p.edit(p.strength)
    outputs = jnp.asarray(p.outputs, jnp.float32)
    kernel = jnp.asarray(p.W.T, jnp.float32)
    e = jnp.asarray(p.e, jnp.float32)
    held = edit_lib.edited_input(edit, e)._replace(activations=(e @ edit_lib.dual_basis(edit).T) * edit.gates.strength)
    expected = np.asarray(edit_lib.project(kernel, held, outputs))
    assert relative_error(e @ edit_lib.bake(kernel, edit, outputs), expected) < 1e-4


def test_baking_equals_the_rome_formula_and_maps_the_input_to_the_output():
    p = Problem(3, 1)
    kernel = edit_lib.bake(jnp.asarray(p.W.T, jnp.float32), p.edit(), jnp.asarray(p.outputs, jnp.float32))
    assert relative_error(kernel.T, oracle.baked(p.W, p.inputs[0], p.outputs[0], p.covariance)) < 1e-5
    assert relative_error(p.inputs[0] @ np.asarray(kernel), p.outputs[0]) < 1e-4


def test_the_same_concept_twice_counts_as_one_direction():
    p = Problem(5, 1)
    alone = edit_lib.edited_input(p.edit(), jnp.asarray(p.e, jnp.float32)).perpendicular
    p.inputs, p.outputs = np.repeat(p.inputs, 2, axis=0), np.repeat(p.outputs, 2, axis=0)
    p.bias, p.temperature = np.repeat(p.bias, 2), np.repeat(p.temperature, 2)
    twice = edit_lib.edited_input(p.edit(), jnp.asarray(p.e, jnp.float32)).perpendicular
    assert relative_error(twice, np.asarray(alone)) < 1e-4


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3, 1e-5, 1e-8])
def test_near_parallel_concepts_give_a_finite_edit_and_gradient(angle):
    p = Problem(6, 2)
    p.inputs[1] = p.inputs[0] + angle * p.inputs[1]
    edit = p.edit()
    values, gradient = jax.value_and_grad(lambda e: jnp.sum(p.project(e) ** 2))(edit)
    assert np.isfinite(values)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    # What the concepts share leaves the encoding in any case.
    perpendicular = edit_lib.edited_input(edit, jnp.asarray(p.inputs[:1], jnp.float32)).perpendicular
    assert np.abs(perpendicular).max() < 2e-2 * np.abs(p.inputs[0]).max()


def test_an_empty_slot_has_no_effect():
    p = Problem(7, 2)
    expected = p.project(p.edit())
    empty = jax.tree.map(lambda leaf: jnp.concatenate([leaf, jnp.zeros_like(leaf[:1])]), p.edit())
    for bias, temperature in ((-1.0, 0.1), (0.0, 0.0)):  # with an open gate, and with an impossible one
        gates = Gate(empty.gates.bias.at[2].set(bias), empty.gates.temperature.at[2].set(temperature), jnp.ones(3))
        padded = p.project(empty._replace(gates=gates), np.concatenate([p.outputs, np.ones((1, D_OUT))]))
        assert relative_error(padded, np.asarray(expected)) < 1e-5


@pytest.mark.parametrize("distance", [1.0, 0.3, 0.1])
def test_similar_concepts_are_told_apart_at_the_conditioning_of_clip(distance):
    """Two dogs of one super-category: i_2 = i_1 + distance * noise, and the condition number of CLIP ViT-L/14."""
    for seed in range(5):
        p = Problem(seed, 2, condition=3.9e3)
        p.inputs[1] = p.inputs[0] + distance * p.inputs[1]
        p.e[1] = p.inputs[1]
        reference = oracle.several(p.W, p.e, p.inputs, p.outputs, p.covariance, p.bias, p.temperature)
        assert relative_error(p.project(p.edit()), reference) < 1e-5 / distance


def matrix_products(jaxpr):
    """Every dot_general of a jaxpr, inner ones included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from matrix_products(inner)


def test_every_product_of_the_edit_is_at_full_precision():
    """On a TPU a float32 product is rounded to bfloat16 unless it says otherwise; a CPU does not show it."""
    p = Problem(0, 2)
    edit, e, kernel = p.edit(), jnp.asarray(p.e, jnp.float32), jnp.asarray(p.W.T, jnp.float32)
    outputs, whitening = jnp.asarray(p.outputs, jnp.float32), whitening_of(p.covariance)
    highest = (jax.lax.Precision.HIGHEST,) * 2
    for function, arguments, default in (
        (edit_lib.dual, (whitening, edit.target_inputs), 0),
        (edit_lib.edited_input, (edit, e), 0),
        (edit_lib.bake, (kernel, edit, outputs), 0),
        (edit_lib.project, (kernel, edit_lib.edited_input(edit, e), outputs), 1),  # W e is the network's own product
    ):
        products = [q.params["precision"] for q in matrix_products(jax.make_jaxpr(function)(*arguments).jaxpr)]
        assert len(products) >= 2
        assert sum(precision != highest for precision in products) == default


def test_concepts_in_half_precision_are_edited_in_float32():
    p = Problem(4, 2)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p.edit())
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    e = jnp.asarray(p.e, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, edit_lib.edited_input(half, e), edit_lib.edited_input(exact, e))
    np.testing.assert_array_equal(edit_lib.similarity(half, e), edit_lib.similarity(exact, e))


def test_stays_in_float32_inside_a_bfloat16_network():
    p = Problem(8, 1)
    # The first token is the concept itself: in bfloat16 its similarity, a small difference of large products,
    # would be lost.
    encodings = jnp.asarray(p.e, jnp.bfloat16)
    edit = p.edit()
    edited = edit_lib.edited_input(edit, encodings)
    s = oracle.similarity(np.asarray(encodings, np.float64), p.inputs[0], p.covariance)
    expected = oracle.sigmoid((s - p.bias[0]) / p.temperature[0])
    assert edited.activations.dtype == jnp.float32
    assert relative_error(edited.activations[:, 0], expected) < 1e-4
    h = edit_lib.project(jnp.asarray(p.W.T, jnp.bfloat16), edited, jnp.asarray(p.outputs, jnp.float32))
    assert h.dtype == jnp.bfloat16
    reference = oracle.single(p.W, p.e, p.inputs[0], p.outputs[0], p.covariance, p.bias[0], p.temperature[0])
    assert relative_error(h.astype(jnp.float32), reference) < 2e-2


def test_gradients_equal_finite_differences():
    p = Problem(9, 2)
    edit = p.edit(p.strength)

    def ours(encodings, outputs, inputs):
        duals = edit_lib.dual(whitening_of(p.covariance), inputs)
        edited = edit_lib.edited_input(edit._replace(target_inputs=inputs, duals=duals), encodings)
        return jnp.sum(edit_lib.project(jnp.asarray(p.W.T, jnp.float32), edited, outputs) ** 2)

    def reference(encodings, outputs, inputs):
        h = oracle.several_with_strength(
            p.W, encodings, inputs, outputs, p.covariance, p.bias, p.temperature, p.strength
        )
        return np.sum(h**2)

    arguments = [p.e, p.outputs, p.inputs]
    gradients = jax.grad(ours, argnums=(0, 1, 2))(*(jnp.asarray(a, jnp.float32) for a in arguments))
    rng = np.random.default_rng(0)
    for n, gradient in enumerate(gradients):
        direction = rng.standard_normal(arguments[n].shape)
        step = 1e-5
        ahead, behind = (
            [a + sign * step * direction if k == n else a for k, a in enumerate(arguments)] for sign in (1, -1)
        )
        difference = (reference(*ahead) - reference(*behind)) / (2 * step)
        np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), difference, rtol=1e-3)
