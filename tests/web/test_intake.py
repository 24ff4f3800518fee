"""Pictures that are dropped on the studio's page."""

import io
import os
import time
import zipfile

import numpy as np
import pytest
from etils import epath
from PIL import Image

from perfusion_jax import InputError
from perfusion_jax.config import make_config
from perfusion_jax.data.folders import read_folder
from perfusion_jax.data.pictures import Picture, fit
from perfusion_jax.web import intake
from perfusion_jax.web.intake import folder_for, keep, new_draft, on_whole, preview, take_back


def save(file, size=(40, 30), **options):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, **options)
    return file


def test_pictures_are_kept_under_names_of_the_studios_own(tmp_path):
    files = [
        save(tmp_path / "a", format="JPEG"),
        save(tmp_path / "b", format="PNG"),
        save(tmp_path / "c", format="WEBP"),
    ]
    draft = new_draft(tmp_path / "runs", files, ["../../etc/x.jpg", "dog.exe", "c"])
    assert sorted(file.name for file in draft.iterdir()) == ["picture_01.jpg", "picture_02.png", "picture_03.webp"]
    assert draft.is_relative_to(tmp_path / "runs" / ".studio")
    assert (draft / "picture_01.jpg").read_bytes() == (tmp_path / "a").read_bytes()


def hostile(tmp_path):
    svg = tmp_path / "svg"
    svg.write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')
    archive = tmp_path / "zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x.png", "x")
    empty = tmp_path / "empty"
    empty.touch()
    text = tmp_path / "text"
    text.write_text("<html>")
    cut = tmp_path / "cut"
    stream = io.BytesIO()
    Image.new("RGB", (500, 500), "red").save(stream, "PNG")
    cut.write_bytes(stream.getvalue()[:20])
    return svg, archive, empty, text, cut


def test_what_is_no_picture_is_named_and_nothing_is_kept(tmp_path):
    for file in hostile(tmp_path):
        with pytest.raises(InputError, match=r"^dog\.png: not a picture"):
            new_draft(tmp_path / "runs", [file], ["dog.png"])
    assert not list((tmp_path / "runs").rglob("picture_*"))


def test_pictures_that_are_too_large_are_refused_by_their_head_alone(tmp_path, monkeypatch):
    huge = tmp_path / "huge"
    Image.new("1", (20_000, 10_000)).save(huge, "PNG")  # 200 megapixels in few bytes
    large = tmp_path / "large"
    Image.new("1", (10_000, 8_000)).save(large, "PNG")
    fair = tmp_path / "fair"
    Image.new("1", (10_000, 1_000)).save(fair, "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(InputError, match=r"^x\.png: .*at most 64 million are taken"):
        new_draft(tmp_path / "runs", [huge], ["x.png"])
    with pytest.raises(InputError, match="10000 x 8000 pixels; at most 64 million"):
        new_draft(tmp_path / "runs", [large], ["x.png"])
    with pytest.raises(InputError, match="60 pictures of 600 million pixels together; at most 512"):
        new_draft(tmp_path / "runs", [fair] * 60, ["x"] * 60)
    monkeypatch.setattr(intake, "MOST_BYTES", 10)
    with pytest.raises(InputError, match="MiB; at most"):
        new_draft(tmp_path / "runs", [large], ["x.png"])


def test_none_and_too_many_are_refused(tmp_path):
    with pytest.raises(InputError, match="drop 3 to 10"):
        new_draft(tmp_path, [], [])
    with pytest.raises(InputError, match=r"65 pictures: .* at most 64"):
        new_draft(tmp_path, ["x"] * 65, ["x"] * 65)


def test_drafts_that_nobody_learns_are_deleted_after_a_day(tmp_path):
    file = save(tmp_path / "a.png")
    old, new = (new_draft(tmp_path / "runs", [file], ["a"]) for _ in range(2))
    os.utime(old, (0, 0))
    new_draft(tmp_path / "runs", [file], ["a"])
    assert not old.exists()
    assert new.exists()


def test_the_oldest_drafts_make_room_for_new_ones(tmp_path, monkeypatch):
    file = save(tmp_path / "a.png")
    drafts = [new_draft(tmp_path / "runs", [file], ["a"]) for _ in range(3)]
    for age, draft in enumerate(drafts):
        os.utime(draft, (time.time() - 9 + age,) * 2)
    monkeypatch.setattr(intake, "MOST_KEPT", 2 * file.stat().st_size)
    new = new_draft(tmp_path / "runs", [file], ["a"])
    assert [draft.exists() for draft in (*drafts, new)] == [False, False, True, True]


def test_uploads_are_seen_by_no_other_decoder(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a", "ICO", sizes=[(16, 16)])
    with pytest.raises(InputError, match=r"a\.ico: not a picture of a kind that is read here \(\.avif"):
        new_draft(tmp_path / "runs", [tmp_path / "a"], ["a.ico"])


def test_pictures_are_taken_back_without_the_masks_that_were_painted(tmp_path):
    draft = new_draft(tmp_path / "runs", [save(tmp_path / "a.jpg")], ["a.jpg"])
    folder = folder_for(tmp_path / "runs", "rex")
    keep(draft, folder, {"picture_01": np.ones((384, 384), np.float32)}, crop=True)
    take_back(folder, draft)
    assert [file.name for file in draft.iterdir()] == ["picture_01.jpg"]
    with pytest.raises(InputError, match="cannot be written"):
        keep(draft, folder, {"other": np.ones((384, 384), np.float32)}, crop=True)
    assert [file.name for file in draft.iterdir()] == ["picture_01.jpg"]


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("size", [(60, 40), (40, 61), (32, 32), (33, 90)])
def test_a_mask_of_the_square_is_put_back_where_the_square_was_cut(size, crop):
    width, height = size
    inside = np.zeros((height, width), np.float32)
    inside[height // 4 : height // 2, width // 3 : 2 * width // 3] = 1
    square = fit(Picture("x", np.zeros((height, width, 3), np.uint8), inside, None), 384, crop).mask
    back = on_whole(square, height, width, crop)
    assert back.shape == inside.shape
    cut = fit(Picture("x", np.zeros((height, width, 3), np.uint8), back, None), 384, crop).mask
    assert np.abs(cut - square).mean() < 0.02
    side = min(size) if crop else max(size)
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    kept = slice(top, top + side), slice(left, left + side)
    assert np.abs(back[kept] - inside[kept]).mean() < 0.05


def test_painted_masks_are_what_is_learnt_from(tmp_path):
    files = [save(tmp_path / "a.jpg", (60, 40)), save(tmp_path / "b.png", (40, 60))]
    draft = new_draft(tmp_path / "runs", files, ["a.jpg", "b.png"])
    mask = np.zeros((384, 384), np.float32)
    mask[:, 192:] = 1
    folder = folder_for(tmp_path / "runs", "rex")
    keep(draft, folder, {"picture_01": mask, "picture_02": 1 - mask}, crop=True)
    assert folder == tmp_path / "runs" / "pictures" / "rex"
    assert not draft.exists()
    first, second = (fit(picture, 64, True).mask for picture in read_folder(epath.Path(folder)))
    assert first[:, :30].max() < 0.05
    assert first[:, 34:].min() > 0.95
    assert second[:, :30].min() > 0.95
    assert second[:, 34:].max() < 0.05
    keep(new_draft(tmp_path / "runs", files, ["a", "b"]), folder_for(tmp_path / "runs", "rex"), {}, crop=True)
    assert sorted(each.name for each in folder.parent.iterdir()) == ["rex", "rex-2"]


def test_a_preview_is_what_training_sees(tmp_path, small_base):
    files = [save(tmp_path / "a.png", (60, 40))]
    draft = new_draft(tmp_path / "runs", files, ["a.png"])
    options = {"validation_prompts": (), "templates": ("a {}",), "super_category": "dog", "pictures": str(draft)}
    (shown,) = preview(make_config(masks="none", **options), small_base, draft, ["a.png"])
    cut = fit(read_folder(epath.Path(draft))[0], 384, True)
    assert np.array_equal(shown.pixels, cut.pixels)
    assert shown.mask.min() == 1
    (looked,) = preview(make_config(masks="attention", **options), small_base, draft, ["a.png"])
    assert 0 <= looked.mask.min() < looked.mask.max() <= 1
