import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_text
from checkpoints import PROMPT_LENGTH
from transformers import CLIPTokenizer

from perfusion_jax import InputError
from perfusion_jax.base_model.text import mean_at

PROMPTS = ["a photo of a dog", "", "the teddy bear, on the beach.", "A  Zebra in the snow"]


def test_ids_equal_those_of_transformers(sd1_folder, sd1_base):
    theirs = CLIPTokenizer.from_pretrained(sd1_folder / "tokenizer")
    expected = theirs(PROMPTS, padding="max_length", max_length=PROMPT_LENGTH)
    np.testing.assert_array_equal(sd1_base.model.tokenizer(PROMPTS), expected["input_ids"])


def test_captions_are_cut_and_their_padding_masked(sd1_folder, sd1_base):
    captions = [*PROMPTS, "a dog " * 20, "a <b>dog</b> named <rex>"]
    theirs = CLIPTokenizer.from_pretrained(sd1_folder / "tokenizer")
    expected = theirs(captions, padding="max_length", truncation=True, max_length=PROMPT_LENGTH)
    ids, mask = sd1_base.model.tokenizer.captions(captions)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, np.array(expected["attention_mask"], bool))


def test_a_placeholder_is_one_token_wherever_it_stands(sd1_base):
    tokenizer = sd1_base.model.tokenizer
    named = tokenizer(["a photo of <rex> and my <tom>.", "<tom>,<rex>"], ["<rex>", "<tom>"])
    plain = tokenizer(["a photo of dog and my cat.", "cat,dog"])
    rex, tom = tokenizer.vocabulary_size, tokenizer.vocabulary_size + 1
    dog, cat = plain[0, 4], plain[0, 7]
    np.testing.assert_array_equal(np.where(named == rex, dog, np.where(named == tom, cat, named)), plain)
    np.testing.assert_array_equal(np.argwhere(named == rex), [[0, 4], [1, 3]])
    np.testing.assert_array_equal(np.argwhere(named == tom), [[0, 7], [1, 1]])


def test_position_is_right_behind_words_of_several_tokens(sd1_base):
    ids = sd1_base.model.tokenizer(["a zebra and <rex>"], ["<rex>"])  # zebra is spelled in five tokens here
    assert np.argwhere(ids[0] == sd1_base.model.tokenizer.vocabulary_size).item() == 1 + 1 + 5 + 1


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("dog", {}),
        ("Teddy  bear", {}),
        ("teddy-bear.", {"teddy-bear.": ["teddy"]}),  # "-" is no word here
        ("teddy, bear", {}),
        ("dgo", {"dgo": ["dog"]}),
        ("my Bech", {"Bech": ["beach"]}),
        ("zebra", {"zebra": []}),
        ("🐕 dog", {"🐕": []}),
    ],
)
def test_words_in_pieces_and_words_near_them(sd1_base, phrase, expected):
    assert sd1_base.model.tokenizer.in_pieces(phrase) == expected


def test_shortens_a_template_to_what_is_taken(sd1_base):
    tokenizer = sd1_base.model.tokenizer
    long = "a photo of a {} " + "on the beach " * 9
    short = tokenizer.shorten(long.strip(), "teddy bear")
    assert long.startswith(short)
    assert len(tokenizer.words(short.replace("{}", "teddy bear"))) == tokenizer.length - 2
    tokenizer.locate(short, "teddy bear")
    assert tokenizer.shorten("a {}", "dog") == "a {}"


def test_locates_a_phrase_of_several_tokens(sd1_base):
    ids, mask = sd1_base.model.tokenizer.locate("a photo of a {} on the beach", "teddy bear")
    np.testing.assert_array_equal(ids, sd1_base.model.tokenizer(["a photo of a teddy bear on the beach"])[0])
    np.testing.assert_array_equal(np.flatnonzero(mask), [5, 6])


@pytest.mark.parametrize(
    ("prompt", "placeholders", "message"),
    [
        ("a photo of <tom>", ["<rex>"], "names <tom>, but the concepts given are: <rex>"),
        ("a photo of <tom>", [], "the concepts given are: none"),
        ("a <|endoftext|> dog", [], r"has <\|endoftext\|>, which is a mark of the tokeniser"),
        ("a photo", ["rex"], "'rex' is not a placeholder"),
        ("a photo", ["<a b>"], "is not a placeholder"),
        ("a photo", ["<rex>", "<rex>"], "share a placeholder"),
        ("a " * 15, [], "has 15 tokens; this text encoder takes 14"),
    ],
)
def test_bad_prompts_are_refused(sd1_base, prompt, placeholders, message):
    with pytest.raises(InputError, match=message):
        sd1_base.model.tokenizer([prompt], placeholders)


def test_a_placeholder_that_is_a_word_already_is_refused(sd1_base, monkeypatch):
    tokenizer = sd1_base.model.tokenizer
    known = {**tokenizer._tokenizer.get_vocab(), "<rex></w>": 5}
    monkeypatch.setattr(tokenizer._tokenizer, "get_vocab", lambda: known)
    with pytest.raises(InputError, match="<rex> is already a word"):
        tokenizer(["a <rex>"], ["<rex>"])


@pytest.mark.parametrize(("template", "phrase"), [("a {}", ""), ("a {}", "  "), ("a photo", "dog"), ("{} {}", "dog")])
def test_bad_super_categories_are_refused(sd1_base, template, phrase):
    with pytest.raises(InputError, match=r"super-category .* is empty|exactly one"):
        sd1_base.model.tokenizer.locate(template, phrase)


def test_a_placeholder_takes_the_concepts_embedding(folder, base):
    width = base.model.new_concept_shapes().embedding.shape[0]
    embeddings = np.random.default_rng(0).standard_normal((2, width)).astype(np.float32)
    ids = base.model.tokenizer(["a <rex> and a <tom>", "<tom> in the snow"], ["<rex>", "<tom>"])
    with torch.no_grad():
        expected = torch_text.encode(folder, ids, embeddings=torch.from_numpy(embeddings))
    ours = base.model.encode(base.params, ids, jnp.asarray(embeddings))
    assert np.abs(ours.tokens - expected.tokens.numpy()).max() < 1e-4 * np.abs(expected.tokens.numpy()).max()
    if expected.added:
        # The vector for a whole prompt is read at its end, though a concept's id is larger.
        pooled = expected.added["added_cond_kwargs"]["text_embeds"].numpy()
        assert np.abs(ours.pooled - pooled).max() < 1e-4 * np.abs(pooled).max()


def test_gradient_reaches_the_concepts_row_alone(base):
    ids = base.model.tokenizer(["a <rex> in the snow"], ["<rex>", "<tom>"])
    embeddings = jax.random.normal(jax.random.key(0), (2, base.model.context_width))

    def loss(embeddings):
        return jnp.sum(base.model.encode(base.params, ids, embeddings).tokens[:, 2, :3] ** 2)

    gradient = jax.grad(loss)(embeddings)
    assert not np.any(gradient[1])
    direction = jax.random.normal(jax.random.key(1), embeddings.shape)
    difference = (loss(embeddings + 1e-2 * direction) - loss(embeddings - 1e-2 * direction)) / 2e-2
    np.testing.assert_allclose(jnp.sum(gradient * direction), difference, rtol=1e-2)


def test_mean_at_averages_the_masked_tokens_of_all_prompts():
    encodings = jnp.arange(24.0).reshape(2, 4, 3)
    mask = jnp.zeros((2, 4), bool).at[0, 1].set(True).at[1, 3].set(True)
    np.testing.assert_allclose(mean_at(encodings, mask), (encodings[0, 1] + encodings[1, 3]) / 2)


def test_names_without_an_embedding_are_never_taken_for_another(sd1_base):
    ids = sd1_base.model.tokenizer(["a <rex> and a <tom>"], ["<rex>", "<tom>"])
    embeddings = jnp.ones((1, sd1_base.model.context_width))
    for given in (None, embeddings):
        with pytest.raises(InputError, match="names 2 concepts, but"):
            sd1_base.model.encode(sd1_base.params, ids, given)
        traced = jax.jit(sd1_base.model.encode)(sd1_base.params, ids, given).tokens
        assert np.isnan(traced[0, 5]).all()


def test_one_string_is_not_taken_for_a_list_of_letters(sd1_base):
    with pytest.raises(InputError, match="give a list"):
        sd1_base.model.tokenizer("a photo of a dog")


def test_templates_may_hold_other_braces(sd1_base):
    ids, mask = sd1_base.model.tokenizer.locate("a {} {colour}", "dog")
    assert ids[mask] == sd1_base.model.tokenizer(["dog"])[0, 1]


@pytest.mark.parametrize(
    ("templates", "width", "message"), [([], 48, "no templates"), (["a {}"], 7, "the whitening matrix is")]
)
def test_a_concept_that_cannot_be_made_is_refused(sd1_base, templates, width, message):
    with pytest.raises(InputError, match=message):
        sd1_base.new_concept("dog", jnp.eye(width), templates)
