"""The pinned Flax classes of diffusers and transformers, imported in this one place.

Both libraries log a line for every Flax module they build, saying that a later release drops the class. The
releases are pinned, so the line tells a user nothing; it alone is filtered out here.
"""

import logging

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


def _is_not_flax_deprecation(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not message.startswith(("Flax classes are deprecated", "TensorFlow and JAX classes are deprecated"))


# Filters of a logger do not see the records of its children; those of its handlers do.
for _library in (diffusers_logging, transformers_logging):
    _library.get_logger()  # installs the library's default handler
    for _handler in logging.getLogger(_library.__name__.split(".")[0]).handlers:
        _handler.addFilter(_is_not_flax_deprecation)

from diffusers.models.attention_flax import FlaxAttention, FlaxGEGLU, FlaxTransformer2DModel  # noqa: E402
from diffusers.models.unets.unet_2d_condition_flax import FlaxUNet2DConditionModel  # noqa: E402
from diffusers.models.vae_flax import FlaxAutoencoderKL  # noqa: E402
from transformers import CLIPTextConfig, CLIPTokenizer  # noqa: E402
from transformers.models.clip.modeling_flax_clip import FlaxCLIPTextModule  # noqa: E402

__all__ = [
    "CLIPTextConfig",
    "CLIPTokenizer",
    "FlaxAttention",
    "FlaxAutoencoderKL",
    "FlaxCLIPTextModule",
    "FlaxGEGLU",
    "FlaxTransformer2DModel",
    "FlaxUNet2DConditionModel",
]
