"""Zero-shot classification with a made-up embedding: each text is the bag of the world's words it holds."""

import numpy as np

from perfusion_jax.emoji_world import captions, catalogue, evaluator

WORDS = {word: number for number, word in enumerate(captions.vocabulary())}


def embed_texts(texts):
    bags = np.zeros((len(texts), len(WORDS)))
    for row, text in zip(bags, texts, strict=True):
        row[[WORDS[word] for word in text.split()]] = 1
    return bags / np.linalg.norm(bags, axis=1, keepdims=True)


def test_a_judge_finds_what_pictures_show():
    """Made-up pictures: a pixel's red says which text the picture's embedding is that of."""
    asked = [("dog", "beach"), ("owl", "night"), ("cactus", "desert"), ("burger", "mountains")]
    shown = [f"{captions.noun_phrase(category)} {captions.place_phrase(place)}" for category, place in asked]
    shown.append("a dog and an owl")
    judge = evaluator.Judge(lambda images: embed_texts([shown[number] for number in images[:, 0, 0, 0]]), embed_texts)
    np.testing.assert_allclose(np.linalg.norm(judge.categories, axis=1), 1)
    images = np.broadcast_to(np.arange(5, dtype=np.uint8)[:, None, None, None], (5, 64, 64, 3))
    assert judge.find_categories(images[:4]) == [{category} for category, _ in asked]
    assert judge.find_categories(images[4:], 2) == [{"dog", "owl"}]
    assert judge.find_places(images[:4]) == [place for _, place in asked]


def test_share_right():
    assert evaluator.share_right([{"dog"}, {"cat"}], [{"dog"}, {"owl"}]) == 0.5


def test_every_category_is_asked_about_in_every_place():
    prompts = evaluator.category_prompts("owl")
    assert len(prompts) == 1 + len(catalogue.PLACES)
    assert prompts[0] == "a photo of an owl"
    assert "a photo of an owl under water" in prompts
