"""Folders as people have them: what is learnt from each, or the one line that says what is wrong."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from odd_names import ODD_NAMES
from PIL import ExifTags, Image

from perfusion_jax import InputError
from perfusion_jax.data.captions import with_slot, with_slots
from perfusion_jax.data.examples import given_masks, prompt_ids
from perfusion_jax.data.folders import find_files, read_folder

SIZE = (40, 20)


def save(file, colour="red", size=SIZE, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file, **options)


def write(file, words, encoding="utf-8"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(words.encode(encoding))


def mask(file, size=SIZE):
    """White on the left half."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[:, : size[0] // 2] = 255
    Image.fromarray(pixels).save(file)


def transparent_mask(file):
    """The same, black, and transparent on the right."""
    mask(file)
    shape = Image.open(file)
    black = Image.new("RGBA", shape.size, "black")
    black.putalpha(shape)
    black.save(file)


def turned(file, orientation, size=SIZE):
    """A picture that EXIF says to turn: stored as `size`."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    save(file, size=size, exif=exif)


class Learnt(NamedTuple):
    """What a folder gives: names of its pictures, their prompts, the names of those with a mask, and warnings."""

    prompts: dict[str, str | None]
    masked: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Case(NamedTuple):
    make: Callable
    expected: Learnt | str


def case(expected, *makes):
    return Case(lambda folder: [make(folder) for make in makes], expected)


def picture(name="a.png", **options):
    return lambda folder: save(folder / name, **options)


def text(name, words, encoding="utf-8"):
    return lambda folder: write(folder / name, words, encoding)


NOT_NAMED = "captions do not name the thing"
CASES = {
    # Pictures of all kinds.
    **{ending: case(Learnt({f"a.{ending}": None}), picture(f"a.{ending}")) for ending in ("bmp", "gif", "tif")},
    **{
        ending: case(Learnt({f"a.{ending}": None}), picture(f"a.{ending}"))
        for ending in ("heic", "jfif", "WEBP", "JPG")
    },
    "fractions": case("a.tif: its pixels are numbers of 32 bits", lambda f: Image.new("F", SIZE).save(f / "a.tif")),
    "damaged EXIF": case(
        Learnt(
            {"a.png": None, "b.png": None},
            warnings=("a.png: its EXIF data are damaged (not a TIFF file", "b.png: its EXIF data are damaged (unpack"),
        ),
        picture("a.png", exif=b"Exif\0\0JUNKJUNK"),
        picture("b.png", exif=b"Exif\0\0II*\0"),
    ),
    "one moves": case(
        Learnt({"a.gif": None}),
        lambda f: Image.new("P", SIZE).save(f / "a.gif", save_all=True, append_images=[Image.new("P", SIZE, 1)]),
    ),
    # What systems leave behind, and what else lies about.
    "litter": case(
        Learnt({"a.jpg": None}),
        picture("a.jpg"),
        text("._a.jpg", "x"),
        text("Thumbs.db", "x"),
        text(".DS_Store", "x"),
        text("desktop.ini", "x"),
        text("__MACOSX/._a.jpg", "x"),
    ),
    "one of a folder of concepts": case(
        Learnt({"a.jpg": None}), picture("a.jpg"), text("concept.json", '{"super_category": "dog"}')
    ),
    "a film and a note": case(
        Learnt({"a.jpg": None}, warnings=("not used: a.mov, notes.md",)),
        picture("a.jpg"),
        text("a.mov", "x"),
        text("notes.md", "x"),
    ),
    "many others": case(
        Learnt({"a.jpg": None}, warnings=("not used: 0.npz, 1.npz, 2.npz, 3.npz, 4.npz and 3 more",)),
        picture("a.jpg"),
        *(text(f"{number}.npz", "x") for number in range(8)),
    ),
    "a text of no picture": case(
        Learnt({"a.jpg": None}, warnings=("not used: README.txt",)), picture("a.jpg"), text("README.txt", "mine")
    ),
    "a live photo": case(Learnt({"a.HEIC": None, "a.jpg": None}), picture("a.HEIC"), picture("a.jpg")),
    "folders of other pictures": case(
        Learnt({"a.jpg": None}, warnings=("not used: mask/, old/",)),
        picture("a.jpg"),
        picture("old/a.jpg"),
        lambda folder: mask(folder / "mask/a.png"),
        text("notes/a.md", "x"),
    ),
    "nothing": case("no pictures in it", text("notes.md", "x")),
    "one folder too high": case("if they are in one of its folders, mine, name that", picture("mine/a.png")),
    # Captions.
    "a slot": case(Learnt({"a.png": "my {} here"}), picture(), text("a.txt", "my {} here\n")),
    "two slots": case(Learnt({"a.png": "{} by a dog"}), picture(), text("a.txt", "{} by a {}")),
    "trigger mark": case(Learnt({"a.png": "a {} in snow"}), picture(), text("a.txt", "a [trigger] in snow")),
    "trigger mark and class": case(
        Learnt({"a.png": "a {} in snow, dog"}), picture(), text("a.txt", "a [trigger] dog in snow, [trigger]")
    ),
    "its name": case(Learnt({"a.png": "a photo of {}."}), picture(), text("a.txt", "a photo of Rex.")),
    "its name and class": case(Learnt({"a.png": "a {} runs"}), picture(), text("a.txt", "a rex dog runs")),
    "its name as in prompts": case(
        Learnt({"a.png": "a photo of {} here"}), picture(), text("a.txt", "a photo of <Rex> dog here")
    ),
    "its name within a word": case(
        Learnt({"a.png": "a {}, trexes"}, warnings=(NOT_NAMED,)), picture(), text("a.txt", "trexes")
    ),
    "its class": case(Learnt({"a.png": "a {} and a dog"}), picture(), text("a.txt", "a dog and a dog")),
    "neither": case(
        Learnt({"a.png": "a {}, on a beach"}, warnings=(NOT_NAMED,)), picture(), text("a.txt", "on a beach")
    ),
    "braces": case(Learnt({"a.png": "a {} of {red|blue}"}), picture(), text("a.txt", "a dog of {red|blue}")),
    "an empty caption": case(Learnt({"a.png": None}), picture(), text("a.txt", " \n")),
    "a byte order mark": case(Learnt({"a.png": "a {}"}), picture(), text("a.txt", "a dog", "utf-8-sig")),
    "utf-16": case(Learnt({"a.png": "a {} in Zürich"}), picture(), text("a.txt", "a dog in Zürich", "utf-16")),
    "lines of Windows": case(Learnt({"a.png": "a {} here"}), picture(), text("a.txt", "a dog\r\nhere\r\n")),
    "latin-1": case("a.txt: not in UTF-8", picture(), text("a.txt", "ein Hündchen", "latin-1")),
    "two endings": case(Learnt({"a.png": "a {}"}), picture(), text("a.png.txt", "a dog")),
    "kohya's ending": case(Learnt({"a.png": "a {}"}), picture(), text("a.caption", "a dog")),
    "whose": case("a.txt: two pictures are called 'a'", picture("a.png"), picture("a.jpg"), text("a.txt", "a dog")),
    "a long one": case(
        Learnt({"a.png": "a {} on a beach"}, warnings=("1 of 1 captions are too long",)),
        picture(),
        text("a.txt", "a dog on a beach with all its friends"),
    ),
    "a long one that names it late": case(
        "a.png: its caption names the thing after", picture(), text("a.txt", "here is what we saw of the dog")
    ),
    # Metadata of datasets.
    "jsonl": case(
        Learnt({"a.png": "a {}", "b.png": None}),
        picture("a.png"),
        picture("b.png"),
        text("metadata.jsonl", '{"file_name": "a.png", "text": "a dog"}\n\n{"file_name": "b.png"}\n'),
    ),
    "jsonl of a folder below": case(
        Learnt({"train/a.png": "a {}"}),
        picture("train/a.png"),
        text("metadata.jsonl", json.dumps({"file_name": "train/a.png", "caption": "a dog"})),
    ),
    "csv": case(
        Learnt({"a.png": "a {}, red"}), picture(), text("metadata.csv", 'file_name,text\na.png,"a dog, red"\n')
    ),
    "its own caption wins": case(
        Learnt({"a.png": "my {}"}),
        picture(),
        text("a.txt", "my dog"),
        text("metadata.jsonl", '{"file_name": "a.png", "text": "a dog"}'),
    ),
    "damaged": case("metadata.jsonl: each line needs a file_name", picture(), text("metadata.jsonl", '{"file": 1}')),
    "of what is gone": case(
        "its metadata names b.png, which is not a picture",
        picture(),
        text("metadata.jsonl", '{"file_name": "b.png", "text": "a dog"}'),
    ),
    "out of the folder": case(
        "which is not in its folder", picture(), text("metadata.jsonl", '{"file_name": "../b.png", "text": "a dog"}')
    ),
    # Folders of other trainers.
    "kohya": case(
        Learnt({"10_ohwx dog/a.png": "a photo of {}", "10_ohwx dog/b.png": None}),
        picture("10_ohwx dog/a.png"),
        picture("10_ohwx dog/b.png"),
        text("10_ohwx dog/a.txt", "a photo of ohwx dog"),
    ),
    "kohya's trigger alone": case(
        Learnt({"10_ohwx dog/a.png": "{} on grass"}),
        picture("10_ohwx dog/a.png"),
        text("10_ohwx dog/a.txt", "ohwx on grass"),
    ),
    "a folder of a trip": case(
        Learnt({"2023_summer/a.png": "a {} in summer", "2023_summer/b.png": "{} at sea"}),
        picture("2023_summer/a.png"),
        text("2023_summer/a.txt", "a dog in summer"),
        picture("2023_summer/b.png"),
        text("2023_summer/b.txt", "summer at sea"),
    ),
    "kohya's of two things": case(
        "folders of several things, ohwx dog, sks cat", picture("10_ohwx dog/a.png"), picture("5_sks cat/a.png")
    ),
    "kohya's in two parts": case(
        Learnt({"10_dog/a.png": "a {} left", "2_dog/a.png": "a {} right"}),
        picture("10_dog/a.png"),
        text("10_dog/a.txt", "a dog left"),
        picture("2_dog/a.png"),
        text("2_dog/a.txt", "a dog right"),
    ),
    "kohya's beside a picture": case(
        "it has pictures, such as sample.png, beside the folder 10_dog", picture("10_dog/a.png"), picture("sample.png")
    ),
    "what is called like kohya's, beside a picture": case(
        Learnt({"a.png": None}), picture("a.png"), text("2023_notes/a.md", "x")
    ),
    "jsonl of both": case(
        Learnt({"01_left/a.png": "a {}", "b.png": "my {}"}),
        picture("01_left/a.png"),
        picture("b.png"),
        text(
            "metadata.jsonl",
            '{"file_name": "01_left/a.png", "text": "a dog"}\n{"file_name": "b.png", "text": "my dog"}',
        ),
    ),
    "beside kohya's": case(
        Learnt({"10_dog/a.png": None}, warnings=("not used: notes.md, old/",)),
        picture("10_dog/a.png"),
        picture("old/a.png"),
        text("notes.md", "x"),
    ),
    "kohya's with masks": case(
        Learnt({"10_dog/a.png": None, "2_dog/a.png": None}, masked=("10_dog/a.png", "2_dog/a.png")),
        picture("10_dog/a.png"),
        lambda folder: mask(folder / "10_dog/masks/a.png"),
        picture("2_dog/a.png"),
        lambda folder: mask(folder / "2_dog/masks/a.png"),
    ),
    "kohya's with masks beside it": case(
        Learnt({"10_dog/a.png": None}, masked=("10_dog/a.png",)),
        picture("10_dog/a.png"),
        lambda folder: mask(folder / "masks/a.png"),
    ),
    "onetrainer": case(
        Learnt({"a.png": "a {}"}, masked=("a.png",)),
        picture(),
        text("a.txt", "a dog"),
        lambda folder: mask(folder / "a-masklabel.png"),
    ),
    "onetrainer without one": case(
        "b.png: has no b-masklabel.png", picture(), picture("b.png"), lambda folder: mask(folder / "a-masklabel.png")
    ),
    # Masks.
    "masks": case(Learnt({"a.png": None}, masked=("a.png",)), picture(), lambda folder: mask(folder / "masks/a.png")),
    "a smaller mask": case(
        Learnt({"a.png": None}, masked=("a.png",)), picture(), lambda folder: mask(folder / "masks/a.png", (20, 10))
    ),
    "a mask of transparency": case(
        Learnt({"a.png": None}, masked=("a.png",)),
        picture(),
        lambda folder: transparent_mask(folder / "masks/a.png"),
    ),
    "an opaque black mask": case(
        "all of it is masked out",
        picture(),
        lambda folder: [mask(folder / "masks/a.png"), Image.new("RGBA", SIZE, "black").save(folder / "masks/a.png")],
    ),
    "litter among masks": case(
        Learnt({"a.png": None}, masked=("a.png",)),
        picture(),
        lambda folder: mask(folder / "masks/a.png"),
        text("masks/._a.png", "x"),
        text("masks/Thumbs.db", "x"),
    ),
}


def shorten(prompt):
    """As a text encoder of five words would."""
    return " ".join(prompt.split()[:5])


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_learnt_from_or_refused_by_one_clear_line(tmp_path, caplog, name):
    make, expected = CASES[name]
    make(tmp_path)

    def read():
        return with_slots(read_folder(tmp_path), "rex", "dog", shorten)

    if isinstance(expected, str):
        with pytest.raises(InputError) as caught:
            read()
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    with caplog.at_level(logging.WARNING):
        pictures = read()
    assert {picture.name: picture.caption for picture in pictures} == expected.prompts
    assert tuple(picture.name for picture in pictures if picture.mask is not None) == expected.masked
    for picture in pictures:
        assert picture.pixels.shape[1::-1] == SIZE
        if picture.mask is not None:
            assert picture.mask[:, :18].min() > 0.9
            assert picture.mask[:, 22:].max() < 0.1
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == len(expected.warnings)
    for words, message in zip(expected.warnings, told, strict=True):
        assert words in message


@pytest.mark.parametrize("name", ODD_NAMES)
def test_folders_and_pictures_may_have_any_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    save(Path(name) / f"{name}.png")
    mask(Path(name) / "masks" / f"{name}.png")
    write(Path(name) / "metadata.jsonl", json.dumps({"file_name": f"{name}.png", "text": "a dog"}))
    (read,) = read_folder(name)
    assert (read.name, read.caption) == (f"{name}.png", "a dog")
    assert read.mask[:, :18].min() > 0.9
    assert read.mask[:, 22:].max() < 0.1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("upright", [False, True])
def test_masks_may_be_drawn_on_a_picture_as_it_is_shown_or_as_it_is_stored(tmp_path, orientation, upright):
    turned(tmp_path / "a.jpg", orientation)
    is_on_its_side = orientation > 4
    shown = SIZE[::-1] if is_on_its_side else SIZE
    mask(tmp_path / "masks" / "a.png", shown if upright else SIZE)
    (picture,) = read_folder(tmp_path)
    assert picture.pixels.shape[1::-1] == shown
    assert picture.mask.shape == picture.pixels.shape[:2]
    if upright or not is_on_its_side:  # of one shape both ways, it is taken for upright
        assert picture.mask[:, 0].min() > 0.9
        return
    # The left half as it is stored is the top or the bottom as it is shown.
    lit = picture.mask.mean(axis=1)
    assert (lit[:15].min() > 0.9) == (orientation in (5, 6))
    assert (lit[-15:].min() > 0.9) == (orientation in (7, 8))


def test_a_folder_of_kohyas_may_be_named_itself(tmp_path):
    save(tmp_path / "10_ohwx dog" / "a.png")
    (picture,) = read_folder(tmp_path / "10_ohwx dog")
    assert picture.trigger == "ohwx dog"
    assert len(find_files(tmp_path).pictures) == 1


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a C++ mug", "a {} mug"),
        ("the mug (c++)", "the mug ({})"),
    ],
)
def test_names_with_signs_are_found(caption, expected):
    assert with_slot(caption, ["c++"], "cup") == (expected, True)


def test_a_caption_that_names_another_concept_is_named(small_base, tmp_path):
    save(tmp_path / "a.png")
    write(tmp_path / "a.txt", "a dog with <tom>")
    pictures = with_slots(read_folder(tmp_path), "rex", "dog", shorten)
    message = r"the caption of a\.png: the prompt .* names <tom>, but the concepts given are: <rex>"
    with pytest.raises(InputError, match=message):
        prompt_ids(small_base.model, pictures, ["a {}"], "<rex> dog", "<rex>")


def test_some_pictures_with_a_mask_and_some_without_are_refused_by_name(small_base, tmp_path):
    for name in ("10_dog/a.png", "2_dog/a.png"):
        save(tmp_path / name)
    mask(tmp_path / "10_dog/masks/a.png")
    with pytest.raises(InputError, match=r"2_dog/a\.png: has no mask"):
        given_masks(small_base.model, read_folder(tmp_path))


def test_a_name_that_nobody_chose_is_a_word_like_any_other(tmp_path):
    save(tmp_path / "a.png")
    write(tmp_path / "a.txt", "concept art of a dog")
    for chosen, expected in ((False, "concept art of a {}"), (True, "{} art of a dog")):
        (made,) = with_slots(read_folder(tmp_path), "concept", "dog", shorten=str, chosen=chosen)
        assert made.caption == expected
