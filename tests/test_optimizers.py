"""Optimizers and schedules against their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from mrjax import optimizers
from mrjax.config import defaults


def config(**fields):
    base = defaults()
    base.update(fields)
    return base


def test_adam_follows_a_warm_up_and_a_cosine() -> None:
    optimizer = optimizers.make_optimizer(config(steps=10, warmup=0.2, learning_rate=0.1))
    params, gradient = jnp.zeros(1), jnp.full(1, 3.0)
    state, steps = optimizer.init(params), []
    for _ in range(10):
        update, state = optimizer.update(gradient, state, params)
        steps.append(-float(update[0]))
    # With a constant gradient each of Adam's steps is as long as the learning rate.
    cosine = 0.05 * (1 + np.cos(np.pi * np.arange(8) / 8))
    assert np.allclose(steps, [0, 0.05, *cosine], atol=1e-5)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_clipped_gradients_move_parameters_against_the_gradient(name: str) -> None:
    optimizer = optimizers.make_optimizer(config(optimizer=name, clip_norm=1.0, warmup=0.0, learning_rate=0.1))
    params = jnp.ones(2)
    update, _ = optimizer.update(jnp.asarray([1e6, -1e6]), optimizer.init(params), params)
    assert float(update[0]) < 0 < float(update[1])
    assert np.abs(update).max() <= 0.2


def test_the_schedules_constant_and_step_fall_as_configured() -> None:
    fields = {"steps": 100, "warmup": 0.1, "learning_rate": 1.0, "decay_every": 0.4, "decay_factor": 0.1}
    step = optimizers.make_schedule(config(schedule="step", **fields))
    assert [float(step(i)) for i in (0, 5, 10, 49, 50, 90)] == pytest.approx([0, 0.5, 1, 1, 0.1, 0.01])
    constant = optimizers.make_schedule(config(schedule="constant", **fields))
    assert [float(constant(i)) for i in (5, 10, 99)] == pytest.approx([0.5, 1, 1])
