"""Where the files are that ship with the package."""

from pathlib import Path

CLIP_VOCABULARY = Path(__file__).parents[1] / "base_model" / "clip_vocabulary"
"""The vocabulary of CLIP, as vocab.json and merges.txt, for models in files that hold none."""

_EMOJI_WORLD = Path(__file__).parents[1] / "emoji_world"

MODEL = _EMOJI_WORLD / "model"
"""The small text-to-image model, in the diffusers layout."""

EVALUATOR = _EMOJI_WORLD / "clip"
"""The CLIP that judges pictures of that model, in transformers' layout."""

EXAMPLES = _EMOJI_WORLD / "examples"
"""Pictures of personal things to learn, a folder each."""
