"""A dataset gives back the pictures it was made of, and never imports TensorFlow."""

import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from PIL import Image

from perfusion_jax import InputError
from perfusion_jax.data import dataset
from perfusion_jax.data.dataset import read_split, write_dataset
from perfusion_jax.data.folders import read_folder
from perfusion_jax.runtime.errors import UnavailableError


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("rex", 3), ("my-cup", 1)):
        folder = tmp_path / "concepts" / name / ("10_ohwx cup" if name == "my-cup" else "")
        (folder / "masks").mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (20 + number, 30, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            if name == "rex":
                Image.fromarray(pixels[..., 0]).save(folder / "masks" / f"{number}.png")
        (folder / "0.txt").write_text("a {} at home")
    (tmp_path / "concepts" / "my-cup" / "10_ohwx cup" / "masks").rmdir()
    return epath.Path(tmp_path / "concepts")


def test_pictures_masks_and_captions_survive(folders, tmp_path):
    where = write_dataset(folders, epath.Path(tmp_path / "out"))
    for name in ("rex", "my-cup"):
        before, after = read_folder(folders / name), read_split(f"tfds:{where}#{name}")
        assert [picture.name for picture in before] == [picture.name for picture in after]
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one.pixels, other.pixels)
            assert (one.caption, one.trigger) == (other.caption, other.trigger)
            assert (one.mask is None) == (other.mask is None)
            if one.mask is not None:
                np.testing.assert_array_equal(one.mask, other.mask)
    with pytest.raises(InputError, match="no concept 'tom'; it has my-cup, rex"):
        read_split(f"tfds:{where}#tom")
    with pytest.raises(InputError, match="is there already"):
        write_dataset(folders, epath.Path(tmp_path / "out"))


def test_a_folder_may_have_a_hash_in_its_name(folders, tmp_path):
    where = write_dataset(folders, epath.Path(tmp_path / "#1 [new]"))
    assert len(read_split(f"tfds:{where}#rex")) == 3
    with pytest.raises(InputError, match="tfds:nowhere: no concept is named; write tfds:FOLDER#CONCEPT"):
        read_split("tfds:nowhere")


def test_the_command_works_without_tensorflow(folders, tmp_path):
    program = (
        "import atexit, runpy, sys; "
        "atexit.register(lambda: print('tensorflow' in sys.modules)); "
        "runpy.run_module('perfusion_jax.data.dataset', run_name='__main__')"
    )
    arguments = [f"--folders={folders}", f"--out={tmp_path / 'out'}"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    where, imported = done.stdout.splitlines()[-2:]
    assert imported == "False"
    assert len(read_split(f"tfds:{where}#rex")) == 3


def test_a_dataset_for_a_bucket_is_made_here_and_copied(folders, tmp_path, monkeypatch):
    local = write_dataset(folders, epath.Path(tmp_path / "local"))
    monkeypatch.setattr(dataset, "is_local", lambda _: False)
    copied = write_dataset(folders, epath.Path(tmp_path / "bucket"))
    assert copied == epath.Path(tmp_path / "bucket" / "concepts" / "1.0.0")
    assert sorted(file.name for file in copied.iterdir()) == sorted(file.name for file in local.iterdir())
    assert len(read_split(f"tfds:{copied}#rex")) == 3
    with pytest.raises(InputError, match="is there already"):
        write_dataset(folders, epath.Path(tmp_path / "bucket"))


def test_broken_datasets_are_named(folders, tmp_path):
    where = write_dataset(folders, epath.Path(tmp_path / "out"))
    (shard,) = where.glob("concepts-rex.*")
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"1\.0\.0: concept 'rex' cannot be read \(Corrupted"):
        read_split(f"tfds:{where}#rex")
    assert len(read_split(f"tfds:{where}#my-cup")) == 1
    (where / "dataset_info.json").write_text("{")
    with pytest.raises(InputError, match=r"1\.0\.0: concept 'rex' cannot be read \(Failed to load JSON"):
        read_split(f"tfds:{where}#rex")


BucketError = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), BucketError("503, backend error")])
@pytest.mark.parametrize("part", ["info", "rest"])
def test_storage_that_fails_for_now_is_no_fault_of_a_dataset(folders, tmp_path, monkeypatch, part, error):
    def fail(*_, **__):
        raise error

    where = write_dataset(folders, epath.Path(tmp_path / "out"))
    if part == "info":
        monkeypatch.setattr(type(where), "read_bytes", fail)
    else:
        monkeypatch.setattr(dataset.tfds, "builder_from_directory", fail)
    with pytest.raises(UnavailableError, match=r"1\.0\.0: cannot be read"):
        read_split(f"tfds:{where}#rex")


def test_bad_input_is_named(folders, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        write_dataset(epath.Path("/nowhere"), epath.Path(tmp_path / "out"))
    with pytest.raises(InputError, match="not a dataset"):
        read_split(f"tfds:{tmp_path}#rex")
    (folders / "a b").mkdir()
    with pytest.raises(InputError, match="a b: its name must be letters"):
        write_dataset(folders, epath.Path(tmp_path / "out"))
