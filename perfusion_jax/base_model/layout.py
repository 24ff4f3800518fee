"""Where the configs and the weights of a base model come from: a folder in the diffusers layout, or a single file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from perfusion_jax.base_model.other_files import SUFFIXES
from perfusion_jax.base_model.single_file import SingleFile, open_single_file
from perfusion_jax.base_model.source import find_folder, read_config, read_index
from perfusion_jax.base_model.weights import Checkpoint, find_checkpoint
from perfusion_jax.runtime import shipped
from perfusion_jax.runtime.errors import InputError
from perfusion_jax.runtime.files import at_home

# A folder may hold C beside the diffusers layout, which passes over it.
COVARIANCE = "covariance.npz"


class Vocabulary(NamedTuple):
    """What a tokeniser is made of.

    Attributes:
        folder: as `text.load_tokenizer` reads it.
        padding: the token behind the end of a prompt, or None for the one that the folder says.
    """

    folder: Path
    padding: str | None = None


class Layout(Protocol):
    """A base model on this machine. Components are `unet`, `vae`, `text_encoder`, `scheduler`, and for some others."""

    @property
    def path(self) -> Path:
        """The folder or the file."""

    @property
    def covariance(self) -> Path | None:
        """The file of C that came with the model, if one did."""

    def index(self) -> dict[str, Any]:
        """Returns what the model is made of; see `source.read_index`."""

    def config_name(self, component: str) -> str:
        """What to call a component's config in errors."""

    def weights_name(self, component: str) -> str:
        """What to call a component's weights in errors."""

    def config(self, component: str, *classes: str) -> dict[str, Any]:
        """Returns a component's config, which must be of one of these classes; see `source.read_config`."""

    def vocabulary(self, component: str) -> Vocabulary:
        """Returns what a tokeniser, `tokenizer` or `tokenizer_2`, is made of."""

    def checkpoint(self, component: str) -> Checkpoint:
        """Returns a component's weights; see `weights.find_checkpoint`."""


@dataclass(frozen=True)
class FolderLayout:
    """A folder in the diffusers layout; a `Layout`.

    Attributes:
        path: the folder.
        variant: which weight files are taken.
    """

    path: Path
    variant: str | None = None

    @property
    def covariance(self) -> Path | None:
        """The file of C in the folder."""
        file = self.path / COVARIANCE
        return file if file.is_file() else None

    def index(self) -> dict[str, Any]:
        """Reads the folder's model_index.json."""
        return read_index(self.path)

    def config_name(self, component: str) -> str:
        """The config's file."""
        return str(self._config_file(component))

    def weights_name(self, component: str) -> str:
        """The component's folder."""
        return str(self.path / component)

    def config(self, component: str, *classes: str) -> dict[str, Any]:
        """Reads the config's file."""
        return read_config(self._config_file(component), *classes)

    def vocabulary(self, component: str) -> Vocabulary:
        """The tokeniser's folder."""
        return Vocabulary(self.path / component)

    def checkpoint(self, component: str) -> Checkpoint:
        """Opens the weights in the component's folder."""
        return find_checkpoint(self.path / component, self.variant)

    def _config_file(self, component: str) -> Path:
        return self.path / component / ("scheduler_config.json" if component == "scheduler" else "config.json")


@dataclass(frozen=True)
class FileLayout:
    """A single file; a `Layout`.

    Attributes:
        opened: the file.
    """

    opened: SingleFile

    @property
    def path(self) -> Path:
        """The file."""
        return self.opened.file

    @property
    def covariance(self) -> Path | None:
        """None: a file has no room for it."""
        return None

    def index(self) -> dict[str, Any]:
        """Returns what was deduced."""
        return self.opened.index

    def config_name(self, component: str) -> str:
        """The file, and the component."""
        file = self.opened.vae_file if component == "vae" else None
        return f"{file or self.path}: {component}"

    def weights_name(self, component: str) -> str:
        """The same."""
        return self.config_name(component)

    def config(self, component: str, *classes: str) -> dict[str, Any]:
        """Returns what was deduced, which is of a class that can be run."""
        return self.opened.configs[component]

    def vocabulary(self, component: str) -> Vocabulary:
        """CLIP's vocabulary, which all these models have; OpenCLIP pads with its first word, id 0."""
        encoder = self.opened.configs[component.replace("tokenizer", "text_encoder")]
        return Vocabulary(shipped.CLIP_VOCABULARY, "!" if encoder["hidden_act"] == "gelu" else None)

    def checkpoint(self, component: str) -> Checkpoint:
        """Returns the component's tensors in the file."""
        return self.opened.checkpoint(component)


def find_layout(source: str, revision: str | None, variant: str | None = None, weights: bool = True) -> Layout:
    """Finds a base model; downloads it when `source` is a hub id that is not cached.

    Args:
        source: a single file, or what `source.find_folder` takes.
        revision, variant, weights: as for `source.find_folder`; a single file has neither of the first two.

    Raises:
        InputError: there is no such model, or it cannot be run.
        UnavailableError: the hub cannot be reached, or storage fails.
    """
    file = Path(at_home(source))
    is_file = file.suffix.lower() in SUFFIXES or file.is_file()
    if source == "emoji" or file.is_dir() or not is_file:
        return FolderLayout(find_folder(source, revision, variant, weights), variant)
    opened = open_single_file(file)
    if revision or variant:
        raise InputError(f"{file}: a single file has no revision {revision!r} or variant {variant!r}: leave it out")
    return FileLayout(opened)
