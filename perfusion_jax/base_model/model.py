"""`load_base_model`: a frozen text-to-image model, ready to be called."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from perfusion_jax.base_model import text
from perfusion_jax.base_model.architecture import Architecture, read_architecture
from perfusion_jax.base_model.layout import Layout, find_layout
from perfusion_jax.base_model.source import full_name
from perfusion_jax.base_model.weights import read_tree
from perfusion_jax.method.concept import Concept
from perfusion_jax.method.surgery import Params, bake, cross_attention_layers, is_edited
from perfusion_jax.runtime.errors import InputError

# Rounding the weights to bfloat16 moves a fingerprint by 0.01 at most. That of another model differs by about 1,
# that of a fine-tune by about the relative change of the weights: one within 2 % counts as the same model.
FINGERPRINT_TOLERANCE = 0.02


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A frozen text-to-image model: its architecture and its weights.

    Attributes:
        name: what it was loaded from.
        model: the architecture, all of it but the weights; static in compiled functions.
        params: weights by component: `unet`, `vae`, `text_encoder`, ... Pass them, or an edited tree, as an argument to
            what is compiled, rather than closing over them.
        layout: where its configs and its tokeniser are.
    """

    name: str
    model: Architecture
    params: dict[str, Params]
    layout: Layout

    @property
    def covariance(self) -> Path | None:
        """The file of C that came with the checkpoint, if one did."""
        return self.layout.covariance

    def super_category_embedding(self, super_category: str) -> jax.Array:
        """Returns the word embedding of a super-category, the mean over its tokens, float32 [token_width].

        Of several text encoders, theirs one after the other.

        Encoding a prompt with it in place of a concept's gives the super-category's encodings, every word where it was.

        Raises:
            InputError: an empty super-category.
        """
        words = np.array(self.model.tokenizer.words(super_category))
        tables = [
            self.params[name]["text_model"]["embeddings"]["token_embedding"] for name in self.model.text_components
        ]
        return jnp.concatenate([table["embedding"][words].astype(jnp.float32).mean(axis=0) for table in tables])

    def new_concept(
        self, super_category: str, whitening: jax.Array, templates: Sequence[str] = ("a photo of a {}",)
    ) -> Concept:
        """Returns a concept that is still its super-category in every way.

        Args:
            super_category: the word or words for this kind of thing, such as `dog` or `teddy bear`.
            whitening: C^-1/2 of this model's text encoder (`load_whitening`), float32 [context_width, context_width].
            templates: prompts with one `{}`; the super-category's encoding is the mean over them and over its tokens.

        Raises:
            InputError: an empty super-category, no template or one without a slot, or a matrix of another width.
        """
        if not templates:
            raise InputError("no templates: give at least one prompt with a {}")
        if whitening.shape != (self.model.context_width, self.model.context_width):
            raise InputError(
                f"the whitening matrix is {whitening.shape}; this text encoder's width is {self.model.context_width}"
            )
        located = [self.model.tokenizer.locate(template, super_category) for template in templates]
        weights = {name: self.params[name] for name in self.model.text_components}
        encodings = [_encode(self.model, weights, ids[None]).tokens for ids, _ in located]
        masks = np.stack([mask for _, mask in located])
        return Concept.from_super_category(
            projections=cross_attention_layers(self.params["unet"]),
            embedding=self.super_category_embedding(super_category),
            encoding=text.mean_at(jnp.concatenate(encodings), jnp.asarray(masks)),
            whitening=whitening,
        )

    @cached_property
    def fingerprint(self) -> tuple[float, ...]:
        """A few numbers per cross-attention kernel by which a concept knows its model, whatever the weights' dtype.

        Each kernel W [d_ctx, d_out] gives x^T W y / rms(W) for fixed unit vectors x and y: about standard normal
        between models, and equal to some thousandths between the float32, float16 and bfloat16 weights of one.
        """
        return tuple(
            round(float(_probe(weights[projection]["kernel"])), 4)
            for _, weights in sorted(cross_attention_layers(self.params["unet"]).items())
            for projection in ("to_k", "to_v")
        )

    def has_fingerprint(self, fingerprint: Sequence[float]) -> bool:
        """Whether a fingerprint is this model's."""
        ours = self.fingerprint
        return len(ours) == len(fingerprint) and np.allclose(ours, fingerprint, rtol=0, atol=FINGERPRINT_TOLERANCE)

    def baked(self, concepts: Sequence[Concept], strengths: Sequence[float]) -> "BaseModel":
        """Returns the model with the ungated edit of concepts in its kernels (`surgery.bake`).

        It is drawn with their words alone, at strength 0.
        """
        unet = bake(self.params["unet"], concepts, jnp.asarray(strengths, jnp.float32))
        return replace(self, params={**self.params, "unet": unet})


# Compiled once, however many templates a concept has.
_encode = jax.jit(Architecture.encode, static_argnums=0)


def _probe(kernel: jax.Array) -> jax.Array:
    exact = kernel.astype(jnp.float32)
    x, y = (np.cos(np.arange(size) * np.sqrt(2)) for size in exact.shape)
    x, y = (jnp.asarray(vector / np.linalg.norm(vector), jnp.float32) for vector in (x, y))
    probed = jnp.einsum("i,io,o->", x, exact, y, precision=jax.lax.Precision.HIGHEST)
    return probed / jnp.sqrt(jnp.mean(exact**2))


def load_base_model(
    source: str | Path,
    *,
    dtype: jnp.dtype = jnp.float32,
    revision: str | None = None,
    variant: str | None = None,
    edited_only: bool = False,
) -> BaseModel:
    """Loads a frozen text-to-image model. PyTorch is not needed, and no pickle is ever read.

    Args:
        source: a folder in the diffusers layout, a `.safetensors` file in the original layout, a hub id (downloaded
            once, then read from the cache, without a network too), or a short name, `emoji`, `sd15`, `sd21` or `sdxl`.
        dtype: float32 or bfloat16, of the weights and of the computation.
        revision: branch, tag or commit of a hub id.
        variant: `fp16` for the weight files of that variant.
        edited_only: whether to leave out all weights but those that an edit changes; so it is loaded at once, and
            concepts can be read, and exported as a LoRA.

    Raises:
        InputError: it cannot be found, read, or run; the message names the file.
        UnavailableError: storage or the hub fails.
    """
    name, variant = full_name(str(source), variant)
    layout = find_layout(name, revision, variant)
    model = read_architecture(layout, dtype)
    params: dict[str, Params] = {}
    for component in ("unet",) if edited_only else model.shapes:
        params[component] = read_tree(
            layout.checkpoint(component),
            model.shapes[component],
            dtype,
            layout.weights_name(component),
            is_edited if edited_only else lambda path: True,
        )
    return BaseModel(name, model, params, layout)
