"""Pictures of personal things: where the mask says, beside others, in the places asked for."""

import io

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="pretraining needs the extra: pip install -e '.[pretrain]'")
pytest.importorskip("resvg_py", reason="pretraining needs the extra: pip install -e '.[pretrain]'")

from pretraining_drawings import FACE, HAT, atlas  # noqa: E402

from perfusion_jax.config import make_config  # noqa: E402
from perfusion_jax.evaluation.scores import PROMPTS  # noqa: E402
from pretraining import captions, drawings, examples, held_out, personal, places, things, vendors  # noqa: E402


@pytest.fixture
def two_vendors(monkeypatch):
    """The flat set has a dog, the same under another name, and a hat; the other set the same dog as pictures."""
    icons = {"dog-face": {"body": _body(FACE)}, "guide-dog": {"body": _body(FACE)}, "top-hat": {"body": _body(HAT)}}
    picture = io.BytesIO()
    Image.fromarray(np.uint8(255 * drawings.rasterise(FACE, 192))).save(picture, "png")
    monkeypatch.setattr(vendors, "icon_set", lambda vendor: {"icons": icons, "width": 100, "height": 100})
    monkeypatch.setattr(held_out, "_code_points", lambda: {"dog-face": "1f436", "guide-dog": "1f9ae"})
    monkeypatch.setattr(held_out, "_solid_files", lambda: dict.fromkeys(("1f436", "1f9ae"), picture.getvalue()))
    held_out.all_sprites.cache_clear()
    yield
    held_out.all_sprites.cache_clear()


def _body(svg):
    return svg.partition(">")[2].removesuffix("</svg>")


def sprite(number):
    picture = drawings.put_together(atlas().coverages[number], atlas().colours[number])
    return torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)


def test_a_thing_is_where_its_mask_says_and_its_company_is_not():
    pictures, masks, shown = personal.photographs(sprite(0), 3, 4, [sprite(2)], ["night", "beach"])
    assert pictures.shape == (3, personal.SIDE, personal.SIDE, 3)
    assert shown == ["night", "beach", "night"]
    # The face is brown where it is not eye or mouth.
    brown = (np.abs(pictures.astype(int) - (200, 100, 50)).max(-1) < 12) & (masks == 255)
    assert (brown.sum((1, 2)) > 0.5 * (masks == 255).sum((1, 2))).all()
    # The box beside it in the first picture is as red as nothing else, and no part of the mask.
    red = np.abs(pictures[0].astype(int) - (250, 0, 5)).max(-1) < 12
    assert red.sum() > 50
    assert masks[0][red].max() < 30


def test_pictures_are_a_function_of_their_seed():
    first, again = (personal.photographs(sprite(0), 2, 7)[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (personal.photographs(sprite(0), 2, 8)[0] != first).mean() > 0.3


def test_what_a_vendor_draws_alike_is_one_thing(two_vendors):
    assert [entry.name for entry in held_out.all_sprites("fluent-flat")[0]] == ["dog-face", "top-hat"]
    assert [entry.name for entry in held_out.all_sprites("fluent-3d")[0]] == ["dog-face"]
    assert [source.name for source in things.drawings_of(("noto",))] == ["dog-face", "top-hat"]


def test_an_atlas_is_named_by_what_it_is_made_from(two_vendors, monkeypatch, tmp_path):
    (tmp_path / "noto.tgz").write_bytes(b"one")
    monkeypatch.setattr(vendors, "fetch", lambda vendor: tmp_path / f"{vendor}.tgz")
    sources = things.drawings_of(("noto",))
    first = things.digest(sources)
    assert things.digest(sources) == first
    assert things.digest(sources[:1]) != first
    monkeypatch.setattr(drawings, "PARTS", 12)
    assert things.digest(sources) != first
    monkeypatch.undo()
    (tmp_path / "noto.tgz").write_bytes(b"two")
    monkeypatch.setattr(vendors, "fetch", lambda vendor: tmp_path / f"{vendor}.tgz")
    assert things.digest(sources) != first


def test_rivals_differ_in_colours_by_a_stated_distance(two_vendors):
    for seed in range(3):
        sprites = held_out.individuals_of("dog", 8, seed, ("fluent-3d", "dog-face"))
        assert sprites.shape == (8, 4, drawings.PIXELS, drawings.PIXELS)
        torch.testing.assert_close(sprites[0], torch.from_numpy(held_out.sprite("fluent-3d", "dog-face")))
        # Two drawings, each of them in colours of its own three times more.
        for family in (sprites[0::2], sprites[1::2]):
            for number in range(1, 4):
                away = [held_out.colours_apart(family[number], other) for other in family[:number]]
                assert min(away) >= held_out.LEAST_APART
        assert torch.equal(sprites, held_out.individuals_of("dog", 8, seed, ("fluent-3d", "dog-face")))


def test_pictures_of_rivals_differ_in_the_individual_alone(two_vendors):
    thing = personal.Thing("dog", "fluent-flat", "dog-face")
    own, masks, _ = personal.photographs(torch.from_numpy(held_out.sprite("fluent-flat", "dog-face", 384)), 2, 5)
    pictures = personal.individuals_like(thing, 3, 2, 5)
    around = masks == 0
    for each in pictures:
        assert np.abs(each[around].astype(int) - own[around]).mean() < 1
    inside = masks == 255
    difference = np.abs(pictures[:, inside].astype(int) - own[inside]).mean((1, 2))
    assert difference[0] < 4
    assert difference[2] > 15


def test_a_thing_is_cut_out_by_its_mask():
    pictures = np.full((1, 1, 3, 3), 100, np.uint8)
    masks = np.array([[[0, 255, 51]]], np.uint8)
    assert personal.cut_out(pictures, masks)[0, 0, :, 0].tolist() == [255, 100, 224]


def test_plain_colours_can_be_asked_for():
    pictures, masks, shown = personal.photographs(sprite(0), 2, 4, where=["yellow background", "space"])
    assert shown == ["yellow background", "space"]
    ground = np.median(pictures[0][masks[0] == 0], 0)
    assert np.abs(ground - places.COLOURS["yellow"]).max() < 25


def test_examples_validation_and_test_prompts_are_apart():
    validation = make_config().validation_prompts
    assert not set(PROMPTS) & set(validation)
    asked = " ".join((*PROMPTS, *validation))
    for place in examples.SHOWN:
        assert captions.place_phrase(places.NAMED.index(place)) not in asked
        assert place not in asked
    kinds = {entry.name: entry.kind for entry in things.table()}
    for _, drawing in examples.BESIDE.values():
        assert f" {kinds[drawing]} " not in f"{asked} "


def test_judges_are_those_beside_the_model(tmp_path):
    assert personal.judge_beside(tmp_path / "model", "clip") == ""
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text("{}")
    assert personal.judge_beside(tmp_path / "model", "clip") == str(tmp_path / "clip")
