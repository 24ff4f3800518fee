"""The command that exports."""

import subprocess
import sys

import jax.numpy as jnp
import pytest
from PIL import Image
from safetensors.numpy import load_file

from perfusion_jax.formats.concept_file import ConceptCard, save_concept


@pytest.fixture(scope="module")
def concept_file(small_base, tmp_path_factory):
    concept = small_base.new_concept("dog", jnp.eye(small_base.model.context_width))
    card = ConceptCard("rex", "dog", "small", small_base.fingerprint, 0.6, 0.15, 6.0, 1)
    file = tmp_path_factory.mktemp("concept") / "rex.safetensors"
    save_concept(file, concept, card)
    return file


def run_export(*arguments):
    command = [sys.executable, "-m", "perfusion_jax.export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_lora_and_what_is_wrong_with_it(small_folder, concept_file, tmp_path):
    out = tmp_path / "out"
    given = (f"--base={small_folder}", f"--concept={concept_file}")
    done = run_export(*given, "--to=lora", f"--out={out}", "--dtype=float32", "--strength=0.5")
    assert done.returncode == 0, done.stderr
    assert [line.rpartition("/")[2] for line in done.stdout.splitlines()] == [
        "rex_lora.safetensors",
        "rex_word.safetensors",
        "README.md",
    ]
    assert "| rex | dog | 1 | 0.5 | not said |" in (out / "README.md").read_text()
    assert all(key.startswith("lora_unet_") for key in load_file(out / "rex_lora.safetensors"))
    fitted = run_export(*given, "--to=lora", f"--out={tmp_path / 'fitted'}", "--fit_scale", "--examples=2")
    assert fitted.returncode == 0, fitted.stderr
    # It has learnt nothing, and baking it adds nothing.
    assert "| rex | dog | 1 | 1 | not said |" in (card := (tmp_path / "fitted" / "README.md").read_text())
    for number, prompt in enumerate(("a photo of a <rex> on the beach", "a photo of a <rex> in the snow"), 1):
        with Image.open(tmp_path / "fitted" / f"example_{number}.png") as picture:
            assert picture.size == (32, 32)
        assert f"![{prompt}](example_{number}.png)" in card
        assert f'- text: "{prompt}"\n  output:\n    url: example_{number}.png' in card
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "else.txt").write_text("")
    for arguments, message in (
        ((*given, "--to=lora", f"--out={mine}"), f"error: {mine}: holds else.txt, which is no part of an export"),
        ((*given, "--to=lora", f"--out={out}2", "--strength=strong"), "error: --strength=strong: not numbers"),
        ((*given, "--to=lora", f"--out={out}2", "--strength=1", "--fit_scale"), "error: --strength and --fit_scale"),
        ((*given, f"--out={out}2"), "--to"),
    ):
        failed = run_export(*arguments)
        assert failed.returncode == 2, failed.stderr
        assert message in failed.stderr
        assert "Traceback" not in failed.stderr
        assert not (tmp_path / "out2").exists()
