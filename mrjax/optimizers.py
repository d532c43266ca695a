"""Optimizers and learning rate schedules by name: a new one is a line in its registry."""

from collections.abc import Callable

import optax
from ml_collections import ConfigDict


def step(config: ConfigDict) -> optax.Schedule:
    """Multiply the learning rate by config.decay_factor after every config.decay_every share of the steps."""
    every = max(round(config.decay_every * config.steps), 1)
    return optax.exponential_decay(config.learning_rate, every, config.decay_factor, staircase=True)


def cosine(config: ConfigDict) -> optax.Schedule:
    """Fall from the peak to zero at the last step along half a cosine (Loshchilov and Hutter, arXiv:1608.03983)."""
    return optax.cosine_decay_schedule(config.learning_rate, max(config.steps - _warmup_steps(config), 1))


SCHEDULES: dict[str, Callable[[ConfigDict], optax.Schedule]] = {
    "constant": lambda config: optax.constant_schedule(config.learning_rate),
    "cosine": cosine,
    "step": step,
}

# Adam (Kingma and Ba, arXiv:1412.6980); with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101); and with
# Nesterov momentum as well (Dozat, ICLR workshop 2016).
OPTIMIZERS: dict[str, Callable[[optax.Schedule, ConfigDict], optax.GradientTransformation]] = {
    "adam": lambda learning_rate, config: optax.adam(learning_rate),
    "adamw": lambda learning_rate, config: optax.adamw(learning_rate, weight_decay=config.weight_decay),
    "nadamw": lambda learning_rate, config: optax.nadamw(learning_rate, weight_decay=config.weight_decay),
}


def make_schedule(config: ConfigDict) -> optax.Schedule:
    """Return the learning rate by step: a linear rise over the warm-up, then config.schedule from its peak on."""
    warmup, later = _warmup_steps(config), SCHEDULES[config.schedule](config)
    if not warmup:
        return later
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), later], [warmup])


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Return config.optimizer, after clipping gradients to config.clip_norm (Pascanu et al., arXiv:1211.5063)."""
    update = OPTIMIZERS[config.optimizer](make_schedule(config), config)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update) if config.clip_norm else update


def _warmup_steps(config: ConfigDict) -> int:
    return round(config.warmup * config.steps)
