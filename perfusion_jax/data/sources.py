"""Where a concept's pictures come from: a folder, a dataset, or the examples that ship."""

from etils import epath

from perfusion_jax.data.folders import find_files, read_folder
from perfusion_jax.data.pictures import Picture
from perfusion_jax.runtime import shipped
from perfusion_jax.runtime.errors import InputError, UnavailableError
from perfusion_jax.runtime.files import to_path
from perfusion_jax.runtime.names import DATASET

EXAMPLE = "emoji:"


def read_pictures(source: str, masks: str = "", captions: str = "") -> list[Picture]:
    """Reads a concept's pictures.

    Args:
        source: as `config.pictures`.
        masks, captions: folders of them, if they are not where the pictures are.

    Raises:
        InputError: they cannot be used, or the package has no such example.
        UnavailableError: storage fails.
    """
    if source.startswith(DATASET):
        if masks or captions:
            raise InputError(f"{source}: a dataset holds its masks and captions; none can be given beside it")
        from perfusion_jax.data import dataset  # tensorflow_datasets takes seconds to import

        return dataset.read_split(source)
    return read_folder(_folder(source), masks or None, captions or None)


def _folder(source: str) -> epath.Path:
    if not source.startswith(EXAMPLE):
        return to_path(source)
    name = source.removeprefix(EXAMPLE)
    examples = sorted(folder.name for folder in shipped.EXAMPLES.iterdir() if folder.is_dir())
    if name not in examples:
        raise InputError(f"config.pictures is {source!r}; the examples are {', '.join(examples)}")
    return epath.Path(shipped.EXAMPLES / name)


def count_pictures(source: str) -> int:
    """How many pictures there are, without reading them; 0 where that cannot be told.

    Args:
        source: as `config.pictures`.

    Raises:
        UnavailableError: storage fails.
    """
    try:
        if source.startswith(DATASET):
            from perfusion_jax.data import dataset

            return dataset.split_size(source)
        return len(find_files(_folder(source)).pictures)
    except UnavailableError:
        raise
    except InputError:
        return 0
