"""What README and docs/ show in Python runs as it stands, each document by itself."""

import numpy as np
import pytest
from documents import DOCS, README, python_blocks

import perfusion_jax
from perfusion_jax import load_whitening
from perfusion_jax.formats.concept_file import ConceptCard, save_concept


@pytest.mark.parametrize("file", [file for file in (README, *DOCS) if python_blocks(file)], ids=lambda file: file.name)
def test_the_examples_run(file, tmp_path, monkeypatch):
    base = perfusion_jax.load_base_model("emoji")
    concept = base.new_concept("dog", load_whitening(base.covariance, base.model.context_width))
    card = ConceptCard("dog", "dog", "emoji", base.fingerprint, 0.6, 0.15, guidance_scale=2.5, step=0)
    save_concept(tmp_path / "runs" / "dog" / "concepts" / "dog.safetensors", concept, card)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in python_blocks(file):
        exec(block, names)
    if "pictures" in names:
        assert names["pictures"].shape == (4, 64, 64, 3)
        assert names["pictures"].dtype == np.uint8
    if "prediction" in names:
        assert np.isfinite(names["prediction"]).all()
    if "get_config" in names:
        perfusion_jax.config.check(names["get_config"]())


def test_the_documents_show_how_to_draw_and_what_is_underneath():
    text = {file.name: "".join(python_blocks(file)) for file in (README, *DOCS)}
    assert "pictures = perfusion_jax.generate(" in text["README.md"]
    assert "prediction = " in text["drawing.md"]
    assert all("def get_config(" in text[name] for name in ("README.md", "training.md"))
