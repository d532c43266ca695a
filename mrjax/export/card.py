"""The model card of an exported network: README.md as the Hugging Face hub reads it."""

from typing import Any

from mrjax.measures.evaluator import INPUT_LABELS
from mrjax.measures.metrics import METRICS

_NETWORKS = {"unet": "U-Net", "unet_dc": "U-Net with data consistency", "varnet": "end-to-end variational network"}
_TASKS = {
    "kspace": "reconstructs magnitude images from undersampled Cartesian k-space",
    "paired": "improves corrupted magnitude images, as the pairs of images it was trained on",
    "denoise": "removes noise from single repetitions of a scan",
    "noise2noise": "removes noise from single repetitions of a scan",
}


def text(model: dict[str, Any]) -> str:
    """Write the card of a model that model.json describes."""
    config, task = model["config"], model["task"]
    purpose = _TASKS.get(task, f"was trained for the task {task!r}")
    network = _NETWORKS.get(model["network"], model["network"])
    return f"""---
license: other
library_name: mrjax
pipeline_tag: image-to-image
tags: [mri, brain, image-reconstruction, jax, {model["network"]}]
metrics: [{", ".join(METRICS)}]
---

# {network} for brain MRI

A {network} of {model["parameters"]:,} parameters, trained with mrjax for {model["step"]:,} steps. It {purpose}.

## Intended use and limits

For research on MR image reconstruction. **Not for diagnosis, nor for any other clinical use:** it is no medical device,
and nobody has shown that it keeps what a reader must see. A network can remove what is there, and invent what is not,
most of all on scans unlike its training data: other contrasts, anatomy, coils, resolution, field strength, acceleration
or noise. Compare with the zero-filled image before anything is concluded.

## Training data

{_training(config, task)}

To whoever hands this model on: say here which data, how many subjects, which scanners, under which licence; and set
`license` above.

## Metrics

{_metrics(model["metrics"], INPUT_LABELS.get(task, "corrupted"))}

## How to load it

With mrjax, `.` being this folder, or its name on the hub:

    from mrjax import load
    reconstruct = load(".")
    image = reconstruct({"image" if task == "paired" else "kspace, mask"})

{_programs(model)}
`model.json` has inputs, outputs, units, config, versions and SHA-256 sums; nothing in this folder is code that mrjax
would execute.
"""


def _training(config: dict[str, Any], task: str) -> str:
    if task == "paired":
        return "Pairs of corrupted and clean images."
    acquisition = config["acquisition"]
    factors = " and ".join(f"{factor:g}" for factor in acquisition["accelerations"])
    noise = f"noise of {' to '.join(f'{x:g}' for x in acquisition['noise'])} of the image's maximum"
    return f"Fully sampled k-space, accelerated by {factors} (mask `{acquisition['mask']}`), with {noise}."


def _metrics(metrics: dict[str, Any], before: str) -> str:
    """Format the metrics of the test split; or of the validation split, or that there are none."""
    if "test" not in metrics:
        known = f"SSIM {metrics['validation']['ssim']:.4f} on the validation split; " if "validation" in metrics else ""
        return f"{known}nothing was measured on a test split (`python -m mrjax.evaluate` before the export does so)."
    head = "".join(f" {metric.label} |" for metric in METRICS.values())
    lines = [f"| contrast | method |{head}", f"|---|---|{'---|' * len(METRICS)}"]
    for contrast, methods in metrics["test"].items():
        for method, label in (("corrupted", before), ("reconstruction", "this network")):
            cells = (
                " ± ".join(metric.format(methods[method][name][part]) for part in ("mean", "std"))
                for name, metric in METRICS.items()
            )
            lines.append(f"| {contrast} | {label} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    return f"On the test split, mean ± standard deviation over volumes, data range the volume's maximum:\n\n{table}"


def _programs(model: dict[str, Any]) -> str:
    """Show how the programs run without mrjax."""
    inputs = model["stablehlo"]["inputs"]
    zeros = ", ".join(f"np.ones({[1, *given['shape'][1:]]}, '{given['dtype']}')" for given in inputs)
    names = ", ".join(f"`{given['name']}` {given['shape']} {given['dtype']}" for given in inputs).replace("'", "")
    found = f"""Without mrjax, with `jax`, `numpy` and `flatbuffers` alone, on a CPU, GPU or TPU; it takes {names}:

    from pathlib import Path
    import numpy as np
    from jax import export
    program = export.deserialize(Path("model.stablehlo").read_bytes())
    image = np.asarray(program.call({zeros}))
"""
    if model["onnx"]:
        shape = [1 if isinstance(n, str) else n for n in model["onnx"]["inputs"][0]["shape"][:-2]] + [256, 256]
        found += f"""
The network alone as ONNX, from image to image of any height and width, without data consistency:

    import numpy as np, onnxruntime
    session = onnxruntime.InferenceSession("model.onnx")
    image = session.run(None, {{"input": np.ones({shape}, np.float32)}})[0]
"""
    return found
