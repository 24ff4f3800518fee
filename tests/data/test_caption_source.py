import itertools
from collections import Counter

import pytest

from perfusion_jax.data.caption_source import make_captions

WORDS = [f"word{chr(97 + one)}{chr(97 + two)}" for one, two in itertools.product(range(26), repeat=2)]


def test_the_same_captions_are_made_again():
    assert list(make_captions(WORDS, 50)) == list(make_captions(WORDS, 50))
    assert list(make_captions(WORDS, 50, seed=1)) != list(make_captions(WORDS, 50))


def test_captions_are_many_and_of_many_lengths():
    made = list(make_captions(WORDS, 2000))
    assert len(set(made)) > 1800
    assert len({len(caption.split()) for caption in made}) > 10
    assert not any("{" in caption or "}" in caption for caption in made)


def test_common_words_of_the_vocabulary_are_more_common():
    counts = Counter(word for caption in make_captions(WORDS, 20_000) for word in caption.split() if word in WORDS)
    first, middle, last = (sum(counts[word] for word in WORDS[start : start + 50]) for start in (0, 300, 600))
    assert first > 3 * middle > 3 * last > 0
    assert len(counts) > 0.95 * len(WORDS)


@pytest.mark.parametrize("vocabulary", [[], ["hund"], ["dog", "red", "sitting"], ["猫", "犬"]])
def test_any_vocabulary_will_do(vocabulary):
    made = list(make_captions(vocabulary, 200))
    assert len(made) == 200
    assert all(made)
    if "dog" in vocabulary:  # words written here are used where the vocabulary has them, and not others
        assert not any("guitar" in caption for caption in made)
        assert any("dog" in caption for caption in made)
