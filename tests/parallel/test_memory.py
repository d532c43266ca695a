"""When a step does not fit, the answer names the largest batch that would and the fields to turn."""

import jax
import numpy as np
import pytest

from mrjax.config import defaults
from mrjax.data.dataset import ExampleIndices
from mrjax.errors import UserError
from mrjax.experiment import Experiment, abstract_state, make_recipe
from mrjax.parallel import memory, sharding


class NoSlices(ExampleIndices):
    """A dataset of which only the spec is looked at."""

    def __init__(self) -> None:
        super().__init__(0)
        self.spec = {"kspace": ((2, 32, 32), np.dtype(np.complex64)), "maximum": ((), np.dtype(np.float32))}


def experiment_of(config) -> Experiment:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    recipe = make_recipe(config, mesh)
    return Experiment(config, recipe, [], [], [NoSlices()], [], abstract_state(config, recipe))


def needed_bytes(config) -> int:
    return memory.needed_bytes(experiment_of(config)._compile(NoSlices().spec, config.batch_size))


def small(**fields):
    config = defaults()
    config.model.channels, config.model.levels, config.data.image_size = 4, 1, (32, 32)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def test_a_step_that_cannot_fit_is_refused_before_it_runs_with_a_batch_that_does_fit(monkeypatch) -> None:
    limit = needed_bytes(small(batch_size=12))
    monkeypatch.setattr(memory, "available_bytes", lambda mesh: limit)
    with pytest.raises(
        UserError,
        match=r"config.batch_size is 24, for which a step needs .* set config.batch_size = 12, "
        r"the largest that fits, or config.grad_accumulation_steps = 2, or config.remat = True",
    ):
        experiment_of(small(batch_size=24)).compile_train_step()


@pytest.mark.slow
def test_accumulation_needs_less_memory() -> None:
    whole, parts = (needed_bytes(small(batch_size=16, grad_accumulation_steps=n)) for n in (1, 4))
    assert parts < 0.5 * whole


def test_running_out_of_memory_is_answered_and_other_errors_are_not() -> None:
    # The real thing: an array larger than any address space.
    huge = jax.jit(lambda: jax.numpy.zeros((1 << 50,), jax.numpy.int8))
    answer = UserError("the answer")
    with pytest.raises(UserError, match="the answer"), memory.explain_out_of_memory(lambda: answer):
        jax.block_until_ready(huge())
    with pytest.raises(jax.errors.JaxRuntimeError), memory.explain_out_of_memory(lambda: answer):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
