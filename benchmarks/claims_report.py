"""docs/evidence.md: what `claims.py` has found, claim by claim, with intervals, plots and a sentence on each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from perfusion_jax.drawing.grids import grid
from perfusion_jax.evaluation.report import Front, front_plot, points, summarise
from perfusion_jax.evaluation.statistics import Estimate, area_difference, estimate
from perfusion_jax.formats.picture_file import write_picture
from perfusion_jax.learning.metrics import Scores
from perfusion_jax.runtime.files import write_bytes

Lines = Sequence[Mapping[str, Any]]
Fronts = dict[str, Front]

DEFAULT = "bias 0.6"


def split_off(lines: Lines, label: str, word: str) -> list[Mapping[str, Any]]:
    """Gives lines of a label whose setting begins with a word a label of their own, `LABEL-WORD`."""
    return [
        {**line, "label": f"{label}-{word}", "setting": line["setting"].removeprefix(f"{word} ")}
        if line["label"] == label and line["setting"].startswith(f"{word} ")
        else line
        for line in lines
    ]


def values(front: Front, setting: str, measure: str) -> dict[str, float]:
    """A measure of each concept, by name; `score` is what chooses the kept step."""
    rows = front.concepts[setting]
    if measure == "score":
        return {name: Scores(row["image"], row["text"], row["precision"]).score for name, row in rows.items()}
    return {name: row[measure] for name, row in rows.items()}


def difference(one: Mapping[str, float], other: Mapping[str, float]) -> Estimate:
    """The mean difference over the concepts of both."""
    return estimate([one[name] - other[name] for name in sorted(one.keys() & other.keys())])


def lead(fronts: Fronts, label: str, other: str) -> Estimate:
    """How much more one front dominates than another."""

    one, two = (fronts[key].concepts for key in (label, other))
    names = sorted(set.intersection(*(set(rows) for front in (one, two) for rows in front.values())))
    return area_difference(points(one, names), points(two, names))


def verdict(number: Estimate) -> str:
    """What an interval says of a claim that the number is above 0."""
    if number.low > 0:
        return "**Holds here.**"
    return "**Does not hold here.**" if number.high < 0 else "**Cannot be told here.**"


def written(number: Estimate, form: str = "+.3f") -> str:
    return f"{number.mean:{form}} ({number.low:{form}} to {number.high:{form}})"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def front_table(fronts: Fronts, labels: Sequence[str]) -> str:
    rows = [
        [label, setting, *(written(row[key], ".3f") for key in ("image", "text", "precision"))]
        for label in labels
        for setting, row in fronts[label].settings.items()
    ]
    return table(["variant", "setting", "image similarity", "text similarity", "prompt precision"], rows)


class Made(NamedTuple):
    """How the numbers were made.

    Attributes:
        command: that gives them.
        base: the model.
        seeds: times that each variant was learnt.
        rates: learning rates that were chosen, by variant; empty where none were.
    """

    command: str
    base: str
    seeds: int
    rates: Mapping[str, Mapping[str, float]]


class Evidence:
    """All that was found; each method writes of a claim: a title, and its text."""

    def __init__(self, full: Lines, few: Lines, measured: Mapping[str, Any]):
        self.full: Fronts = summarise(split_off(full, "perfusion", "global"))
        self.few: Fronts = summarise(split_off(few, "perfusion", "temperature"))
        self.measured = measured

    def leads(self, fronts: Fronts, labels: Sequence[str], over: str) -> str:
        rows = [[label, written(lead(fronts, over, label))] for label in labels]
        return table(["variant", f"area that {over} dominates beyond its"], rows)

    def c1(self) -> tuple[str, str]:
        size = self.measured["size"]
        ratio = size["model"] / size["files"]["perfusion"]
        rows = [[label, f"{count / 1000:,.0f} KB"] for label, count in size["files"].items()]
        text = f"The model's weights are {size['model'] / 1e6:,.0f} MB in float32: {ratio:,.0f} times a concept."
        return (
            "a concept is five orders of magnitude smaller than the model",
            f"{text}\n\n{table(['method', 'file'], rows)}",
        )

    def c2(self) -> tuple[str, str]:
        rows = [
            [label, f"{found['each']:.0f}", f"{np.mean(found['kept']):.0f}"]
            for label, found in self.measured["seconds"].items()
        ]
        heads = ["method", "seconds a concept, learnt in a fleet", "step that was kept, mean"]
        text = "Without compiling, and without the pictures that DreamBooth and Custom Diffusion have drawn first."
        return "minutes of training", f"{text}\n\n{table(heads, rows)}"

    def c3(self) -> tuple[str, str]:
        labels = ["perfusion", "trained-keys", "perfusion-global"]
        found = lead(self.full, "perfusion", "trained-keys")
        text = f"{verdict(found)} The area of locked keys is larger by {written(found)} than that of trained ones."
        return "locked keys have a better front than trained ones", f"{text}\n\n{front_table(self.full, labels)}"

    def c4(self) -> tuple[str, str]:
        one, other = (values(self.few[label], DEFAULT, "text") for label in ("perfusion", "mask-none"))
        found = difference(one, other)
        text = f"{verdict(found)} With its own masks text similarity is higher by {written(found)} than without."
        labels = ["perfusion", "mask-found", "mask-none"]
        return "the soft mask raises text similarity", f"{text}\n\n{front_table(self.few, labels)}"

    def c5(self) -> tuple[str, str]:
        labels = ["beta-55", "beta-65", "perfusion", "beta-85"]
        found = lead(self.few, "perfusion", "beta-55")
        text = f"{verdict(found)} Learnt at 0.75 (`perfusion`) the area is larger by {written(found)} than at 0.55."
        return "a higher bias in training gives a better front", f"{text}\n\n{front_table(self.few, labels)}"

    def c6(self) -> tuple[str, str]:
        front = self.few["perfusion-temperature"]
        scores = {setting: values(front, setting, "score") for setting in front.settings}
        found = difference(scores["0.15"], scores["0.1"])
        best = max(scores, key=lambda setting: np.mean(list(scores[setting].values())))
        text = (
            f"{verdict(found)} The harmonic mean of image similarity and prompt precision is higher by "
            f"{written(found)} at 0.15 than at training's 0.1; it is highest at {best}."
        )
        return (
            "a higher temperature when drawing than in training is better, 0.15 best",
            f"{text}\n\n{front_table(self.few, ['perfusion-temperature'])}",
        )

    def c7(self) -> tuple[str, str]:
        parts = []
        for measure, words in (("image", "image similarity"), ("text", "text similarity")):
            one, all_of_them = (values(self.few[label], DEFAULT, measure) for label in ("pictures-1", "perfusion"))
            parts.append(f"{words} changes by {written(difference(one, all_of_them))}")
        text = f"Learnt from one picture, and not from all of them, {' and '.join(parts)}."
        labels = ["pictures-1", "pictures-2", "perfusion"]
        return "one picture suffices, with little more overfitting", f"{text}\n\n{front_table(self.few, labels)}"

    def c8(self) -> tuple[str, str]:
        front = self.full["perfusion"]
        first, *_, last = front.settings
        image, text_range = (
            difference(values(front, low, key), values(front, high, key))
            for key, low, high in (("image", first, last), ("text", last, first))
        )
        both = min(image, text_range, key=lambda number: number.low)
        return (
            "one file spans the front by its bias alone",
            f"{verdict(both)} From {first} to {last} image similarity falls by {written(image)} and text similarity "
            f"rises by {written(text_range)}.",
        )

    def c9(self) -> tuple[str, str]:
        others = [label for label in self.full if label.partition("-")[0] not in ("perfusion", "trained", "plain")]
        leads = {label: lead(self.full, "perfusion", label) for label in others}
        words = " ".join(f"Against {label}: {verdict(found).strip('*.')}." for label, found in leads.items())
        ceiling = estimate(list(self.measured["likeness"].values()))
        text = (
            f"{words} Textual Inversion has no control to turn: its front is one point. Concepts' own pictures have an "
            f"image similarity of {written(ceiling, '.3f')} to each other."
        )
        return (
            "its front dominates those of other methods",
            f"{text}\n\n![fronts](evidence/fronts.svg)\n\n{self.leads(self.full, others, 'perfusion')}\n\n"
            f"{front_table(self.full, ['plain', 'perfusion', *others])}",
        )

    def c10(self) -> tuple[str, str]:
        found = self.measured["variety"]
        varied = difference(found["global"], found["local"])
        fronts = (self.full["perfusion-global"], "bias 0.5"), (self.full["perfusion"], DEFAULT)
        place = difference(*(values(front, setting, "precision") for front, setting in fronts))
        return (
            "the global lock gives richer scenes and more variety",
            f"{verdict(varied)} The mean distance between pictures of one prompt (1 - cosine, by the CLIP) is larger "
            f"by {written(varied)} under the global lock (bias 0.5) than under the local one (0.6); prompt precision "
            f"is higher by {written(place)}.",
        )

    def c11(self) -> tuple[str, str]:
        rows = []
        for count, shares in self.measured["together"].items():
            each, everyone, plain = (
                written(estimate(list(shares[key].values())), ".2f") for key in ("each", "all", "plain")
            )
            rows.append([count, each, everyone, plain])
        two = self.measured["together"]["2"]
        found = difference(two["each"], two["plain"])
        text = f"{verdict(found)} Each of two concepts is found in {written(found)} more of their pictures "
        heads = ["concepts", "each is there", "all are there", "each, drawn by its super-category's word"]
        return (
            "concepts that were learnt apart combine in one picture",
            f"{text}than where only their super-categories are named.\n\n{table(heads, rows)}",
        )

    def c12(self) -> tuple[str, str]:
        found = self.measured["looked_at"]
        if not {"perfusion", "dreambooth"} <= found.keys():
            return "attention stays on the object", "Cannot be told here: no masks, or all concepts diverged."
        rows = [[label, written(estimate(list(shares.values())), ".2f")] for label, shares in found.items()]
        held = difference(found["perfusion"], found["dreambooth"])
        return (
            "locked keys keep the word's attention on the object",
            f"{verdict(held)} The share of the word's attention that falls on the thing, over the share of its area, "
            f"is larger by {written(held, '+.2f')} than DreamBooth's.\n\n"
            f"{table(['method', 'attention on the thing, over its area'], rows)}",
        )

    def c13(self) -> tuple[str, str]:
        found = self.measured["of_eight"]
        several = estimate([float(np.mean(np.array(counts) >= 2)) for counts in found.values()])
        half = Estimate(*(number - 0.5 for number in several))
        return (
            "eight seeds usually hold several good pictures",
            f"{verdict(half)} Of eight pictures of a prompt at least two are good in {written(several, '.2f')} of the "
            "cases; claimed is more than half. Good is a picture that is at least 0.8 times as near to the thing's own "
            "pictures as these are to each other, and that has at least 0.9 times the text similarity of the plain "
            "model's pictures of the prompt.",
        )

    def c14(self) -> tuple[str, str]:
        found = {int(place): list(gates.values()) for place, gates in self.measured["gates"].items()}
        rows = [
            [f"{place:+d}" if place else "the word", written(estimate(gates), ".2f")] for place, gates in found.items()
        ]
        after = estimate(found[1]) if 1 in found else estimate([0.0])
        above = Estimate(*(number - 0.1 for number in after))
        return (
            "a concept speaks at several positions, not only at its word",
            f"{verdict(above)} Right after its word the gate is open by {written(after, '.2f')}; claimed is more than "
            f"0.1.\n\n{table(['place from the word', 'gate'], rows)}",
        )

    def c15(self) -> tuple[str, str]:
        labels = ["decay-0", "decay-0_9", "perfusion", "decay-0_999", "straight-through"]
        if "decay-0" not in self.few:
            return "the moving average of i* is needed", "**Holds here.** Without it all concepts diverge."
        labels = [label for label in labels if label in self.few]
        found = lead(self.few, "perfusion", "decay-0")
        rows = [[label, str(self.measured["diverged"][label])] for label in labels]
        return (
            "the moving average of i* is needed",
            f"{verdict(found)} With it (0.99, `perfusion`) the area is larger by {written(found)} than without.\n\n"
            f"{table(['variant', 'concepts that diverged'], rows)}\n\n{front_table(self.few, labels)}",
        )

    @property
    def claims(self) -> list[Callable[[], tuple[str, str]]]:
        """All of them, in the paper's order."""
        return [getattr(self, f"c{number}") for number in range(1, 16)]


def write_evidence(
    docs: epath.Path,
    full: Lines,
    few: Lines,
    measured: Mapping[str, Any],
    sheet: tuple[list[np.ndarray], list[str], list[str]],
    made: Made,
) -> None:
    """Writes evidence.md and evidence/ beside it.

    Args:
        docs: the folder.
        full, few: lines of scores by both protocols.
        measured: what `claims.MEASURES` have found.
        sheet: pictures, and the words beside their rows and columns.
        made: how.
    """
    evidence = Evidence(full, few, measured)
    concepts = sorted({line["name"] for line in full})
    write_picture(docs / "evidence" / "methods.png", grid(*sheet))
    write_bytes(docs / "evidence" / "fronts.svg", front_plot(evidence.full).encode())
    adapted = "Learning rates as published for Stable Diffusion, **not adapted to this model**, but for Perfusion's."
    if made.rates:
        rows = [[label, *(f"{name} {rate:g}" for name, rate in rates.items())] for label, rates in made.rates.items()]
        adapted = "Learning rates, chosen on other concepts by the score that chooses the kept step: "
        adapted += "; ".join(f"{label}: {', '.join(words)}" for label, *words in rows) + "."
    parts = [
        "# Evidence",
        f"The claims of the paper, tried on {len(concepts)} concepts ({', '.join(concepts)}), each learnt "
        f"{made.seeds} times by each variant, on the model `{made.base}`. Everything on this page is what",
        f"```sh\n{made.command}\n```",
        "wrote. Numbers in brackets are bootstrap intervals of 95 % over concepts. Image similarity is the mean cosine "
        "over all pairs of drawn and own pictures, text similarity that with the prompt, the super-category's word in "
        "place of the concept's ([evaluation](evaluation.md)). A claim holds here where the interval is above 0. C2 "
        "and C10 to C14 are measured on the first seed alone.",
        adapted,
        "![each concept by each method, in the snow](evidence/methods.png)",
    ]
    for number, claim in enumerate(evidence.claims, 1):
        title, text = claim()
        parts += [f"## C{number}: {title}", text]
    write_bytes(docs / "evidence.md", ("\n\n".join(parts) + "\n").encode())
