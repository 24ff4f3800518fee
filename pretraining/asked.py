"""What pictures are asked for, the same by the world's own hand, and how many answer."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from perfusion_jax.base_model.clip import Clip
from pretraining import captions, clip, individuals, places, scenes, things, training_tools


@dataclasses.dataclass(frozen=True)
class Request:
    """What a picture should show: one or two kinds, and a place."""

    kinds: tuple[str, ...]
    place: str

    @property
    def prompt(self) -> str:
        """The request in words: "a photo of a dog and an owl at night"."""
        named = " and ".join(f"{captions.article(kind)} {kind}" for kind in self.kinds)
        return f"a photo of {named} {places.PHRASES[self.place]}"


def requests(seed: int, count: int, things_each: int) -> list[Request]:
    """Common kinds in places, chosen by a seed: every kind before any comes twice."""
    random = np.random.default_rng(seed)
    common = list(dict.fromkeys(entry.kind for entry in things.table() if entry.common))
    order = np.concatenate([random.permutation(common) for _ in range(-(-count * things_each // len(common)))])
    return [
        Request(
            tuple(dict.fromkeys(map(str, order[number * things_each : (number + 1) * things_each]))),
            str(random.choice(places.PLACES)),
        )
        for number in range(count)
    ]


def score(evaluator: Clip, pictures: np.ndarray, asked: Sequence[Request]) -> dict[str, float]:
    """Shares of pictures whose kinds are those that the evaluator ranks first, and whose place is.

    Args:
        evaluator: the CLIP that is asked.
        pictures: uint8 [count, side, side, 3].
        asked: what each should show.
    """
    embedded = evaluator.images(pictures)
    order = (embedded @ evaluator.texts(clip.kind_phrases()).T).argsort(1)[:, ::-1]
    at = np.stack([evaluator.texts(phrases).mean(0) for phrases in clip.place_phrases()])
    nearest = (embedded @ (at / np.linalg.norm(at, axis=1, keepdims=True)).T).argmax(1)
    kinds = things.kinds()
    found = [
        {kinds[index] for index in ranks[: len(request.kinds)]} == set(request.kinds)
        for ranks, request in zip(order, asked, strict=True)
    ]
    return {
        "kinds": float(np.mean(found)),
        "place": float(np.mean([places.PLACES[n] == r.place for n, r in zip(nearest, asked, strict=True)])),
    }


def rendered(world: scenes.World, asked: Sequence[Request], seed: int) -> np.ndarray:
    """What is asked for as the world draws it, whose scores are the ceiling: uint8 [count, side, side, 3].

    Args:
        world: has drawings of all kinds that are asked for.
        asked: what each picture shows.
        seed: of all else.
    """
    planner, generator = world.planner, training_tools.generator(seed)
    number = torch.tensor([len(request.kinds) for request in asked])
    slot = torch.cat([torch.arange(each) for each in number.tolist()])
    kind = torch.tensor([things.kinds().index(kind) for request in asked for kind in request.kinds])
    weights = planner.weights * (planner.kind == kind[:, None])
    drawing = torch.multinomial(weights, 1, generator=generator)[:, 0]
    scene = torch.arange(len(asked)).repeat_interleave(number)
    plan = scenes.Plan(
        things=individuals.invent(planner.colours, drawing, generator),
        views=planner.views(number[scene], slot, generator),
        scene=scene,
        slot=slot,
        worn=torch.zeros(len(slot), dtype=torch.bool),
        backgrounds=places.named(places.invent(len(asked), generator), [request.place for request in asked]),
        styles=torch.zeros(len(asked), dtype=torch.long),
    )
    return training_tools.to_pixels(world.draw(plan)[0])
