"""The frozen model against PyTorch diffusers and transformers, on the same weights."""

import gc
import shutil
import weakref
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_text
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.numpy import load_file, save_file

from perfusion_jax import Gate, insert, keys_values, load_base_model, remove
from perfusion_jax.base_model import Context, load_architecture

TOLERANCE = 1e-4  # of the largest output


def relative_error(ours, reference):
    reference = np.asarray(reference)
    return np.abs(np.asarray(ours, np.float32) - reference).max() / np.abs(reference).max()


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    return tensor.permute(0, 2, 3, 1).numpy()


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def compare_with_torch(folder, base, size: int, tolerance: float = TOLERANCE):
    """Compares text encoder, UNet and both ways of the VAE on a picture of `size` pixels."""
    rng = np.random.default_rng(0)
    ids = base.model.tokenizer(["a photo of a dog", "the teddy bear on the beach"])
    sizes = np.array([[512, 400, 0, 20, 256, 256], [100, 90, 5, 0, 64, 64]], np.float32)
    with torch.no_grad():
        theirs = torch_text.encode(folder, ids, sizes)
    encodings = base.model.encode(base.params, ids)
    assert relative_error(encodings.tokens, theirs.tokens) < tolerance
    if theirs.added:
        assert relative_error(encodings.pooled, theirs.added["added_cond_kwargs"]["text_embeds"]) < tolerance

    side = size // base.model.vae_factor
    latents = rng.standard_normal((2, side, side, base.model.latent_channels), dtype=np.float32)
    timesteps = np.array([3, 700], np.int32)
    with torch.no_grad():
        unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
        expected = unet(channels_first(latents), torch.from_numpy(timesteps), theirs.tokens, **theirs.added).sample
    del unet
    fed = base.model.read(base.params["unet"], encodings, jnp.asarray(sizes))
    ours = jax.jit(base.model.denoise)(base.params["unet"], latents, timesteps, fed)
    assert relative_error(ours, channels_last(expected)) < tolerance

    images = rng.uniform(-1, 1, (1, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
        posterior = vae.encode(channels_first(images)).latent_dist
        decoded = vae.decode(channels_first(latents[:1]) / vae.config.scaling_factor).sample
    scale = vae.config.scaling_factor
    encoded = base.model.encode_image(base.params["vae"], jnp.asarray(images))
    assert relative_error(encoded.mean, channels_last(posterior.mean) * scale) < tolerance
    assert relative_error(encoded.std, channels_last(posterior.std) * scale) < tolerance
    assert (
        relative_error(base.model.decode_latent(base.params["vae"], jnp.asarray(latents[:1])), channels_last(decoded))
        < tolerance
    )


def test_equals_pytorch(folder, base):
    compare_with_torch(folder, base, size=32)


@pytest.mark.slow
def test_a_unet_on_a_grid_of_any_size_equals_pytorch(folder, base):
    rng = np.random.default_rng(0)
    encodings = rng.standard_normal((1, 16, base.model.context_width), dtype=np.float32)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    for size in ((15, 18), (9, 5)):
        latents = rng.standard_normal((1, *size, base.model.latent_channels), dtype=np.float32)
        with torch.no_grad():
            expected = unet(channels_first(latents), torch.tensor([300]), torch.from_numpy(encodings)).sample
        inputs = (base.params["unet"], latents, jnp.array([300]), keys_values(base.params["unet"], encodings))
        assert relative_error(jax.jit(base.model.denoise)(*inputs), channels_last(expected)) < TOLERANCE
        prediction, maps = jax.jit(base.model.attention_maps)(*inputs)
        assert relative_error(prediction, channels_last(expected)) < TOLERANCE
        assert maps.shape == (1, *size, 16)
        np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-4)


@pytest.mark.slow
def test_full_stable_diffusion_15_equals_pytorch(full_size_folder):
    base = load_base_model(full_size_folder)
    concept = base.new_concept("teddy bear", jnp.eye(base.model.context_width))
    edited = insert(base.params["unet"], concept, Gate(bias=0.6, temperature=0.15))
    assert len(concept.value_outputs) == 16
    assert sum(output.size for output in concept.value_outputs.values()) == 12_480
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (remove(edited), base.params["unet"])), strict=True))
    compare_with_torch(full_size_folder, base, size=256)


def test_group_norm_before_attention_has_pytorchs_epsilon(sd1_folder, tmp_path):
    """With activations as small as this, an epsilon of 1e-5 in place of 1e-6 changes the output by more than a half."""
    folder = shutil.copytree(sd1_folder, tmp_path / "small")
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name in ("conv_in.weight", "conv_in.bias", "down_blocks.0.resnets.0.conv2.weight"):
        tensors[name] *= 1e-3
    tensors["down_blocks.0.resnets.0.conv2.bias"] *= 1e-3
    save_file(tensors, file)
    compare_with_torch(folder, load_base_model(folder), size=32)


def test_pictures_need_not_be_square(base):
    distribution = base.model.encode_image(base.params["vae"], jnp.zeros((1, 16, 24, 3)))
    assert distribution.mean.shape == (1, 8, 12, base.model.latent_channels)
    assert base.model.decode_latent(base.params["vae"], distribution.mean).shape == (1, 16, 24, 3)


def test_latents_as_wide_as_they_have_channels_are_not_mistaken_for_channels_first(base):
    latents = jax.random.normal(jax.random.key(0), (1, 6, 4, 4))
    wide = jnp.concatenate([latents, jnp.zeros((1, 6, 8, 4))], axis=2)
    assert base.model.decode_latent(base.params["vae"], latents).shape == (1, 12, 8, 3)
    assert base.model.decode_latent(base.params["vae"], wide).shape == (1, 12, 24, 3)


def test_the_unet_never_reads_its_own_text_projections(sd1_base):
    rng = np.random.default_rng(1)
    encodings = jnp.asarray(rng.standard_normal((1, 16, sd1_base.model.context_width)), jnp.float32)
    latents = jnp.asarray(rng.standard_normal((1, 16, 16, 4)), jnp.float32)
    fed = Context(keys_values(sd1_base.params["unet"], encodings))
    denoise = jax.jit(sd1_base.model.denoise)
    expected = denoise(sd1_base.params["unet"], latents, jnp.array([5]), fed)

    def poison(path, leaf):
        names = [entry.key for entry in path]
        return leaf * jnp.nan if "attn2" in names and ("to_k" in names or "to_v" in names) else leaf

    poisoned = jax.tree_util.tree_map_with_path(poison, sd1_base.params["unet"])
    assert not np.isfinite(
        keys_values(poisoned, encodings)["mid_block/attentions_0/transformer_blocks_0/attn2"].key
    ).any()
    np.testing.assert_array_equal(denoise(poisoned, latents, jnp.array([5]), fed), expected)


def test_missing_keys_and_values_are_named(sd1_base):
    fed = Context(keys_values(sd1_base.params["unet"], jnp.zeros((1, 16, sd1_base.model.context_width))))
    fed.layers.pop("mid_block/attentions_0/transformer_blocks_0/attn2")
    with pytest.raises(ValueError, match="mid_block/attentions_0"):
        sd1_base.model.denoise(sd1_base.params["unet"], jnp.zeros((1, 16, 16, 4)), jnp.array([5]), fed)


@pytest.mark.slow
def test_bfloat16_is_close_to_float32(sd1_folder, sd1_base):
    half = load_base_model(sd1_folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    ids = sd1_base.model.tokenizer(["a photo of a dog"])
    latents = jax.random.normal(jax.random.key(0), (1, 16, 16, 4))
    images = jax.random.uniform(jax.random.key(1), (1, 32, 32, 3), minval=-1)

    def outputs(base):
        return jax.jit(partial(compute, base.model))(base.params)

    def compute(model, params):
        encodings = model.encode(params, ids).tokens
        fed = Context(keys_values(params["unet"], encodings))
        noise = model.denoise(params["unet"], latents.astype(encodings.dtype), jnp.array([400]), fed)
        return encodings, noise, model.encode_image(params["vae"], images).mean

    for ours, reference in zip(outputs(half), outputs(sd1_base), strict=True):
        assert 1e-5 < relative_error(ours.astype(jnp.float32), reference) < 0.05
    assert jax.eval_shape(partial(compute, half.model), half.params)[1].dtype == jnp.bfloat16


@pytest.mark.slow
def test_gradients_reach_the_keys_and_values(sd1_base):
    encodings = jax.random.normal(jax.random.key(0), (1, 16, sd1_base.model.context_width))
    latents = jax.random.normal(jax.random.key(1), (1, 16, 16, 4))
    probe = jax.random.normal(jax.random.key(2), latents.shape)
    params = sd1_base.params["unet"]
    fed = Context(keys_values(params, encodings))
    directions = jax.tree.map(lambda leaf: 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), fed)

    @jax.jit
    def loss(fed):
        return jnp.sum(probe * sd1_base.model.denoise(params, latents, jnp.array([50]), fed))

    def at(step):
        return float(loss(jax.tree.map(lambda leaf, direction: leaf + step * direction, fed, directions)))

    gradient = jax.jit(jax.grad(loss))(fed)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    # The five-point difference: float32 allows no step so small that a two-point one were exact enough.
    difference = (8 * (at(0.25) - at(-0.25)) - (at(0.5) - at(-0.5))) / 3
    along = sum(float(jnp.sum(g * d)) for g, d in zip(*map(jax.tree.leaves, (gradient, directions)), strict=True))
    np.testing.assert_allclose(along, difference, rtol=1e-3)


@pytest.mark.parametrize(
    ("shape", "prompts", "dtype", "message"),
    [
        ((2, 16, 16, 4), 1, jnp.float32, "2 latents, but keys and values of 1 prompts"),
        ((1, 16, 16, 4), 1, jnp.bfloat16, "computes in float32, the keys of .* are bfloat16"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(sd1_base, shape, prompts, dtype, message):
    fed = Context(keys_values(sd1_base.params["unet"], jnp.zeros((prompts, 16, sd1_base.model.context_width), dtype)))
    with pytest.raises(ValueError, match=message):
        sd1_base.model.denoise(sd1_base.params["unet"], jnp.zeros(shape), jnp.zeros(shape[0], jnp.int32), fed)


def test_a_model_that_is_loaded_twice_compiles_nothing_anew(sd1_folder, sd1_base):
    again = load_base_model(sd1_folder)
    assert again.model == sd1_base.model
    assert hash(again.model) == hash(sd1_base.model)
    traced = []

    @partial(jax.jit, static_argnums=0)
    def width(model, encodings):
        traced.append(model)
        return encodings * model.context_width

    for base in (sd1_base, again):
        width(base.model, jnp.ones(2))
    assert len(traced) == 1
    width(load_architecture(sd1_folder, dtype=jnp.bfloat16), jnp.ones(2))
    assert len(traced) == 2


def test_no_model_is_kept_alive_by_what_was_compiled_for_it(sd1_folder):
    base = load_base_model(sd1_folder)
    base.new_concept("dog", jnp.eye(base.model.context_width))
    leaf = weakref.ref(base.params["unet"]["conv_in"]["kernel"])
    del base
    gc.collect()
    assert leaf() is None
