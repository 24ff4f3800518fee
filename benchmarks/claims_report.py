"""docs/evidence.md: what `claims.py` has found, claim by claim, with intervals, plots and a sentence on each."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from perfusion_jax.drawing.grids import grid
from perfusion_jax.evaluation.report import Front, front_plot, points, summarise
from perfusion_jax.evaluation.statistics import Estimate, area_difference, dominated_area, estimate
from perfusion_jax.formats.picture_file import write_picture
from perfusion_jax.learning.metrics import Scores
from perfusion_jax.runtime.files import write_bytes

Lines = Sequence[Mapping[str, Any]]
Fronts = dict[str, Front]

DEFAULT = "bias 0.6"
LEAST = 8  # concepts; of fewer an interval says little

# Margins, stated before the study was run.
MAGNITUDES = 1e5  # C1: times that the model is larger than a concept
MINUTES = 10.0  # C2: "minutes of training"
KEPT = 0.9  # C7: share of both similarities that is left of one picture: "little more overfitting"
LOST = 0.5  # C15: share of concepts that diverge more than with the average, at which "needed" is plain
SPANNED = 0.5  # C8: share of the way from the plain model's image similarity to the most faithful other method's


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


def difference(one: Mapping[str, float], other: Mapping[str, float], share: float = 1.0) -> Estimate:
    """The mean difference over the concepts of both; of the other's values a share."""
    return interval([one[name] - share * other[name] for name in sorted(one.keys() & other.keys())])


def interval(numbers: Sequence[float]) -> Estimate:
    """The mean over concepts, and its interval; of fewer than LEAST, no interval."""
    if len(numbers) < LEAST:
        return Estimate(float(np.mean(numbers)) if numbers else math.nan, math.nan, math.nan)
    return estimate(numbers)


def less(number: Estimate, margin: float) -> Estimate:
    """A number beyond a margin."""
    return Estimate(*(each - margin for each in number))


def weakest(*numbers: Estimate) -> Estimate:
    """Of what has all to be above 0: what is surely not, else the least sure."""
    refuted = [number for number in numbers if number.high < 0]
    if refuted:
        return min(refuted, key=lambda number: number.high)
    return min(numbers, key=lambda number: -math.inf if math.isnan(number.low) else number.low)


def lead(fronts: Fronts, label: str, other: str) -> Estimate:
    """How much more one front dominates than another."""

    one, two = (fronts[key].concepts for key in (label, other))
    names = common(fronts, label, other)
    found = area_difference(points(one, names), points(two, names))
    return found if len(names) >= LEAST else Estimate(found.mean, math.nan, math.nan)


def common(fronts: Fronts, label: str, other: str) -> list[str]:
    """The concepts that both have under all of their settings."""
    return sorted(set.intersection(*(set(rows) for key in (label, other) for rows in fronts[key].concepts.values())))


def wins(fronts: Fronts, label: str, other: str) -> str:
    """On how many concepts a front dominates more than another, and on which less."""
    names = common(fronts, label, other)
    areas = [dominated_area(points(fronts[key].concepts, names)) for key in (label, other)]
    lost = [name for name, one, two in zip(names, *areas, strict=True) if one <= two]
    return f"{len(names) - len(lost)} of {len(names)}" + (f"; not on {', '.join(lost)}" if lost else "")


def verdict(number: Estimate) -> str:
    """What an interval says of a claim that the number is above 0."""
    if number.low > 0:
        return "**Holds here.**"
    return "**Does not hold here.**" if number.high < 0 else "**Cannot be told here.**"


def written(number: Estimate, form: str = "+.3f") -> str:
    if math.isnan(number.low):
        return f"{number.mean:{form}} (too few concepts for an interval)"
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


class Tuned(NamedTuple):
    """Learning rates of a method.

    Attributes:
        rates: that were chosen.
        scores: on other concepts, by how many times the published rates were taken.
    """

    rates: dict[str, float]
    scores: dict[str, float]


class Made(NamedTuple):
    """How the numbers were made.

    Attributes:
        command: that gives them.
        base: the model.
        seeds: times that each variant was learnt.
        tuned: learning rates that were chosen, by variant; empty where none were.
    """

    command: str
    base: str
    seeds: int
    tuned: Mapping[str, Tuned]


class Evidence:
    """All that was found; each method writes of a claim: a title, and its text."""

    def __init__(self, full: Lines, few: Lines, measured: Mapping[str, Any]):
        self.full: Fronts = summarise(split_off(full, "perfusion", "global"))
        self.few: Fronts = summarise(split_off(few, "perfusion", "temperature"))
        self.measured = measured

    def leads(self, fronts: Fronts, labels: Sequence[str], over: str) -> str:
        rows = [[label, written(lead(fronts, over, label)), wins(fronts, over, label)] for label in labels]
        return table(["variant", f"area that {over} dominates beyond its", "concepts on which it does"], rows)

    def c1(self) -> tuple[str, str]:
        size = self.measured["size"]
        ratio = size["model"] / size["files"]["perfusion"]
        rows = [[label, f"{count / 1000:,.0f} KB"] for label, count in size["files"].items()]
        holds = "**Holds here.**" if ratio >= MAGNITUDES else "**Does not hold here.**"
        text = (
            f"{holds} The model's weights are {size['model'] / 1e6:,.0f} MB in float32: {ratio:,.0f} times a concept."
        )
        return (
            "a concept is five orders of magnitude smaller than the model",
            f"{text}\n\n{table(['method', 'file'], rows)}",
        )

    def c2(self) -> tuple[str, str]:
        found = self.measured["seconds"]
        rows = [
            [label, f"{each['each']:.0f}", f"{np.mean(each['kept']):.0f}", str(each["looks"])]
            for label, each in found.items()
        ]
        heads = [
            "method",
            "seconds a concept, learnt in a fleet",
            "step that was kept, mean",
            "steps it is chosen from",
        ]
        seconds = found["perfusion"]["each"]
        holds = "**Holds here.**" if seconds <= 60 * MINUTES else "**Does not hold here.**"
        text = (
            f"{holds} A concept learns for {seconds / 60:.1f} minutes; claimed are minutes, here at most {MINUTES:g}. "
            "Without compiling, and without the pictures that DreamBooth and Custom Diffusion have drawn first."
        )
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
        beyond = {setting: difference(scores["0.15"], each) for setting, each in scores.items() if setting != "0.15"}
        nearest = min(beyond, key=lambda setting: beyond[setting].mean)
        best = max(scores, key=lambda setting: np.mean(list(scores[setting].values())))
        text = (
            f"{verdict(weakest(*beyond.values()))} The harmonic mean of image similarity and prompt precision is "
            f"higher by {written(beyond['0.1'])} at 0.15 than at training's 0.1, and by {written(beyond[nearest])} "
            f"than at {nearest}, where it comes nearest; it is highest at {best}. Claimed is that it is higher at 0.15 "
            "than at all others."
        )
        return (
            "a higher temperature when drawing than in training is better, 0.15 best",
            f"{text}\n\n{front_table(self.few, ['perfusion-temperature'])}",
        )

    def c7(self) -> tuple[str, str]:
        parts, left = [], []
        for measure, words in (("image", "image similarity"), ("text", "text similarity")):
            one, all_of_them = (values(self.few[label], DEFAULT, measure) for label in ("pictures-1", "perfusion"))
            parts.append(f"{words} changes by {written(difference(one, all_of_them))}")
            left.append(difference(one, all_of_them, KEPT))
        text = (
            f"{verdict(weakest(*left))} Learnt from one picture, and not from all of them, {' and '.join(parts)}; "
            f"claimed is that at least {KEPT:g} of both are left."
        )
        labels = ["pictures-1", "pictures-2", "perfusion"]
        return "one picture suffices, with little more overfitting", f"{text}\n\n{front_table(self.few, labels)}"

    def c8(self) -> tuple[str, str]:
        front = self.full["perfusion"]
        first, *_, last = front.settings
        image, text_range = (
            difference(values(front, low, key), values(front, high, key))
            for key, low, high in (("image", first, last), ("text", last, first))
        )
        means = {label: max(row["image"].mean for row in front.settings.values()) for label, front in self.full.items()}
        needed = SPANNED * (max(means[label] for label in self.others) - means["plain"])
        both = weakest(less(image, needed), text_range)
        return (
            "one file spans the front by its bias alone",
            f"{verdict(both)} From {first} to {last} image similarity falls by {written(image)} and text similarity "
            f"rises by {written(text_range)}; claimed is that image similarity falls by at least {needed:.3f}, "
            f"{SPANNED:g} of the way from the plain model to the most faithful of the other methods.",
        )

    @property
    def others(self) -> list[str]:
        """The other methods."""
        return [
            label for label in self.full if label.partition("-")[0] not in ("perfusion", "trained", "plain", "mask")
        ]

    def c9(self) -> tuple[str, str]:
        others = self.others
        leads = {label: lead(self.full, "perfusion", label) for label in others}
        words = " ".join(f"Against {label}: {verdict(found).strip('*.')}." for label, found in leads.items())
        ceiling = interval(list(self.measured["likeness"].values()))
        text = (
            f"{words} Textual Inversion has no control to turn: its front is one point. Perfusion learns by the "
            "pictures' masks, where they have some, and the others without; so does `mask-none`. Concepts' own "
            f"pictures have an image similarity of {written(ceiling, '.3f')} to each other."
        )
        unmasked = [self.leads(self.full, others, "mask-none")] if "mask-none" in self.full else []
        tables = "\n\n".join([self.leads(self.full, others, "perfusion"), *unmasked])
        return (
            "its front dominates those of other methods",
            f"{text}\n\n![fronts](evidence/fronts.svg)\n\n{tables}\n\n"
            f"{front_table(self.full, ['plain', 'perfusion', *(['mask-none'] * len(unmasked)), *others])}",
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
            keys = ("each", "all", "plain", "plain_all")
            rows.append([count, *(written(interval(list(shares[key].values())), ".2f") for key in keys)])
        two = self.measured["together"]["2"]
        found = difference(two["all"], two["plain_all"])
        text = f"{verdict(found)} Both of two concepts are found in {written(found)} more of their pictures "
        heads = ["concepts", "each is there", "all are there", "each, by its super-category's word", "all, likewise"]
        return (
            "concepts that were learnt apart combine in one picture",
            f"{text}than where only their super-categories are named.\n\n{table(heads, rows)}",
        )

    def c12(self) -> tuple[str, str]:
        found = self.measured["looked_at"]
        title = "locked keys keep the word's attention on the object"
        if not {"perfusion", "trained-keys"} <= found.keys():
            return title, "**Cannot be told here.** There are no masks, or all concepts diverged."
        held = {label: difference(found["perfusion"], shares) for label, shares in found.items()}
        words = " ".join(
            f"Against {label}: {verdict(held[label]).strip('*.')}." for label in self.others if label in held
        )
        rows = [
            [label, written(interval(list(shares.values())), ".2f"), written(held[label], "+.2f")]
            for label, shares in found.items()
        ]
        heads = ["method", "attention on the thing, over its area", "perfusion's is larger by"]
        return (
            title,
            f"{verdict(held['trained-keys'])} The share that falls on the thing of the attention of all words that "
            f"name it, over the share of its area, is larger by {written(held['trained-keys'], '+.2f')} with locked "
            f"keys than with trained ones. {words}\n\n{table(heads, rows)}",
        )

    def c13(self) -> tuple[str, str]:
        found = self.measured["of_eight"]
        several = interval([float(np.mean(np.array(counts) >= 2)) for counts in found.values()])
        return (
            "eight seeds usually hold several good pictures",
            f"{verdict(less(several, 0.5))} Of eight pictures of a prompt at least two are good in "
            f"{written(several, '.2f')} of the cases; claimed is more than half. Good is a picture that is at least "
            "0.8 times as near to the thing's own pictures as these are to each other, and that has at least 0.9 times "
            "the text similarity of the plain model's pictures of the prompt.",
        )

    def c14(self) -> tuple[str, str]:
        found = {int(place): list(gates.values()) for place, gates in self.measured["gates"].items()}
        rows = [
            [f"{place:+d}" if place else "the word", written(interval(gates), ".2f")] for place, gates in found.items()
        ]
        after = interval(found.get(1, []))
        return (
            "a concept speaks at several positions, not only at its word",
            f"{verdict(less(after, 0.1))} Right after its word the gate is open by {written(after, '.2f')}; claimed is "
            f"more than 0.1.\n\n{table(['place from the word', 'gate'], rows)}",
        )

    def c15(self) -> tuple[str, str]:
        labels = ["decay-0", "decay-0_9", "perfusion", "decay-0_999", "straight-through"]
        lost = {label: self.measured["diverged"][label] for label in labels}
        rows = [[label, f"{share:.0%}"] for label, share in lost.items()]
        labels = [label for label in labels if label in self.few]
        tables = f"{table(['variant', 'concepts that diverged'], rows)}\n\n{front_table(self.few, labels)}"
        title = "the moving average of i* is needed"
        of_all = f"Without it {lost['decay-0']:.0%} of the concepts diverge, with it {lost['perfusion']:.0%}."
        if lost["decay-0"] - lost["perfusion"] > LOST:  # those that are left say nothing of the others
            return title, f"**Holds here.** {of_all}\n\n{tables}"
        if not {"decay-0", "perfusion"} <= self.few.keys():
            return title, f"**Cannot be told here.** {of_all}\n\n{tables}"
        found = lead(self.few, "perfusion", "decay-0")
        return (
            title,
            f"{verdict(found)} With it (0.99, `perfusion`) the area is larger by {written(found)} than without.\n\n"
            f"{tables}",
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
    if made.tuned:
        rows = [
            [
                label,
                ", ".join(f"{name} {rate:g}" for name, rate in tuned.rates.items()),
                ", ".join(f"{factor}: {score:.3f}" for factor, score in tuned.scores.items()),
            ]
            for label, tuned in made.tuned.items()
        ]
        heads = ["method", "rates that were chosen", "score by times the published rates"]
        adapted = "Learning rates, chosen on other concepts by the score that chooses the kept step:\n\n"
        adapted += table(heads, rows)
    parts = [
        "# Evidence",
        f"The claims of the paper, tried on {len(concepts)} concepts ({', '.join(concepts)}), each learnt "
        f"{made.seeds} times by each variant, on the model `{made.base}`. Everything on this page is what",
        f"```sh\n{made.command}\n```",
        "wrote. Numbers in brackets are bootstrap intervals of 95 % over concepts, as wide as so few ask for; of a "
        "concept the seeds are averaged first. Some twenty verdicts are given: chance alone may have made one of them. "
        "Image similarity is the mean cosine over all pairs of drawn and own pictures, text similarity that with the "
        "prompt, the super-category's word in place of the concept's ([evaluation](evaluation.md)). A claim holds here "
        "where the interval is above 0, or beyond the margin that is named. C2 and C10 to C14 are measured on the "
        "first seed alone.",
        adapted,
        "![each concept by each method, in the rain](evidence/methods.png)",
    ]
    for number, claim in enumerate(evidence.claims, 1):
        title, text = claim()
        parts += [f"## C{number}: {title}", text]
    write_bytes(docs / "evidence.md", ("\n\n".join(parts) + "\n").encode())
