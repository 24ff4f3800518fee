"""Sheets of where a picture looked at each word of its prompt."""

from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image

from perfusion_jax.base_model.text import PromptTokenizer
from perfusion_jax.drawing.generation import Drawn
from perfusion_jax.drawing.grids import grid
from perfusion_jax.drawing.recipe import Recipe
from perfusion_jax.formats.picture_file import write_picture


def write_attention(recipe: Recipe, batches: Sequence[Drawn], tokenizer: PromptTokenizer, folder: epath.Path) -> None:
    """Writes a sheet per picture: the picture, and for every word how much each part of it looked at the word.

    Each map is stretched from its least (dark) to its largest share of attention (light); both stand beside the word.

    Raises:
        InputError, UnavailableError: they cannot be written.
    """
    pictures = np.concatenate([some.pixels for some in batches])
    maps = np.concatenate([some.attention for some in batches if some.attention is not None])
    names = [f"<{entry['name']}>" for entry in recipe.concepts]
    for number, (picture, seen) in enumerate(zip(pictures, maps, strict=True)):
        words = tokenizer.pieces(recipe.prompts[number], names)
        shown, labels = [picture], ["picture"]
        for position, word in words:
            share = seen[:, :, position]
            least, most = float(share.min()), float(share.max())
            large = Image.fromarray((share - least) / max(most - least, 1e-9)).resize(
                picture.shape[1::-1], Image.Resampling.BILINEAR
            )
            shown.append((picture * (0.15 + 0.85 * np.asarray(large)[..., None])).astype(np.uint8))
            labels.append(f"{word} {least:.2f}-{most:.2f}")
        write_picture(folder / f"{number}.png", grid([np.stack(shown)], column_labels=labels), recipe._asdict())
