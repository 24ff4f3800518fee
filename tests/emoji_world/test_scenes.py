"""Scenes: determinism, masks, captions, tinting. Needs no downloaded drawing: the sprites are made up."""

import numpy as np
import pytest

from perfusion_jax.emoji_world import captions, catalogue, descriptions, places, scenes
from perfusion_jax.emoji_world.drawings import SPRITE_PIXELS


def disc(colour):
    """A filled circle of one colour as a sprite."""
    rows, columns = np.mgrid[:SPRITE_PIXELS, :SPRITE_PIXELS] - (SPRITE_PIXELS - 1) / 2
    sprite = np.zeros((SPRITE_PIXELS, SPRITE_PIXELS, 4), np.uint8)
    sprite[..., :3] = colour
    sprite[..., 3] = np.where(np.hypot(rows, columns) < SPRITE_PIXELS / 2, 255, 0)
    return sprite


@pytest.fixture(scope="module")
def sprites():
    names = (*catalogue.CATEGORIES, *catalogue.OTHERS, *catalogue.HEADWEAR)
    return {name: np.stack([disc((200, 40, 40)), disc((40, 200, 40))]) for name in names}


def test_a_scene_depends_on_seed_and_index_alone(sprites):
    first = [scenes.render_scene(7, index, sprites) for index in range(20)]
    again = [scenes.render_scene(7, index, sprites) for index in reversed(range(20))][::-1]
    for one, other in zip(first, again, strict=True):
        assert one.caption == other.caption
        assert one.description == other.description
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.masks, other.masks)
    assert scenes.render_scene(8, 0, sprites).description != first[0].description


def test_captions_name_what_is_in_the_picture(sprites):
    for index in range(300):
        scene = scenes.render_scene(0, index, sprites)
        words = scene.caption.split()
        for thing in scene.description.things:
            assert thing.category in words
            assert thing.colour is None or thing.colour in words
            assert thing.headwear is None or thing.headwear in words
        assert set(words) <= set(captions.vocabulary())


def test_masks_tell_object_from_background(sprites):
    things = (descriptions.Thing("dog"), descriptions.Thing("cat", drawing=1))
    things = tuple(descriptions.Thing(thing.category, thing.drawing, size=descriptions.PAIR_SIZE) for thing in things)
    image, masks = scenes.draw(descriptions.Description(things, "white"), sprites)
    background, _ = scenes.draw(descriptions.Description((), "white"), sprites)
    union = masks.max(axis=0)
    np.testing.assert_array_equal(image[union == 0], background[union == 0])
    np.testing.assert_array_equal(np.unique(image[masks[0] == 255], axis=0), [[200, 40, 40]])
    np.testing.assert_array_equal(np.unique(image[masks[1] == 255], axis=0), [[40, 200, 40]])


def test_the_first_thing_is_on_the_left(sprites):
    things = tuple(descriptions.Thing(name, size=descriptions.PAIR_SIZE) for name in ("owl", "car"))
    _, masks = scenes.draw(descriptions.Description(things, "grass"), sprites)
    centres = [np.average(np.arange(scenes.PIXELS), weights=mask.sum(axis=0)) for mask in masks]
    assert centres[0] < scenes.PIXELS / 2 < centres[1]
    assert captions.describe_objects(things) == "an owl and a car"


def test_a_hat_sits_on_top_and_belongs_to_the_object(sprites):
    _, bare = scenes.draw(descriptions.Description((descriptions.Thing("dog"),), "white"), sprites)
    _, dressed = scenes.draw(descriptions.Description((descriptions.Thing("dog", headwear="hat"),), "white"), sprites)
    assert np.argmax(dressed[0].any(axis=1)) < np.argmax(bare[0].any(axis=1))


@pytest.mark.parametrize("colour", catalogue.COLOURS)
def test_tinting_keeps_black_black_and_white_light(colour):
    shades = np.array([[[0, 0, 0, 255], [128, 128, 128, 255], [255, 255, 255, 9]]], np.uint8)
    tinted = scenes.tint(shades, catalogue.COLOURS[colour])
    np.testing.assert_array_equal(tinted[0, 0, :3], 0)
    assert tinted[0, 2, :3].min() > 200
    assert np.argmax(tinted[0, 1, :3]) == np.argmax(catalogue.COLOURS[colour])
    np.testing.assert_array_equal(tinted[..., 3], shades[..., 3])


def test_styles_leave_no_colour(sprites):
    for style in catalogue.STYLES:
        image, _ = scenes.draw(descriptions.Description((descriptions.Thing("dog"),), "beach", style=style), sprites)
        assert np.ptp(image.astype(int), axis=-1).max() == 0


def test_variants_of_a_place_differ_a_little():
    for place in catalogue.PLACES:
        one, other = (places.draw_place(place, variant).astype(float) for variant in (0, 2))
        assert 0 < np.abs(one - other).mean() < 40


def test_objects_lie_on_the_grid_of_latents(sprites):
    for index in range(200):
        for thing in scenes.render_scene(0, index, sprites).description.things:
            assert not any(length % descriptions.CELL for length in (thing.size, *thing.shift))


def test_english_articles():
    assert captions.noun_phrase("owl") == "an owl"
    assert captions.noun_phrase("blue owl") == "a blue owl"
    assert captions.noun_phrase("owl", "my") == "my owl"
