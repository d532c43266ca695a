"""mrjax: train brain-MRI reconstruction models in JAX."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mrjax.inference import Inference


def load(source: str | os.PathLike[str]) -> "Inference":
    """Load a trained network: `reconstruct = mrjax.load("runs/unet")`, then `image = reconstruct(kspace)`.

    `source` is the workdir of a run, a folder that `mrjax.export` has written, or `user/model` on the Hugging Face hub
    where `huggingface_hub` is installed. What it returns is called with arrays (`mrjax.inference.Inference.__call__`)
    and has `.config`, `.metrics` and `.export(folder)`. Raises a `UserError` if there is no model.
    """
    # Not above: JAX and all else take seconds to import.
    from mrjax.export.folder import find
    from mrjax.inference import Inference

    return Inference.restore(find(os.fspath(source)))
