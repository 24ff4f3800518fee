"""Fetch the drawings from the npm registry into the cache: `python -m perfusion_jax.emoji_world.fetch`.

Needs the `npm` command, about 110 MB of disk, and no account. Running it again does nothing.
"""

import os
import pathlib
import subprocess
import tarfile
import tempfile

from perfusion_jax.emoji_world import catalogue


def cache_directory() -> pathlib.Path:
    """Folder of everything that pretraining fetches or computes; the variable EMOJI_WORLD_CACHE moves it."""
    default = pathlib.Path.home() / ".cache" / "perfusion_jax" / "emoji_world"
    return pathlib.Path(os.environ.get("EMOJI_WORLD_CACHE", default))


def package_directory(vendor: str) -> pathlib.Path:
    """Folder into which the npm package of `vendor` is unpacked."""
    return cache_directory() / "drawings" / vendor


def fetch(vendor: str) -> None:
    """Download and unpack one vendor's package, unless it is there already."""
    target = package_directory(vendor)
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        subprocess.run(["npm", "pack", "--silent", catalogue.DRAWING_PACKAGES[vendor]], cwd=folder, check=True)
        (archive,) = pathlib.Path(folder).glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (pathlib.Path(folder) / "package").rename(target)


def main() -> None:
    """Fetches all vendors' drawings."""
    for vendor in catalogue.DRAWING_PACKAGES:
        fetch(vendor)
        print(f"{vendor}: {package_directory(vendor)}")


if __name__ == "__main__":
    main()
