"""The evaluator CLIP against transformers' PyTorch CLIP on the same random weights, and where it comes from."""

import shutil

import numpy as np
import pytest
import torch
from checkpoints import save_clip, save_dinov2
from fake_hub import reach, serve
from huggingface_hub import constants
from huggingface_hub.utils import reset_sessions
from torch.nn import functional
from transformers import CLIPModel, FlaxCLIPModel

from perfusion_jax import InputError
from perfusion_jax.base_model.clip import load_clip
from perfusion_jax.base_model.instance import load_instance_encoder
from perfusion_jax.base_model.source import find_cached_folder
from perfusion_jax.runtime.errors import UnavailableError

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


class TestHub:
    @pytest.fixture
    def repository(self, clip_folder, tmp_path):
        """One that holds weights for other libraries as well, as published ones do."""
        folder = shutil.copytree(clip_folder, tmp_path / "repository")
        for name in ("pytorch_model.bin", "open_clip_model.safetensors", "tf_model.h5", "flax_model.msgpack"):
            (folder / name).write_bytes(b"of another library")
        return folder

    @pytest.fixture
    def hub(self, repository, tmp_path, monkeypatch):
        with serve({"owner/clip": repository}) as server:
            reach(server, tmp_path / "cache", monkeypatch)
            yield server

    @pytest.mark.parametrize("kind", ["safetensors", "shards", "msgpack"])
    def test_only_what_is_read_is_fetched_and_then_the_cache_does(self, hub, repository, clip_folder, kind):
        weights = {"model.safetensors"}
        if kind != "safetensors":
            (repository / "model.safetensors").unlink()
        if kind == "shards":
            CLIPModel.from_pretrained(clip_folder).save_pretrained(repository, max_shard_size="50KB")
            weights = {file.name for file in repository.glob("model-*-of-*.safetensors")}
            assert len(weights) > 1
        elif kind == "msgpack":
            weights = {"flax_model.msgpack"}
            FlaxCLIPModel.from_pretrained(clip_folder, from_pt=True).save_pretrained(repository)
        assert find_cached_folder("owner/clip") is None
        expected = load_clip(clip_folder).texts(TEXTS)
        np.testing.assert_allclose(load_clip("owner/clip").texts(TEXTS), expected, atol=1e-6)
        assert {name for name in hub.fetched if not name.endswith((".json", ".txt"))} == weights
        hub.close()
        assert find_cached_folder("owner/clip") is not None
        np.testing.assert_allclose(load_clip("owner/clip").texts(TEXTS), expected, atol=1e-6)

    def test_an_instance_encoder_is_fetched(self, tmp_path, monkeypatch):
        folder = save_dinov2(tmp_path / "dinov2")
        with serve({"owner/dinov2": folder}) as hub:
            reach(hub, tmp_path / "cache", monkeypatch)
            pixels = np.random.default_rng(0).integers(0, 256, (2, 36, 36, 3)).astype(np.uint8)
            ours = load_instance_encoder("owner/dinov2").images(pixels)
        np.testing.assert_array_equal(ours, load_instance_encoder(folder).images(pixels))

    def test_pickles_alone_are_told_and_not_fetched(self, hub, repository):
        (repository / "model.safetensors").unlink()
        (repository / "flax_model.msgpack").unlink()
        with pytest.raises(InputError, match=r"owner/clip: no model\.safetensors or .*Pickled weights .*AutoModel"):
            load_clip("owner/clip")
        assert not {name for name in hub.fetched if name.endswith((".bin", ".h5")) or "open_clip" in name}
        assert find_cached_folder("owner/clip") is None

    def test_what_the_hub_refuses_is_told(self, hub, monkeypatch):
        with pytest.raises(InputError, match="owner/other: no such folder here, and no such model on the hub"):
            load_clip("owner/other")
        hub.gated.add("owner/clip")
        with pytest.raises(InputError, match="owner/clip: its licence must be accepted first"):
            load_clip("owner/clip")

    def test_without_network_it_is_told(self, tmp_path, hub, monkeypatch):
        hub.close()
        with pytest.raises(UnavailableError, match="owner/clip: not in the cache, and the hub cannot be reached"):
            load_clip("owner/clip")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        reset_sessions()
        try:
            with pytest.raises(InputError, match="owner/clip: not in the cache, and HF_HUB_OFFLINE forbids"):
                load_clip("owner/clip")
        finally:
            monkeypatch.undo()
            reset_sessions()
