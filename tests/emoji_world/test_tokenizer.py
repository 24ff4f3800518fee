"""The tokenizer: one token a word, CLIP's special tokens, any other text still encodable."""

import json

import pytest

from perfusion_jax import load_base_model
from perfusion_jax.emoji_world import captions, tokenizer
from perfusion_jax.runtime import shipped


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_tokenizer(folder)
    return tokenizer.load_tokenizer(folder)


def test_every_word_of_the_world_is_one_token(clip_tokenizer):
    for word in tokenizer.split_words(captions.vocabulary()):
        assert clip_tokenizer.tokenize(word) == [f"{word}</w>"]


def test_a_text_is_wrapped_and_padded_as_clip_expects(clip_tokenizer):
    (ids,) = tokenizer.encode(clip_tokenizer, ["a photo of a dog"])
    start, end = clip_tokenizer.bos_token_id, clip_tokenizer.eos_token_id
    assert len(ids) == tokenizer.MODEL_MAX_LENGTH
    assert ids[0] == start
    assert ids[6:] == [end] * (tokenizer.MODEL_MAX_LENGTH - 6)
    assert end == max(clip_tokenizer.get_vocab().values())


def test_unknown_words_fall_apart_and_come_back(clip_tokenizer):
    ids = clip_tokenizer("a wombat in Zürich!").input_ids
    assert clip_tokenizer.decode(ids, skip_special_tokens=True).strip() == "a wombat in zürich !"
    assert clip_tokenizer.eos_token_id not in ids[1:-1]


def test_merges_are_learned_from_the_most_frequent_pair():
    assert tokenizer.learn_merges(["ab", "abc"]) == [("a", "b"), ("a", "b</w>"), ("ab", "c</w>")]


def test_hyphens_separate_words():
    assert tokenizer.split_words(["close-up"]) == ["-", "close", "up"]


def test_the_super_categories_of_the_examples_are_words_of_the_model():
    base = load_base_model("emoji")
    for file in shipped.EXAMPLES.glob("*/concept.json"):
        assert not base.model.tokenizer.in_pieces(json.loads(file.read_text())["super_category"])
