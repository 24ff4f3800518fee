"""Losses of steps that are still under way."""

import jax.numpy as jnp
import numpy as np

from perfusion_jax.learning.losses import Losses


def test_all_but_the_last_steps_are_waited_for():
    losses = Losses()
    waited = []
    for step in range(5):
        losses.add(jnp.array([float(step)]))
        waited.append(losses.wait(2))
    assert waited == [0, 0, 1, 1, 1]
    assert losses.wait() == 2
    assert losses.wait() == 0


def test_entries_are_read_in_the_order_of_steps():
    losses = Losses()
    losses.pack(0, None)  # nothing is new
    for step in (1, 2, 3):
        losses.add(jnp.array([float(step), np.nan]))
        if step > 1:
            losses.pack(step, 0.5 * step)
    assert [entry.step for entry in losses.read(left=1)] == [2]
    (last,) = losses.read()
    assert (last.step, last.seconds, last.values[0, 0]) == (3, 1.5, 3.0)
