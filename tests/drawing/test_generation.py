"""`generate`, the function that people call."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perfusion_jax import InputError
from perfusion_jax.drawing.controls import per_concept
from perfusion_jax.drawing.generation import drawing, generate
from perfusion_jax.drawing.programs import compiled_begin, compiled_step
from perfusion_jax.formats.concept_file import ConceptCard, TrainedConcept
from perfusion_jax.method import baselines
from perfusion_jax.method.baselines import BASELINES

SMALL = {"steps": 3, "height": 32, "width": 32, "batch_size": 2}


def make_concept(base, name, word="dog", seed=0, moved=0.3):
    rng = np.random.default_rng(seed)
    concept = base.new_concept(word, jnp.eye(base.model.context_width))
    concept = jax.tree.map(
        lambda leaf: leaf + moved * jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), concept
    )
    card = ConceptCard(name, word, "small", base.fingerprint, bias=0.6, temperature=0.15, guidance_scale=6.0, step=1)
    return TrainedConcept(concept, card)


def difference(one, other):
    return np.abs(one.astype(int) - other).max()


def test_a_picture_depends_on_its_own_prompt_and_seed_alone(small_base):
    rex, tom = make_concept(small_base, "rex"), make_concept(small_base, "tom", "cat", seed=1)
    prompts = ["a photo of a <rex>", "the teddy bear on the beach", "a photo of a <rex>", "my <tom>"]
    together = generate(small_base, prompts, [5, 6, 7, 5], [rex, tom], **SMALL)
    assert together.shape == (4, 32, 32, 3)
    assert together.dtype == np.uint8
    assert difference(together[:1], generate(small_base, prompts[:1], [5], [rex], **SMALL)) <= 1
    assert difference(together[1:2], generate(small_base, prompts[1:2], [6], **SMALL)) <= 1
    assert difference(together[3:], generate(small_base, prompts[3:], [5], [tom, rex], **SMALL)) <= 1
    assert difference(together[0], together[2]) > 5


def test_the_order_of_concepts_and_the_same_one_twice(small_base):
    rex, tom = make_concept(small_base, "rex"), make_concept(small_base, "tom", "cat", seed=1)
    one, other = (generate(small_base, ["<rex> and <tom>"], [0], pair, **SMALL) for pair in ([rex, tom], [tom, rex]))
    assert difference(one, other) <= 1
    twin = make_concept(small_base, "twin")
    near = TrainedConcept(jax.tree.map(lambda leaf: leaf * (1 + 1e-7), twin.concept), twin.card)
    for again in (twin, near):
        pictures = [some.pixels for some in drawing(small_base, ["<rex> and <twin>"], [0], [rex, again], **SMALL)]
        assert np.std(pictures[0]) > 1  # finite: NaN would be one colour


def test_a_concept_still_untrained_draws_its_super_category(small_base):
    rex = make_concept(small_base, "rex", moved=0.0)
    plain = generate(small_base, ["a photo of a dog"], [0], **SMALL)
    for closed in ({"strength": 0.0}, {"start": 1.0}, {"end": 0.0}, {"start": 0.5, "end": 0.5}):
        assert difference(plain, generate(small_base, ["a photo of a <rex>"], [0], [rex], **closed, **SMALL)) <= 1
    edited = generate(small_base, ["a photo of a <rex>"], [0], [rex], **SMALL)
    assert difference(plain, edited) > 1
    early = generate(small_base, ["a photo of a <rex>"], [0], [rex], end=0.3, **SMALL)
    assert min(difference(early, plain), difference(early, edited)) > 1


def test_keys_that_were_trained_are_not_passed_over(small_base):
    concept, card = make_concept(small_base, "rex")
    rex = TrainedConcept(concept, dataclasses.replace(card, lock_keys=False))
    with pytest.raises(InputError, match=r"rex: its keys were trained .* draw it with the local one"):
        generate(small_base, ["a <rex>"], [0], [rex], lock="global", **SMALL)


def test_what_changes_from_picture_to_picture_does_not_compile_anew(small_base):
    rex, tom = make_concept(small_base, "rex"), make_concept(small_base, "tom", "cat", seed=1)
    generate(small_base, ["a photo of a <rex>"], [0], [rex], **SMALL)
    before, begun = compiled_step._cache_size(), compiled_begin._cache_size()
    generate(small_base, ["the <rex> on the beach"], [9], [rex], bias=0.4, temperature=0.1, strength=0.5, **SMALL)
    generate(small_base, ["<tom> and <rex>", "a dog", "<tom>"], [1, 2, 3], [tom, rex], bias=[0.4, 0.5], **SMALL)
    generate(small_base, ["a <tom>"], [0], [tom], guidance=2.0, guidance_rescale=0.5, negative_prompt="cat", **SMALL)
    generate(small_base, ["a <tom>"], [0], [tom], sampler="dpm++", **SMALL)
    generate(small_base, ["a <tom>"], [0], [tom], sampler="euler", **SMALL)
    generate(small_base, ["a <tom>"], [0], [tom], **{**SMALL, "steps": 5})
    assert (compiled_step._cache_size(), compiled_begin._cache_size()) == (before, begun)
    generate(small_base, ["a <tom>"], [0], [tom], **{**SMALL, "width": 40})
    assert compiled_step._cache_size() == before + 1
    compiled = []
    for start, end in ((0.5, 1.0), (0.0, 0.4), (0.4, 0.5), (0.3, 0.9)):
        generate(small_base, ["a <tom>"], [0], [tom], start=start, end=end, **{**SMALL, "steps": 6})
        compiled.append(compiled_step._cache_size())
    assert compiled == compiled[:1] * 4


def test_guidance_of_one_or_less_is_none_and_leads_away_from_nothing(small_base):
    one, none, negative = (
        generate(small_base, ["a dog"], [0], guidance=guidance, negative_prompt=words, **SMALL)
        for guidance, words in ((1, ""), (0, ""), (0.5, "a cat"))
    )
    np.testing.assert_array_equal(one, none)
    np.testing.assert_array_equal(one, negative)
    assert difference(one, generate(small_base, ["a dog"], [0], guidance=1.5, **SMALL)) > 0


def test_noise_that_a_sampler_puts_back_is_of_the_picture_alone(small_base):
    options = {**SMALL, "sampler": "euler_a", "steps": 4}
    together = generate(small_base, ["a dog", "a cat", "a dog"], [3, 4, 5], **options)
    assert difference(together[2:], generate(small_base, ["a dog"], [5], **options)) <= 1
    assert difference(together[:1], generate(small_base, ["a dog"], [3], **{**options, "sampler": "euler"})) > 1


def test_from_a_picture(small_base):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 40, 3)).astype(np.uint8)
    options = {"steps": 10, "batch_size": 1, "init_image": image}
    near = generate(small_base, ["a dog"], [0], init_strength=0.1, **options)
    far = generate(small_base, ["a dog"], [0], init_strength=1.0, **options)
    assert near.shape == (1, 32, 40, 3)
    latents = small_base.model.encode_image(
        small_base.params["vae"], jnp.asarray(image[None] / 127.5 - 1, jnp.float32)
    ).mean
    decoded = np.asarray(small_base.model.decode_latent(small_base.params["vae"], latents))
    kept = np.clip((decoded + 1) * 127.5, 0, 255)
    assert np.abs(near - kept).mean() < 0.5 * np.abs(far - kept).mean()
    for wrong in ({"init_strength": 0.0}, {"height": 48}, {"init_image": image / 255}):
        with pytest.raises(InputError, match="init_"):
            generate(small_base, ["a dog"], [0], **{**options, **wrong})


def test_attention_and_progress(small_base):
    steps = []
    prompts = ["a dog", "a photo of a <rex>", "<rex>"]
    rex = make_concept(small_base, "rex")

    def tick():
        steps.append(1)

    watched = list(drawing(small_base, prompts, [0, 1, 2], [rex], attention=True, on_step=tick, **SMALL))
    assert len(steps) == 2 * SMALL["steps"]  # two batches
    attention = np.concatenate([some.attention for some in watched])
    assert attention.shape == (3, 16, 16, 16)
    np.testing.assert_allclose(attention.sum(axis=-1), 1, atol=1e-4)
    plain = generate(small_base, prompts, [0, 1, 2], [rex], **SMALL)
    assert difference(np.concatenate([some.pixels for some in watched]), plain) <= 1


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a dog", {"height": 31}, "pictures of 32 x 31 pixels: width and height must be multiples of 2"),
        ("a dog", {"steps": 1001}, "1001 sampling steps"),
        ("a dog", {"sampler": "heun"}, "sampler 'heun' is not one of"),
        ("a <tom>", {}, "names <tom>, but the concepts given are: <rex>"),
        ("a <rex>", {"lock": "none"}, "lock is 'none'"),
        ("a <rex>", {"bias": [0.5, 0.6]}, "bias has 2 values: give one, or one for each of the 1 concepts"),
        ("a <rex>", {"temperature": 0.0}, "temperature is 0.0; it must be finite, and above 0"),
        ("a <rex>", {"strength": float("nan")}, "strength is nan; it must be finite"),
        ("a <rex>", {"start": 1.5}, "start is 1.5; it is a fraction of the steps"),
        ("a <rex>", {"guidance": float("inf")}, "guidance is inf"),
        ("a <rex>", {"guidance": "high"}, "guidance is 'high'; it must be a number"),
        ("a <rex>", {"guidance": [2.0]}, r"guidance is \[2.0\]; it must be a number"),
        ("a <rex>", {"steps": 2.5}, "steps is 2.5; it must be a whole number"),
        ("a <rex>", {"batch_size": 2.0}, "batch_size is 2.0; it must be a whole number"),
        ("a <rex>", {"height": 32.0}, "height is 32.0; it must be a whole number"),
        ("a <rex>", {"guidance_rescale": 2.0}, "guidance_rescale is 2.0; it must be at least 0 and at most 1"),
        ("a <rex>", {"negative_prompt": "a <rex>"}, "negative_prompt is 'a <rex>': it can name no concept"),
    ],
)
def test_impossible_requests_are_refused(small_base, prompt, options, message):
    with pytest.raises(InputError, match=message):
        generate(small_base, [prompt], [0], [make_concept(small_base, "rex")], **{**SMALL, **options})
    with pytest.raises(InputError, match="1 prompts and 2 seeds"):
        generate(small_base, ["a dog"], [0, 1])


HALVES = [0.5, 1, np.float32(0.5), np.float64(0.5), np.array(0.5), jnp.float32(0.5), jnp.bfloat16(0.5)]


@pytest.mark.parametrize("half", HALVES, ids=lambda half: type(half).__name__)
@pytest.mark.parametrize("name", ["bias", "temperature", "strength", "start", "end"])
def test_values_of_a_control(name, half):
    value = float(half)
    assert per_concept(name, None, [0.6, 0.7]) == [0.6, 0.7]
    assert per_concept(name, half, [0.6, 0.7]) == [value, value]
    for both in ([half, 0.25], (half, np.float32(0.25)), np.array([value, 0.25]), jnp.array([half, 0.25])):
        assert per_concept(name, both, [0.6, 0.7]) == [value, 0.25]
    for one in ([half], np.array([value])):
        assert per_concept(name, one, [0.6, 0.7]) == [value, value]
    for wrong, message in (
        ("half", "is 'half'; it must be a number"),
        ([[half]], r"has the shape \(1, 1\)"),
        ([half, "half"], "it must be a number"),
        ([], "has 0 values"),
    ):
        with pytest.raises(InputError, match=f"{name} {message}" if message != "it must be a number" else message):
            per_concept(name, wrong, [0.6, 0.7])


def test_numbers_of_any_library_draw_the_same(small_base):
    rex = make_concept(small_base, "rex")
    image = np.zeros((32, 32, 3), np.uint8)
    fractions = {"bias": 0.5, "temperature": 0.25, "strength": 0.5, "start": 0.0, "end": 0.5, "guidance": 2.0}
    fractions |= {"guidance_rescale": 0.5, "init_strength": 1.0}
    expected = generate(small_base, ["a <rex>"], [0], [rex], init_image=image, **fractions, **SMALL)
    for real, whole in ((np.float32, np.int64), (jnp.float32, jnp.int32)):
        options = {name: real(value) for name, value in fractions.items()}
        options |= {name: whole(value) for name, value in SMALL.items()}
        drawn = generate(small_base, ["a <rex>"], [whole(0)], [rex], init_image=image, **options)
        np.testing.assert_array_equal(drawn, expected)


def make_baseline(base, method, name="rex", seed=0):
    """A concept that another method has learnt, and the model with all that it has added."""
    embedding = base.super_category_embedding("cat")
    learnt = baselines.begin(method, base.params["unet"], embedding, jax.random.key(seed), rank=2)
    rng = np.random.default_rng(seed)
    learnt = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), learnt)
    card = dataclasses.replace(make_concept(base, name).card, method=method)
    return TrainedConcept(learnt, card)


@pytest.mark.parametrize("method", BASELINES)
def test_what_another_method_has_learnt_is_drawn_by_the_model_it_is_added_to(small_base, method):
    rex = make_baseline(small_base, method)
    drawn = generate(small_base, ["a photo of a <rex>"], [3], [rex], strength=0.5, **SMALL)
    changed = {
        **small_base.params,
        "unet": jax.tree.map(np.asarray, baselines.add(small_base.params["unet"], rex.concept, 0.5)),
    }
    # The same by hand: the word stands where nothing else is said of it.
    table = changed["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
    word = small_base.model.tokenizer.words("snow")[0]
    text = jax.tree.map(lambda leaf: leaf, changed["text_encoder"])
    text["text_model"]["embeddings"]["token_embedding"]["embedding"] = table.at[word].set(rex.concept.embedding)
    by_hand = dataclasses.replace(small_base, params={**changed, "text_encoder": text})
    expected = generate(by_hand, ["a photo of a snow"], [3], **SMALL)
    assert difference(drawn, expected) <= 1
    if method != "textual_inversion":
        whole = generate(small_base, ["a photo of a <rex>"], [3], [rex], **SMALL)
        assert difference(drawn, whole) > 1


def test_perfusion_beside_another_method(small_base):
    rex, tom = make_baseline(small_base, "lora"), make_concept(small_base, "tom", seed=1)
    prompts = ["a <rex> and a <tom>"]
    both = generate(small_base, prompts, [0], [rex, tom], bias=0.5, **SMALL)
    turned = generate(small_base, prompts, [0], [tom, rex], bias=0.5, **SMALL)
    assert difference(both, turned) <= 1
    without = generate(small_base, prompts, [0], [rex, tom], strength=(1, 0), **SMALL)
    assert difference(both, without) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": 0.5}, "bias is of Perfusion's edit: rex was learnt by lora, which has none"),
        ({"temperature": 0.5}, "temperature is of Perfusion's edit"),
        ({"end": 0.5}, "end is of Perfusion's edit"),
    ],
)
def test_controls_that_another_method_has_not(small_base, options, message):
    with pytest.raises(InputError, match=message):
        drawing(small_base, ["a <rex>"], [0], [make_baseline(small_base, "lora")], **options, **SMALL)
