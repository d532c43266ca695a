"""A step that does not fit: the error names the largest batch size that would, and the fields that help."""

import jax
import numpy as np
import pytest

from mrjax import experiment
from mrjax.config import defaults
from mrjax.errors import UserError
from mrjax.parallel import memory, sharding


def compile_step(config, mesh):
    state = experiment.abstract_state(experiment.initial_state(config), mesh)
    spec = {"kspace": ((2, 32, 32), np.dtype(np.complex64)), "maximum": ((), np.dtype(np.float32))}
    fixed = {"model": experiment.model(config), "task": experiment.task(config), "normalise_by": "slice"}
    return experiment.train_step(config, mesh, state, spec, 0, optimizer=experiment.optimizer(config), **fixed)


def small(**fields):
    config = defaults()
    config.model.channels, config.model.levels, config.data.image_size = 4, 2, (32, 32)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def test_a_step_that_cannot_fit_is_refused_with_the_largest_batch_size_that_fits(monkeypatch) -> None:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    _, fitting = compile_step(small(batch_size=12), mesh)
    limit = memory.needed_bytes(fitting)
    monkeypatch.setattr(memory, "available_bytes", lambda mesh: limit)
    with pytest.raises(
        UserError,
        match=r"config.batch_size is 24, for which a step needs .* set config.batch_size = 12, "
        r"the largest that fits, or config.accumulate = 2, or config.remat = True",
    ):
        compile_step(small(batch_size=24), mesh)


def test_gradient_accumulation_needs_less_memory() -> None:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    whole, parts = (memory.needed_bytes(compile_step(small(batch_size=16, accumulate=n), mesh)[1]) for n in (1, 4))
    assert parts < 0.5 * whole


def test_the_out_of_memory_error_of_xla_is_replaced_and_no_other_error() -> None:
    make_array = jax.jit(lambda: jax.numpy.zeros((1 << 50,), jax.numpy.int8))  # larger than any address space
    error = UserError("too large")
    with pytest.raises(UserError, match="too large"), memory.explain_out_of_memory(lambda: error):
        jax.block_until_ready(make_array())
    with pytest.raises(jax.errors.JaxRuntimeError), memory.explain_out_of_memory(lambda: error):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
