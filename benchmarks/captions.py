"""How far C of made-up captions is from C of real ones, and how many captions are enough.

    python benchmarks/captions.py --captions FILE --base BASE

FILE has real captions, one on a line; half of them give the C that others are compared with, the other half tells how
much two samples of real captions differ. For common words as concepts, and for every token of 300 captions of the other
half, it compares how much of the token is the concept, s = <i*, e> / <i*, i*>, and how far the gate opens for it (beta
0.6, tau 0.15).
"""

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from perfusion_jax import load_base_model
from perfusion_jax.base_model import BaseModel
from perfusion_jax.data.caption_source import make_captions
from perfusion_jax.data.measuring import CAPTIONS_PER_DIMENSION
from perfusion_jax.data.text_covariance import accumulate, covariance_of
from perfusion_jax.formats.covariance_file import load_covariance

CONCEPTS = ("dog", "cat", "teddy bear", "car", "cup", "robot", "flower", "house", "shoe", "guitar", "bird", "boat")
BIAS, TEMPERATURE = 0.6, 0.15


def measure(base: BaseModel, captions: Sequence[str], folder: Path, name: str) -> np.ndarray:
    """C of some captions, float64 [width, width]."""
    file = folder / f"{name}.txt"
    file.write_text("".join(f"{caption}\n" for caption in captions))
    progress = None
    for progress in tqdm(accumulate(base, file), total=-(-len(captions) // 64), desc=name):  # noqa: B007
        pass
    return covariance_of(progress, file)


def similarities(base: BaseModel, covariance: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """How much of each token of some captions is each concept: float64 [concepts x tokens]."""
    tokenizer = base.model.tokenizer
    ids, is_real = tokenizer.captions(captions)
    tokens = np.asarray(base.model.encode(base.params, ids).tokens, np.float64)[is_real]
    rows = []
    for word in CONCEPTS:
        if tokenizer.in_pieces(word):
            continue
        ids, is_word = tokenizer.locate("a photo of a {}", word)
        target = np.asarray(base.model.encode(base.params, ids[None]).tokens, np.float64)[0][is_word].mean(axis=0)
        dual = np.linalg.solve(covariance, target)
        rows.append(tokens @ dual / (target @ dual))
    return np.concatenate(rows)


def gate(similarity: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-(similarity - BIAS) / TEMPERATURE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=Path, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--most", type=int, default=20_000, help="real captions that are read")
    parser.add_argument("--counts", type=int, nargs="*", default=(), help="numbers of captions that are compared")
    parser.add_argument("--other", type=Path, help="a file of C that is compared, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = load_base_model(options.base)
        usual = CAPTIONS_PER_DIMENSION * base.model.context_width
        real = options.captions.read_text().splitlines()
        random.Random(0).shuffle(real)
        half = min(options.most, len(real)) // 2
        reference = measure(base, real[:half], folder, f"{half} real captions")
        words = base.model.tokenizer.whole_words
        found = {f"{half} other real captions": measure(base, real[half : 2 * half], folder, "others")}
        for count in sorted({*options.counts, usual}):
            name = f"{count} made-up captions"
            found[name] = measure(base, list(make_captions(words, count)), folder, name)
        if options.other:
            found[options.other.name] = load_covariance(options.other, base.model.context_width)
        probes = real[half : half + 300]
        expected = similarities(base, reference, probes)
        print("C of                            condition   |s - s'| mean    largest   gate: mean     largest")
        for name, covariance in {f"{half} real captions": reference, **found}.items():
            ours = similarities(base, covariance, probes)
            off, opened = np.abs(ours - expected), np.abs(gate(ours) - gate(expected))
            eigenvalues = np.linalg.eigvalsh(covariance)
            print(
                f"{name:30s} {eigenvalues[-1] / eigenvalues[0]:10.3g} {off.mean():16.4f} {off.max():10.4f} "
                f"{opened.mean():12.4f} {opened.max():10.4f}"
            )
        print(f"mean of |s| {np.abs(expected).mean():.4f}, of the gate {gate(expected).mean():.4f}")


if __name__ == "__main__":
    main()
