"""The README.md of an export: the model card that the hub shows, and which words to write in which tool."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from perfusion_jax.base_model import BaseModel
from perfusion_jax.base_model.source import is_hub_id
from perfusion_jax.formats.concept_file import ConceptCard
from perfusion_jax.formats.lora import CLIP_NAMES
from perfusion_jax.runtime import shipped

WORD_FILE = "_word.safetensors"
HUB_LICENCES = (
    *("afl-3.0", "apache-2.0", "artistic-2.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause"),
    *("bsd-3-clause-clear", "bsl-1.0", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0"),
    *("cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0"),
    *("cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "creativeml-openrail-m"),
    *("gpl", "gpl-2.0", "gpl-3.0", "mit", "openrail", "openrail++", "unknown", "unlicense", "wtfpl"),
)
"""Licences of pictures and models to which the hub gives identifiers."""
SCENES = ("on the beach", "in the snow", "at night", "on a table", "in the city", "in the forest", "in the desert")
"""Where the card's prompts put the concepts; the first stands in what it says of each tool."""


class Example(NamedTuple):
    """A picture for the card.

    Attributes:
        prompt: by which it was drawn.
        pixels: uint8 [height, width, 3].
    """

    prompt: str
    pixels: np.ndarray


def example_file(number: int) -> str:
    """The name of an example's file, counted from 0."""
    return f"example_{number + 1}.png"


def prompt_for(concepts: Sequence[ConceptCard], scene: str, form: str = "<{}>") -> str:
    """A prompt with all concepts, each called as `form` says."""
    things = " and ".join(f"a {form.format(concept.name)}" for concept in concepts)
    return f"a photo of {things} {scene}"


@dataclass(frozen=True)
class Card:
    """What a model card is made of.

    Attributes:
        base: the model that the concepts were trained on.
        concepts: their cards.
        strengths: theirs.
        files: with the edit, then with the words in the order of the concepts, as far as there are any.
        gated: whether the edit keeps its gate.
        examples: pictures of it.
    """

    base: BaseModel
    concepts: Sequence[ConceptCard]
    strengths: Sequence[float]
    files: Sequence[str]
    gated: bool = False
    examples: Sequence[Example] = ()

    @property
    def weights(self) -> str:
        """The file with the edit, or empty."""
        return next((file for file in self.files if not file.endswith(WORD_FILE)), "")

    @property
    def words(self) -> list[str]:
        """The files of the words, or none."""
        return [file for file in self.files if file.endswith(WORD_FILE)]

    def text(self, kind: str) -> str:
        """The whole card of a kind of export, such as `lora`."""
        how = {
            "lora": self._lora,
            "lora-peft": self._peft,
            "bundle": self._bundle,
            "embedding": self._embedding,
            "pipeline": self._pipeline,
            "orbax": self._orbax,
        }
        names = " and ".join(concept.name for concept in self.concepts)
        gate = "" if kind == "embedding" or self.gated else _GATE
        shown = "".join(f"![{example.prompt}]({example_file(n)})\n" for n, example in enumerate(self.examples))
        facts = f"{self._table()}\n{shown}" if shown else self._table()
        return f"{self._front_matter(kind)}\n# {names}\n\n{facts}{gate}\n## How to draw it\n\n{how[kind]()}"

    def _front_matter(self, kind: str) -> str:
        """YAML, in which JSON's strings are strings, whatever they hold."""
        licences = {concept.licence for concept in self.concepts}
        licence = (licences.pop() if len(licences) == 1 else "") or "unknown"
        known = re.sub(r"[\s_]+", "-", licence.strip().lower())
        # Of others the hub takes a name of letters and digits beside "other"; the card's table has it as it was given.
        named = [f"license: {known}"]
        if known not in HUB_LICENCES:
            slug = re.sub(r"[^a-z0-9.]+", "-", known).strip("-") or "unnamed"
            named = ["license: other", f"license_name: {slug}"]
        tags = ["text-to-image", "diffusers", "perfusion"]
        tags += ["lora", "template:sd-lora"] if kind.startswith("lora") else []
        lines = [
            *named,
            "library_name: diffusers",
            *([f"base_model: {json.dumps(self.base.name)}"] if is_hub_id(self.base.name) else []),
            f"instance_prompt: {json.dumps(self._prompt())}",
            "widget:",
            *(self._widgets() or [f"- text: {json.dumps(self._prompt())}"]),
            "tags:",
            *(f"- {tag}" for tag in tags),
        ]
        return "\n".join(["---", *lines, "---", ""])

    def _widgets(self) -> list[str]:
        """The pictures that the hub's page shows."""
        lines = []
        for number, example in enumerate(self.examples):
            lines += [f"- text: {json.dumps(example.prompt)}", "  output:", f"    url: {example_file(number)}"]
        return lines

    def _table(self) -> str:
        rows = "\n".join(
            f"| {concept.name} | {concept.super_category} | {concept.step} | {strength:g} "
            f"| {concept.licence or 'not said'} |"
            for concept, strength in zip(self.concepts, self.strengths, strict=True)
        )
        return f"""\
Learnt by [Perfusion](https://arxiv.org/abs/2305.01644) with `perfusion_jax` on `{self.base.name}`. It is of use with
that base model, or a fine-tune that is near it, alone.

| concept | is a | steps | strength | licence of its pictures |
| --- | --- | --- | --- | --- |
{rows}
"""

    def _lora(self) -> str:
        words = " and ".join(f"`{file}`" for file in self.words)
        return f"""\
Both are needed, the LoRA and the word.

**A1111, Forge, SD.Next**: `{self.weights}` goes into `models/Lora`, {words} into `embeddings`. Write
`{self._prompt("{}_word")} <lora:{_stem(self.weights)}:1>`.

**ComfyUI**: `{self.weights}` goes into `models/loras`, {words} into `models/embeddings`. A node *Load LoRA* stands
between checkpoint and sampler. Write `{self._prompt("embedding:{}_word")}`.

**kohya's sd-scripts**: `--network_module networks.lora --network_weights {self.weights}
--textual_inversion_embeddings {" ".join(self.words)}`. Write `{self._prompt("{}_word")}`.

**OneTrainer**: `{self.weights}` as the LoRA, {words} as additional embeddings.

{self._diffusers()}"""

    def _peft(self) -> str:
        return self._diffusers()

    def _bundle(self) -> str:
        return f"""\
**A1111, SD.Next**: `{self.weights}` goes into `models/Lora`. Write
`{self._prompt("{}_word")} <lora:{_stem(self.weights)}:1>`.

Other tools pass the words over, or refuse the file: export `lora` for them.
"""

    def _embedding(self) -> str:
        return f"""\
These are the words alone, without the edit that goes with them: the concept's kind and colours, and not much more.

**A1111, Forge, SD.Next**: into `embeddings`. Write `{self._prompt("{}_word")}`.

**ComfyUI**: into `models/embeddings`. Write `{self._prompt("embedding:{}_word")}`.

{self._diffusers()}"""

    def _pipeline(self) -> str:
        return f"""\
This is a whole model with the concept in it: what the base model's licence says holds for it, too.

**diffusers**:

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(".", torch_dtype=torch.float32)
picture = pipe({json.dumps(self._prompt())}).images[0]
```

**perfusion_jax**: `--base` with this folder, and no `--concept`.
"""

    def _orbax(self) -> str:
        return f"""\
`tree` is an Orbax checkpoint: `unet`, the parameters of diffusers' `FlaxUNet2DConditionModel`, and `words`, the word
embeddings of the concepts, a row for each.

```python
import jax
import orbax.checkpoint as ocp

folder = "/path/to/this/folder/tree"
here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # or any other, leaf by leaf
with ocp.StandardCheckpointer() as checkpointer:
    leaves = checkpointer.metadata(folder).item_metadata.tree
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), leaves)
    tree = checkpointer.restore(folder, target)
```

**perfusion_jax**: `--tree` with this folder, and the prompt `{self._prompt()}`.
"""

    def _diffusers(self) -> str:
        loading = [f'pipe.load_lora_weights(".", weight_name="{self.weights}")'] if self.weights else []
        name, path = self.base.name, self.base.layout.path
        xl = len(self.base.model.text_encoders) > 1
        # Left to itself, the newest diffusers mixes the dtypes of files in half precision.
        dtype = "torch_dtype=torch.float32"
        opened = f"DiffusionPipeline.from_pretrained({json.dumps(name)}, {dtype})"
        if path.is_file():
            kind = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
            opened = f"{kind}.from_single_file({json.dumps(name)}, {dtype})"
        elif path == shipped.MODEL:
            opened = f"DiffusionPipeline.from_pretrained(shipped.MODEL, {dtype})"
        lines = [
            "import torch",
            f"from diffusers import {opened.partition('.')[0]}",
            *(["from perfusion_jax.runtime import shipped"] if path == shipped.MODEL else []),
            *(["from safetensors.torch import load_file"] if xl else []),
            "",
            f"pipe = {opened}",
            *loading,
            *self._loading_words(),
            f"picture = pipe({json.dumps(self._prompt())}).images[0]",
        ]
        return "\n".join(["**diffusers**:", "", "```python", *lines, "```", ""])

    def _loading_words(self) -> list[str]:
        encoders = self.base.model.text_encoders
        named = list(zip(self.words, (concept.placeholder for concept in self.concepts), strict=True))
        if len(encoders) == 1:
            return [f'pipe.load_textual_inversion("{file}", token="{word}")' for file, word in named]
        lines = []
        for file, word in named:
            lines.append(f'words = load_file("{file}")')
            for key, encoder in zip(CLIP_NAMES, encoders, strict=True):
                parts = f"text_encoder=pipe.{encoder.component}, tokenizer=pipe.{encoder.tokenizer}"
                lines.append(f'pipe.load_textual_inversion(words["{key}"], token="{word}", {parts})')
        # Older configs say 2, by which transformers takes the vector of a prompt where the id is largest: the word's.
        lines.append("# The vector for a whole prompt is read at its end, and not at the new word.")
        lines += [
            f"pipe.{encoder.component}.text_model.eos_token_id = pipe.{encoder.tokenizer}.eos_token_id"
            for encoder in encoders
        ]
        return lines

    def _prompt(self, form: str = "<{}>") -> str:
        return prompt_for(self.concepts, SCENES[0], form)


_GATE = """
The rank-one edit is baked into plain weights, which have no gate: words near the concept's own are changed more than
where `perfusion_jax` draws it, and so are negative prompts. Where pictures follow the concept too much, give it less
weight.
"""


def _stem(file: str) -> str:
    return file.removesuffix(".safetensors")
