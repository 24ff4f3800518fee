"""How fast a run goes: time in which no steps are taken is left out."""

import time
from types import SimpleNamespace

import pytest

from perfusion_jax.learning.progress import Bar, Meter, Work


def test_pauses_do_not_count():
    now = 10.0
    meter = Meter(clock=lambda: now)
    assert meter.read() is None
    for _ in range(4):
        now += 0.5
        meter.count(1)
    with meter.pause():
        now += 100
    assert meter.read() == pytest.approx(0.5)
    now += 3
    meter.count(1)
    assert meter.read() == pytest.approx(3)
    with meter.pause():
        now += 100
        assert meter.read() is None
        now += 10
    now += 8
    meter.count(2)
    assert meter.read() == pytest.approx(4)


def test_utilisation_is_of_the_published_peak():
    compiled = SimpleNamespace(cost_analysis=lambda: {"flops": 197e10}, as_text=lambda: "")
    work = Work.of(compiled, "TPU v5 lite", repeats=2)
    # Two parts of 1.97 TFLOP each, in a tenth of a second, on a chip of 197 TFLOP/s.
    assert work.utilisation(0.1) == pytest.approx(0.2)
    assert Work.of(compiled, "a chip without a data sheet", repeats=2).utilisation(0.1) is None


def test_the_bar_tells_speed_and_loss(capsys):
    bar = Bar(total=100, concepts=2, name="fleet")
    bar.skip(50)
    time.sleep(0.11)  # tqdm measures its rate over a tenth of a second at least
    bar.advance(10)
    bar.show(loss=0.12345, samples_per_second=12.34, utilisation=0.31)
    bar.close()
    told = capsys.readouterr().err
    assert "60/100" in told
    assert "loss 0.1235, 12.3 samples/s, 31% MFU" in told
    assert "concepts/h" in told
