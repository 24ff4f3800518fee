"""Zero-shot classification with a made-up embedding: each text is the bag of the world's words it holds."""

import numpy as np

from perfusion_jax.emoji_world import captions, catalogue, evaluator

WORDS = {word: number for number, word in enumerate(captions.vocabulary())}


def embed_texts(texts):
    bags = np.zeros((len(texts), len(WORDS)))
    for row, text in zip(bags, texts, strict=True):
        row[[WORDS[word] for word in text.split()]] = 1
    return bags / np.linalg.norm(bags, axis=1, keepdims=True)


def test_classes_are_unit_vectors_that_find_their_own_captions():
    categories = evaluator.class_embeddings(embed_texts, list(map(evaluator.category_prompts, catalogue.CATEGORIES)))
    np.testing.assert_allclose(np.linalg.norm(categories, axis=1), 1)
    asked = [("dog", "beach"), ("owl", "night"), ("cactus", "desert"), ("umbrella", "mountains")]
    pictures = embed_texts(
        [f"{captions.noun_phrase(category)} {captions.place_phrase(place)}" for category, place in asked]
    )
    ranks = evaluator.rank_classes(pictures, categories)
    assert [catalogue.CATEGORIES[row[0]] for row in ranks] == [category for category, _ in asked]
    places = evaluator.class_embeddings(embed_texts, list(map(evaluator.place_prompts, catalogue.PLACES)))
    ranks = evaluator.rank_classes(pictures, places)
    assert [catalogue.PLACES[row[0]] for row in ranks] == [place for _, place in asked]


def test_every_category_is_asked_about_in_every_place():
    prompts = evaluator.category_prompts("owl")
    assert len(prompts) == 1 + len(catalogue.PLACES)
    assert prompts[0] == "a photo of an owl"
    assert "a photo of an owl under water" in prompts
