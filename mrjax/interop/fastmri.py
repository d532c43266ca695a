"""fastMRI's state_dicts and this package's parameters: the same arrays under other names and axis orders.

The network, its width and its depth are recognised by the names and shapes of a state_dict alone. The networks are
`fastmri.models.Unet` and `fastmri.models.VarNet` (fastmri 0.3.0, https://github.com/facebookresearch/fastMRI).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mrjax.errors import UserError, expect

StateDict = dict[str, np.ndarray]
_Parameter = tuple[str, str, tuple[int, ...]]  # our name, kind in `_AXES`, shape in the state_dict
_FIRST = "down_sample_layers.0.layers.0.weight"
_SENSITIVITIES, _CASCADE = "sens_net.norm_unet.unet.", "cascades.{}.model.unet."
_LABELS = {"unet": "U-Net", "varnet": "VarNet"}
# PyTorch's (out, in, height, width), or (in, out, height, width) where transposed, to (height, width, in, out).
_AXES = {"convolution": (2, 3, 1, 0), "transposed": (2, 3, 0, 1), "head": (2, 3, 1, 0), "vector": (0,)}


class Network(NamedTuple):
    """A network of fastMRI's in this package's terms."""

    name: str  # in `models.MODELS`
    fields: dict[str, int]  # its attributes that the shapes of its weights determine
    params: dict[str, Any]  # float32


def from_fastmri(weights: StateDict) -> Network:
    """Convert a state_dict, its names prefixed or not; `UserError` unless it is of a U-Net or VarNet of one channel."""
    prefix, name = _recognise(weights)
    weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    fields = _infer_fields(name, weights)
    table = _parameters(name, fields)
    for verb, names in (("lacks", table.keys() - weights.keys()), ("also holds", weights.keys() - table.keys())):
        if names:
            raise UserError(f"the state_dict {verb} {prefix}{min(names)}, expected that of fastMRI's {_LABELS[name]}")
    params = {}
    for theirs, (ours, kind, shape) in table.items():
        value = weights[theirs]
        found = f"{prefix}{theirs} of the state_dict has the shape {value.shape}"
        expect(value.shape == shape, found, f"{shape} in a {_LABELS[name]} of {fields['channels']} channels")
        with np.errstate(over="ignore"):
            value = value.astype(np.float32).transpose(_AXES[kind])
        expect(np.isfinite(value).all(), f"{prefix}{theirs} of the state_dict holds NaN or Inf", "finite numbers")
        params[ours] = np.ascontiguousarray(value[0, 0] if kind == "head" else value)
    return Network(name, fields, unflatten_dict(params, sep="/"))


def to_fastmri(name: str, fields: Mapping[str, int], params: dict[str, Any]) -> StateDict:
    """Convert parameters to the state_dict that fastMRI's network loads; the inverse of `from_fastmri`."""
    flat, weights = flatten_dict(params, sep="/"), {}
    for theirs, (ours, kind, _) in _parameters(name, fields).items():
        value = np.asarray(flat[ours], np.float32)
        value = value[None, None] if kind == "head" else value
        weights[theirs] = np.ascontiguousarray(value.transpose(np.argsort(_AXES[kind])))
    return weights


def _recognise(weights: StateDict) -> tuple[str, str]:
    """Find the prefix of the names, and the network's name in `models.MODELS`."""
    for name, ending in (("varnet", _SENSITIVITIES + _FIRST), ("unet", _FIRST)):
        found = [key for key in weights if key == ending or key.endswith(f".{ending}")]
        if len(found) == 1:
            return found[0].removesuffix(ending), name
    some = ", ".join(list(weights)[:3])
    raise UserError(f"the state_dict is of neither fastMRI's U-Net nor its VarNet: its names are {some or 'none'}, ...")


def _infer_fields(name: str, weights: StateDict) -> dict[str, int]:
    """Infer the network's attributes, 1 where nothing tells: `from_fastmri` names what a state_dict lacks."""

    def unet_fields(prefix: str, start: str) -> dict[str, int]:
        first = np.atleast_1d(weights.get(start + _FIRST, 1))
        levels = sum(key.startswith(f"{start}up_transpose_conv.") for key in weights)
        return {f"{prefix}channels": len(first), f"{prefix}levels": max(levels, 1)}

    if name == "unet":
        return unet_fields("", "")
    cascades = sum(key.endswith(".dc_weight") for key in weights)
    return {**unet_fields("", _CASCADE.format(0)), **unet_fields("sens_", _SENSITIVITIES), "cascades": max(cascades, 1)}


def _parameters(name: str, fields: Mapping[str, int]) -> dict[str, _Parameter]:
    """List all parameters of a network by their names in the state_dict."""
    size = fields["channels"], fields["levels"]
    if name == "unet":
        return _unet_parameters("", "", 1, *size)
    sens_size = fields["sens_channels"], fields["sens_levels"]
    table = _unet_parameters("sensitivities/unet/", _SENSITIVITIES, 2, *sens_size)
    for i in range(fields["cascades"]):
        table[f"cascades.{i}.dc_weight"] = f"cascade_{i}/weight", "vector", (1,)
        table |= _unet_parameters(f"cascade_{i}/unet/", _CASCADE.format(i), 2, *size)
    return table


def _unet_parameters(ours: str, theirs: str, images: int, channels: int, levels: int) -> dict[str, _Parameter]:
    """List those of a U-Net from `images` channels to as many, under the prefixes `ours` and `theirs`."""
    width = [channels << level for level in range(levels + 1)]
    blocks = [("bottleneck", "conv", width[-2], width[-1])]
    last = f"{theirs}up_conv.{levels - 1}.1"
    table: dict[str, _Parameter] = {
        f"{last}.weight": (f"{ours}head/kernel", "head", (images, channels, 1, 1)),
        f"{last}.bias": (f"{ours}head/bias", "vector", (images,)),
    }
    for level, before in enumerate([images, *width[:-2]]):
        # Theirs are counted in the order in which they run, from the bottom up; the last is a sequence with the head.
        up, shape = levels - 1 - level, (width[level + 1], width[level], 2, 2)
        transpose = f"{theirs}up_transpose_conv.{up}.layers.0.weight"
        table[transpose] = f"{ours}up_{level}/transpose/kernel", "transposed", shape
        blocks.append((f"down_{level}", f"down_sample_layers.{level}", before, width[level]))
        blocks.append((f"up_{level}", f"up_conv.{up}" if level else f"up_conv.{up}.0", width[level + 1], width[level]))
    for block, layers, before, after in blocks:
        for ordinal, layer, count in ((0, 0, before), (1, 4, after)):
            kernel = f"{ours}{block}/conv_{ordinal}/kernel"
            table[f"{theirs}{layers}.layers.{layer}.weight"] = kernel, "convolution", (after, count, 3, 3)
    return table
