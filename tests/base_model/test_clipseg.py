"""CLIPSeg against transformers' PyTorch CLIPSeg on the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import save_clipseg
from torch.nn import functional
from transformers import CLIPSegForImageSegmentation

from perfusion_jax import InputError
from perfusion_jax.base_model.clipseg import load_segmenter
from perfusion_jax.base_model.embedding import cubic_weights


@pytest.fixture(scope="module", params=[True, False], ids=["refined", "plain"])
def clipseg_folder(request, tmp_path_factory):
    return save_clipseg(tmp_path_factory.mktemp("clipseg") / "clipseg", refined=request.param)


@pytest.mark.parametrize("side", [32, 64, 48])
def test_logits_equal_pytorch_at_any_size(clipseg_folder, side):
    ours, theirs = load_segmenter(clipseg_folder), CLIPSegForImageSegmentation.from_pretrained(clipseg_folder).eval()
    ids = ours.tokenizer(["a dog", "the teddy bear on the beach"])
    pixels = np.random.default_rng(0).standard_normal((2, side, side, 3), dtype=np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long(), torch.from_numpy(pixels).permute(0, 3, 1, 2)).logits.numpy()
    logits = jax.jit(ours.logits)(ours.params, ids, pixels)
    # The plain kind's one up-scaling layer pads nothing either: sizes agree where the patches fill the picture.
    assert logits.shape == expected.shape
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_masks_are_soft_and_of_the_pictures_size(clipseg_folder):
    segmenter = load_segmenter(clipseg_folder)
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 40, 40, 3)), jnp.float32)
    masks = segmenter.masks(segmenter.params, segmenter.tokenizer(["a dog"] * 2), images)
    assert masks.shape == (2, 40, 40)
    assert 0 <= masks.min() < masks.max() <= 1


@pytest.mark.parametrize(("old", "new"), [(4, 8), (14, 22), (6, 3)])
def test_interpolation_equals_pytorch(old, new):
    grid = np.random.default_rng(0).standard_normal((old, old)).astype(np.float32)
    expected = functional.interpolate(torch.from_numpy(grid)[None, None], (new, new), mode="bicubic")[0, 0]
    weights = cubic_weights(old, new)
    np.testing.assert_allclose(weights @ grid @ weights.T, expected, atol=1e-5)


def test_another_model_is_refused(folder):
    with pytest.raises(InputError, match="CLIPTextModel, which is not supported"):
        load_segmenter(folder / "text_encoder")
    with pytest.raises(InputError, match="no such folder"):
        load_segmenter("/nowhere")
