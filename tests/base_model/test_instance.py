"""The instance encoder against transformers' PyTorch ViT on the same random weights."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import save_clip, save_dinov2, save_vit
from torch.nn import functional
from transformers import BitImageProcessor, Dinov2Model, ViTModel

from perfusion_jax import InputError
from perfusion_jax.base_model.embedding import embed_all, fit_pictures
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


def dinov2_in_torch(folder, normalised):
    with torch.no_grad():
        output = Dinov2Model.from_pretrained(folder).eval()(normalised)
    return functional.normalize(output.last_hidden_state[:, 0]).numpy()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_size": 32},  # nothing is interpolated
        {"image_size": 20},
        {"layerscale_value": 0.5},
        {"use_swiglu_ffn": True},
        {"mlp_ratio": 2.0},
        {"qkv_bias": False, "use_mask_token": False},
    ],
    ids=str,
)
def test_dinov2_equals_pytorch_on_the_middle_of_pictures(tmp_path, options):
    """The position embeddings of 10 x 10 tiles, or as the options say, are interpolated to 8 x 8."""
    folder = save_dinov2(tmp_path, **options)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 36, 36, 3)).astype(np.uint8)
    normalised = (pixels / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.3, 0.4, 0.5])
    middle = torch.from_numpy(normalised[:, 2:34, 2:34]).permute(0, 3, 1, 2).float()
    np.testing.assert_allclose(load_instance_encoder(folder).images(pixels), dinov2_in_torch(folder, middle), atol=2e-5)


def test_a_vit_for_pictures_of_another_size_equals_pytorch(tmp_path):
    folder = save_vit(tmp_path)
    edit_preprocessor(folder, size=48)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3)).astype(np.uint8)
    normalised = (pixels / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.3, 0.4, 0.5])
    with torch.no_grad():
        theirs = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()(
            torch.from_numpy(normalised).permute(0, 3, 1, 2).float(), interpolate_pos_encoding=True
        )
    expected = functional.normalize(theirs.last_hidden_state[:, 0]).numpy()
    np.testing.assert_allclose(load_instance_encoder(folder).images(pixels), expected, atol=1e-5)


def edit_preprocessor(folder, **changes):
    """Changes keys of a preprocessor's file; None takes one out."""
    file = folder / "preprocessor_config.json"
    changed = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


@pytest.mark.parametrize("tile", [8, 1], ids=["smaller", "larger"])
@pytest.mark.parametrize("changes", [{}, {"resample": 2}, {"resample": 1}, {"do_center_crop": None}], ids=str)
def test_pictures_are_resized_and_cut_as_by_the_preprocessor(tmp_path, changes, tile):
    folder = save_dinov2(tmp_path)
    edit_preprocessor(folder, **changes)
    noise = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3))
    pixels = np.kron(noise, np.ones((1, tile, tile, 1))).astype(np.uint8)
    processor = BitImageProcessor.from_pretrained(folder)
    normalised = processor(list(pixels), return_tensors="pt").pixel_values
    theirs = dinov2_in_torch(folder, normalised)
    encoder = load_instance_encoder(folder)
    scale = encoder.mean, encoder.deviation, encoder.scaled, encoder.method
    fitted = fit_pictures(jnp.asarray(pixels, jnp.float32) / 127.5 - 1, 32, *scale)
    # Pillow rounds to bytes after each axis; the smallest deviation is 0.3.
    np.testing.assert_allclose(fitted, normalised.permute(0, 2, 3, 1), atol=2 / 255 / 0.3)
    ours = encoder.images(pixels)
    assert (ours * theirs).sum(1).min() > 0.9999
    assert (ours * theirs[::-1]).sum(1).max() < 0.999


def test_pictures_that_make_no_whole_tiles_are_refused(tmp_path):
    file = save_dinov2(tmp_path) / "preprocessor_config.json"
    file.write_text(file.read_text().replace("32", "30"))
    with pytest.raises(InputError, match=r"preprocessor_config\.json: pictures of 30 pixels, .* tiles of 4 pixels"):
        load_instance_encoder(tmp_path)


def test_a_filter_that_jax_has_not_is_refused(tmp_path):
    folder = save_dinov2(tmp_path)
    edit_preprocessor(folder, resample=5)
    with pytest.raises(InputError, match=r"preprocessor_config\.json: resample is 5; it must be one of 0, 1, 2, 3"):
        load_instance_encoder(folder)


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
    assert shapes == {1: {1}, 5: {8}, 64: {64}, 70: {64, 8}}[count]


def test_a_folder_that_is_no_vit_is_refused(tmp_path_factory):
    with pytest.raises(InputError, match="CLIPModel, which is not supported"):
        load_instance_encoder(save_clip(tmp_path_factory.mktemp("clip") / "clip"))
