"""Methods of personalisation to compare Perfusion with: what each learns of a thing, and what that adds to the UNet.

    textual_inversion   a word embedding, and nothing of the UNet (arXiv 2208.01618)
    lora                a word embedding, and a change of low rank of every W_K and W_V (arXiv 2106.09685)
    custom_diffusion    a word embedding, and all of every W_K and W_V (arXiv 2212.04488)
    dreambooth          all of the UNet, for a rare word that stays what it is (arXiv 2208.12242)

Weights are kept as what is added to the frozen ones, W' = W + g D, so that a strength g acts on every method alike, and
one that has learnt nothing is the model itself. The change is there for every word of every prompt: no gate opens it.

All functions are pure and work under `jit`, `grad` and `vmap`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key

from perfusion_jax.method.concept import Concept
from perfusion_jax.method.surgery import Params, is_edited

Weights = dict[str, Float32[Array, "..."]]
"""By path in the UNet's tree, such as `mid_block/attentions_0/transformer_blocks_0/attn2/to_k/kernel`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Baseline:
    """What Textual Inversion learns, and what all methods have. All arrays are float32.

    Attributes:
        embedding: as a `Concept`'s, [token_width].
    """

    embedding: Float32[Array, "*concepts token_width"]

    @property
    def changes(self) -> Weights:
        """What is added to the UNet's weights at strength 1, by path."""
        return {}

    def trainable(self, fields: tuple[str, ...]) -> dict[str, Any]:
        """The parameters that training moves, by field name; `dataclasses.replace` takes them back."""
        return {field: getattr(self, field) for field in fields}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Baseline):
    """What a LoRA learns.

    Attributes:
        down: by path of a kernel, [context_width, rank].
        up: likewise, [rank, out_width]. The change is their product: alpha is the rank.
    """

    down: Weights
    up: Weights

    @property
    def changes(self) -> Weights:
        """As a `Baseline`'s."""
        return {path: jnp.matmul(down, self.up[path], precision="highest") for path, down in self.down.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FineTuned(Baseline):
    """What Custom Diffusion and DreamBooth learn.

    Attributes:
        added: by path, of the shape of the weights there.
    """

    added: Weights

    @property
    def changes(self) -> Weights:
        """As a `Baseline`'s."""
        return self.added


BASELINES: dict[str, type[Baseline]] = {
    "textual_inversion": Baseline,
    "lora": LowRank,
    "custom_diffusion": FineTuned,
    "dreambooth": FineTuned,
}
"""What each method learns, by its name in a config."""

Learnt = Concept | Baseline
"""What any method learns."""


def begin(
    method: str,
    unet_params: Mapping[str, Any],
    embedding: Float[Array, " token_width"],
    key: Key[Array, ""],
    rank: int = 1,
) -> Baseline:
    """What a method has before training: it changes nothing yet.

    Args:
        method: a key of BASELINES.
        unet_params: the frozen UNet.
        embedding: of the word that it begins with, [token_width].
        key: of a LoRA's first factors, which are normal with a standard deviation of 1 / rank (as peft's `gaussian`);
            the second ones are zero.
        rank: of a LoRA.
    """
    embedding = jnp.asarray(embedding, jnp.float32)
    if method == "textual_inversion":
        return Baseline(embedding)
    weights = _by_path(unet_params)
    if method != "dreambooth":
        weights = {path: leaf for path, leaf in weights.items() if is_edited(path.split("/"))}
    if method == "lora":
        keys = jax.random.split(key, len(weights))
        return LowRank(
            embedding,
            down={
                path: jax.random.normal(own, (leaf.shape[0], rank)) / rank
                for own, (path, leaf) in zip(keys, weights.items(), strict=True)
            },
            up={path: jnp.zeros((rank, leaf.shape[1])) for path, leaf in weights.items()},
        )
    return FineTuned(embedding, {path: jnp.zeros(leaf.shape) for path, leaf in weights.items()})


def add(unet_params: Params, learnt: Baseline, strength: Float[Array, ""] | float = 1.0) -> Params:
    """Adds what a method has learnt to a UNet: W' = W + g D.

    Args:
        unet_params: the UNet, without edits.
        learnt: by a baseline.
        strength: g.

    Returns:
        A tree of the same structure, dtypes and shapes; what the method has not learnt are the very same leaves.

    Raises:
        ValueError: it was learnt on another UNet.
    """
    changes = learnt.changes
    weights = _by_path(unet_params)
    for path, change in changes.items():
        if path not in weights or weights[path].shape != change.shape:
            here = f"has {weights[path].shape}" if path in weights else "has none"
            raise ValueError(f"learnt on another UNet: it changes {path} of shape {change.shape}, this one {here}")

    def added(path: Any, leaf: Float[Array, "..."]) -> Float[Array, "..."]:
        change = changes.get(_name(path))
        return leaf if change is None else (leaf.astype(jnp.float32) + strength * change).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(added, unet_params)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _by_path(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
