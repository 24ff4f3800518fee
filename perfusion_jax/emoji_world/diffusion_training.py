"""Training text encoder and UNet together: settings, batches, loss, one step, and the state that a run keeps."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTokenizer

from perfusion_jax.emoji_world import model_folder, torch_training
from perfusion_jax.emoji_world.muon import MuonAndAdam

SEED = 2_000


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the diffusion model is trained."""

    batch_size: int = 128
    muon_rate: float = 2e-3
    adam_rate: float = 1e-3
    warm_up_steps: int = 200
    weight_decay: float = 0.01
    average_decay: float = 0.999
    empty_caption_share: float = 0.1
    hidden_padding_share: float = 0.5
    isolated_words_share: float = 0.5
    object_weight: float = 1.0
    signal_to_noise_cap: float = 5.0
    save_every: int = 100
    look_every: int = 600
    guidance_scale: float = 4.0


class TextToLatents(torch.nn.Module):
    """The two parts that are trained, as one module."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, batch: "Batch") -> torch.Tensor:
        """Predicts the velocity, float [batch, channels, 8, 8]."""
        encodings = self.text_encoder(batch.tokens, attention_mask=batch.attended).last_hidden_state
        return self.unet(batch.noisy_latents, batch.timesteps, encodings, encoder_attention_mask=batch.visible).sample


@dataclasses.dataclass(frozen=True)
class Batch:
    """Input and target of one step.

    Attributes:
        noisy_latents: float [batch, channels, 8, 8].
        timesteps: int [batch].
        tokens: int [batch, 24].
        attended: int [batch, 24]: 1 where the text encoder's self-attention may look.
        visible: bool [batch, 24]: positions that the UNet's cross-attention may read.
        velocity: what is to be predicted, float [batch, channels, 8, 8].
        weights: of the squared error, float [batch, 1, 8, 8].
    """

    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    tokens: torch.Tensor
    attended: torch.Tensor
    visible: torch.Tensor
    velocity: torch.Tensor
    weights: torch.Tensor


def make_batch(
    scenes: Mapping[str, np.ndarray],
    alphas_cumprod: torch.Tensor,
    end_token: int,
    generator: torch.Generator,
    settings: Settings,
) -> Batch:
    """Noise latents, drop captions, hide padding, isolate words, and weigh the loss.

    Args:
        scenes: dictionary as of `latent_shards.encode_scenes`.
        alphas_cumprod: float [timesteps], the noise schedule.
        end_token: id of the end token, which is also the padding.
        generator: source of all randomness.

    Returns:
        A Batch; weights are float [batch, 1, 8, 8]: min-SNR (arXiv 2303.09556) times the object weighting.
    """
    latents = torch.from_numpy(scenes["latents"]).float()
    tokens = torch.from_numpy(scenes["tokens"]).long()
    count = len(latents)
    dropped = torch.rand(count, generator=generator) < settings.empty_caption_share
    tokens[dropped, 1:] = end_token
    # An object should be read from its own word, for that is what personalisation edits. But every later word and the
    # padding know of it too, through the text encoder's attention. So half of the time the padding is hidden, and half
    # of the time words see nothing but the start token: then only the word itself tells.
    hidden = torch.rand(count, generator=generator) < settings.hidden_padding_share
    visible = ~(hidden[:, None] & (tokens == end_token))
    # One timestep from each of `count` equal strata: the same distribution as independent draws, less variance.
    strata = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (strata * len(alphas_cumprod)).long()
    alphas = alphas_cumprod[timesteps][:, None, None, None]
    noise = torch.randn(latents.shape, generator=generator)
    isolated = torch.rand(count, generator=generator) < settings.isolated_words_share
    attended = torch.ones_like(tokens)
    attended[isolated, 1:] = 0
    ratio = alphas / (1 - alphas)
    objects = torch.from_numpy(scenes["masks"]).float()[:, None] / 255
    return Batch(
        noisy_latents=alphas.sqrt() * latents + (1 - alphas).sqrt() * noise,
        timesteps=timesteps,
        tokens=tokens,
        attended=attended,
        visible=visible,
        velocity=alphas.sqrt() * noise - (1 - alphas).sqrt() * latents,
        weights=ratio.clamp(max=settings.signal_to_noise_cap) / (ratio + 1) * (1 + settings.object_weight * objects),
    )


def weighted_error(model: TextToLatents, batch: Batch) -> torch.Tensor:
    """Mean squared error of the predicted velocity under `batch.weights`. Scalar."""
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model(batch)
    return (batch.weights * (prediction.float() - batch.velocity).square()).mean()


def train_step(model: TextToLatents, optimizer: MuonAndAdam, factor: float, batch: Batch) -> float:
    """One optimiser step at `factor` of the learning rates; returns the loss."""
    loss = weighted_error(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(factor)
    return loss.item()


@torch.no_grad()
def validation_loss(model: TextToLatents, batches: Sequence[Batch]) -> float:
    """Mean loss over fixed batches: fixed scenes, timesteps and noise."""
    return float(np.mean([weighted_error(model, batch).item() for batch in batches]))


def rate_factor(step: int, decay_start: int | None, decay_steps: int, settings: Settings) -> float:
    """Share of the full learning rates: linear warm-up, then one, then a linear fall to zero.

    Args:
        step: from 0.
        decay_start: step at which the fall begins; None: never.
        decay_steps: length of the fall.
    """
    factor = min(1.0, (step + 1) / settings.warm_up_steps)
    return factor if decay_start is None else factor * (1 - max(0, step - decay_start) / decay_steps)


@dataclasses.dataclass
class Trainer:
    """All that changes while training, and what it takes to go on."""

    model: TextToLatents
    average: TextToLatents
    optimizer: MuonAndAdam
    step: int = 0
    decay_start: int | None = None

    def save(self, path: Path) -> None:
        """Writes everything to one checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "decay_start": self.decay_start,
        }
        torch_training.save_checkpoint(path, state)

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back a checkpoint's contents."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.decay_start = state["step"], state["decay_start"]


def make_trainer(text_tokenizer: CLIPTokenizer, latent_channels: int, settings: Settings) -> Trainer:
    """A Trainer at step 0."""
    torch.manual_seed(SEED)
    text_encoder, unet = model_folder.build_text_encoder(text_tokenizer), model_folder.build_unet(latent_channels)
    # On a CPU the backward pass of PyTorch's fused attention costs as much as all convolutions together: spelled-out
    # attention makes a step a third faster.
    text_encoder.set_attn_implementation("eager")
    unet.set_attn_processor(AttnProcessor())
    model = TextToLatents(text_encoder, unet).train()
    optimizer = MuonAndAdam(model, settings.muon_rate, settings.adam_rate, settings.weight_decay)
    return Trainer(model, copy.deepcopy(model).eval().requires_grad_(False), optimizer)


def open_trainer(
    folder: Path, text_tokenizer: CLIPTokenizer, latent_channels: int, settings: Settings, decay_samples: int
) -> tuple[Trainer, Path]:
    """Where training stands: (trainer, path to save it at). A decay phase starts from the constant phase's state."""
    trainer = make_trainer(text_tokenizer, latent_channels, settings)
    constant, decaying = folder / "constant.pt", folder / "decaying.pt"
    path = decaying if decay_samples else constant
    state = torch_training.load_checkpoint(path) or torch_training.load_checkpoint(constant)
    if state is not None:
        trainer.restore(state)
    if decay_samples and trainer.decay_start is None:
        trainer.decay_start = trainer.step
    return trainer, path


def finished_pipeline(
    average: TextToLatents, autoencoder: AutoencoderKL, text_tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The model as it is used and shipped: averaged weights, with the context lifted (`model_folder.lift_context`)."""
    text_encoder, unet = copy.deepcopy(average.text_encoder), copy.deepcopy(average.unet)
    model_folder.lift_context(text_encoder, unet)
    return model_folder.build_pipeline(autoencoder, text_encoder, text_tokenizer, unet)
