"""When a step does not fit, the answer names the largest batch that would and the fields to turn."""

import dataclasses

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


class SixteenSlices(NoSlices):
    def __len__(self) -> int:
        return 16


def test_a_device_cache_that_does_not_fit_is_refused_by_its_own_fields_before_anything_is_read(monkeypatch) -> None:
    cached, step, compiled = 16 * (2 * 32 * 32 * 8 + 8), 1 << 20, []
    monkeypatch.setattr(Experiment, "_compile", lambda self, spec, size: compiled.append(size))
    monkeypatch.setattr(memory, "needed_bytes", lambda compiled: step)

    def refusal(device: int | None, host: int) -> str:
        monkeypatch.setattr(memory, "available_bytes", lambda mesh: device)
        monkeypatch.setattr(memory, "available_memory", lambda: host)
        experiment = experiment_of(small(batch_size=2, data__cache="device"))
        with pytest.raises(UserError) as error:
            dataclasses.replace(experiment, train_datasets=[SixteenSlices()]).compile_train_step()
        return str(error.value)

    for words, device, host in (
        ("on each device, found 0.00 GB there", cached - 1, 1 << 40),
        ("on each device, found 0.00 GB for each on the host", None, cached - 1),
        ("on each device, beside 0.00 GB for a step, found 0.00 GB there", cached + step - 1, 1 << 40),
    ):
        assert not compiled  # a cache too large by itself is refused before that
        message = refusal(device, host)
        assert message.startswith("config.data.cache is 'device', which takes 0.00 GB")
        assert words in message
        assert message.endswith(
            "expected config.data.cache = 'host' or 'none', or config.data.cache_half = True, or a smaller "
            "config.data.image_size"
        )


def test_running_out_of_memory_while_a_device_cache_is_loaded_names_the_cache(monkeypatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")

    monkeypatch.setattr("mrjax.experiment.DeviceCache", load)
    with pytest.raises(UserError, match=r"config\.data\.cache is 'device'"):
        _ = experiment_of(small(data__cache="device")).caches


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: again"), MemoryError(), KeyError(1)])
def test_advice_that_cannot_be_computed_leaves_one_sentence(error: Exception, monkeypatch) -> None:
    def fail(self: Experiment, spec: object, batch_size: int) -> None:
        raise error

    monkeypatch.setattr(Experiment, "_compile", fail)
    experiment = experiment_of(small(batch_size=8))
    sentence = (
        r"config\.batch_size is 8, .*; set a smaller config\.batch_size, or config\.grad_accumulation_steps = 2, or"
    )
    with (
        pytest.raises(UserError, match=sentence),
        memory.explain_out_of_memory(experiment.explain_out_of_memory),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")


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
