"""The evaluator CLIP against transformers' PyTorch CLIP on the same random weights."""

import numpy as np
import pytest
import torch
from checkpoints import save_clip
from torch.nn import functional
from transformers import CLIPModel

from perfusion_jax import InputError
from perfusion_jax.base_model.clip import load_clip

TEXTS = ["a photo of a dog", "the teddy bear on the beach", ""]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip") / "clip")


def test_embeddings_equal_pytorch(clip_folder):
    ours = load_clip(clip_folder)
    theirs = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    normalised = (pixels / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.3, 0.4, 0.5])
    ids, mask = ours.tokenizer.captions(TEXTS)
    with torch.no_grad():
        images = theirs.get_image_features(torch.from_numpy(normalised).permute(0, 3, 1, 2).float())
        texts = theirs.get_text_features(torch.from_numpy(ids).long(), torch.from_numpy(mask))
    np.testing.assert_allclose(ours.images(pixels), functional.normalize(images).numpy(), atol=1e-5)
    np.testing.assert_allclose(ours.texts(TEXTS), functional.normalize(texts).numpy(), atol=1e-5)


def test_pictures_of_any_size_and_number(clip_folder):
    clip = load_clip(clip_folder)
    large = np.kron(np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
    embeddings = clip.images(large)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(embeddings[-1:], clip.images(large[-1:]), atol=1e-5)


def test_a_folder_that_is_no_clip_is_refused(tmp_path, folder, tmp_path_factory):
    with pytest.raises(InputError, match=r"config.json: missing"):
        load_clip(tmp_path)
    clip_folder = save_clip(tmp_path_factory.mktemp("clip") / "clip")
    (clip_folder / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0]}')
    with pytest.raises(InputError, match=r"preprocessor_config.json: image_std is missing"):
        load_clip(clip_folder)
    with pytest.raises(InputError, match="CLIPTextModel, which is not supported"):
        load_clip(folder / "text_encoder")
