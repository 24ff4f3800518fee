"""Reading weight files into Flax parameter trees, without PyTorch and without a second copy in memory.

A tree's expected paths, shapes and dtypes come from the Flax module; every tensor of the file must match one and every
one must be found. PyTorch's names and layouts are translated on the way (convolution kernels OIHW -> HWIO, linear
kernels [out, in] -> [in, out]).
"""

import json
import mmap
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import storage_errors

FlaxPath = tuple[str, ...]

# Names that checkpoints written before diffusers 0.17 use in the attention of the VAE.
_OLD_ATTENTION_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
# Buffers that some releases of transformers saved beside the weights.
_BUFFERS = ("position_ids",)


def torch_name(path: FlaxPath) -> str:
    """Returns PyTorch's name of a Flax parameter: `attn2/to_out_0/kernel` is `attn2.to_out.0.weight`."""
    *modules, leaf = path
    # `linear_1` of the time embedding is a name, not an index into a list.
    dotted = [m if m.startswith("linear_") else re.sub(r"_(\d+)$", r".\1", m) for m in modules]
    return ".".join([*dotted, {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)])


def _vae_attention_name(name: str) -> str:
    """The Flax VAE kept the old names of attention projections; PyTorch diffusers renamed them."""
    for new, old in _OLD_ATTENTION_NAMES.items():
        name = re.sub(rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.", name)
    return name


def to_flax_layout(tensor: np.ndarray, path: FlaxPath, rank: int) -> np.ndarray:
    """Returns PyTorch's tensor as the Flax parameter of that path and rank holds it, a view where it can be."""
    if path[-1] != "kernel":
        return tensor
    if tensor.ndim == 4 and rank == 2:  # old checkpoints have 1x1 convolutions in the attention of the VAE
        tensor = tensor[:, :, 0, 0]
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def torch_tensors(params: Mapping[str, Any], dtype: jnp.dtype) -> dict[str, np.ndarray]:
    """Returns a component's weights as PyTorch's diffusers and transformers name them and lay them out.

    Args:
        params: as of `read_tree`.
        dtype: of every tensor in the result; what does not fit into it becomes infinite.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in flatten_dict(params).items():
        with np.errstate(over="ignore"):  # the caller checks
            tensor = np.asarray(leaf).astype(dtype)
        if path[-1] == "kernel":
            tensor = tensor.transpose(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
        tensors[_vae_attention_name(torch_name(path))] = np.ascontiguousarray(tensor)
    return tensors


class Checkpoint(Protocol):
    """The tensors of one component's weights."""

    def names(self) -> set[str]:
        """Returns the name of every tensor."""

    def find(self, path: FlaxPath) -> str | None:
        """Returns the name under which the checkpoint holds a Flax parameter, or None."""

    def read(self, name: str, path: FlaxPath, rank: int) -> np.ndarray:
        """Reads a tensor, in the layout of a Flax parameter of that path and rank."""


class Safetensors:
    """The tensors of a single or sharded safetensors checkpoint, by PyTorch's names; a `Checkpoint`."""

    def __init__(self, files: list[Path]):
        self._file_of: dict[str, Path] = {}
        for file in files:
            with opened_safetensors(file) as opened:
                self._file_of.update(dict.fromkeys(opened.keys(), file))

    def names(self) -> set[str]:
        """Returns the name of every tensor."""
        return {name for name in self._file_of if not name.endswith(_BUFFERS)}

    def find(self, path: FlaxPath) -> str | None:
        """Returns the name under which the files hold a Flax parameter, or None."""
        name = torch_name(path)
        # transformers leaves the prefix out since 5.6.
        names = (name, _vae_attention_name(name), name.removeprefix("text_model."))
        return next((n for n in names if n in self._file_of), None)

    def read(self, name: str, path: FlaxPath, rank: int) -> np.ndarray:
        """Reads a tensor, in the layout of a Flax parameter of that path and rank."""
        # Opened anew for every tensor: pages of an open memory map count as ours until it is closed.
        with opened_safetensors(self._file_of[name]) as opened:
            return to_flax_layout(opened.get_tensor(name), path, rank)


@contextmanager
def opened_safetensors(file: Path) -> Iterator[Any]:
    """Opens a safetensors file, to read tensors as NumPy arrays.

    Raises:
        InputError: it is not there, or broken.
        UnavailableError: storage fails.
    """
    with storage_errors(file, "read"):
        file.open("rb").close()  # safetensors tells of a file that cannot be opened as one that is not there
        try:
            with safe_open(file, framework="numpy") as opened:
                yield opened
        except SafetensorError as error:
            raise InputError(
                f"{file}: not a complete safetensors file ({error}); it may be a broken download: fetch it again"
            ) from error


class _Msgpack:
    """The tensors of a Flax msgpack checkpoint, by path; they can only be read all at once, in the file's dtype."""

    def __init__(self, file: Path):
        with storage_errors(file, "read"):
            try:
                with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                    tree = serialization.msgpack_restore(buffer)  # type: ignore[arg-type]  # reads any buffer
                self._leaves: dict[str, np.ndarray] = {"/".join(p): leaf for p, leaf in flatten_dict(tree).items()}
            except (OSError, MemoryError):
                raise
            except Exception as error:  # msgpack and flax raise whatever the broken bytes lead them to
                raise InputError(f"{file}: not a complete Flax msgpack file ({error}); fetch it again") from error

    def names(self) -> set[str]:
        return {name for name in self._leaves if not name.endswith(_BUFFERS)}

    def find(self, path: FlaxPath) -> str | None:
        name = "/".join(path)
        return name if name in self._leaves else None

    def read(self, name: str, path: FlaxPath, rank: int) -> np.ndarray:
        return np.asarray(self._leaves.pop(name))  # each leaf is read once; do not keep it beside its converted copy


def find_checkpoint(folder: Path, variant: str | None) -> Checkpoint:
    """Opens the weights of one component.

    Args:
        folder: the component's folder, such as `.../unet`.
        variant: `fp16` for the files of that variant, or None for the plain ones. A component that has none of the
            variant, in a model where another has, is read from its plain files, as diffusers does.

    Raises:
        InputError: there are none that can be read safely.
        UnavailableError: storage fails.
    """
    found = _find_checkpoint(folder, variant)
    if found is None and variant and has_variant(folder.parent, variant):
        found = _find_checkpoint(folder, None)
    if found is None:
        raise InputError(_why_unreadable(folder, variant))
    return found


def has_variant(model: Path, variant: str) -> bool:
    """Whether a component of a model has weights of a variant."""
    return any(_variant_of(file.name) == variant for file in model.glob("*/*"))


def _variant_of(name: str) -> str | None:
    """`fp16` of `model.fp16.safetensors` or of one of its shards; None of plain weights, and of other files."""
    match = re.search(r"\.(\w+)(?:-\d{5}-of-\d{5})?\.(?:safetensors|msgpack)$", name)
    return match and match[1]


def _find_checkpoint(folder: Path, variant: str | None) -> Checkpoint | None:
    infix = f".{variant}" if variant else ""
    for stem in ("diffusion_pytorch_model", "model"):
        single = folder / f"{stem}{infix}.safetensors"
        if single.is_file():
            return Safetensors([single])
        for index in (
            folder / f"{stem}.safetensors.index{infix}.json",
            folder / f"{stem}{infix}.safetensors.index.json",
        ):
            if index.is_file():
                return Safetensors(_shards(index))
    for stem in ("diffusion_flax_model", "flax_model"):
        if (folder / f"{stem}{infix}.msgpack").is_file():
            return _Msgpack(folder / f"{stem}{infix}.msgpack")
    return None


def _shards(index: Path) -> list[Path]:
    with storage_errors(index, "read"):
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index}: not an index of safetensors shards ({error!r})") from error
    files = [index.parent / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{index}: the shards {missing} that it lists are not beside it; fetch them")
    return files


def _why_unreadable(folder: Path, variant: str | None) -> str:
    wanted = f"weights of variant {variant!r}" if variant else "weights"
    files = {file.name for file in folder.glob("*")}
    if variant and any(re.fullmatch(r"[a-z_]+(-\d{5}-of-\d{5})?\.(safetensors|msgpack)", name) for name in files):
        return f"{folder}: no {wanted}, but plain ones: leave the variant out"
    variants = sorted({found for name in files if (found := _variant_of(name))})
    if variants:
        return f"{folder}: no {wanted}, but some of variant {variants[0]!r}: ask for variant={variants[0]!r}"
    return (
        f"{folder}: no {wanted} (*.safetensors or *.msgpack). Pickled weights (*.bin, *.ckpt) can run code when read, "
        "and are never loaded or fetched; convert them once, where you trust them and have PyTorch: "
        'python -c "from diffusers import StableDiffusionPipeline as P; '
        f"P.from_pretrained('{folder.parent}').save_pretrained('converted', safe_serialization=True)\""
    )


def read_tree(
    checkpoint: Checkpoint,
    expected: Mapping[str, Any],
    dtype: jnp.dtype,
    component: str,
    wanted: Callable[[FlaxPath], bool] = lambda path: True,
) -> dict[str, Any]:
    """Reads a checkpoint into a parameter tree.

    Tensors are read, converted and put on the default device one at a time.

    Args:
        checkpoint: from `find_checkpoint`.
        expected: tree of `jax.ShapeDtypeStruct`, the module's parameters.
        dtype: dtype of every parameter in the result.
        component: what to call it in errors, such as `unet`.
        wanted: which parameters to read; the others are looked for, and left out of the result.

    Raises:
        InputError: tensors are missing, unexpected, of another shape, or not finite; all of them are named.
        UnavailableError: storage fails.
    """
    flat = flatten_dict(expected)
    names = {path: name for path in flat if (name := checkpoint.find(path)) is not None}
    missing = sorted(torch_name(path) for path in flat.keys() - names.keys())
    unexpected = sorted(checkpoint.names() - set(names.values()))
    problems = [f"missing: {missing}"] * bool(missing) + [f"unexpected: {unexpected}"] * bool(unexpected)
    if problems:
        raise InputError(f"{component}: the weights do not fit its config; " + "; ".join(problems))

    leaves: dict[FlaxPath, jax.Array] = {}
    for path, name in names.items():
        if not wanted(path):
            continue
        tensor = checkpoint.read(name, path, len(flat[path].shape))
        if tensor.shape != flat[path].shape:
            problems.append(f"{name} has shape {tensor.shape}, its config asks for {flat[path].shape}")
            continue
        # One pass converts and lays out anew; jax takes that array as it is. Only one tensor is ever in memory twice.
        converted = tensor.astype(dtype, order="C")
        if not np.isfinite(converted).all():
            problems.append(f"{name} has values that are not finite")
        leaves[path] = jax.device_put(converted)  # `jnp.asarray` would compile a program for every shape
    if problems:
        raise InputError(f"{component}: " + "; ".join(problems))
    return unflatten_dict(leaves)
