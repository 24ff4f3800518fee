"""What all tests share: compiled programs, and small checkpoints of random weights.

These have the layout of Stable Diffusion and are saved by PyTorch diffusers and transformers.
"""

import os
import tempfile
from pathlib import Path

import fsspec
import jax
import pytest
from checkpoints import LAYOUTS, save_checkpoint, save_full_size
from etils.epath.backend import fsspec_backend
from huggingface_hub import constants

from perfusion_jax import load_base_model

CACHE = "JAX_COMPILATION_CACHE_DIR"
# Files that take the longest begin first, so that no worker of `-n 2 --dist loadfile` is left with one at the end.
LONG = ("test_fleet.py", "test_train.py", "test_processes.py")
OPTIMISED = "--xla_backend_optimization_level="


def pytest_configure(config):
    """Makes compiling cheap, which is most of what tests do, in this process and in those that it starts.

    What one has compiled is not compiled again by another, until pytest ends; and LLVM optimises programs, which take a
    few steps each, a little and not as much as it can (XLA_FLAGS=--xla_backend_optimization_level=3).
    """
    if OPTIMISED not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {OPTIMISED}1".strip()
    if CACHE not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="compiled")
        config.add_cleanup(folder.cleanup)
        os.environ[CACHE] = folder.name
        jax.config.update("jax_compilation_cache_dir", folder.name)
    # Encoders in a developer's cache of the hub would judge by default.
    hub = tempfile.TemporaryDirectory(prefix="hub")
    config.add_cleanup(hub.cleanup)
    os.environ["HF_HOME"], constants.HF_HUB_CACHE = hub.name, str(Path(hub.name) / "hub")
    os.environ.pop("HF_HUB_CACHE", None)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture
def bucket(monkeypatch) -> str:
    """The address of an empty bucket, in memory."""
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(memory, "store", {})
    monkeypatch.setattr(memory, "pseudo_dirs", [""])
    monkeypatch.setattr(type(fsspec_backend), "fs", lambda *_: memory)
    return "gs://bucket"


# The other two and the embedded model have all that is in the layout of Stable Diffusion 2, if not together.
QUICK = ("sd1", "sdxl")


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(LAYOUTS)],
)
def folder(request, tmp_path_factory) -> Path:
    """A small checkpoint; tests that use it run for each layout."""
    return save_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("sd1"), "sd1")


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("small"), "sd1", small=True)


@pytest.fixture(scope="session")
def large_folder(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("large"), "sd1", large=True)


@pytest.fixture(scope="session")
def full_size_folder(tmp_path_factory) -> Path:
    return save_full_size(tmp_path_factory.mktemp("full_size"))


@pytest.fixture(scope="session")
def base(folder):
    return load_base_model(folder)


@pytest.fixture(scope="session")
def sd1_base(sd1_folder):
    return load_base_model(sd1_folder)


@pytest.fixture(scope="session")
def small_base(small_folder):
    return load_base_model(small_folder)
