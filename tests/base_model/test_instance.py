"""The instance encoder against transformers' PyTorch ViT on the same random weights."""

import numpy as np
import pytest
import torch
from checkpoints import save_clip, save_vit
from torch.nn import functional
from transformers import ViTModel

from perfusion_jax import InputError
from perfusion_jax.base_model.embedding import embed_all
from perfusion_jax.base_model.instance import load_instance_encoder


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    return save_vit(tmp_path_factory.mktemp("vit") / "vit")


def test_embeddings_equal_pytorch(vit_folder):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    normalised = (pixels / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.3, 0.4, 0.5])
    with torch.no_grad():
        theirs = ViTModel.from_pretrained(vit_folder, add_pooling_layer=False).eval()(
            torch.from_numpy(normalised).permute(0, 3, 1, 2).float()
        )
    expected = functional.normalize(theirs.last_hidden_state[:, 0]).numpy()
    np.testing.assert_allclose(load_instance_encoder(vit_folder).images(pixels), expected, atol=1e-5)


def test_pictures_of_any_size_are_taken(vit_folder):
    encoder = load_instance_encoder(vit_folder)
    small = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    large = np.kron(small, np.ones((1, 16, 16, 1))).astype(np.uint8)
    embeddings = encoder.images(large)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert (embeddings * encoder.images(np.ascontiguousarray(255 - large))).sum(1).max() < 1 - 1e-3


@pytest.mark.parametrize("count", [1, 5, 64, 70])
def test_any_number_is_embedded_in_few_shapes(count):
    shapes = set()

    def embed(params, batch):
        shapes.add(len(batch))
        return params * batch

    inputs = np.arange(2.0 * count).reshape(count, 2)
    np.testing.assert_array_equal(embed_all(embed, 3, inputs), 3 * inputs)
    assert shapes <= {1, 2, 4, 8, 16, 32, 64}


def test_a_folder_that_is_no_vit_is_refused(tmp_path_factory):
    with pytest.raises(InputError, match="CLIPModel, which is not supported"):
        load_instance_encoder(save_clip(tmp_path_factory.mktemp("clip") / "clip"))
