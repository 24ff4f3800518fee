"""A concept: what Perfusion learns, as a pytree of float32 arrays.

A `Concept` holds arrays only. Its name, super-category and base model are metadata of its file
(`formats.concept_file`): were they part of the pytree, every concept would trace anew, and concepts could not be
stacked along an axis for `jax.vmap`.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from perfusion_jax.method import edit

# Of a projection, by cross-attention layer.
Outputs = dict[str, Float32[Array, "*concepts _"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Concept:
    """One concept, or many stacked along a leading axis of every array. All arrays are float32.

    Attributes:
        embedding: the word embedding that stands at the placeholder token, [token_width]; those for several text
            encoders one after the other. Trained.
        target_input: i*, the encoding at the concept's token, [context_width]. State: a moving average, never a
            parameter.
        dual: C^-1 i*, [context_width]. Kept with i*, so that a trained concept can be used without C.
        key_outputs: o*_K by cross-attention layer, [out_width] each. Locked to the super-category: W_K i_super.
        value_outputs: o*_V by cross-attention layer, [out_width] each. Trained.
    """

    embedding: Float32[Array, "*concepts token_width"]
    target_input: Float32[Array, "*concepts context"]
    dual: Float32[Array, "*concepts context"]
    key_outputs: Outputs
    value_outputs: Outputs

    @classmethod
    def from_super_category(
        cls,
        projections: Mapping[str, Mapping[str, Mapping[str, Float[Array, "..."]]]],
        embedding: Float[Array, " token_width"],
        encoding: Float[Array, " context"],
        whitening: Float32[Array, "context context"],
    ) -> "Concept":
        """Returns the concept before training: in every way its super-category (paper, sections 4.1 and 4.2).

        Args:
            projections: the cross-attention layers, as `surgery.cross_attention_layers` finds them.
            embedding: the super-category's word embedding, [token_width]; the mean over its tokens if there are
                several.
            encoding: i_super, the encoding at the super-category's token, [context_width]; likewise the mean.
            whitening: C^-1/2, float32 [context_width, context_width].
        """
        target_input = jnp.asarray(encoding, jnp.float32)

        def outputs(projection: str) -> Outputs:
            return {
                layer: jnp.matmul(
                    target_input, weights[projection]["kernel"].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
                )
                for layer, weights in projections.items()
            }

        return cls(
            embedding=jnp.asarray(embedding, jnp.float32),
            target_input=target_input,
            dual=edit.dual(whitening, target_input),
            key_outputs=outputs("to_k"),
            value_outputs=outputs("to_v"),
        )

    def trainable(
        self, fields: Sequence[str] = ("embedding", "value_outputs")
    ) -> dict[str, Float32[Array, "..."] | Outputs]:
        """Returns the parameters that training moves, by field name; `dataclasses.replace` takes them back.

        Args:
            fields: which; with `key_outputs` among them, the keys are no longer locked (for ablation).
        """
        return {field: getattr(self, field) for field in fields}

    def with_target_input(
        self, target_input: Float32[Array, " context"], whitening: Float32[Array, "context context"]
    ) -> "Concept":
        """Returns the concept with another i* ([context_width]) and the dual that belongs to it."""
        return dataclasses.replace(self, target_input=target_input, dual=edit.dual(whitening, target_input))


def stack(concepts: Sequence[Concept]) -> Concept:
    """Stacks concepts of the same base model along a new leading axis of every array."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *concepts)
