"""What the README shows in Python runs as it stands."""

import re
from pathlib import Path

import numpy as np

import perfusion_jax
from perfusion_jax import load_whitening
from perfusion_jax.formats.concept_file import ConceptCard, save_concept

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run(tmp_path, monkeypatch):
    base = perfusion_jax.load_base_model("emoji")
    concept = base.new_concept("dog", load_whitening(base.covariance, base.model.context_width))
    card = ConceptCard("dog", "dog", "emoji", base.fingerprint, 0.6, 0.15, guidance_scale=2.5, step=0)
    save_concept(tmp_path / "runs" / "dog" / "concepts" / "dog.safetensors", concept, card)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(block, names)
    assert names["pictures"].shape == (4, 64, 64, 3)
    assert names["pictures"].dtype == np.uint8
    assert np.isfinite(names["prediction"]).all()
