"""A base model in one `.safetensors` file, in the original layout of Stable Diffusion 1.x, 2.x and XL."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from perfusion_jax.base_model.deduction import Prediction, deduce_configs, has_linear_projections
from perfusion_jax.base_model.original_layout import (
    SECOND_TEXT_ENCODER,
    TEXT_ENCODERS,
    UNET,
    VAE,
    OriginalCheckpoint,
    clip_name,
    is_open_clip,
    is_original_vae,
    is_passed_over,
    open_clip_name,
    unet_name,
    vae_name,
)
from perfusion_jax.base_model.other_files import check_dtypes, check_kind, check_parts, check_suffix
from perfusion_jax.base_model.tensor_headers import Header, Part, read_header
from perfusion_jax.base_model.weights import Checkpoint, Safetensors, opened_safetensors
from perfusion_jax.runtime.errors import InputError

# With this deviation of a bias, a UNet of Stable Diffusion 2 predicts the velocity (ComfyUI).
_VELOCITY_DEVIATION = 0.09
_VELOCITY = {"v": True, "v_prediction": True, "epsilon": False, "eps": False}
# Of these, which programs write, the first is of Stability's model specification.
_PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
_NAMED = 5


@dataclass(frozen=True)
class SingleFile:
    """A base model in one file: configs deduced from its tensors, and its weights, which are read when asked for.

    Attributes:
        file: the model.
        vae_file: the file that the VAE is taken from instead, if one is.
        configs: by component: `unet`, `vae`, `text_encoder`, for XL `text_encoder_2`, and `scheduler`; each as a
            config.json of diffusers or transformers.
        index: what the model is made of, as a model_index.json.
        checkpoints: the weights of each component but `scheduler`.
    """

    file: Path
    vae_file: Path | None
    configs: dict[str, dict[str, Any]]
    index: dict[str, Any]
    checkpoints: Mapping[str, Checkpoint]

    def checkpoint(self, component: str) -> Checkpoint:
        """Returns the weights of a component, for `weights.read_tree`."""
        return self.checkpoints[component]


def open_single_file(file: Path, vae: Path | None = None) -> SingleFile:
    """Opens a model in one file; its weights are not read yet.

    Args:
        file: `.safetensors`, in the original layout.
        vae: a file whose VAE replaces the model's, in the original layout or in that of diffusers; None takes
            `MODEL.vae.safetensors` beside `MODEL.safetensors` if it is there.

    Raises:
        InputError: it is another kind of file, or not complete; the message names it and says what to do.
        UnavailableError: storage fails.
    """
    check_suffix(file)
    header = read_header(file)
    check_kind(header)
    prefixes = _find_parts(header)
    vae_file = vae or _vae_beside(file)
    check_parts(header, prefixes, vae_file)
    _check_all_known(header, prefixes)
    parts = {component: _part(header, component, prefix) for component, prefix in prefixes.items()}
    vae_header = header
    if vae_file is not None:
        check_suffix(vae_file)
        vae_header = read_header(vae_file)
        prefixes["vae"] = VAE if vae_header.has(VAE) else ""
        parts["vae"] = _part(vae_header, "vae", prefixes["vae"])
    for part in parts.values():
        check_dtypes(part)
    configs = deduce_configs(parts, _prediction(header, parts["unet"]))
    checkpoints: dict[str, Checkpoint] = {}
    for component, part in parts.items():
        source = vae_header if component == "vae" else header
        names = frozenset(part.tensors)
        rename = _rename(component, part, configs[component])
        checkpoints[component] = OriginalCheckpoint(source.file, prefixes[component], names, rename)
    if not is_original_vae(parts["vae"].tensors):
        checkpoints["vae"] = Safetensors([vae_header.file])
    return SingleFile(file, vae_file, configs, _index(configs), checkpoints)


def _find_parts(header: Header) -> dict[str, str]:
    """Returns what the names of each component begin with, for those that the file has."""
    text_encoder = next((prefix for prefix in TEXT_ENCODERS if header.has(prefix)), None)
    candidates = {
        "unet": f"{UNET}input_blocks.",
        "vae": VAE,
        "text_encoder": text_encoder,
        "text_encoder_2": SECOND_TEXT_ENCODER,
    }
    found = {component: prefix for component, prefix in candidates.items() if prefix and header.has(prefix)}
    return {component: UNET if component == "unet" else prefix for component, prefix in found.items()}


def _part(header: Header, component: str, prefix: str) -> Part:
    needed = {
        name.removeprefix(prefix): tensor
        for name, tensor in header.tensors.items()
        if name.startswith(prefix) and not is_passed_over(name)
    }
    return Part(f"{header.file}: {component}", needed)


def _rename(component: str, part: Part, config: Mapping[str, Any]) -> Callable[[str], str]:
    if component == "unet":
        return partial(unet_name, config=config)
    if component == "vae":
        return partial(vae_name, config=config)
    return open_clip_name if is_open_clip(part.tensors) else clip_name


def _vae_beside(file: Path) -> Path | None:
    """Returns the VAE that is beside a model by the convention of A1111's web UI.

    Raises:
        InputError: there is one, and it cannot be read.
    """
    beside = file.with_suffix(".vae.safetensors")
    if beside.is_file():
        return beside
    for suffix in (".vae.pt", ".vae.ckpt"):
        if file.with_suffix(suffix).is_file():
            raise InputError(
                f"{file.with_suffix(suffix)}: a VAE that would replace the one of {file.name}, but pickles can run "
                "code and are never loaded: convert it to .safetensors, or move it away"
            )
    return None


def _check_all_known(header: Header, prefixes: Mapping[str, str]) -> None:
    known = tuple(prefixes.values())
    unknown = sorted(n for n in header.tensors if not n.startswith(known) and not is_passed_over(n))
    if unknown:
        more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        raise InputError(
            f"{header.file}: unexpected: {unknown[:_NAMED]}{more}; not a plain model of Stable Diffusion 1, 2 or XL"
        )


def _prediction(header: Header, unet: Part) -> Prediction:
    """Finds out what the UNet predicts.

    Marks in the file say so where there are some: tensors without numbers, or metadata. For Stable Diffusion 2 they
    are missing; there a statistic of one bias tells, which is a rule of thumb (ComfyUI's) for the published models: its
    standard deviation is above 0.09 where the UNet predicts the velocity. All others predict the noise.

    Raises:
        InputError: the metadata name something else.
    """
    if "v_pred" in header.tensors:
        return Prediction(velocity=True, zero_snr="ztsnr" in header.tensors)
    for key in _PREDICTION_KEYS:
        if key in header.metadata:
            named = header.metadata[key]
            if named not in _VELOCITY:
                raise InputError(f"{header.file}: it predicts {named!r}; supported are {', '.join(_VELOCITY)}")
            return Prediction(velocity=_VELOCITY[named], zero_snr="ztsnr" in header.tensors)
    last = unet.count(r"output_blocks\.(\d+)\.") - 1
    bias = f"output_blocks.{last}.1.transformer_blocks.0.norm1.bias"
    is_second = has_linear_projections(unet) and not header.has(SECOND_TEXT_ENCODER)
    if not is_second or bias not in unet.tensors:
        return Prediction()
    with opened_safetensors(header.file) as opened:
        return Prediction(velocity=bool(np.std(opened.get_tensor(UNET + bias), dtype=np.float64) > _VELOCITY_DEVIATION))


def _index(configs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a model_index.json of diffusers says of a model with these configs."""
    is_xl = "text_encoder_2" in configs
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"}
    for component, config in configs.items():
        library = "transformers" if "architectures" in config else "diffusers"
        index[component] = [library, config.get("_class_name") or config["architectures"][0]]
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    if is_xl:
        index |= {"tokenizer_2": ["transformers", "CLIPTokenizer"], "force_zeros_for_empty_prompt": True}
    return index
