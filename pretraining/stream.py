"""Endless scenes as the diffusion model sees them: drawn, encoded and worded just before they are needed.

A scene is used several times, each time with other noise and other words, since drawing and encoding it costs a good
part of a training step on a CPU. A ring holds the last few thousand scenes; every step replaces some of them and draws
its batch from all. What a step sees is a function of the seed and the step: a resumed run draws the ring anew.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader, IterableDataset
from transformers import CLIPTokenizer

from pretraining import captions, codes, scenes, training_tools
from pretraining.captions import Texts
from pretraining.diffusion import cover_cells
from pretraining.tokenizer import MODEL_MAX_LENGTH


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Scenes ready for training.

    Attributes:
        latents: float16 [count, channels, grid, grid].
        objects: float16 [count, grid, grid], how much of a cell things cover.
        code_pictures: uint8 [count, 4, CODE_SIDE, CODE_SIDE]: of the thing whose code a caption may hold; zeros without
            things.
        texts: captions of each scene in several wordings: arrays as of Texts with a second axis, [count, wordings,
            ...], on the CPU.
    """

    latents: torch.Tensor
    objects: torch.Tensor
    code_pictures: torch.Tensor
    texts: Texts


def word_table(tokenizer: CLIPTokenizer) -> dict[str, list[int]]:
    """Token ids of every word that captions hold. A code's place is held by a token that no word has."""
    table = {word: tokenizer(word, add_special_tokens=False).input_ids for word in captions.vocabulary()}
    return {**table, captions.CODE: [0]}


class _Plans(IterableDataset):
    """What is drawn in steps first, first + 1, ...: plans, words and the things that may be told by a code."""

    def __init__(
        self,
        planner: scenes.Planner,
        writer: captions.Writer,
        ids: dict[str, list[int]],
        tokenizer: CLIPTokenizer,
        seed: int,
        first: int,
        count: int,
        wordings: int,
    ) -> None:
        self.planner, self.writer, self.ids = planner, writer, ids
        self.start, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.seed, self.first, self.count, self.wordings = seed, first, count, wordings

    def __iter__(self) -> Iterator[tuple[scenes.Plan, Texts, torch.Tensor]]:
        workers = torch.utils.data.get_worker_info()
        offset, stride = (0, 1) if workers is None else (workers.id, workers.num_workers)
        step = self.first + offset
        while True:
            yield self.plan(step)
            step += stride

    def plan(self, step: int) -> tuple[scenes.Plan, Texts, torch.Tensor]:
        plan = self.planner.plan(self.seed, step, self.count)
        random = np.random.default_rng([self.seed, step])
        codable = self.writer.codable(plan, random)
        worded = [
            captions.to_texts(
                self.writer.write(plan, codable, random), self.ids, self.start, self.end, MODEL_MAX_LENGTH
            )
            for _ in range(self.wordings)
        ]
        texts = Texts(
            *(torch.stack([getattr(each, field.name) for each in worded], 1) for field in dataclasses.fields(Texts))
        )
        return plan, texts, torch.from_numpy(codable)


class Stream:
    """Batches of encoded scenes.

    Args:
        world: draws them.
        autoencoder: encodes them; on the world's device.
        tokenizer: of the text encoder.
        seed: of the sequence of scenes.
        batch_size: scenes in a batch.
        uses: how often a scene is used on average; divides `batch_size`.
        capacity: scenes in the ring; a multiple of `batch_size / uses`.
        workers: processes that invent and word scenes ahead; 0: none.
    """

    def __init__(
        self,
        world: scenes.World,
        autoencoder: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        seed: int,
        batch_size: int,
        uses: int = 4,
        capacity: int = 8_192,
        workers: int = 0,
    ) -> None:
        self.world, self.autoencoder, self.tokenizer = world, autoencoder, tokenizer
        self.writer, self.ids = captions.Writer(world.atlas), word_table(tokenizer)
        self.seed, self.batch_size, self.uses, self.workers = seed, batch_size, uses, workers
        self.fresh = batch_size // uses
        self.capacity = capacity // self.fresh * self.fresh

    def plans(self, first: int) -> Iterator[tuple[scenes.Plan, Texts, torch.Tensor]]:
        """What is drawn in steps first, first + 1, ..."""
        source = _Plans(
            self.world.planner, self.writer, self.ids, self.tokenizer, self.seed, first, self.fresh, self.uses
        )
        if not self.workers:
            return iter(source)
        return iter(DataLoader(source, batch_size=None, num_workers=self.workers, prefetch_factor=4))

    @torch.no_grad()
    def encode(self, plan: scenes.Plan, texts: Texts, codable: torch.Tensor, step: int) -> Encoded:
        """Draw and encode planned scenes."""
        painted = self.world.paint(plan.things)
        pictures, masks = self.world.draw(plan, painted)
        device = pictures.device
        with training_tools.autocast(device):
            latents = self.autoencoder.encode(pictures).latent_dist.mean
        generator = training_tools.generator(self.seed + 7, step)
        (told,) = torch.nonzero(codable >= 0, as_tuple=True)
        thing = codable[told].to(device)
        shown = codes.code_pictures(painted[thing], plan.things[codable[told]].to(device), generator)
        code_pictures = torch.zeros(len(pictures), *shown.shape[1:], dtype=torch.uint8, device=device)
        code_pictures[told.to(device)] = shown
        objects = cover_cells(masks, latents.shape[-1])
        return Encoded(latents.half(), objects.half(), code_pictures, texts)

    def batches(self, first_step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, Texts, torch.Tensor]]:
        """Latents, covered cells, captions and code pictures (as of `diffusion.make_batch`) of steps first_step, ..."""
        pieces = self.capacity // self.fresh
        ring: Encoded | None = None
        # A step sees the pieces `step` to `step + pieces - 1`; each has its own place, whatever step a run begins at.
        for number, (plan, texts, codable) in enumerate(self.plans(first_step), first_step):
            piece = self.encode(plan, texts, codable, number)
            if ring is None:
                ring = _empty_like(piece, self.capacity)
            _put(ring, piece, number % pieces * self.fresh)
            step = number - pieces + 1
            if step < first_step:
                continue
            random = training_tools.generator(self.seed + 9, step)
            chosen = torch.randperm(self.capacity, generator=random)[: self.batch_size]
            wording = torch.randint(self.uses, (self.batch_size,), generator=random)
            here = chosen.to(ring.latents.device)
            texts = Texts(*(getattr(ring.texts, field.name)[chosen, wording] for field in dataclasses.fields(Texts)))
            yield ring.latents[here].float(), ring.objects[here].float(), texts, ring.code_pictures[here]


def _empty_like(piece: Encoded, capacity: int) -> Encoded:
    def grown(array: torch.Tensor) -> torch.Tensor:
        return torch.empty(capacity, *array.shape[1:], dtype=array.dtype, device=array.device)

    texts = Texts(*(grown(getattr(piece.texts, field.name)) for field in dataclasses.fields(Texts)))
    return Encoded(grown(piece.latents), grown(piece.objects), grown(piece.code_pictures), texts)


def _put(ring: Encoded, piece: Encoded, place: int) -> None:
    end = place + len(piece.latents)
    for name in ("latents", "objects", "code_pictures"):
        getattr(ring, name)[place:end] = getattr(piece, name)
    for field in dataclasses.fields(Texts):
        getattr(ring.texts, field.name)[place:end] = getattr(piece.texts, field.name)
