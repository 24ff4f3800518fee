import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from perfusion_jax import Concept, Gate, bake, insert, keys_values, remove
from perfusion_jax.base_model import Context
from perfusion_jax.base_model.text import mean_at
from perfusion_jax.method.concept import stack
from perfusion_jax.method.covariance import whitening_of
from perfusion_jax.method.surgery import cross_attention_layers, fitted_strengths

LAYER = "mid_block/attentions_0/transformer_blocks_0/attn2"
GATE = Gate(bias=0.6, temperature=0.15)


@pytest.fixture(scope="module")
def whitening(sd1_base):
    rng = np.random.default_rng(0)
    root = rng.standard_normal((sd1_base.model.context_width,) * 2) / sd1_base.model.context_width**0.5
    return whitening_of(root @ root.T + 0.1 * np.eye(len(root)))


@pytest.fixture(scope="module")
def concepts(sd1_base, whitening):
    """Two concepts with values that training might have given them."""
    made = []
    for seed, word in enumerate(["dog", "teddy bear"]):
        rng = np.random.default_rng(seed)
        concept = sd1_base.new_concept(word, whitening)
        leaves, structure = jax.tree.flatten(concept.trainable())
        moved = [leaf + rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
        made.append(dataclasses.replace(concept, **jax.tree.unflatten(structure, moved)))
    return made


@pytest.fixture(scope="module")
def encodings(sd1_base, concepts):
    ids = sd1_base.model.tokenizer(["a photo of <rex> and <tom>"], ["<rex>", "<tom>"])
    return sd1_base.model.encode(sd1_base.params, ids, jnp.stack([c.embedding for c in concepts])).tokens


def same_tree(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x is y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_layers_are_found_in_the_tree(sd1_base):
    layers = cross_attention_layers(sd1_base.params["unet"])
    assert len(layers) == 7  # two down, one middle, four up
    assert LAYER in layers
    with pytest.raises(ValueError, match="no cross-attention"):
        cross_attention_layers(sd1_base.params["vae"])


def test_remove_gives_back_the_very_same_tree(sd1_base, concepts):
    params = sd1_base.params["unet"]
    edited = insert(params, concepts, GATE)
    assert not same_tree(edited, params)
    assert same_tree(remove(edited), params)
    assert same_tree(remove(params), params)
    with pytest.raises(ValueError, match="already has an edit"):
        insert(edited, concepts, GATE)


@pytest.mark.parametrize("which", [[0], [1], [0, 1]])
def test_keys_and_values_equal_the_paper_in_every_layer(sd1_base, concepts, encodings, whitening, which):
    params = sd1_base.params["unet"]
    chosen = [concepts[j] for j in which]
    gates = [GATE, Gate(bias=0.4, temperature=0.1)][: len(chosen)]
    found = keys_values(insert(params, chosen, gates), encodings)
    inputs = np.stack([c.target_input for c in chosen]).astype(np.float64)
    root = np.asarray(whitening, np.float64)
    covariance = np.linalg.inv(root @ root)
    for layer, weights in cross_attention_layers(params).items():
        for ours, projection, outputs in (
            (found[layer].key, "to_k", [c.key_outputs[layer] for c in chosen]),
            (found[layer].value, "to_v", [c.value_outputs[layer] for c in chosen]),
        ):
            reference = oracle.several(
                np.asarray(weights[projection]["kernel"].T, np.float64),
                np.asarray(encodings[0], np.float64),
                inputs,
                np.stack(outputs).astype(np.float64),
                covariance,
                [gate.bias for gate in gates],
                [gate.temperature for gate in gates],
            )
            assert np.abs(ours[0] - reference).max() < 1e-4 * np.abs(reference).max(), (layer, projection)


def test_global_lock_takes_all_keys_from_the_super_category_and_leaves_them_unedited(sd1_base, concepts, encodings):
    params = sd1_base.params["unet"]
    ids = sd1_base.model.tokenizer(["a photo of <rex> and <tom>"], ["<rex>", "<tom>"])
    super_embeddings = jnp.stack([sd1_base.super_category_embedding(word) for word in ("dog", "teddy bear")])
    super_encodings = sd1_base.model.encode(sd1_base.params, ids, super_embeddings).tokens
    # A super-category of one word is simply that prompt; one of two words stands at one position, and moves no
    # other word.
    one_word = sd1_base.model.encode(sd1_base.params, sd1_base.model.tokenizer(["a photo of dog and cat"])).tokens
    np.testing.assert_allclose(super_encodings[0, :6], one_word[0, :6], atol=1e-5)
    locked = keys_values(insert(params, concepts, GATE), encodings, super_encodings)
    local = keys_values(insert(params, concepts, GATE), encodings)
    plain = keys_values(params, super_encodings)
    for layer, layer_locked in locked.items():
        np.testing.assert_array_equal(layer_locked.key, plain[layer].key)
        np.testing.assert_array_equal(layer_locked.value, local[layer].value)
        assert np.abs(layer_locked.key - local[layer].key).max() > 1e-2


def test_locked_key_at_the_concepts_token_is_the_super_categorys(sd1_base, whitening):
    """With the gate wide open and e = i*, local lock gives exactly W_K i_super."""
    concept = sd1_base.new_concept("dog", whitening)
    ids = sd1_base.model.tokenizer(["a photo of a dog"])
    encodings = sd1_base.model.encode(sd1_base.params, ids).tokens
    np.testing.assert_allclose(encodings[0, 5], concept.target_input, rtol=1e-5, atol=1e-5)
    wide_open = Gate(bias=-10.0, temperature=0.1)
    edited = keys_values(insert(sd1_base.params["unet"], concept, wide_open), encodings)
    plain = keys_values(sd1_base.params["unet"], encodings)
    for layer, layer_edited in edited.items():
        for ours, theirs in zip(layer_edited, plain[layer], strict=True):
            np.testing.assert_allclose(ours[0, 5], theirs[0, 5], atol=1e-4 * np.abs(theirs).max())


def test_a_new_concept_of_several_words_is_their_mean(sd1_base, whitening):
    concept = sd1_base.new_concept("teddy bear", whitening, ["a photo of a {}", "the {} in the snow"])
    table = sd1_base.params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
    ids = sd1_base.model.tokenizer(["a photo of a teddy bear", "the teddy bear in the snow"])
    np.testing.assert_allclose(concept.embedding, (table[ids[0, 5]] + table[ids[0, 6]]) / 2, rtol=1e-6)
    encodings = sd1_base.model.encode(sd1_base.params, ids).tokens
    expected = (encodings[0, 5] + encodings[0, 6] + encodings[1, 2] + encodings[1, 3]) / 4
    np.testing.assert_allclose(concept.target_input, expected, atol=1e-5)
    np.testing.assert_allclose(concept.dual, whitening @ whitening @ expected, rtol=1e-3, atol=1e-3)
    weights = cross_attention_layers(sd1_base.params["unet"])[LAYER]
    np.testing.assert_allclose(concept.key_outputs[LAYER], expected @ weights["to_k"]["kernel"], atol=1e-4)
    np.testing.assert_allclose(concept.value_outputs[LAYER], expected @ weights["to_v"]["kernel"], atol=1e-4)
    assert np.isclose(mean_at(encodings, jnp.asarray(ids == ids[0, 5])), (encodings[0, 5] + encodings[1, 2]) / 2).all()


def test_strength_zero_is_the_untouched_model(sd1_base, concepts, encodings):
    params = sd1_base.params["unet"]
    off = keys_values(insert(params, concepts, GATE._replace(strength=0.0)), encodings)
    plain = keys_values(params, encodings)
    jax.tree.map(np.testing.assert_array_equal, off, plain)


def test_a_baked_tree_is_a_plain_tree_that_maps_the_input_to_the_output(sd1_base, concepts):
    params = sd1_base.params["unet"]
    baked = bake(params, concepts[0])
    assert jax.tree.structure(baked) == jax.tree.structure(params)
    plain = keys_values(baked, concepts[0].target_input[None, None])
    for layer, (key, value) in plain.items():
        for ours, target in ((key, concepts[0].key_outputs), (value, concepts[0].value_outputs)):
            np.testing.assert_allclose(ours[0, 0], target[layer], atol=1e-3)
    unchanged = {id(leaf) for leaf in jax.tree.leaves(params)} & {id(leaf) for leaf in jax.tree.leaves(baked)}
    assert len(unchanged) == len(jax.tree.leaves(params)) - 2 * len(plain)
    jax.tree.map(np.testing.assert_array_equal, bake(params, concepts, strength=0.0), params)


def test_vmap_over_concepts_equals_one_at_a_time(sd1_base, concepts, encodings):
    params = sd1_base.params["unet"]
    gates = Gate(*(jnp.array([a, b]) for a, b in ((0.6, 0.5), (0.15, 0.1), (1.0, 0.7))))

    def edited(concept, gate):
        return keys_values(insert(params, concept, gate), encodings)

    together = jax.jit(jax.vmap(edited))(stack(concepts), gates)
    for j, concept in enumerate(concepts):
        alone = edited(concept, Gate(*(field[j] for field in gates)))
        jax.tree.map(lambda a, b, j=j: np.testing.assert_allclose(a[j], b, rtol=1e-4, atol=1e-4), together, alone)


def test_gradient_reaches_the_values_but_not_locked_keys(sd1_base, concepts, encodings):
    concept = concepts[0]

    def loss(parameters):
        edited = insert(sd1_base.params["unet"], dataclasses.replace(concept, **parameters), GATE)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(keys_values(edited, encodings)))

    locked = jax.jit(jax.grad(loss))(concept.trainable())
    assert set(locked) == {"embedding", "value_outputs"}
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(locked["value_outputs"]))
    unlocked = jax.grad(loss)(concept.trainable(("embedding", "key_outputs", "value_outputs")))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(unlocked["key_outputs"]))


def test_an_edited_tree_denoises_differently(sd1_base, concepts, encodings):
    params = sd1_base.params["unet"]
    latents = jax.random.normal(jax.random.key(0), (1, 16, 16, 4))
    denoise = jax.jit(sd1_base.model.denoise)
    edited = insert(params, concepts, GATE)
    plain = denoise(params, latents, jnp.array([500]), Context(keys_values(params, encodings)))
    changed = denoise(edited, latents, jnp.array([500]), Context(keys_values(edited, encodings)))
    assert np.abs(plain - changed).max() > 1e-2 * np.abs(plain).max()


def test_gates_of_a_wrong_number_are_refused(sd1_base, concepts):
    with pytest.raises(ValueError, match=r"bias has shape \(3,\): give one value, or one for each of the 2"):
        insert(sd1_base.params["unet"], concepts, Gate(jnp.ones(3), jnp.ones(2)))


def test_a_concept_of_another_unet_is_refused(sd1_base, concepts):
    foreign = dataclasses.replace(concepts[0], value_outputs={"other/attn2": jnp.ones(3)})
    assert isinstance(foreign, Concept)
    with pytest.raises(ValueError, match="other/attn2"):
        insert(sd1_base.params["unet"], foreign, GATE)


def test_no_concept_is_the_untouched_tree(sd1_base):
    params = sd1_base.params["unet"]
    assert same_tree(insert(params, [], []), params)
    assert same_tree(bake(params, []), params)


def test_an_edited_tree_is_not_baked(sd1_base, concepts):
    edited = insert(sd1_base.params["unet"], concepts, GATE)
    with pytest.raises(ValueError, match="already has an edit"):
        bake(edited, concepts)


def test_baking_works_under_jit_and_vmap(sd1_base, concepts):
    params = sd1_base.params["unet"]
    path = ("mid_block", "attentions_0", "transformer_blocks_0", "attn2", "to_v", "kernel")

    def kernel(tree):
        for name in path:
            tree = tree[name]
        return tree

    together = jax.jit(jax.vmap(lambda concept, strength: kernel(bake(params, concept, strength))))(
        stack(concepts), jnp.array([1.0, 0.5])
    )
    for j, strength in enumerate((1.0, 0.5)):
        np.testing.assert_allclose(together[j], kernel(bake(params, concepts[j], strength)), atol=1e-4)


def test_a_bfloat16_network_is_edited_in_float32(sd1_base, concepts, encodings):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), sd1_base.params["unet"])
    edited = insert(half, concepts, GATE)
    assert {leaf.dtype for leaf in jax.tree.leaves(edited["concept_edit"])} == {jnp.dtype(jnp.float32)}
    ours = keys_values(edited, encodings.astype(jnp.bfloat16))
    exact = keys_values(insert(sd1_base.params["unet"], concepts, GATE), encodings)
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        assert mine.dtype == jnp.bfloat16
        assert np.abs(mine.astype(jnp.float32) - theirs).max() < 0.05 * np.abs(theirs).max()


def test_a_concept_of_other_widths_is_refused(sd1_base, concepts):
    narrow = dataclasses.replace(concepts[0], target_input=jnp.ones(32), dual=jnp.ones(32))
    with pytest.raises(ValueError, match=r"made for another UNet: .* maps \(48, 32\), the concept \(32, 32\)"):
        insert(sd1_base.params["unet"], narrow, GATE)


def test_a_temperature_of_zero_is_refused(sd1_base, concepts):
    with pytest.raises(ValueError, match="must be above 0"):
        insert(sd1_base.params["unet"], concepts, Gate(bias=0.6, temperature=0.0))


def test_another_target_input_brings_its_dual(concepts, whitening):
    target_input = concepts[1].target_input
    moved = concepts[0].with_target_input(target_input, whitening)
    np.testing.assert_array_equal(moved.target_input, target_input)
    np.testing.assert_allclose(moved.dual, concepts[1].dual, rtol=1e-5)


def test_super_category_encodings_of_another_shape_are_refused(sd1_base, encodings):
    with pytest.raises(ValueError, match="encode the same ids"):
        keys_values(sd1_base.params["unet"], encodings, encodings[:, :5])


def test_fitted_strengths_are_those_of_least_squares(sd1_base, concepts, encodings):
    """Against float64 and one large system of equations."""
    unet = sd1_base.params["unet"]
    fitted = fitted_strengths(unet, concepts, GATE, encodings[0])
    tokens = np.float64(encodings[0])
    rows, wanted = [], []
    for layer, weights in cross_attention_layers(unet).items():
        for projection, kind in (("to_k", "key_outputs"), ("to_v", "value_outputs")):
            kernel = np.float64(weights[projection]["kernel"])
            outputs = np.float64([getattr(concept, kind)[layer] for concept in concepts])
            inputs = np.float64([concept.target_input for concept in concepts])
            duals = np.float64([concept.dual for concept in concepts])
            coordinates = np.linalg.solve(inputs @ duals.T, duals @ tokens.T).T
            similarity = tokens @ duals.T / np.sum(inputs * duals, axis=1)
            gates = 1 / (1 + np.exp(-(similarity - GATE.bias) / GATE.temperature))
            unit = np.sqrt(np.square(tokens @ kernel).mean())
            gated = gates @ outputs - coordinates @ inputs @ kernel
            baked = coordinates[:, :, None] * (outputs - inputs @ kernel)
            rows.append(np.moveaxis(baked, 1, 2).reshape(-1, len(concepts)) / unit)
            wanted.append(gated.reshape(-1) / unit)
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(wanted))[0]
    assert np.abs(expected - 1).max() > 0.05  # it is not the strength that one would take anyway
    np.testing.assert_allclose(fitted, expected, rtol=1e-4)
