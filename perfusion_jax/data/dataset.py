"""Many concepts' pictures as one `tensorflow_datasets` dataset of ArrayRecord files, without TensorFlow.

    python -m perfusion_jax.data.dataset --folders concepts/ --out gs://bucket/datasets

turns a folder of concept folders (`data.folders`) into `OUT/concepts/1.0.0/`, with one split per concept. It can be
copied as it is; `config.pictures = "tfds:gs://bucket/datasets/concepts/1.0.0#dog"` learns from its split `dog`.
"""

import io
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from etils import epath
from PIL import Image

from perfusion_jax.data.folders import read_folder
from perfusion_jax.data.pictures import Picture
from perfusion_jax.runtime import command_line
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import is_local, is_storage_error, storage_errors, subfolders, to_path
from perfusion_jax.runtime.names import DATASET, NAME_RULE

INFO = "dataset_info.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Concepts(tfds.core.GeneratorBasedBuilder):
    """Builder of a dataset with one split per concept.

    Args:
        folders: {concept name: its folder}.
        options: of the base class, `data_dir` among them.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, folders: dict[str, epath.Path] | None = None, **options: Any):
        self._folders = folders or {}
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "name": tfds.features.Text(doc="the picture's file name"),
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png", doc="upright"),
                "mask": tfds.features.Image(
                    shape=(None, None, 1), encoding_format="png", doc="white where the thing is"
                ),
                "has_mask": tfds.features.Scalar(np.uint8, doc="0: the mask is black and says nothing"),
                "caption": tfds.features.Text(doc="as in its file, or empty"),
                "trigger": tfds.features.Text(doc="what captions call the thing, or empty"),
            }
        )
        return tfds.core.DatasetInfo(builder=self, description="Pictures of concepts.", features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        return {name: self._generate_examples(folder) for name, folder in self._folders.items()}

    def _generate_examples(self, folder: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
        for picture in read_folder(folder):
            mask = np.zeros(picture.pixels.shape[:2], np.float32) if picture.mask is None else picture.mask
            yield (
                picture.name,
                {
                    "name": picture.name,
                    # Encoded here: given an array, tfds would ask TensorFlow.
                    "image": _png(picture.pixels),
                    "mask": _png(np.round(255 * mask).astype(np.uint8)),
                    "has_mask": int(picture.mask is not None),
                    "caption": picture.caption or "",
                    "trigger": picture.trigger,
                },
            )


def _png(pixels: np.ndarray) -> io.BytesIO:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    stream.seek(0)
    return stream


def write_dataset(folders: epath.Path, out: epath.Path) -> epath.Path:
    """Turns a folder of concept folders into a dataset, and returns where it is.

    Raises:
        InputError: there are no concept folders, one is called something that no split can be, a picture cannot be
            read, or the dataset is there already, or cannot be written.
        UnavailableError: storage fails.
    """
    inside = subfolders(folders)
    if inside is None:
        raise InputError(f"{folders}: no such folder")
    concepts = {folder.name: folder for folder in inside}
    if not concepts:
        raise InputError(f"{folders}: no folders of concepts in it")
    for name in concepts:
        if not _NAME.fullmatch(name):
            raise InputError(f"{folders / name}: its name must be {NAME_RULE}")
    with tempfile.TemporaryDirectory() as temporary:
        # ArrayRecord writes local files alone.
        builder = Concepts(folders=concepts, data_dir=str(out) if is_local(out) else temporary)
        made = epath.Path(builder.data_path)
        where = made if is_local(out) else out / builder.name / str(builder.version)
        with storage_errors(where, "written"):
            if (where / INFO).exists():
                raise InputError(f"{where}: is there already; delete it to make it anew")
            builder.download_and_prepare()
            if where != made:
                where.mkdir(parents=True, exist_ok=True)
                # The file by which a dataset is known comes last: a part of one is none.
                for file in sorted(made.iterdir(), key=lambda file: file.name == INFO):
                    (where / file.name).write_bytes(file.read_bytes())
    return where


def read_split(source: str) -> list[Picture]:
    """Reads a concept's pictures, in the order of their names.

    Args:
        source: `tfds:FOLDER#CONCEPT`.

    Raises:
        InputError: no such dataset or split, or it is broken.
        UnavailableError: storage fails.
    """
    with _opened(source) as (builder, split):
        pictures = [
            Picture(
                name=_string(row["name"]),
                pixels=row["image"],
                mask=row["mask"][..., 0].astype(np.float32) / 255 if row["has_mask"] else None,
                caption=_string(row["caption"]) or None,
                trigger=_string(row.get("trigger", "")),  # older datasets have none
            )
            for row in builder.as_data_source(split=split)
        ]
    return sorted(pictures, key=lambda picture: picture.name.split("/"))  # as a folder's, of which these are paths


def split_size(source: str) -> int:
    """How many pictures a concept has; arguments and errors as for `read_split`."""
    with _opened(source) as (builder, split):
        return builder.info.splits[split].num_examples


@contextmanager
def _opened(source: str) -> Iterator[tuple[Any, str]]:
    """Gives a dataset's builder and the name of the split; what is wrong with them becomes an error within it."""
    # The last #, for a folder may have one in its name, and no split can.
    folder, _, split = source.removeprefix(DATASET).rpartition("#")
    if not folder:
        raise InputError(f"{source}: no concept is named; write tfds:FOLDER#CONCEPT")
    path = to_path(folder)
    with storage_errors(folder, "read"):
        try:
            (path / INFO).read_bytes()  # tfds would call it missing, whatever storage does
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"{folder}: not a dataset of tensorflow_datasets: no {INFO} in it") from error
        try:
            builder = tfds.builder_from_directory(path)
            if split not in builder.info.splits:
                raise InputError(f"{folder}: no concept {split!r}; it has {', '.join(sorted(builder.info.splits))}")
            yield builder, split
        except Exception as error:  # of broken files each library raises something of its own
            if isinstance(error, (InputError, MemoryError)) or is_storage_error(error):
                raise
            raise InputError(f"{folder}: concept {split!r} cannot be read ({error})") from error


def _string(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def main() -> None:
    """Writes the dataset."""
    print(write_dataset(to_path(flags.FLAGS.folders), to_path(flags.FLAGS.out)))


def run() -> None:
    """The command."""
    flags.DEFINE_string("folders", None, "folder of concept folders", required=True)
    flags.DEFINE_string("out", None, "folder to write the dataset to, local or in a bucket", required=True)
    command_line.run(main)


if __name__ == "__main__":
    run()
