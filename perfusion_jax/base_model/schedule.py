"""The noise schedule of a checkpoint (Ho et al., arXiv 2006.11239; velocity: Salimans and Ho, arXiv 2202.00512)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perfusion_jax.runtime.errors import InputError

# Betas by name, as PyTorch diffusers defines them, each from (beta_start, beta_end, num_train_timesteps) to
# float64 [steps].
_BETAS: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "linear": np.linspace,
    "scaled_linear": lambda start, end, steps: np.linspace(math.sqrt(start), math.sqrt(end), steps) ** 2,
    "squaredcos_cap_v2": lambda start, end, steps: _cosine_betas(steps),
}


def _cosine_betas(steps: int) -> np.ndarray:
    """Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17."""
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def _zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Rescales betas so that the last step is pure noise (Lin et al. 2023, arXiv 2305.08891, algorithm 1)."""
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    return 1 - np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


@dataclass(frozen=True)
class NoiseSchedule:
    """How noise is added and what the network predicts.

    Attributes:
        alphas_cumprod: the share of the signal's variance left at each timestep, float32 [num_train_timesteps].
        prediction_type: `epsilon` or `v_prediction`.
        config: the scheduler's whole config, as saved with the checkpoint.
    """

    alphas_cumprod: np.ndarray
    prediction_type: str
    config: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> "NoiseSchedule":
        """Reads a diffusers scheduler config; `source` names it in errors.

        Raises:
            InputError: a beta schedule, prediction type or kind of scheduler that is not known.
        """
        kind = config.get("_class_name", "")
        if kind.startswith(("FlowMatch", "EDM", "CosineDPM")):
            raise InputError(f"{source}: {kind} adds noise in another way than by betas; such models are not supported")
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(f"{source}: prediction_type {prediction_type!r} is not one of epsilon, v_prediction")
        name = config.get("beta_schedule", "linear")
        steps = config.get("num_train_timesteps", 1000)
        if name not in _BETAS and config.get("trained_betas") is None:
            raise InputError(f"{source}: beta_schedule {name!r} is not one of {', '.join(_BETAS)}")
        try:
            if config.get("trained_betas") is not None:
                betas = np.asarray(config["trained_betas"], np.float64)
            else:
                betas = _BETAS[name](float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02)), steps)
        except (TypeError, ValueError) as error:
            raise InputError(f"{source}: the betas cannot be computed ({error})") from error
        if config.get("rescale_betas_zero_snr"):
            betas = _zero_terminal_snr(betas)
        return cls(np.cumprod(1 - betas).astype(np.float32), prediction_type, dict(config))

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps; valid ones are 0 to this, exclusive."""
        return len(self.alphas_cumprod)

    def _signal_and_noise(self, timesteps: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
        kept = jnp.asarray(self.alphas_cumprod)[timesteps].reshape(-1, *[1] * (rank - 1))
        return jnp.sqrt(kept), jnp.sqrt(1 - kept)

    def add_noise(self, latents: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
        """Returns sqrt(a_t) x + sqrt(1 - a_t) noise, float32.

        Args:
            latents: [batch, ...].
            noise: standard normal, the shape of the latents.
            timesteps: int32 [batch].
        """
        signal_scale, noise_scale = self._signal_and_noise(timesteps, latents.ndim)
        return signal_scale * latents + noise_scale * noise

    def target(self, latents: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
        """Returns what the network should predict: the noise, or the velocity sqrt(a_t) noise - sqrt(1 - a_t) x.

        Arguments as for `add_noise`.
        """
        if self.prediction_type == "epsilon":
            return noise
        signal_scale, noise_scale = self._signal_and_noise(timesteps, latents.ndim)
        return signal_scale * noise - noise_scale * latents

    def loss_weights(self, timesteps: jax.Array, gamma: float) -> jax.Array:
        """Returns min-SNR-gamma weights of the squared error of `target` (Hang et al. 2023, arXiv 2303.09556).

        min(SNR, gamma) / SNR of noise, and / (SNR + 1) of velocity, where SNR = a_t / (1 - a_t).

        Args:
            timesteps: int32 [batch].
            gamma: above 0.

        Returns:
            float32 [batch].
        """
        kept = jnp.asarray(self.alphas_cumprod)[timesteps]
        # In a_t itself, for which the last step of a rescaled schedule has 0 signal.
        per_noise = jnp.minimum(1.0, gamma * (1 - kept) / jnp.maximum(kept, 1e-12))
        return per_noise if self.prediction_type == "epsilon" else per_noise * kept
