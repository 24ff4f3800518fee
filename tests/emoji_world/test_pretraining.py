"""The pretraining code: its optimiser, its batches, whitening, checkpoints, and the folder it writes."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pretraining needs the extra: pip install -e '.[pretrain]'")
pytest.importorskip("resvg_py", reason="pretraining needs the extra: pip install -e '.[pretrain]'")

from diffusers import StableDiffusionPipeline  # noqa: E402

from perfusion_jax.emoji_world import (  # noqa: E402
    autoencoder_training,
    diffusion_training,
    latent_shards,
    model_folder,
    muon,
    tokenizer,
    torch_training,
)

SETTINGS = diffusion_training.Settings()


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory):
    return tokenizer.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def made_up_scenes(count, end_token):
    """Random latents, captions of five tokens, and a mask over the left half."""
    random = np.random.default_rng(0)
    tokens = np.full((count, tokenizer.MODEL_MAX_LENGTH), end_token, np.int16)
    tokens[:, 0] = end_token - 1
    tokens[:, 1:6] = random.integers(0, 500, (count, 5))
    masks = np.zeros((count, 8, 8), np.uint8)
    masks[:, :, :4] = 255
    return {
        "latents": random.normal(size=(count, 16, 8, 8)).astype(np.float16),
        "tokens": tokens,
        "masks": masks,
    }


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 24, 24)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(muon.orthogonalise(matrices).float())
    assert values.min() > 0.3
    assert values.max() < 1.4


def test_the_optimiser_lowers_a_loss_and_resumes_where_it_stopped():
    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.SiLU(), torch.nn.Conv2d(8, 3, 3))
        return model, muon.MuonAndAdam(model, muon_rate=1e-2, adam_rate=1e-2)

    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def train(model, optimizer, steps):
        for _ in range(steps):
            loss = (model(images) - images[..., 2:-2, 2:-2]).square().mean()
            loss.backward()
            optimizer.step(1.0)
        return loss.item()

    whole, whole_optimizer = make()
    first = train(whole, whole_optimizer, 1)
    assert train(whole, whole_optimizer, 39) < 0.7 * first
    half, half_optimizer = make()
    train(half, half_optimizer, 20)
    resumed, resumed_optimizer = make()
    resumed.load_state_dict(half.state_dict())
    resumed_optimizer.load_state_dict(half_optimizer.state_dict())
    train(resumed, resumed_optimizer, 20)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_batch_mixes_latents_and_noise_as_the_schedule_says(text_tokenizer):
    end_token = text_tokenizer.eos_token_id
    scenes = made_up_scenes(64, end_token)
    schedule = model_folder.build_scheduler().alphas_cumprod
    batch = diffusion_training.make_batch(scenes, schedule, end_token, torch.Generator().manual_seed(0), SETTINGS)
    alphas = schedule[batch.timesteps][:, None, None, None]
    recovered = alphas.sqrt() * batch.noisy_latents - (1 - alphas).sqrt() * batch.velocity
    torch.testing.assert_close(recovered, torch.from_numpy(scenes["latents"]).float(), rtol=0, atol=1e-5)
    # One timestep from each stratum of 1000 / 64.
    assert len(set((batch.timesteps * 64 // 1000).tolist())) >= 60
    torch.testing.assert_close(batch.weights[..., :4], 2 * batch.weights[..., 4:])
    assert batch.weights.max() <= 2 * 5 / 6 + 1e-6


def test_captions_are_dropped_padding_hidden_and_words_isolated(text_tokenizer):
    end_token = text_tokenizer.eos_token_id
    scenes = made_up_scenes(4096, end_token)
    schedule = model_folder.build_scheduler().alphas_cumprod
    batch = diffusion_training.make_batch(scenes, schedule, end_token, torch.Generator().manual_seed(0), SETTINGS)
    empty = (batch.tokens[:, 1] == end_token).float().mean().item()
    assert empty == pytest.approx(SETTINGS.empty_caption_share, abs=0.02)
    hidden = (~batch.visible[:, -1]).float().mean().item()
    assert hidden == pytest.approx(SETTINGS.hidden_padding_share, abs=0.03)
    assert batch.visible[batch.tokens != end_token].all()
    isolated = (batch.attended.sum(1) == 1).float().mean().item()
    assert isolated == pytest.approx(SETTINGS.isolated_words_share, abs=0.03)
    assert batch.attended[:, 0].all()


def test_an_isolated_word_is_encoded_alike_in_any_caption(text_tokenizer):
    text_encoder = model_folder.build_text_encoder(text_tokenizer)
    tokens = torch.tensor(tokenizer.encode(text_tokenizer, ["a photo of a dog", "a blue bus and a dog"]))
    attended = torch.zeros_like(tokens)
    attended[:, 0] = 1
    with torch.no_grad():
        alone = text_encoder(tokens, attention_mask=attended).last_hidden_state
        together = text_encoder(tokens).last_hidden_state
    assert torch.isfinite(alone).all()
    same = tokens[0] == tokens[1]
    torch.testing.assert_close(alone[0, same], alone[1, same], rtol=0, atol=1e-6)
    assert (together[0, same][1:] - together[1, same][1:]).abs().max() > 1e-4


def test_every_pass_shows_every_scene_once_in_another_order():
    steps = latent_shards.SHARD_SCENES // 64
    visits = steps * latent_shards.SHARDS
    numbers = {latent_shards.batch_indices(0, step, 64)[0] for step in range(0, visits, steps)}
    assert numbers == set(range(latent_shards.SHARDS))
    first = np.concatenate([latent_shards.batch_indices(0, step, 64)[1] for step in range(steps)])
    second = np.concatenate([latent_shards.batch_indices(0, visits + step, 64)[1] for step in range(steps)])
    assert sorted(first) == sorted(second) == list(range(latent_shards.SHARD_SCENES))
    assert (first != second).mean() > 0.9


def test_whitening_changes_the_latents_and_not_the_pictures():
    torch.manual_seed(0)
    autoencoder = autoencoder_training.build_autoencoder(autoencoder_training.Settings()).eval()
    images = torch.rand(32, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = autoencoder(images).sample
        autoencoder_training.whiten(autoencoder, images)
        latents = autoencoder.encode(images).latent_dist.mean
        after = autoencoder(images).sample
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-4)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    factors = [diffusion_training.rate_factor(step, 1000, 100, SETTINGS) for step in (0, 500, 1000, 1050, 1100)]
    assert factors == pytest.approx([1 / SETTINGS.warm_up_steps, 1, 1, 0.5, 0])
    assert diffusion_training.rate_factor(10**6, None, 0, SETTINGS) == 1


@pytest.mark.slow
def test_a_trainer_comes_back_from_its_checkpoint(tmp_path, text_tokenizer):
    end_token = text_tokenizer.eos_token_id
    schedule = model_folder.build_scheduler().alphas_cumprod
    scenes = made_up_scenes(8, end_token)

    def steps(trainer, count):
        for _ in range(count):
            generator = torch.Generator().manual_seed(trainer.step)
            batch = diffusion_training.make_batch(scenes, schedule, end_token, generator, SETTINGS)
            diffusion_training.train_step(trainer.model, trainer.optimizer, 1.0, batch)
            torch_training.average_weights(trainer.average, trainer.model, 0.5)
            trainer.step += 1

    trainer = diffusion_training.make_trainer(text_tokenizer, 16, SETTINGS)
    steps(trainer, 1)
    trainer.save(tmp_path / "constant.pt")
    assert not (tmp_path / "constant.pt.partial").exists()
    steps(trainer, 1)
    again, path = diffusion_training.open_trainer(tmp_path, text_tokenizer, 16, SETTINGS, decay_samples=0)
    assert (again.step, path.name) == (1, "constant.pt")
    steps(again, 1)
    for one, other in zip(trainer.average.parameters(), again.average.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    branch, path = diffusion_training.open_trainer(tmp_path, text_tokenizer, 16, SETTINGS, decay_samples=640)
    assert (branch.step, branch.decay_start, path.name) == (1, 1, "decaying.pt")


def test_the_folder_is_a_stable_diffusion_model_of_the_promised_size(tmp_path, text_tokenizer):
    autoencoder = autoencoder_training.build_autoencoder(autoencoder_training.Settings())
    pipeline = model_folder.build_pipeline(
        autoencoder, model_folder.build_text_encoder(text_tokenizer), text_tokenizer, model_folder.build_unet(16)
    )
    pictures = model_folder.sample(pipeline, ("a dog",), seed=0, steps=2)
    assert model_folder.save_pipeline(pipeline, tmp_path) < 25e6
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    again = model_folder.sample(loaded, ("a dog",), seed=0, steps=2)
    assert pictures.shape == (1, 64, 64, 3)
    assert np.abs(pictures.astype(int) - again).max() <= 8  # half precision on disk


def test_lifting_the_context_keeps_the_model_and_makes_the_covariance_invertible(text_tokenizer):
    torch.manual_seed(0)
    text_encoder, unet = model_folder.build_text_encoder(text_tokenizer), model_folder.build_unet(16)
    norm = text_encoder.text_model.final_layer_norm
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    tokens = torch.randint(0, 700, (300, tokenizer.MODEL_MAX_LENGTH))
    latents, timesteps = torch.randn(2, 16, 8, 8), torch.tensor([3, 900])

    @torch.no_grad()
    def run():
        encodings = text_encoder(tokens).last_hidden_state
        rows = encodings.reshape(-1, encodings.shape[-1]).double()
        eigenvalues = torch.linalg.eigvalsh(rows.T @ rows)
        return unet(latents, timesteps, encodings[:2]).sample, (eigenvalues[0] / eigenvalues.mean()).item()

    before, smallest_before = run()
    model_folder.lift_context(text_encoder, unet)
    after, smallest_after = run()
    torch.testing.assert_close(before, after, rtol=0, atol=2e-5)
    assert smallest_before < 1e-8
    assert smallest_after > 1e-3


def test_pixels_survive_the_way_to_floats_and_back():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    np.testing.assert_array_equal(torch_training.to_pixels(torch_training.from_pixels(images)), images)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SETTINGS.batch_size = 1
