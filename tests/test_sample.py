"""The command line that draws."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from perfusion_jax import InputError
from perfusion_jax.formats.concept_file import ConceptCard, save_concept
from perfusion_jax.sample import per_concept


@pytest.fixture
def concept_file(sd1_base, tmp_path):
    card = ConceptCard("rex", "dog", "small", sd1_base.fingerprint, bias=0.6, temperature=0.15, step=1)
    save_concept(tmp_path / "rex.safetensors", sd1_base.new_concept("dog", jnp.eye(sd1_base.context_width)), card)
    return tmp_path / "rex.safetensors"


def run(folder, *arguments):
    command = [
        sys.executable,
        "-m",
        "perfusion_jax.sample",
        f"--base={folder}",
        "--steps=2",
        "--height=32",
        "--width=32",
    ]
    root = Path(__file__).parents[1]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=root, check=False)


def test_draws_a_concept_into_one_grid(sd1_folder, concept_file, tmp_path):
    out = tmp_path / "new" / "rex.png"
    done = run(sd1_folder, f"--concept={concept_file}", "--prompt=a photo of a <rex>", f"--out={out}", "--num_images=3")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout
    with Image.open(out) as picture:
        assert np.asarray(picture).shape == (2 * 128 + 4, 2 * 128 + 4, 3)


def test_a_prompt_without_the_concept_is_a_warning_and_bad_input_one_line(sd1_folder, concept_file, tmp_path):
    out = tmp_path / "rex.png"
    done = run(sd1_folder, f"--concept={concept_file}", "--prompt=a dog", f"--out={out}", "--num_images=1")
    assert "warning: the prompt does not name <rex>" in done.stdout
    with Image.open(out) as picture:
        assert picture.size == (32, 32)
    done = run(sd1_folder, f"--concept={concept_file}", "--prompt=a <rex>", f"--out={out}", "--bias=0.5,0.6")
    assert done.returncode != 0
    assert (
        done.stderr.strip().splitlines()[-1]
        == "error: --bias has 2 values: give one, or one for each of the 1 concepts"
    )


def test_values_of_a_gate():
    assert per_concept("bias", [], [0.6, 0.7]) == [0.6, 0.7]
    assert per_concept("bias", ["0.5"], [0.6, 0.7]) == [0.5, 0.5]
    assert per_concept("bias", ["0.5", "0.4"], [0.6, 0.7]) == [0.5, 0.4]
    with pytest.raises(InputError, match="--bias=high: not numbers"):
        per_concept("bias", ["high"], [0.6])
