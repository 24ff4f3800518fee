"""A concept's folder as people have it: which files are its pictures, masks and captions.

    FOLDER/rex.jpg                a picture, of any size
    FOLDER/masks/rex.png          its mask, white where the thing is; or FOLDER/rex-masklabel.png (OneTrainer)
    FOLDER/rex.txt                its caption; or rex.caption (kohya)
    FOLDER/metadata.jsonl         captions as Hugging Face's datasets have them: {"file_name": "rex.jpg", "text": "..."}
    FOLDER/metadata.csv           the same as a table
    FOLDER/10_rex dog/rex.jpg     kohya's folders: how often each is shown, what captions call it, its class

A folder may be local or in a bucket (`gs://...`). What systems leave in folders is passed over; any other file that is
not used, and any folder of pictures, is named in a warning.
"""

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from perfusion_jax.data.pictures import ENDINGS, Picture, read_picture
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import entries, storage_errors, to_path
from perfusion_jax.runtime.names import FACTS

CAPTION_ENDINGS = (".txt", ".caption")
# What metadata files call a caption.
CAPTION_COLUMNS = ("text", "caption", "prompt")
METADATA = ("metadata.jsonl", "metadata.csv")
MASK_MARK = "-masklabel"
# Of kohya: how often each picture is shown, and what it shows.
_REPEATED = re.compile(r"\d+_(\S.*)")
# What macOS, Windows and Synology leave behind, and all that is hidden.
_LITTER = re.compile(r"\..*|thumbs\.db|ehthumbs\.db|desktop\.ini|icon\r|__macosx|@eadir", re.IGNORECASE)
# Skipped files that a warning names.
_NAMED = 5


class Files(NamedTuple):
    """The files of a concept.

    Attributes:
        pictures: in the order of their names.
        masks, caption_files: of some of them, by picture.
        captions: that metadata gives, by picture.
        trigger: what captions call the thing, as kohya's folder says; empty where none does.
        skipped: names of files, and of folders of pictures, that are not used.
    """

    pictures: list[epath.Path]
    masks: dict[epath.Path, epath.Path]
    caption_files: dict[epath.Path, epath.Path]
    captions: dict[epath.Path, str]
    trigger: str
    skipped: list[str]


def read_folder(
    folder: str | os.PathLike[str],
    masks: str | os.PathLike[str] | None = None,
    captions: str | os.PathLike[str] | None = None,
) -> list[Picture]:
    """Reads all pictures of a folder, in the order of their names.

    Args:
        folder: of the pictures.
        masks: folder of the masks; left out, they are in FOLDER/masks (or in such a folder of kohya's folders), if it
            exists, or beside the pictures.
        captions: folder of the captions; left out, they are beside the pictures, or in metadata.

    Raises:
        InputError: no such folder, no picture in it, or a file that cannot be used; the message names it.
        UnavailableError: storage fails.
    """
    files = find_files(folder, masks, captions)
    if files.skipped:
        more = f" and {len(files.skipped) - _NAMED} more" if len(files.skipped) > _NAMED else ""
        logging.warning("%s: not used: %s%s", folder, ", ".join(files.skipped[:_NAMED]), more)
    pictures = []
    for file in files.pictures:
        caption = files.captions.get(file)
        if file in files.caption_files:
            caption = " ".join(read_words(files.caption_files[file]).split())
        picture = read_picture(file, files.masks.get(file), caption or None, files.trigger)
        # Of several folders, whose files may be called alike.
        pictures.append(replace(picture, name=str(file.relative_to(to_path(folder)))))
    return pictures


def find_files(
    folder: str | os.PathLike[str],
    masks: str | os.PathLike[str] | None = None,
    captions: str | os.PathLike[str] | None = None,
) -> Files:
    """Finds a concept's files without reading pictures; arguments and errors as for `read_folder`."""
    root = to_path(folder)
    inside = _list(root)
    if inside is None:
        raise InputError(f"{root}: no such folder of pictures")
    roots, trigger = _folders_of(root, inside)
    if roots != [root]:
        inside = [file for file in inside if file not in roots] + [file for one in roots for file in _list(one) or ()]
    metadata = {file: _metadata(file) for file in inside if file.name.lower() in METADATA}
    captioned = {file.parent / name: words for file, rows in metadata.items() for name, words in rows.items()}
    with storage_errors(root, "read"):
        candidates = [file for file in inside if file.suffix.lower() in ENDINGS and not file.is_dir()]
    # Metadata may name pictures in folders below.
    below = [file for file in captioned if file.parent not in roots]
    labels = [file for file in candidates if _without_mark(file.stem)]
    pictures = sorted({*candidates, *below} - {*labels})
    if not pictures:
        raise InputError(f"{root}: no pictures in it ({', '.join(ENDINGS)}){_hint(inside)}")
    if masks is not None:
        mask_folders = {to_path(masks): pictures}
    elif (root / "masks").exists():
        mask_folders = {root / "masks": pictures}
    else:
        mask_folders = {one / "masks": [file for file in pictures if file.parent == one] for one in roots}
    mask_files: dict[epath.Path, epath.Path] = {}
    for mask_folder, masked in mask_folders.items():
        in_mask_folder = _list(mask_folder)
        if in_mask_folder is not None:
            mask_files |= _masks_in(mask_folder, in_mask_folder, masked)
        elif masks is not None:
            raise InputError(f"{masks}: no such folder")
    if not mask_files:
        mask_files = _masks_beside(pictures, labels)
    texts = inside if captions is None else _list(to_path(captions))
    if texts is None:
        raise InputError(f"{captions}: no such folder")
    texts = [file for file in texts if file.suffix.lower() in CAPTION_ENDINGS]
    caption_files = _by_name(pictures, texts, beside=captions is None)
    used = {*pictures, *mask_files.values(), *caption_files.values(), *metadata}
    with storage_errors(root, "read"):
        folders = {file for file in inside if file not in used and file.is_dir()}
    known = used | folders
    skipped = [file.name for file in inside if file not in known]
    unused = folders - {file.parent for file in used}
    skipped += [f"{file.name}/" for file in unused if _has_pictures(file)]
    missing = [str(file.relative_to(root)) for file in captioned if file not in pictures]
    if missing:
        raise InputError(f"{root}: its metadata names {missing[0]}, which is not a picture in it")
    return Files(pictures, mask_files, caption_files, captioned, trigger, sorted(skipped))


def _list(folder: epath.Path) -> list[epath.Path] | None:
    """What is in a folder, but for FACTS and what systems leave there; None if there is no such folder."""
    inside = entries(folder)
    if inside is None:
        return None
    return [file for file in inside if file.name != FACTS and not _LITTER.fullmatch(file.name)]


def _folders_of(root: epath.Path, inside: Sequence[epath.Path]) -> tuple[list[epath.Path], str]:
    """The folders that hold the pictures, and what kohya's names of them call the thing.

    Raises:
        InputError: there are kohya's folders of several things, or pictures beside one.
    """
    own = _REPEATED.fullmatch(root.name)
    found = [(file, match[1].strip()) for file in inside if (match := _REPEATED.fullmatch(file.name))]
    with storage_errors(root, "read"):
        found = [(file, name) for file, name in found if file.is_dir()]
    loose = [file for file in inside if file.suffix.lower() in ENDINGS]
    if loose and not any(file.name.lower() in METADATA for file in inside):  # which may name pictures in both
        beside = next((file for file, _ in found if _has_pictures(file)), None)
        if beside is not None:
            raise InputError(
                f"{root}: it has pictures, such as {loose[0].name}, beside the folder {beside.name}: put all into one "
                "place, or name the folder"
            )
    if loose:
        return [root], own[1].strip() if own else ""
    names = sorted({name for _, name in found})
    if len(names) > 1:
        raise InputError(
            f"{root}: it has folders of several things, {', '.join(names)}: a concept is one thing, so name one of the "
            "folders"
        )
    return ([file for file, _ in found], names[0]) if found else ([root], "")


def _has_pictures(folder: epath.Path) -> bool:
    return any(file.suffix.lower() in ENDINGS for file in _list(folder) or ())


def _hint(inside: Sequence[epath.Path]) -> str:
    folders = [file.name for file in inside if not file.suffix][:_NAMED]
    return f"; if they are in one of its folders, {', '.join(folders)}, name that" if folders else ""


def _without_mark(stem: str) -> str:
    """The name of the picture that a mask beside it belongs to; empty for other files."""
    return stem.removesuffix(MASK_MARK) if stem.endswith(MASK_MARK) else ""


def _by_name(pictures: Sequence[epath.Path], files: Sequence[epath.Path], beside: bool) -> dict[epath.Path, epath.Path]:
    """Files by the picture that they are called by: rex.txt of rex.jpg, or rex.jpg.txt.

    Args:
        pictures: all of them.
        files: what may belong to them.
        beside: whether they lie beside their pictures, and not in a folder of their own.

    Raises:
        InputError: two pictures may be meant.
    """
    named = {(file.parent if beside else None, file.stem): file for file in sorted(files)}
    found: dict[epath.Path, epath.Path] = {}
    for picture in pictures:
        place = picture.parent if beside else None
        file = named.get((place, picture.name)) or named.get((place, picture.stem))
        if file is None:
            continue
        if file in found.values():
            raise InputError(f"{file}: two pictures are called {picture.stem!r}, and it may be of either: rename one")
        found[picture] = file
    return found


def _masks_beside(pictures: Sequence[epath.Path], labels: Sequence[epath.Path]) -> dict[epath.Path, epath.Path]:
    """Masks that lie beside their pictures, by picture.

    Raises:
        InputError: some pictures have one, and some none.
    """
    named = {(file.parent, _without_mark(file.stem)): file for file in labels}
    masks = {picture: mask for picture in pictures if (mask := named.get((picture.parent, picture.stem)))}
    if masks and len(masks) < len(pictures):
        without = next(picture for picture in pictures if picture not in masks)
        raise InputError(f"{without}: has no {without.stem}{MASK_MARK}.png, but other pictures have: give all or none")
    return masks


def _masks_in(
    folder: epath.Path, inside: Sequence[epath.Path], pictures: Sequence[epath.Path]
) -> dict[epath.Path, epath.Path]:
    """The masks of a folder by picture.

    Raises:
        InputError: one belongs to no picture, or a picture has none.
    """
    files = [file for file in inside if file.suffix.lower() in ENDINGS]
    masks = _by_name(pictures, files, beside=False)
    unmatched = sorted(set(files) - set(masks.values()))
    if unmatched:
        raise InputError(f"{unmatched[0]}: a mask of no picture: its name must be a picture's")
    missing = [picture for picture in pictures if picture not in masks]
    if missing:
        raise InputError(f"{folder}: no mask for the picture {missing[0].stem!r}: give one for each picture, or none")
    return masks


def _metadata(file: epath.Path) -> dict[str, str]:
    """Captions by the names of pictures.

    Raises:
        InputError: it is damaged, or names a file outside its folder.
        UnavailableError: storage fails.
    """
    words = read_words(file)
    found = {}
    try:
        if file.suffix.lower() == ".csv":
            rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(words)))
        else:
            rows = [json.loads(line) for line in words.splitlines() if line.strip()]
        for row in rows:
            caption = next((row[column] for column in CAPTION_COLUMNS if row.get(column)), "")
            name = row["file_name"]
            if ".." in name.split("/") or name.startswith("/"):
                raise InputError(f"{file}: it names {name}, which is not in its folder")
            found[name] = str(caption).strip()
    except (json.JSONDecodeError, csv.Error, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: each line needs a file_name, and may have a text ({error!r})") from error
    return found


def read_words(file: epath.Path) -> str:
    """Reads a text, in UTF-8 or, where a mark of it begins the file, UTF-16.

    Raises:
        InputError: it is in neither.
        UnavailableError: storage fails.
    """
    with storage_errors(file, "read"):
        data = file.read_bytes()
    try:
        words = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not in UTF-8 ({error.reason} at byte {error.start}); save it so") from error
    return words.replace("\r\n", "\n").strip()
