"""Training text encoder and UNet together: settings, what a step sees, the loss, and the state that a run keeps."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from perfusion_jax.emoji_world.muon import MuonAndAdam
from pretraining import model as models
from pretraining import places, things, tokenizer, training_tools
from pretraining.captions import Texts
from pretraining.codes import Coder

SEED = 2_000
CODE_WIDTH = 128
MIDDLE = (0.1, 0.5)
"""Where of the noise schedule a signal-to-noise ratio is between 8 and 0.4."""
POSITION = ("step", "samples", "decay_start", "average_start")
"""What a checkpoint says of where training stands. It also names the vocabulary, if it is not an old one."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the diffusion model is trained. Shares are of the samples."""

    batch_size: int = 128
    muon_rate: float = 2e-3
    adam_rate: float = 1e-3
    warm_up_steps: int = 200
    weight_decay: float = 0.01
    average_decay: float = 0.999
    empty_caption_share: float = 0.1
    hidden_padding_share: float = 0.5
    # What a word's encoding may have read: the whole caption before it; its own noun phrase; or nothing.
    reads_phrase_share: float = 0.4
    reads_nothing_share: float = 0.2
    # Where a noun has read the words that tell an individual: how often the UNet cannot see these words themselves.
    hidden_telling_share: float = 0.7
    object_weight: float = 2.0
    # Min-SNR (arXiv 2303.09556) alone gives steps of much noise, in which a picture this small can follow nothing but
    # its caption, a hundredth of the weight of others: captions then taught the places and not the things. Hence the
    # floor.
    signal_to_noise_cap: float = 5.0
    signal_to_noise_floor: float = 0.5
    # Of the samples, beside those of any timestep, from MIDDLE: there shapes are told from the noise, and learning went
    # on when it was over elsewhere.
    middle_share: float = 0.5
    guidance_scale: float = 4.0


@dataclasses.dataclass(frozen=True)
class Batch:
    """Input and target of one step.

    Attributes:
        noisy_latents: float [batch, channels, grid, grid].
        timesteps: int [batch].
        texts: the captions.
        code_pictures: uint8 [batch, 4, CODE_SIDE, CODE_SIDE]: of the thing whose code a caption holds.
        code_noise: float [batch, CODE_WIDTH].
        attended: bool [batch, length, length]: which positions (last axis) each position of the text encoder may read.
        visible: bool [batch, length]: positions that the UNet's cross-attention may read.
        velocity: what is to be predicted, float [batch, channels, grid, grid].
        weights: of the squared error, float [batch, 1, grid, grid].
    """

    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    texts: Texts
    code_pictures: torch.Tensor
    code_noise: torch.Tensor
    attended: torch.Tensor
    visible: torch.Tensor
    velocity: torch.Tensor
    weights: torch.Tensor


class TextToLatents(torch.nn.Module):
    """The parts that are trained together, as one module; the coder does not ship."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet
        self.coder = Coder(models.CONTEXT_WIDTH, CODE_WIDTH)

    def encode(self, batch: Batch) -> torch.Tensor:
        """Text encodings under the batch's masks, with codes put in: float [batch, length, width]."""
        text_model = self.text_encoder.text_model
        texts = batch.texts
        embeddings = text_model.embeddings.token_embedding(texts.tokens)
        (coded,) = torch.nonzero(texts.code >= 0, as_tuple=True)
        position, added = texts.code[coded], texts.code_added[coded]
        code = self.coder(batch.code_pictures[coded].float() / 255, batch.code_noise[coded], added).to(embeddings.dtype)
        there = embeddings[coded, position]
        embeddings = embeddings.index_put((coded, position), torch.where(added[:, None], there + code, code))
        hidden = text_model.embeddings(inputs_embeds=embeddings)
        mask = torch.zeros_like(batch.attended, dtype=hidden.dtype).masked_fill(
            ~batch.attended, torch.finfo(hidden.dtype).min
        )
        encoded = text_model.encoder(inputs_embeds=hidden, attention_mask=mask[:, None]).last_hidden_state
        return text_model.final_layer_norm(encoded)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Predicts the velocity, float [batch, channels, grid, grid]."""
        return self.unet(
            batch.noisy_latents, batch.timesteps, self.encode(batch), encoder_attention_mask=batch.visible
        ).sample


def timestep_quantile(probability: torch.Tensor, middle_share: float) -> torch.Tensor:
    """Where in the noise schedule timesteps are, as shares of it: `middle_share` of them in MIDDLE, others anywhere.

    Args:
        probability: float, in [0, 1).
        middle_share: below 1.
    """
    low, high = MIDDLE
    middle = low + probability / max(middle_share, 1e-6) * (high - low)
    return torch.where(probability < middle_share, middle, (probability - middle_share) / (1 - middle_share))


def make_batch(
    latents: torch.Tensor,
    objects: torch.Tensor,
    texts: Texts,
    code_pictures: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    end_token: int,
    generator: torch.Generator,
    settings: Settings,
) -> Batch:
    """Noise latents, drop captions, decide what encodings and the UNet may read, and weigh the loss.

    Args:
        latents: float [batch, channels, grid, grid].
        objects: float [batch, grid, grid], how much of a cell things cover.
        texts: captions, on the CPU.
        code_pictures: uint8 [batch, 4, CODE_SIDE, CODE_SIDE].
        alphas_cumprod: float [timesteps], the noise schedule.
        end_token: id of the end token, which is also the padding.
        generator: source of all randomness, on the CPU.

    Returns:
        A Batch on the latents' device; weights are of the squared error of the velocity.
    """
    device, count = latents.device, len(latents)

    def chance(share: float) -> torch.Tensor:
        return torch.rand(count, generator=generator) < share

    dropped = chance(settings.empty_caption_share)
    tokens = texts.tokens.clone()
    tokens[dropped, 1:] = end_token
    length = tokens.shape[1]
    way = torch.rand(count, generator=generator)
    nothing = ~dropped & (way < settings.reads_nothing_share)
    phrase = ~dropped & ~nothing & (way < settings.reads_nothing_share + settings.reads_phrase_share)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    # Every position may read the start and itself.
    least = torch.eye(length, dtype=torch.bool)
    least[:, 0] = True
    same = (texts.phrase[:, :, None] == texts.phrase[:, None, :]) & (texts.phrase[:, :, None] >= 0)
    attended = torch.where(
        nothing[:, None, None], least, torch.where(phrase[:, None, None], (same & causal) | least, causal)
    )
    # A thing should be read from its own noun, for that is what personalisation edits. But every later word and the
    # padding know of it too, through the text encoder's attention. So part of the time words read their own phrase
    # alone, or nothing; and half of the time the padding is hidden.
    hidden_padding = chance(settings.hidden_padding_share) & ~dropped
    visible = ~(hidden_padding[:, None] & (tokens == end_token))
    # Which individual it is should be read from the noun too, not from the words before it.
    hidden_telling = chance(settings.hidden_telling_share) & ~nothing & ~dropped
    visible &= ~(hidden_telling[:, None] & texts.tells)
    coded = torch.where(dropped, -1, texts.code)
    texts = dataclasses.replace(texts, tokens=tokens, code=coded)
    # One timestep from each of `count` equal strata: the same distribution as independent draws, less variance.
    strata = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    timesteps = (timestep_quantile(strata, settings.middle_share) * len(alphas_cumprod)).long()
    alphas = alphas_cumprod[timesteps][:, None, None, None].to(device)
    noise = training_tools.normal(latents.shape, generator, device)
    ratio = alphas / (1 - alphas)
    weights = (ratio.clamp(max=settings.signal_to_noise_cap) + settings.signal_to_noise_floor) / (ratio + 1)
    return Batch(
        noisy_latents=alphas.sqrt() * latents + (1 - alphas).sqrt() * noise,
        timesteps=timesteps.to(device),
        texts=Texts(*(getattr(texts, field.name).to(device) for field in dataclasses.fields(texts))),
        code_pictures=code_pictures,
        code_noise=training_tools.normal((count, CODE_WIDTH), generator, device),
        attended=attended.to(device),
        visible=visible.to(device),
        velocity=alphas.sqrt() * noise - (1 - alphas).sqrt() * latents,
        weights=weights * (1 + settings.object_weight * objects[:, None]),
    )


def weighted_error(model: TextToLatents, batch: Batch) -> torch.Tensor:
    """Mean squared error of the predicted velocity under `batch.weights`. Scalar."""
    with training_tools.autocast(batch.velocity.device):
        prediction = model(batch)
    return (batch.weights * (prediction.float() - batch.velocity).square()).mean()


def train_step(model: TextToLatents, optimizer: MuonAndAdam, factor: float, batch: Batch) -> torch.Tensor:
    """One optimiser step at `factor` of the learning rates; returns the loss."""
    loss = weighted_error(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(factor)
    return loss.detach()


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
    samples: int = 0
    decay_start: int | None = None
    average_start: int = 0
    """Step from which weights are averaged: those before were for other latents."""
    vocabulary: str = ""
    """What the tokens' ids mean (`tokenizer.digest`)."""

    def save(self, path: Path) -> None:
        """Writes everything to one checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "samples": self.samples,
            "decay_start": self.decay_start,
            "average_start": self.average_start,
            "vocabulary": self.vocabulary,
        }
        training_tools.save_checkpoint(path, state)

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back a checkpoint, or what `lightened` left of it: then the averaged weights are trained on.

        Raises:
            ValueError: it was trained with another vocabulary.
        """
        training_tools.check_vocabulary(state, self.vocabulary)
        self.average.load_state_dict(state["average"])
        self.model.load_state_dict(state.get("model", state["average"]))
        if "optimizer" in state:
            training_tools.restore_optimizer(self.optimizer, state["optimizer"])
        for name in POSITION:
            setattr(self, name, state[name])


def position(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint without weights and optimiser."""
    return {name: state[name] for name in (*POSITION, "vocabulary") if name in state}


def lightened(state: dict[str, Any]) -> dict[str, Any]:
    """A tenth of a checkpoint, to be sent or kept: the averaged weights in half precision, to be gone on from."""
    average = {name: value.half() if value.is_floating_point() else value for name, value in state["average"].items()}
    return {"average": average, **position(state), "decay_start": None}


def turned(weights: dict[str, torch.Tensor], axes: torch.Tensor) -> dict[str, torch.Tensor]:
    """The UNet's weights among others, for latents whose axes are the rows of `axes` (orthonormal)."""
    entry, end = weights["unet.conv_in.weight"], weights["unet.conv_out.weight"]
    return {
        **weights,
        "unet.conv_in.weight": torch.einsum("oihw,ji->ojhw", entry, axes).contiguous(),
        "unet.conv_out.weight": torch.einsum("ji,iohw->johw", axes, end).contiguous(),
        "unet.conv_out.bias": axes @ weights["unet.conv_out.bias"],
    }


def make_trainer(
    text_tokenizer: CLIPTokenizer, latent_channels: int, grid: int, device: torch.device, settings: Settings
) -> Trainer:
    """A Trainer at step 0."""
    torch.manual_seed(SEED)
    text_encoder, unet = models.build_text_encoder(text_tokenizer), models.build_unet(latent_channels, grid)
    # The masks are of our own making, so attention is spelled out in the text encoder. In the UNet it is on a CPU
    # alone, where the backward pass of PyTorch's fused attention costs as much as all convolutions together.
    text_encoder.set_attn_implementation("eager")
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())
    model = TextToLatents(text_encoder, unet).train().to(device)
    if device.type == "cuda":  # on a CPU it made steps a sixth slower
        model.to(memory_format=torch.channels_last)
    optimizer = MuonAndAdam(model, settings.muon_rate, settings.adam_rate, settings.weight_decay)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    return Trainer(model, average, optimizer, vocabulary=tokenizer.digest(text_tokenizer))


def finished_pipeline(
    average: TextToLatents, autoencoder: AutoencoderKL, text_tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The model as it is used and shipped: averaged weights, with the context lifted (`model.lift_context`)."""
    text_encoder, unet = copy.deepcopy(average.text_encoder), copy.deepcopy(average.unet)
    phrases = list(places.PHRASES.values())
    prompts = [f"a photo of a {kind} {phrases[number % len(phrases)]}" for number, kind in enumerate(things.kinds())]
    device = next(text_encoder.parameters()).device
    models.lift_context(text_encoder, unet, torch.tensor(tokenizer.encode(text_tokenizer, prompts), device=device))
    return models.build_pipeline(autoencoder, text_encoder, text_tokenizer, unet)


def cover_cells(masks: torch.Tensor, grid: int) -> torch.Tensor:
    """How much of each latent cell things cover: float masks [batch, slots, side, side] to float [batch, grid,
    grid]."""
    return functional.avg_pool2d(masks.sum(1).clamp(max=1), masks.shape[-1] // grid)
