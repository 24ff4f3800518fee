"""The pinned Flax classes of diffusers and transformers, imported in this one place.

Both libraries log a line for every Flax module they build, saying that a later release drops the class. The releases
are pinned, so the line tells a user nothing; it alone is filtered out here.
"""

import logging


def _is_not_flax_deprecation(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not message.startswith(("Flax classes are deprecated", "TensorFlow and JAX classes are deprecated"))


# A logger's filter does not see its children's records: each module that logs the line gets one, before its import.
for _module in (
    "diffusers.models.attention_flax",
    "diffusers.models.embeddings_flax",
    "diffusers.models.modeling_flax_utils",
    "diffusers.models.resnet_flax",
    "diffusers.models.unets.unet_2d_blocks_flax",
    "diffusers.models.unets.unet_2d_condition_flax",
    "diffusers.models.vae_flax",
    "transformers.modeling_flax_utils",
):
    logging.getLogger(_module).addFilter(_is_not_flax_deprecation)

from diffusers.models.attention_flax import (  # noqa: E402
    FlaxAttention,
    FlaxBasicTransformerBlock,
    FlaxGEGLU,
    FlaxTransformer2DModel,
)
from diffusers.models.resnet_flax import FlaxResnetBlock2D, FlaxUpsample2D  # noqa: E402
from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel  # noqa: E402
from diffusers.models.vae_flax import FlaxAutoencoderKL  # noqa: E402
from transformers import (  # noqa: E402
    CLIPConfig,
    CLIPSegConfig,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    Dinov2Config,
    ViTConfig,
)
from transformers.models.clip.modeling_flax_clip import (  # noqa: E402
    FlaxCLIPAttention,
    FlaxCLIPMLP,
    FlaxCLIPModule,
    FlaxCLIPTextModelWithProjectionModule,
    FlaxCLIPTextModule,
    FlaxCLIPTextTransformer,
    FlaxCLIPVisionTransformer,
)
from transformers.models.dinov2.modeling_flax_dinov2 import FlaxDinov2Module  # noqa: E402
from transformers.models.vit.modeling_flax_vit import FlaxViTModule  # noqa: E402

__all__ = [
    "CLIPConfig",
    "CLIPSegConfig",
    "CLIPTextConfig",
    "CLIPTokenizer",
    "CLIPVisionConfig",
    "Dinov2Config",
    "FlaxAttention",
    "FlaxAutoencoderKL",
    "FlaxBasicTransformerBlock",
    "FlaxCLIPAttention",
    "FlaxCLIPMLP",
    "FlaxCLIPModule",
    "FlaxCLIPTextModelWithProjectionModule",
    "FlaxCLIPTextModule",
    "FlaxCLIPTextTransformer",
    "FlaxCLIPVisionTransformer",
    "FlaxDinov2Module",
    "FlaxGEGLU",
    "FlaxResnetBlock2D",
    "FlaxTransformer2DModel",
    "FlaxUNet2DConditionModel",
    "FlaxUpsample2D",
    "FlaxViTModule",
    "ViTConfig",
]
