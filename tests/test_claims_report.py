"""The page of evidence, on made-up scores whose answers are known."""

import sys

import numpy as np
import pytest
from fleet_runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import claims_report
from claims_report import Evidence, Made, difference, lead, split_off, verdict, write_evidence

from perfusion_jax.evaluation.statistics import Estimate

NAMES = [f"thing{number}" for number in range(8)]
BIASES = {"bias 0.3": 0.1, "bias 0.45": 0.05, "bias 0.6": 0.0, "bias 0.75": -0.05, "bias 0.8": -0.1}
FULL = {"perfusion": 0.1, "trained-keys": 0.1, "lora-1": 0.0, "dreambooth": 0.2, "plain": -0.1}
FEW = {"perfusion": 0.1, "mask-found": 0.1, "mask-none": 0.0, "beta-55": 0.0, "beta-65": 0.1, "beta-85": 0.1}
FEW |= {"pictures-1": 0.0, "pictures-2": 0.05, "decay-0": 0.1, "decay-0_9": 0.1, "decay-0_999": 0.1}
FEW |= {"straight-through": 0.1}


def line(label, setting, name, image, text):
    noise = 0.01 * np.sin(NAMES.index(name))
    scores = {"image": [image + noise], "text": [text + noise], "precision": [0.5 + noise]}
    return {"label": label, "setting": setting, "name": name, **scores}


def lines_of(labels):
    """Each label's front is that much better than another, in both directions."""
    return [
        line(label, setting, name, 0.4 + better + along, 0.4 + better - along)
        for label, better in labels.items()
        for setting, along in BIASES.items()
        for name in NAMES
    ]


GLOBAL = [line("perfusion", "global bias 0.5", name, 0.5, 0.5) for name in NAMES]
BY_TEMPERATURE = [
    line("perfusion", f"temperature {value}", name, 0.4 + value / 10, 0.4)
    for value in (0.1, 0.15, 0.2)
    for name in NAMES
]


MEASURED = {
    "size": {"model": 4e9, "files": {"perfusion": 1e5}},
    "seconds": {"perfusion": {"each": 60.0, "kept": [100, 200]}},
    "likeness": dict.fromkeys(NAMES, 0.8),
    "variety": {"local": dict.fromkeys(NAMES, 0.3), "global": dict.fromkeys(NAMES, 0.2)},
    "together": {
        count: {"each": dict.fromkeys(NAMES, 0.9), "all": dict.fromkeys(NAMES, 0.8), "plain": dict.fromkeys(NAMES, 0.1)}
        for count in ("2", "3")
    },
    # One of another method diverged: the rest is compared.
    "looked_at": {"perfusion": dict.fromkeys(NAMES, 2.0), "dreambooth": dict.fromkeys(NAMES[1:], 1.0)},
    "of_eight": {name: [0, 1, 0, 2, 0, 0] for name in NAMES},
    "gates": {"0": dict.fromkeys(NAMES, 0.9), "1": dict.fromkeys(NAMES, 0.05)},
    "diverged": dict.fromkeys(FEW, 0),
}


@pytest.fixture
def evidence():
    return Evidence(lines_of(FULL) + GLOBAL, lines_of(FEW) + BY_TEMPERATURE, MEASURED)


def test_verdicts_are_those_of_intervals():
    assert verdict(Estimate(0.1, 0.01, 0.2)) == "**Holds here.**"
    assert verdict(Estimate(-0.1, -0.2, -0.01)) == "**Does not hold here.**"
    assert verdict(Estimate(0.1, -0.01, 0.2)) == "**Cannot be told here.**"


def test_settings_of_another_kind_are_a_front_of_their_own(evidence):
    split = split_off(lines_of({"perfusion": 0.0}) + GLOBAL, "perfusion", "global")
    assert {(each["label"], each["setting"]) for each in split if "global" in each["label"]} == {
        ("perfusion-global", "bias 0.5")
    }
    assert set(evidence.few["perfusion-temperature"].settings) == {"0.1", "0.15", "0.2"}
    assert set(evidence.full["perfusion"].settings) >= set(BIASES)


def test_differences_are_over_the_concepts_of_both():
    assert difference({"a": 1.0, "b": 2.0}, {"b": 1.5, "c": 9.0}) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (3, "Cannot be told"),  # both are the same
        (4, "Holds"),
        (5, "Holds"),
        (6, "Holds"),
        (8, "Holds"),
        (10, "Does not hold"),
        (11, "Holds"),
        (12, "Holds"),
        (13, "Does not hold"),
        (14, "Does not hold"),
        (15, "Cannot be told"),
    ],
)
def test_each_claim_has_the_verdict_that_its_numbers_have(evidence, number, expected):
    _, text = evidence.claims[number - 1]()
    assert text.startswith(f"**{expected}")


def test_the_fronts_of_other_methods(evidence):
    _, text = evidence.c9()
    assert "Against lora-1: Holds here." in text
    assert "Against dreambooth: Does not hold here." in text
    assert "Against trained-keys" not in text
    assert lead(evidence.full, "perfusion", "lora-1").low > 0


def test_a_variant_of_which_nothing_is_left_is_a_result():
    left = {label: better for label, better in FEW.items() if label != "decay-0"}
    without = Evidence(lines_of(FULL) + GLOBAL, lines_of(left) + BY_TEMPERATURE, MEASURED)
    assert "all concepts diverge" in without.c15()[1]


def test_the_page_is_written(tmp_path):
    sheet = ([np.zeros((2, 16, 16, 3), np.uint8)] * 2, ["own", "perfusion"], NAMES[:2])
    found = lines_of(FULL) + GLOBAL, lines_of(FEW) + BY_TEMPERATURE
    chosen = {"lora-1": {"weights_rate": 0.001}}
    for rates, said in (({}, "**not adapted to this model**"), (chosen, "lora-1: weights_rate 0.001")):
        made = Made("python benchmarks/claims.py --seeds 2", "emoji", 2, rates)
        write_evidence(claims_report.epath.Path(tmp_path), *found, MEASURED, sheet, made)
        page = (tmp_path / "evidence.md").read_text()
        assert said in page
        assert all(f"## C{number}: " in page for number in range(1, 16))
        assert "python benchmarks/claims.py --seeds 2" in page
        assert (tmp_path / "evidence" / "methods.png").exists()
