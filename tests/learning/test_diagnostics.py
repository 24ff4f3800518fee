"""Traces of chosen steps, and the operation that gave the first NaN."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from test_step import make_concept, make_examples, make_metric

from perfusion_jax import InputError
from perfusion_jax.config import make_config
from perfusion_jax.learning import diagnostics
from perfusion_jax.learning import step as training
from perfusion_jax.learning.diagnostics import Profiler, first_nan
from perfusion_jax.learning.step import Settings
from perfusion_jax.train import parse_profile


def test_the_steps_asked_for_are_traced(monkeypatch):
    events = []
    profiler = SimpleNamespace(
        start_trace=lambda folder: events.append(f"start {folder}"), stop_trace=lambda: events.append("stop")
    )
    monkeypatch.setattr(diagnostics.jax, "profiler", profiler)
    traced = Profiler("runs/rex/profile", parse_profile("1:3"))
    for step in range(5):
        traced.before_step(lambda: events.append("wait"))
        events.append(step)
    traced.close()
    assert events == [0, "wait", "start runs/rex/profile", 1, 2, "wait", "stop", 3, 4]
    cut_off = Profiler("profile", (0, 9))
    cut_off.before_step(lambda: None)
    cut_off.close()
    assert events[-1] == "stop"


@pytest.mark.parametrize("text", ["3", "3:1", "2:2", "a:b", "1:2:3"])
def test_steps_that_cannot_be_traced_are_named(text):
    with pytest.raises(InputError, match=rf"--profile is '{text}'; it must be START:STOP"):
        parse_profile(text)


@pytest.mark.slow
def test_the_operation_that_gave_the_first_nan_is_named(small_base, monkeypatch):
    _, whitening = make_metric(small_base)
    concept, examples = make_concept(small_base, whitening), make_examples(small_base)
    true_loss = training.loss

    def broken(*arguments):
        loss, encoding = true_loss(*arguments)
        return loss + jnp.log(loss - 1e9), encoding

    settings = Settings.of(make_config(batch_size=1))
    learning = training.start(concept, settings)
    arguments = (small_base.model, small_base.params, whitening, examples, learning, jax.random.key(0), settings)
    with monkeypatch.context() as patched:
        patched.setattr(training, "loss", lambda *them: (true_loss(*them)[0] + jnp.exp(200.0), true_loss(*them)[1]))
        assert first_nan(*arguments) == "no operation gave NaN: numbers grew to infinity"
    monkeypatch.setattr(training, "loss", broken)
    found = first_nan(*arguments)
    assert found.startswith("the first NaN came from log in broken, ")
    assert "test_diagnostics.py:" in found
