"""The page of evidence, on made-up scores whose answers are known."""

import subprocess
import sys

import numpy as np
import pytest
from fleet_runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import claims_report
from claims_report import Evidence, Made, Tuned, difference, lead, split_off, verdict, weakest, write_evidence, written

from perfusion_jax.config import make_config
from perfusion_jax.evaluation.scores import PROMPTS
from perfusion_jax.evaluation.statistics import Estimate

NAMES = [f"thing{number}" for number in range(8)]
BIASES = {"bias 0.3": 0.1, "bias 0.45": 0.05, "bias 0.6": 0.0, "bias 0.75": -0.05, "bias 0.8": -0.1}
FULL = {"perfusion": 0.1, "trained-keys": 0.1, "mask-none": 0.05, "lora-1": 0.0, "dreambooth": 0.2, "plain": -0.1}
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


ALIKE = dict.fromkeys(NAMES, 0.0)
GLOBAL = [line("perfusion", "global bias 0.5", name, 0.5, 0.5) for name in NAMES]
BY_TEMPERATURE = [
    line("perfusion", f"temperature {value}", name, 0.4 + value / 10, 0.4)
    for value in (0.1, 0.15, 0.2)
    for name in NAMES
]


TOGETHER = {
    count: {
        name: dict.fromkeys(NAMES, share)
        for name, share in {"each": 0.9, "all": 0.8, "plain": 0.1, "plain_all": 0.0}.items()
    }
    for count in ("2", "3")
}
LOOKS = {"perfusion": 2.0, "trained-keys": 1.5, "dreambooth": 2.5, "lora-1": 1.0, "plain": 2.0}
MEASURED = {
    "size": {"model": 4e9, "files": {"perfusion": 1e5}},
    "seconds": {"perfusion": {"each": 60.0, "kept": [100, 200], "looks": 16}},
    "likeness": dict.fromkeys(NAMES, 0.8),
    "variety": {"local": dict.fromkeys(NAMES, 0.3), "global": dict.fromkeys(NAMES, 0.2)},
    "together": TOGETHER,
    "looked_at": {label: dict.fromkeys(NAMES, share) for label, share in LOOKS.items()},
    "of_eight": {name: [0, 1, 0, 2, 0, 0] for name in NAMES},
    "gates": {"0": dict.fromkeys(NAMES, 0.9), "1": dict.fromkeys(NAMES, 0.05)},
    "diverged": dict.fromkeys(FEW, 0),
}


@pytest.fixture
def evidence():
    return Evidence(lines_of(FULL) + GLOBAL, lines_of(FEW) + BY_TEMPERATURE, MEASURED)


RATES = """
import claims
asked = []
best = lambda at: claims.climb(lambda factor: asked.append(factor) or -abs(factor / at - 1))
assert list(best(1)) == [0.3, 1, 3, 10] == asked
assert list(best(30)) == [0.3, 1, 3, 10, 30, 90]
assert len(best(1e9)) == claims.MOST_FACTORS
print(*best(0.1))
"""


def test_rates_are_tried_further_on_while_the_best_is_at_an_end():
    done = subprocess.run([sys.executable, "-c", RATES], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [float(factor) for factor in done.stdout.split()]
    np.testing.assert_allclose(found, [0.1 / 3, 0.1, 0.3, 1, 3, 10], rtol=1e-6)


CHOICES = """
from blind import compare
key = [
    {"method": "ours", "concept": "rex", "place": "at night", "nearest": "rex"},
    {"method": "ours", "concept": "tom", "place": "at night", "nearest": "rex"},
    {"method": "lora", "concept": "tom", "place": "at sunset", "nearest": "tom"},
]
answers = {"1": ["rex", "at night"], "2": ["rex", "at sunset"], "3": ["none", "at sunset"]}
found = compare(key, answers)
assert found["ours"] == {"concept": 0.5, "place": 0.5, "encoder": 0.5, "agreement": 1.0, "pictures": 2}, found
assert found["lora"] == {"concept": 0.0, "place": 1.0, "encoder": 1.0, "agreement": 0.0, "pictures": 1}, found
assert found["all"]["pictures"] == 3
"""


def test_a_blind_judge_is_counted_by_method():
    done = subprocess.run([sys.executable, "-c", CHOICES], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_chosen_by_the_prompts_of_an_evaluation():
    config = make_config()
    assert not set(PROMPTS) & {*config.validation_prompts, *config.templates}


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
    ours = dict.fromkeys(NAMES, 2.0) | {"a": 1.0}
    assert difference(ours, dict.fromkeys(NAMES, 1.5) | {"c": 9.0}) == (0.5, 0.5, 0.5)


def test_of_several_parts_one_that_is_refuted_refutes_all():
    unsure, no, yes = Estimate(0.0, -0.05, 0.06), Estimate(-0.02, -0.03, -0.005), Estimate(0.2, 0.1, 0.3)
    assert verdict(weakest(unsure, no, yes)) == "**Does not hold here.**"
    assert verdict(weakest(unsure, yes)) == "**Cannot be told here.**"
    assert verdict(weakest(yes, yes)) == "**Holds here.**"


def test_of_few_concepts_nothing_can_be_told():
    few = difference(dict.fromkeys(NAMES[1:], 2.0), dict.fromkeys(NAMES, 1.5))
    assert few.mean == 0.5
    assert verdict(few) == "**Cannot be told here.**"
    assert written(few) == "+0.500 (too few concepts for an interval)"


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, "Does not hold"),  # four orders of magnitude
        (2, "Holds"),
        (3, "Cannot be told"),  # both are the same
        (4, "Holds"),
        (5, "Holds"),
        (6, "Does not hold"),  # it is better than training's, and worse than the highest
        (7, "Does not hold"),
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
    assert "| lora-1 | +" in text
    assert "| 8 of 8 |" in text
    assert f"| 0 of 8; not on {', '.join(NAMES)} |" in text
    assert "area that mask-none dominates" in text
    assert lead(evidence.full, "perfusion", "lora-1").low > 0


def test_a_variant_of_which_nothing_is_left_is_a_result():
    left = {label: better for label, better in FEW.items() if label != "decay-0"}
    measured = {**MEASURED, "diverged": {**MEASURED["diverged"], "decay-0": 1.0}}
    without = Evidence(lines_of(FULL) + GLOBAL, lines_of(left) + BY_TEMPERATURE, measured)
    assert without.c15()[1].startswith("**Holds here.** Without it 100% of the concepts diverge, with it 0%.")


def test_a_claim_holds_beyond_its_margin():
    """One that holds of each of those that do not hold above."""
    by_temperature = [
        line("perfusion", f"temperature {value}", name, 0.5 - abs(value - 0.15), 0.4)
        for value in (0.1, 0.15, 0.2)
        for name in NAMES
    ]
    measured = {**MEASURED, "size": {"model": 4e9, "files": {"perfusion": 1e4}}}
    few = lines_of({**FEW, "pictures-1": 0.09})
    evidence = Evidence(lines_of(FULL) + GLOBAL, few + by_temperature, measured)
    for number in (1, 6, 7):
        assert evidence.claims[number - 1]()[1].startswith("**Holds here.**"), number
    # Where another method is much more faithful, the bias does not span half of the way to it.
    beside = Evidence(lines_of({**FULL, "dreambooth": 0.5}) + GLOBAL, few + by_temperature, measured)
    assert beside.c8()[1].startswith("**Does not hold here.**")


def test_both_of_two_concepts_must_be_in_a_picture(evidence):
    together = {
        count: {**shares, "each": dict.fromkeys(NAMES, 0.5), "all": ALIKE} for count, shares in TOGETHER.items()
    }
    alone = Evidence(lines_of(FULL) + GLOBAL, lines_of(FEW) + BY_TEMPERATURE, {**MEASURED, "together": together})
    assert alone.c11()[1].startswith("**Cannot be told here.**")


def test_the_page_is_written(tmp_path):
    sheet = ([np.zeros((2, 16, 16, 3), np.uint8)] * 2, ["own", "perfusion"], NAMES[:2])
    found = lines_of(FULL) + GLOBAL, lines_of(FEW) + BY_TEMPERATURE
    chosen = {"lora-1": Tuned({"weights_rate": 0.001}, {"1": 0.4, "3": 0.5})}
    for tuned, said in (({}, "**not adapted to this model**"), (chosen, "| lora-1 | weights_rate 0.001 | 1: 0.400, 3")):
        made = Made("python benchmarks/claims.py --seeds 2", "emoji", 2, tuned)
        write_evidence(claims_report.epath.Path(tmp_path), *found, MEASURED, sheet, made)
        page = (tmp_path / "evidence.md").read_text()
        assert said in page
        assert all(f"## C{number}: " in page for number in range(1, 16))
        assert "python benchmarks/claims.py --seeds 2" in page
        assert (tmp_path / "evidence" / "methods.png").exists()
