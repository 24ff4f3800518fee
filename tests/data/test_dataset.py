"""A dataset gives back the pictures it was made of, and never imports TensorFlow."""

import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from PIL import Image

from perfusion_jax import InputError
from perfusion_jax.data.dataset import read_split, write_dataset
from perfusion_jax.data.pictures import read_folder


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("rex", 3), ("my-cup", 1)):
        folder = tmp_path / "concepts" / name
        (folder / "masks").mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (20 + number, 30, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            if name == "rex":
                Image.fromarray(pixels[..., 0]).save(folder / "masks" / f"{number}.png")
        (folder / "0.txt").write_text("a {} at home")
    (tmp_path / "concepts" / "my-cup" / "masks").rmdir()
    return epath.Path(tmp_path / "concepts")


def test_pictures_masks_and_captions_survive(folders, tmp_path):
    where = write_dataset(folders, epath.Path(tmp_path / "out"))
    for name in ("rex", "my-cup"):
        before, after = read_folder(folders / name), read_split(f"tfds:{where}#{name}")
        assert [picture.name for picture in before] == [picture.name for picture in after]
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one.pixels, other.pixels)
            assert one.caption == other.caption
            assert (one.mask is None) == (other.mask is None)
            if one.mask is not None:
                np.testing.assert_array_equal(one.mask, other.mask)
    with pytest.raises(InputError, match="no concept 'tom'; it has my-cup, rex"):
        read_split(f"tfds:{where}#tom")
    with pytest.raises(InputError, match="is there already"):
        write_dataset(folders, epath.Path(tmp_path / "out"))


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


def test_bad_input_is_named(folders, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        write_dataset(epath.Path("/nowhere"), epath.Path(tmp_path / "out"))
    with pytest.raises(InputError, match="not a dataset"):
        read_split(f"tfds:{tmp_path}#rex")
    (folders / "a b").mkdir()
    with pytest.raises(InputError, match="a b: name it with letters"):
        write_dataset(folders, epath.Path(tmp_path / "out"))
