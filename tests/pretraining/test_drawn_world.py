"""The world's scenes: pure functions of seed and step, individuals where they should be, captions that say what is
there."""

import colorsys
import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pretraining needs the extra: pip install -e '.[pretrain]'")
pytest.importorskip("resvg_py", reason="pretraining needs the extra: pip install -e '.[pretrain]'")

from pretraining_drawings import atlas  # noqa: E402

from pretraining import (  # noqa: E402
    asked,
    captions,
    diffusion,
    drawings,
    individuals,
    places,
    scenes,
    train_diffusion,
    training_tools,
)


@pytest.fixture(scope="module")
def world():
    return scenes.World(atlas(), places.bank())


def plan_of(world, drawing, background=None, **view):
    """One faithful drawing alone before a white background."""
    views = {"centre": [32.0, 32.0], "size": 40.0, "turn": 0.0, "flipped": False, **view}
    none = torch.zeros(1, dtype=torch.long)
    backgrounds = places.invent(1, torch.Generator().manual_seed(0))
    backgrounds = dataclasses.replace(
        backgrounds,
        name=torch.tensor([places.NAMED.index(background or "white background")]),
        colours=torch.ones(1, 2, 3),
    )
    return scenes.Plan(
        individuals.faithful(world.planner.colours, none + drawing),
        scenes.Views(*(torch.tensor([views[field.name]]) for field in dataclasses.fields(scenes.Views))),
        none,
        none,
        none.bool(),
        backgrounds,
        none,
    )


def test_scenes_are_a_function_of_seed_and_step(world):
    pictures, masks = world.scenes(3, 5, 32)
    again, _ = world.scenes(3, 5, 32)
    assert torch.equal(pictures, again)
    assert not torch.equal(pictures, world.scenes(3, 6, 32)[0])
    assert pictures.shape == (32, 3, 64, 64)
    assert pictures.abs().max() <= 1
    assert masks.min() >= 0
    assert masks.sum(1).max() <= 1 + 1e-5


def test_another_seed_gives_other_scenes_of_the_same_size(world):
    validation, training = (
        world.planner.plan(seed, 0, 64) for seed in (train_diffusion.VALIDATION_SEED, diffusion.SEED)
    )
    assert not torch.equal(validation.views.centre[:64], training.views.centre[:64])
    # PyTorch's own generator knows the lower half of a seed alone.
    first = [torch.rand(4, generator=training_tools.generator(seed, 7)).tolist() for seed in (1, 2, 2**33 + 1)]
    assert len({tuple(numbers) for numbers in first}) == 3
    again = torch.rand(4, generator=training_tools.generator(1, 7)).tolist()
    assert again == first[0]


def test_masks_are_where_the_picture_is_not_the_background(world):
    plan = world.planner.plan(0, 0, 64)
    plan = dataclasses.replace(plan, styles=torch.zeros(64, dtype=torch.long))
    pictures, masks = world.draw(plan)
    backgrounds = 2 * world.bank.draw(plan.backgrounds) - 1
    outside = (masks.sum(1) == 0)[:, None].expand_as(pictures)
    torch.testing.assert_close(pictures[outside], backgrounds[outside])
    inside = masks.sum(1).amax((1, 2))[plan.scene.unique()]
    assert (inside > 0.9).float().mean() > 0.95


def test_a_thing_stands_where_its_view_says(world):
    _, masks = world.draw(plan_of(world, 2, centre=[20.0, 40.0], size=30.0))
    mask = masks[0, 0]
    line = torch.arange(64) + 0.5
    rows, columns = mask.sum(1), mask.sum(0)
    # The box is opaque at its left end and half transparent at its right: its extent tells, not its centre of mass.
    seen = line[columns > 0.4 * columns.max()]
    assert (seen[0] + seen[-1]) / 2 == pytest.approx(20, abs=0.6)
    assert seen[-1] - seen[0] + 1 == pytest.approx(30, abs=1.1)
    assert (rows * line).sum() / rows.sum() == pytest.approx(40, abs=0.1)
    assert (rows > 0.4 * rows.max()).sum() == pytest.approx(15, abs=1)


def test_flipping_mirrors_and_turning_turns(world):
    straight, _ = world.draw(plan_of(world, 2))
    flipped, _ = world.draw(plan_of(world, 2, flipped=True))
    torch.testing.assert_close(flipped.flip(-1), straight, rtol=0, atol=1e-4)
    _, quarter = world.draw(plan_of(world, 3, turn=float(np.pi / 2)))
    _, upright = world.draw(plan_of(world, 3))
    torch.testing.assert_close(torch.rot90(upright[0, 0], -1), quarter[0, 0], rtol=0, atol=1e-3)


def test_a_faithful_individual_is_the_drawing(world):
    people = individuals.faithful(world.planner.colours, torch.arange(4))
    painted = world.paint(people)
    margin = drawings.PIXELS // 12
    for number in range(4):
        expected = drawings.put_together(atlas().coverages[number], atlas().colours[number])
        inner = painted[number, :, margin:-margin, margin:-margin].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(inner, expected, atol=1e-5)


def test_individuals_differ_in_colour_and_shape_and_stay_pictures(world):
    people = individuals.invent(
        world.planner.colours, torch.zeros(256, dtype=torch.long), torch.Generator().manual_seed(0)
    )
    painted = world.paint(people)
    assert painted.min() >= -1e-5
    assert (painted[:, :3] <= painted[:, 3:] + 1e-4).all()  # premultiplied
    main = people.colours[:, 0]
    near = (main - world.planner.colours[0, 0]).abs().amax(1) < 0.15
    assert 0.25 < near.float().mean() < 0.75
    assert (people.outline[:, 0] > 0).float().mean() == pytest.approx(0.15, abs=0.08)


def test_hues_agree_with_the_standard_library():
    colours = torch.rand(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = np.array([colorsys.rgb_to_hsv(*colour) for colour in colours.tolist()])
    np.testing.assert_allclose(individuals.rgb_to_hsv(colours).numpy(), expected, atol=1e-9)
    torch.testing.assert_close(individuals.hsv_to_rgb(torch.from_numpy(expected)), colours)


def test_every_place_is_drawn_and_varies():
    for place in places.PLACES:
        first, second = places.draw_place(place, 0), places.draw_place(place, 1)
        assert first.shape == (places.SIDE, places.SIDE, 3)
        assert first.std() > 5
        assert np.abs(first.astype(int) - second).mean() > 1
        np.testing.assert_array_equal(first, places.draw_place(place, 0))


def test_what_is_worn_sits_on_the_wearers_head(world):
    for step in range(20):
        plan = world.planner.plan(1, step, 64)
        for worn in torch.nonzero(plan.worn)[:, 0].tolist():
            wearer = worn - 1
            assert plan.scene[wearer] == plan.scene[worn]
            assert plan.slot[wearer] + 1 == plan.slot[worn]
            away = plan.views.centre[worn] - plan.views.centre[wearer]
            assert 0.3 * plan.views.size[wearer] < away.norm() < 0.7 * plan.views.size[wearer]
            assert away[1] < 0


COLOUR_EXAMPLES = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (60, 160, 60),
    "blue": (50, 110, 220),
    "purple": (140, 60, 200),
    "pink": (250, 130, 190),
    "brown": (120, 75, 40),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
    "grey": (130, 130, 130),
}


@pytest.mark.parametrize("word", COLOUR_EXAMPLES)
def test_colours_have_words(word):
    colour = torch.tensor(COLOUR_EXAMPLES[word]) / 255
    assert tuple(places.COLOURS)[captions.colour_words(colour)] == word


def test_captions_name_every_thing_and_the_place(world):
    writer = captions.Writer(atlas())
    plan = world.planner.plan(2, 0, 256)
    random = np.random.default_rng(0)
    written = writer.write(plan, writer.codable(plan, random), random)
    words = {*captions.vocabulary(), captions.CODE}
    said = 0
    for scene, caption in enumerate(written):
        assert {word.text for word in caption.words} <= words
        nouns = [word.text for word in caption.words if word.noun]
        of_scene = torch.nonzero(plan.scene == scene)[:, 0].tolist()
        shown = [number for number in of_scene if not plan.worn[number]]
        for noun, number in zip(nouns, shown, strict=True):
            kind = atlas().sources[plan.things.drawing[number]].entry.kind
            assert noun == kind or (number == caption.coded and noun in captions.ANYTHING)
        assert (" wearing " in str(caption)) == bool(plan.worn[of_scene].any())
        name = int(plan.backgrounds.name[scene])
        said += name >= 0 and captions.place_phrase(name) in str(caption)
        assert caption.coded in (-1, *shown)
        assert (captions.CODE in str(caption).split()) == (caption.coded >= 0 and not caption.code_added)
    assert said > 0.7 * (plan.backgrounds.name >= 0).sum()


def test_some_things_are_called_objects_where_that_is_asked(world):
    plan = world.planner.plan(2, 0, 256)

    def nouns(share):
        writer, random = captions.Writer(atlas(), coded_share=0, nameless_share=share), np.random.default_rng(0)
        written = writer.write(plan, writer.codable(plan, random), random)
        return [word.text for caption in written for word in caption.words if word.noun]

    assert not set(captions.ANYTHING) & set(nouns(0))
    called = nouns(0.25)
    assert sum(noun in captions.ANYTHING for noun in called) / len(called) == pytest.approx(0.25, abs=0.06)


def test_the_world_draws_what_is_asked_for(world):
    wanted = [asked.Request(("dog",), "space"), asked.Request(("hat", "dog"), "beach")]
    pictures = asked.rendered(world, wanted, 3)
    assert pictures.shape == (2, 64, 64, 3)
    np.testing.assert_array_equal(pictures, asked.rendered(world, wanted, 3))
    space = np.mean([places.draw_place("space", number) for number in range(8)])
    assert pictures[0].mean() < 2 * space + 40
    assert pictures[1].mean() > pictures[0].mean()


def test_a_code_stands_before_its_noun_or_on_it():
    def words(*texts):
        return tuple(
            captions.Word(text, 0 if text in ("red", captions.CODE, "dog") else -1, text != "dog", text == "dog")
            for text in texts
        )

    ids = {"a": [5], "red": [6], "dog": [7, 8], "outside": [9], captions.CODE: [0]}
    before = captions.Caption(words("a", captions.CODE, "red", "dog", "outside"), 3, False, 0)
    on_it = captions.Caption(words("a", "red", "dog", "outside"), 4, True, 0)
    without = captions.Caption(words("a", "red", "dog"))
    texts = captions.to_texts([before, on_it, without], ids, 1, 2, 9)
    assert texts.tokens[0].tolist() == [1, 5, 0, 6, 7, 8, 9, 2, 2]
    assert texts.code.tolist() == [2, 4, -1]
    assert texts.code_added.tolist() == [False, True, False]
    assert texts.phrase[1].tolist() == [-1, -1, 0, 0, 0, -1, -1, -1, -1]
    assert texts.tells[0].tolist() == [False, True, True, True, False, False, True, False, False]
    cut = captions.to_texts([before], ids, 1, 2, 3)
    assert (cut.tokens.tolist(), cut.code.tolist()) == ([[1, 5, 2]], [-1])


def test_a_large_scene_is_the_small_one_in_finer_detail(world):
    large = scenes.World(atlas(), places.bank(8, 3 * places.SIDE))
    plan = world.planner.plan(5, 0, 16)
    plan = dataclasses.replace(plan, styles=torch.zeros(16, dtype=torch.long))
    plan = dataclasses.replace(
        plan, backgrounds=dataclasses.replace(plan.backgrounds, variant=plan.backgrounds.variant % 8)
    )
    small, masks = world.draw(plan)
    fine, fine_masks = large.draw(plan)
    assert fine.shape == (16, 3, 192, 192)
    shrunk = torch.nn.functional.avg_pool2d(fine, 3)
    assert (shrunk - small).abs().mean() < 0.03
    assert (torch.nn.functional.avg_pool2d(fine_masks, 3) - masks).abs().mean() < 0.005
