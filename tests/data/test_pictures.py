"""Pictures as people have them: turned, transparent, grey, CMYK, broken."""

import numpy as np
import pytest
from etils import epath
from PIL import Image

from perfusion_jax import InputError
from perfusion_jax.data.folders import read_folder
from perfusion_jax.data.pictures import fit, open_picture
from perfusion_jax.data.sources import count_pictures
from perfusion_jax.runtime.errors import UnavailableError

RED, GREEN = (255, 0, 0), (0, 255, 0)


def two_halves(width=40, height=20, left=RED, right=GREEN):
    image = Image.new("RGB", (width, height), left)
    image.paste(right, (width // 2, 0, width, height))
    return image


@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG", "webp"])
def test_reads_the_usual_formats(tmp_path, ending):
    two_halves().save(tmp_path / f"a.{ending}")
    (picture,) = read_folder(tmp_path)
    assert picture.pixels.shape == (20, 40, 3)
    assert np.abs(picture.pixels[10, 5].astype(int) - RED).max() < 30
    assert picture.mask is None


def test_a_picture_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture must be turned right by 90 degrees
    two_halves().save(tmp_path / "a.jpg", exif=exif, quality=100)
    (picture,) = read_folder(tmp_path)
    assert picture.pixels.shape == (40, 20, 3)
    assert picture.pixels[5, 10, 0] > 200 > picture.pixels[35, 10, 0]


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "1"])
def test_other_colour_modes_are_converted(tmp_path, mode):
    two_halves(left="black", right="white").convert(mode).save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    (picture,) = read_folder(tmp_path)
    assert picture.pixels.shape == (20, 40, 3)
    assert picture.pixels[10, 5].max() < 10
    assert picture.pixels[10, 35].min() > 245


def test_colours_that_cannot_be_converted_are_named(tmp_path, monkeypatch):
    two_halves().save(tmp_path / "a.png")
    (tmp_path / "masks").mkdir()
    Image.new("LAB", (40, 20), (255, 128, 128)).save(tmp_path / "masks" / "a.tif")
    assert read_folder(tmp_path)[0].mask.min() > 0.9

    def refuse(image, mode):
        raise ValueError(f"conversion from {image.mode} to {mode} not supported")  # as older versions of PIL do

    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(InputError, match=r"a\.tif: cannot be read \(conversion from LAB to RGB not supported"):
        open_picture(epath.Path(tmp_path / "masks" / "a.tif"))


def test_sixteen_bit_greys_are_scaled_not_cut(tmp_path):
    grey = np.full((20, 20), 257 * 100, np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert (read_folder(tmp_path)[0].pixels == 100).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_the_mask_and_shows_white(tmp_path, mode):
    image = two_halves().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 20, 20))
    image.convert(mode).save(tmp_path / "a.png")
    (picture,) = read_folder(tmp_path)
    np.testing.assert_array_equal(picture.mask[:, :20], 0)
    np.testing.assert_array_equal(picture.mask[:, 20:], 1)
    np.testing.assert_array_equal(picture.pixels[:, :20], 255)


def test_an_opaque_alpha_channel_is_no_mask(tmp_path):
    two_halves().convert("RGBA").save(tmp_path / "a.png")
    assert read_folder(tmp_path)[0].mask is None


def test_mask_files_win_over_transparency(tmp_path):
    image = two_halves().convert("RGBA")
    image.putalpha(7)
    image.save(tmp_path / "a.png")
    (tmp_path / "masks").mkdir()
    two_halves(left="black", right="white").convert("L").save(tmp_path / "masks" / "a.jpg", quality=100)
    mask = read_folder(tmp_path)[0].mask
    assert mask[:, :15].max() < 0.1
    assert mask[:, 25:].min() > 0.9


def save_mask(folder, name="a.png", size=(40, 20), colour="white"):
    (folder / "masks").mkdir(exist_ok=True)
    Image.new("L", size, colour).save(folder / "masks" / name)


def truncated(folder):
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "a.jpg", quality=100)
    (folder / "a.jpg").write_bytes((folder / "a.jpg").read_bytes()[:3000])


BAD = {
    "text": (lambda folder: (folder / "a.jpg").write_text("hello"), r"a.jpg: not a picture"),
    "empty": (lambda folder: (folder / "a.jpg").write_bytes(b""), r"a.jpg: not a picture"),
    "truncated": (truncated, r"a.jpg: cannot be read"),
    "one pixel": (lambda folder: Image.new("RGB", (1, 1)).save(folder / "a.png"), "a.png: 1 x 1 pixels; at least 16"),
    "none": (lambda folder: (folder / "notes.md").write_text("x"), "no pictures in it"),
    "mask size": (
        lambda folder: [two_halves().save(folder / "a.png"), save_mask(folder, size=(20, 20))],
        r"masks/a.png: 20 x 20 pixels; its picture has 40 x 20",
    ),
    "black mask": (
        lambda folder: [two_halves().save(folder / "a.png"), save_mask(folder, colour="black")],
        r"masks/a.png: all of it is masked out",
    ),
    "missing mask": (
        lambda folder: [two_halves().save(folder / "a.png"), two_halves().save(folder / "b.png"), save_mask(folder)],
        "no mask for the picture 'b'",
    ),
    "mask of nothing": (
        lambda folder: [two_halves().save(folder / "a.png"), save_mask(folder), save_mask(folder, "c.png")],
        r"masks/c.png: a mask of no picture",
    ),
    "invisible": (
        lambda folder: Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(folder / "a.png"),
        r"a.png: all of it is masked out",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused_by_name(tmp_path, case):
    make, message = BAD[case]
    make(tmp_path)
    with pytest.raises(InputError, match=message):
        read_folder(tmp_path)


def test_storage_that_fails_for_now_is_no_fault_of_the_pictures(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(5, "Input/output error")

    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(type(epath.Path(tmp_path)), "read_bytes", fail)
    with pytest.raises(UnavailableError, match=r"a\.png: cannot be read"):
        read_folder(tmp_path)
    # Nor is a folder missing that cannot be looked into.
    monkeypatch.setattr(type(epath.Path(tmp_path)), "iterdir", fail)
    for read in (read_folder, count_pictures):
        with pytest.raises(UnavailableError, match=f"{tmp_path}: cannot be read"):
            read(str(tmp_path))


@pytest.mark.parametrize("name", ["masks", "a.txt"])
def test_what_cannot_be_looked_at_is_not_taken_for_missing(tmp_path, name):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / name).symlink_to(name)  # to itself
    with pytest.raises(InputError, match=f"{name}: cannot be read"):
        read_folder(tmp_path)


def test_a_missing_folder_is_named():
    with pytest.raises(InputError, match="/nowhere: no such folder"):
        read_folder("/nowhere")


def test_cropping_takes_the_middle_without_distortion(tmp_path):
    image = two_halves(60, 20)
    image.paste("blue", (20, 0, 40, 20))
    image.save(tmp_path / "a.png")
    fitted = fit(read_folder(tmp_path)[0], 16, crop=True)
    assert fitted.pixels.shape == (16, 16, 3)
    assert (fitted.pixels[:, 2:-2] == (0, 0, 255)).all()


def test_padding_keeps_all_and_tells_what_it_adds(tmp_path):
    two_halves(64, 32).save(tmp_path / "a.png")
    fitted = fit(read_folder(tmp_path)[0], 32, crop=False)
    np.testing.assert_array_equal(fitted.pixels[:8], 255)
    assert fitted.mask is None
    np.testing.assert_array_equal(fitted.inside[:7], 0)
    np.testing.assert_allclose(fitted.inside[9:23], 1, atol=1e-3)
    assert fitted.pixels[16, 4, 0] > 250
    assert fitted.pixels[16, 28, 1] > 250


def test_a_mask_is_fitted_with_its_picture(tmp_path):
    two_halves().save(tmp_path / "a.png")
    (tmp_path / "masks").mkdir()
    two_halves(left="black", right="white").convert("L").save(tmp_path / "masks" / "a.png")
    fitted = fit(read_folder(tmp_path)[0], 32, crop=True)
    assert fitted.mask.shape == (32, 32)
    assert 0 <= fitted.mask.min() < 0.01
    assert 0.99 < fitted.mask.max() <= 1


def test_a_thing_outside_the_crop_is_an_error(tmp_path):
    two_halves(100, 20).save(tmp_path / "a.png")
    mask = Image.new("L", (100, 20))
    mask.paste(255, (0, 0, 10, 20))
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks" / "a.png")
    with pytest.raises(InputError, match=r"a.png: cropping to a square cuts the thing away"):
        fit(read_folder(tmp_path)[0], 16, crop=True)
