"""Commands start fast, and compile once."""

import os
import subprocess
import sys

import pytest

HEAVY = "jax", "flax", "diffusers", "transformers", "orbax", "tensorflow_datasets"


def run(program, **environment):
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize(
    "module", ["", ".train", ".sample", ".covariance", ".compile", ".evaluate", ".export", ".studio"]
)
def test_what_takes_seconds_to_import_is_imported_when_it_is_needed(module):
    loaded = run(f"import sys, perfusion_jax{module}; print(*(name for name in {HEAVY} if name in sys.modules))")
    assert loaded.split() == []


def test_what_the_package_offers_is_there():
    offered = run("import perfusion_jax; print(*(getattr(perfusion_jax, n).__name__ for n in perfusion_jax.__all__))")
    assert {"BaseModel", "generate", "load_whitening"} <= set(offered.split())


def test_the_next_command_compiles_nothing_that_one_before_has_compiled(tmp_path):
    program = (
        "from perfusion_jax.runtime.command_line import share_compiled_programs; share_compiled_programs(); "
        "import jax; print(jax.jit(lambda x: x * 2 + 1)(3.0))"
    )
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_COMPILATION_CACHE_DIR": ""}
    unset = f"import os; os.environ.pop('JAX_COMPILATION_CACHE_DIR'); {program}"
    kept = []
    for _ in range(2):
        run(unset, **environment)
        kept.append({file.name for file in (tmp_path / "cache" / "perfusion_jax").rglob("*-cache")})
    assert kept[0]
    assert kept[0] == kept[1]
    run(program, XDG_CACHE_HOME=str(tmp_path / "other"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "named"))
    assert not (tmp_path / "other").exists()
