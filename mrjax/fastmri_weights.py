"""fastMRI's state_dicts and this package's parameters: the same arrays under other names and in other layouts.

A state_dict is read off its names and shapes alone: which network, how wide and how deep. The networks are
`fastmri.models.Unet` and `fastmri.models.VarNet` (fastmri 0.3.0, https://github.com/facebookresearch/fastMRI).
"""

from collections.abc import Iterator
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
    expected = {theirs for _, theirs, _ in table}
    for what, odd in (("lacks", expected - weights.keys()), ("also holds", weights.keys() - expected)):
        if odd:
            raise UserError(f"the state_dict {what} {prefix}{min(odd)}, expected that of fastMRI's {_LABELS[name]}")
    params = {}
    for ours, theirs, kind in table:
        value = np.asarray(weights[theirs], np.float32)
        if value.ndim != _DIMENSIONS[kind]:
            raise UserError(
                f"{prefix}{theirs} of the state_dict has the shape {value.shape}, expected {_DIMENSIONS[kind]} axes"
            )
        params[ours] = _to_ours(value, kind)
    return Network(name, fields, unflatten_dict(params, sep="/"))


def to_fastmri(name: str, fields: dict[str, int], params: dict[str, Any]) -> StateDict:
    """The state_dict that `load_state_dict` of fastMRI's network takes, from what `from_fastmri` gave."""
    flat = flatten_dict(params, sep="/")
    return {theirs: _to_theirs(np.asarray(flat[ours], np.float32), kind) for ours, theirs, kind in _table(name, fields)}


_LABELS = {"unet": "U-Net", "varnet": "VarNet"}
_DIMENSIONS = {"convolution": 4, "transposed": 4, "head": 4, "vector": 1}
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


def _table(name: str, fields: dict[str, int]) -> Iterator[tuple[str, str, str]]:
    """(our name, their name, kind) of every parameter."""
    if name == "unet":
        yield from _unet_table(fields["levels"], "", "")
        return
    yield from _unet_table(fields["sens_levels"], "sensitivities/unet/", _SENSITIVITIES)
    for i in range(fields["cascades"]):
        yield f"cascade_{i}/weight", f"cascades.{i}.dc_weight", "vector"
        yield from _unet_table(fields["levels"], f"cascade_{i}/unet/", _CASCADE.format(i))


def _unet_table(levels: int, ours: str, theirs: str) -> Iterator[tuple[str, str, str]]:
    def pair(block: str, layers: str) -> Iterator[tuple[str, str, str]]:
        for ordinal, layer in enumerate((0, 4)):
            yield f"{ours}{block}/conv_{ordinal}/kernel", f"{theirs}{layers}.layers.{layer}.weight", "convolution"

    for level in range(levels):
        yield from pair(f"down_{level}", f"down_sample_layers.{level}")
    yield from pair("bottleneck", "conv")
    for level in range(levels):
        # Theirs are counted in the order in which they run, from the bottom up.
        ordinal = levels - 1 - level
        last = f"up_conv.{ordinal}"
        transposed = f"{theirs}up_transpose_conv.{ordinal}.layers.0.weight"
        yield f"{ours}up_{level}/transpose/kernel", transposed, "transposed"
        yield from pair(f"up_{level}", last if level else f"{last}.0")
    yield f"{ours}head/kernel", f"{theirs}up_conv.{levels - 1}.1.weight", "head"
    yield f"{ours}head/bias", f"{theirs}up_conv.{levels - 1}.1.bias", "vector"
