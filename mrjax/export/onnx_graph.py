"""A U-Net as an ONNX graph, from magnitude image to magnitude image: any number of slices of any height and width.

Written with `onnx.helper`, operation by operation, as the one converter from JAX (jax2onnx 0.17) needs an older Orbax
than ours. Data consistency, which needs the k-space, is not part of it, and all arithmetic is float32.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from ml_collections import ConfigDict
from onnx import TensorProto, helper, numpy_helper

from mrjax.export.stablehlo import UNIT
from mrjax.ops.reference import EPSILON, SLOPE

OPSET, IR_VERSION = 18, 10  # of 2023 and 2024, for runtimes that are not the newest


class _Graph:
    """Nodes and constants under numbered names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._numbers = itertools.count()

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"constant_{next(self._numbers)}"
        self.constants.append(numpy_helper.from_array(np.array(value, dtype, order="C"), name))
        return name

    def __call__(self, operation: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operation.lower()}_{next(self._numbers)}"
        self.nodes.append(helper.make_node(operation, inputs, [name], name, **attributes))
        return name

    def axes(self, *axes: int) -> str:
        return self.constant(axes, np.int64)


def write(path: Path, config: ConfigDict, params: Any) -> dict[str, Any]:
    """Write the graph of a config's U-Net with these parameters; return what model.json says of it."""
    graph, channels = _Graph(), 1 + 2 * config.data.adjacent_slices
    shape: list[str | int] = ["batch", *([channels] if channels > 1 else []), "height", "width"]
    image = "input" if channels > 1 else graph("Unsqueeze", "input", graph.axes(1))
    inputs = [("input", shape)]
    if config.normalise == "volume":
        inputs.append(("maximum", ["batch"]))
    offset, scale = _scaling(graph, config.normalise, image)
    normalised = graph("Div", graph("Sub", image, offset), scale)
    output = graph("Add", graph("Mul", _unet(graph, normalised, params, config), scale), offset)
    graph.nodes.append(helper.make_node("Squeeze", [output, graph.axes(1)], ["image"]))

    def declare(name: str, shape: Sequence[str | int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    result = ["batch", "height", "width"]
    body = helper.make_graph(
        graph.nodes, "unet", [declare(*given) for given in inputs], [declare("image", result)], graph.constants
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    described = [{"name": name, "shape": shape, "dtype": "float32", "unit": "any"} for name, shape in inputs]
    return {
        "file": path.name,
        "inputs": described,
        "outputs": [{"name": "image", "shape": result, "dtype": "float32", "unit": UNIT}],
    }


def _scaling(graph: _Graph, rule: str, image: str) -> tuple[str, str]:
    """Compute offset and scale (batch, 1, 1, 1) of `mri.normalise`, from the first channel of the image."""
    first = graph("Slice", image, graph.axes(0), graph.axes(1), graph.axes(1))
    axes, zero, one = graph.axes(2, 3), graph.constant(0), graph.constant(1)
    if rule == "volume":
        offset, scale = zero, graph("Reshape", "maximum", graph.axes(-1, 1, 1, 1))
    elif rule == "slice":
        offset = graph("ReduceMin", first, axes)
        scale = graph("Sub", graph("ReduceMax", first, axes), offset)
    else:
        offset = graph("ReduceMean", first, axes)
        pixels = graph("Cast", graph("ReduceProd", graph("Shape", first, start=2), keepdims=0), to=TensorProto.FLOAT)
        squares = graph("ReduceSumSquare", graph("Sub", first, offset), axes)
        scale = graph("Sqrt", graph("Div", squares, graph("Sub", pixels, one)))
    return offset, graph("Where", graph("Greater", scale, zero), scale, one)


def _unet(graph: _Graph, image: str, params: Any, config: ConfigDict) -> str:
    """Apply `models.unet.UNet` to (batch, channels, height, width)."""
    levels, skips, x = config.model.levels, [], image
    pool = {"max": "MaxPool", "avg": "AveragePool"}[config.model.pool]
    for i in range(levels):
        x = _convolve_twice(graph, x, params[f"down_{i}"])
        skips.append(x)
        x = graph(pool, x, kernel_shape=[2, 2], strides=[2, 2])
    x = _convolve_twice(graph, x, params["bottleneck"])
    for i in reversed(range(levels)):
        kernel = params[f"up_{i}"]["transpose"]["kernel"].transpose(2, 3, 0, 1)
        x = _norm_act(graph, graph("ConvTranspose", x, graph.constant(kernel), strides=[2, 2]), kernel.shape[1])
        # An odd side lacks a pixel, below or on the right.
        missing = graph("Sub", graph("Shape", skips[i]), graph("Shape", x))
        x = graph("Pad", x, graph("Concat", graph.axes(0, 0, 0, 0), missing, axis=0), mode="reflect")
        x = _convolve_twice(graph, graph("Concat", x, skips[i], axis=1), params[f"up_{i}"])
    kernel = params["head"]["kernel"].T[:, :, None, None]
    x = graph("Conv", x, graph.constant(kernel), graph.constant(params["head"]["bias"]))
    if config.model.residual:
        x = graph("Add", x, graph("Slice", image, graph.axes(0), graph.axes(1), graph.axes(1)))
    return x


def _convolve_twice(graph: _Graph, x: str, params: Any) -> str:
    for name in ("conv_0", "conv_1"):
        kernel = params[name]["kernel"].transpose(3, 2, 0, 1)
        x = _norm_act(graph, graph("Conv", x, graph.constant(kernel), pads=[1, 1, 1, 1]), len(kernel))
    return x


def _norm_act(graph: _Graph, x: str, channels: int) -> str:
    ones, zeros = graph.constant(np.ones(channels)), graph.constant(np.zeros(channels))
    return graph("LeakyRelu", graph("InstanceNormalization", x, ones, zeros, epsilon=EPSILON), alpha=SLOPE)
