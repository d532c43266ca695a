"""fastMRI's state_dicts and this package's parameters: the same arrays under other names and in other layouts.

A state_dict is read off its names and shapes alone: which network, how wide and how deep. The networks are
`fastmri.models.Unet` and `fastmri.models.VarNet` (fastmri 0.3.0, https://github.com/facebookresearch/fastMRI).
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mrjax.errors import UserError

_FIRST = "down_sample_layers.0.layers.0.weight"
_SENSITIVITIES, _CASCADE = "sens_net.norm_unet.unet.", "cascades.{}.model.unet."
StateDict = dict[str, np.ndarray]


class Network(NamedTuple):
    """A network of fastMRI's in this package's words.

    Attributes:
      name: in `models.MODELS`.
      fields: its attributes that its weights' shapes tell.
      params: its parameters, float32.
    """

    name: str
    fields: dict[str, int]
    params: dict[str, Any]


def from_fastmri(weights: StateDict) -> Network:
    """The network that a state_dict holds, whatever stands before its names, as in checkpoints of Lightning.

    Raises:
      UserError: it is not one of fastMRI's U-Net or VarNet, or not of images of one channel.
    """
    prefix, name = _recognise(weights)
    weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if name == "unet":
        fields = dict(zip(("channels", "levels"), _size(weights, ""), strict=True))
    else:
        cascades = sum(key.endswith(".dc_weight") for key in weights)
        fields = dict(zip(("sens_channels", "sens_levels"), _size(weights, _SENSITIVITIES), strict=True))
        fields |= dict(zip(("channels", "levels"), _size(weights, _CASCADE.format(0)), strict=True))
        fields["cascades"] = cascades
    table = list(_table(name, fields))
    expected = {row.theirs for row in table}
    for what, odd in (("lacks", expected - weights.keys()), ("also holds", weights.keys() - expected)):
        if odd:
            raise UserError(f"the state_dict {what} {prefix}{min(odd)}, expected that of fastMRI's {_LABELS[name]}")
    params = {}
    for row in table:
        value = np.asarray(weights[row.theirs], np.float32)
        if value.shape != row.shape:
            raise UserError(
                f"{prefix}{row.theirs} of the state_dict has the shape {value.shape}, expected {row.shape} in a "
                f"{_LABELS[name]} of {fields['channels']} channels"
            )
        params[row.ours] = _to_ours(value, row.kind)
    return Network(name, fields, unflatten_dict(params, sep="/"))


def to_fastmri(name: str, fields: Mapping[str, int], params: dict[str, Any]) -> StateDict:
    """The state_dict that `load_state_dict` of fastMRI's network takes, from what `from_fastmri` gave."""
    flat = flatten_dict(params, sep="/")
    rows = _table(name, fields)
    return {row.theirs: _to_theirs(np.asarray(flat[row.ours], np.float32), row.kind) for row in rows}


class _Row(NamedTuple):
    """One parameter: our name, theirs, what it is, and its shape there."""

    ours: str
    theirs: str
    kind: str
    shape: tuple[int, ...]


_LABELS = {"unet": "U-Net", "varnet": "VarNet"}
# PyTorch's (out, in, height, width), or (in, out, height, width) where transposed, to (height, width, in, out).
_AXES = {"convolution": (2, 3, 1, 0), "transposed": (2, 3, 0, 1), "head": (2, 3, 1, 0), "vector": (0,)}


def _to_ours(value: np.ndarray, kind: str) -> np.ndarray:
    turned = value.transpose(_AXES[kind])
    return np.ascontiguousarray(turned[0, 0] if kind == "head" else turned)


def _to_theirs(value: np.ndarray, kind: str) -> np.ndarray:
    whole = value[None, None] if kind == "head" else value
    return np.ascontiguousarray(whole.transpose(np.argsort(_AXES[kind])))


def _recognise(weights: StateDict) -> tuple[str, str]:
    """What stands before the names, and the network's name here."""
    for name, ending in (("varnet", _SENSITIVITIES + _FIRST), ("unet", _FIRST)):
        found = [key for key in weights if key == ending or key.endswith(f".{ending}")]
        if len(found) == 1:
            return found[0].removesuffix(ending), name
    some = ", ".join(list(weights)[:3])
    raise UserError(f"the state_dict is of neither fastMRI's U-Net nor its VarNet: its names are {some or 'none'}, ...")


def _size(weights: StateDict, prefix: str) -> tuple[int, int]:
    """Channels and levels of the U-Net of that prefix."""
    levels = sum(key.startswith(f"{prefix}up_transpose_conv.") for key in weights)
    first = weights.get(prefix + _FIRST)
    if first is None or levels == 0:
        raise UserError(f"the state_dict lacks {prefix}{_FIRST} or {prefix}up_transpose_conv, expected a whole U-Net")
    return first.shape[0], levels


def _table(name: str, fields: Mapping[str, int]) -> Iterator[_Row]:
    """Every parameter."""
    if name == "unet":
        yield from _unet_table(fields["channels"], fields["levels"], 1, "", "")
        return
    yield from _unet_table(fields["sens_channels"], fields["sens_levels"], 2, "sensitivities/unet/", _SENSITIVITIES)
    for i in range(fields["cascades"]):
        yield _Row(f"cascade_{i}/weight", f"cascades.{i}.dc_weight", "vector", (1,))
        yield from _unet_table(fields["channels"], fields["levels"], 2, f"cascade_{i}/unet/", _CASCADE.format(i))


def _unet_table(channels: int, levels: int, images: int, ours: str, theirs: str) -> Iterator[_Row]:
    """Of a U-Net from as many channels as to."""

    def pair(block: str, layers: str, before: int, after: int) -> Iterator[_Row]:
        for ordinal, (layer, count) in enumerate(((0, before), (4, after))):
            name = f"{theirs}{layers}.layers.{layer}.weight"
            yield _Row(f"{ours}{block}/conv_{ordinal}/kernel", name, "convolution", (after, count, 3, 3))

    width = [channels << level for level in range(levels + 1)]
    for level in range(levels):
        yield from pair(
            f"down_{level}", f"down_sample_layers.{level}", width[level - 1] if level else images, width[level]
        )
    yield from pair("bottleneck", "conv", width[-2], width[-1])
    for level in range(levels):
        # Theirs are counted in the order in which they run, from the bottom up.
        ordinal = levels - 1 - level
        name, shape = f"{theirs}up_transpose_conv.{ordinal}.layers.0.weight", (width[level + 1], width[level], 2, 2)
        yield _Row(f"{ours}up_{level}/transpose/kernel", name, "transposed", shape)
        block = f"up_conv.{ordinal}" if level else f"up_conv.{ordinal}.0"
        yield from pair(f"up_{level}", block, width[level + 1], width[level])
    last = f"{theirs}up_conv.{levels - 1}.1"
    yield _Row(f"{ours}head/kernel", f"{last}.weight", "head", (images, channels, 1, 1))
    yield _Row(f"{ours}head/bias", f"{last}.bias", "vector", (images,))
