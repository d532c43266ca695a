"""PyTorch's side of the benchmarks: fastMRI's U-Net, data loader and training loop.

Imported inside functions only, after `report.require_packages`: scripts say how they are used without PyTorch, and a
process that times mrjax's training holds none of it.
"""

import contextlib
import gc
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from fastmri.data import SliceDataset
from fastmri.data.subsample import RandomMaskFunc
from fastmri.data.transforms import UnetDataTransform
from fastmri.models import Unet


def device() -> torch.device:
    """Return the GPU if JAX computes on one, else the CPU."""
    return torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")


def make_unet(form: str, channels: int, levels: int) -> tuple[torch.nn.Module, torch.memory_format]:
    """Return fastMRI's U-Net on the device in one of `report.PYTORCH_FORMS`, and its images' memory format."""
    layout = torch.channels_last if "channels_last" in form else torch.contiguous_format
    unet = Unet(in_chans=1, out_chans=1, chans=channels, num_pool_layers=levels).to(device(), memory_format=layout)
    if "compiled" in form:
        # Not dynamic: the levels are one piece of code at several sizes, which PyTorch would compile once for all, and
        # more sizes than it compiles by default before it falls back to eager.
        torch._dynamo.config.recompile_limit = 64
        unet.compile(dynamic=False)
    return unet, layout


def autocast(precision: str) -> torch.autocast:
    """Return PyTorch's mixed precision for bfloat16, and a context without effect for float32."""
    return torch.autocast(device().type, torch.bfloat16, enabled=precision == "bfloat16")


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def training_step(
    form: str, channels: int, levels: int, precision: str, images: tuple[np.ndarray, np.ndarray]
) -> tuple[Callable[[], None], int]:
    """Return a training step on (corrupted, target), (batch, height, width) float32, and its number of parameters."""
    unet, layout = make_unet(form, channels, levels)
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-3, fused=True)
    corrupted, target = (torch.from_numpy(x[:, None]).to(device(), memory_format=layout) for x in images)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(precision):
            output = unet(corrupted)
        torch.nn.functional.mse_loss(output.float(), target).backward()
        optimizer.step()
        synchronize()

    return run, sum(parameter.numel() for parameter in unet.parameters())


def inference_step(form: str, channels: int, levels: int, precision: str, images: np.ndarray) -> Callable[[], None]:
    """Return a function that applies the U-Net to images (batch, height, width) float32."""
    unet, layout = make_unet(form, channels, levels)
    unet.eval()
    inputs = torch.from_numpy(images[:, None]).to(device(), memory_format=layout)

    def run() -> None:
        with torch.inference_mode(), autocast(precision):
            unet(inputs)
        synchronize()

    return run


def warm_up(forms: Sequence[str], make: Callable[[str], Callable[[], None]]) -> dict[str, Callable[[], None] | str]:
    """Make and run the function of each form once.

    Returns:
      By form, its function, or the reason why it cannot run, e.g. that compiling needs a C++ compiler.
    """
    results: dict[str, Callable[[], None] | str] = {}
    for form in forms:
        torch._dynamo.reset()
        try:
            run = make(form)
            run()
            results[form] = run
        except Exception as error:  # a form that fails is a row of the table and does not end the others
            results[form] = f"not measured: {type(error).__name__}: {str(error).strip().splitlines()[0][:60]}"
    return results


def cpu_threads() -> int:
    """Return how many threads PyTorch uses by default."""
    return torch.get_num_threads()


def unet_transform() -> UnetDataTransform:
    """Return fastMRI's fourfold random mask and its U-Net's transform, as its own training uses them."""
    return UnetDataTransform("multicoil", RandomMaskFunc([0.08], [4]), use_seed=False)


def unchanged(kspace: np.ndarray, mask: Any, target: np.ndarray, *_: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return k-space and target unchanged: the transform of a loader without mask and transform."""
    return kspace, target


class EndlessLoader:
    """fastMRI's `SliceDataset` under a shuffling `DataLoader`, epoch after epoch.

    Attributes:
      slices: number of slices in an epoch.
    """

    def __init__(self, folder: str, batch: int, transform: Callable[..., Any]) -> None:
        self._data, self._batch = SliceDataset(folder, "multicoil", transform=transform), batch
        self.slices = len(self._data)

    @contextlib.contextmanager
    def stream(self, workers: int) -> Iterator[Iterator[Any]]:
        """Open an endless stream of batches."""
        loader = torch.utils.data.DataLoader(
            self._data, self._batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
        )
        epochs = (loader for _ in iter(int, 1))
        yield itertools.chain.from_iterable(epochs)
        epochs.close()
        del loader
        gc.collect()  # ends its workers


def train_from_files(
    folder: Path, *, channels: int, levels: int, steps: int, batch: int, workers: int, threads: int
) -> tuple[float, float]:
    """Train fastMRI's U-Net on multi-coil files with fastMRI's data path; time the second half of the steps.

    Returns:
      Images a second, and the share of the time spent waiting for batches.
    """
    torch.set_num_threads(threads)
    loader = torch.utils.data.DataLoader(
        # `bool` keeps every sample like the default, which is a lambda and cannot be pickled for another process.
        SliceDataset(folder, challenge="multicoil", transform=unet_transform(), raw_sample_filter=bool),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        # A fork of this process would copy JAX's locks without the threads that hold them.
        multiprocessing_context=multiprocessing.get_context("forkserver"),
    )
    target_device = "cuda" if torch.cuda.is_available() else "cpu"
    network = Unet(1, 1, chans=channels, num_pool_layers=levels).to(target_device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    batches, waited, start = iter(loader), 0.0, 0.0
    for step in range(steps):
        requested = time.perf_counter()
        sample = next(batches, None)
        if sample is None:
            batches = iter(loader)
            sample = next(batches)
        waited += time.perf_counter() - requested
        image, target = sample.image.to(target_device), sample.target.to(target_device)
        loss = torch.nn.functional.mse_loss(network(image[:, None])[:, 0], target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step + 1 == steps // 2:
            loss.item()
            waited, start = 0.0, time.perf_counter()
    loss.item()
    seconds = time.perf_counter() - start
    return (steps - steps // 2) * batch / seconds, waited / seconds


class TrainedUnet:
    """fastMRI's U-Net with fastMRI's normalisation, its parameters drawn with a seed.

    Attributes:
      parameters: number of parameters.
    """

    def __init__(self, channels: int, levels: int, seed: int) -> None:
        torch.manual_seed(seed)
        self._unet, self._seed = Unet(1, 1, chans=channels, num_pool_layers=levels), seed
        self.parameters = sum(parameter.numel() for parameter in self._unet.parameters())

    def train_or_load(
        self, file: Path, folder: Path, accelerations: dict[float, float], batch: int, steps: int
    ) -> None:
        """Load the parameters from a file, or train and write them to it.

        Training minimises L1 by Adam on what fastMRI's classes read, mask and normalise.

        Args:
          file: of the parameters, .pt.
          folder: of multi-coil files to train on.
          accelerations: centre fraction by acceleration.
          batch: slices in a step.
          steps: number of steps.
        """
        if file.exists():
            self._unet.load_state_dict(torch.load(file, weights_only=True))
            return
        mask = RandomMaskFunc(list(accelerations.values()), [int(a) for a in accelerations])
        transform = UnetDataTransform("multicoil", mask, use_seed=False)
        slices = SliceDataset(folder, challenge="multicoil", transform=transform)
        loader = torch.utils.data.DataLoader(slices, batch_size=batch, shuffle=True, drop_last=True)
        mask.rng.seed(self._seed)
        optimizer = torch.optim.Adam(self._unet.parameters(), lr=1e-3)
        batches = itertools.chain.from_iterable(loader for _ in iter(int, 1))
        for sample in itertools.islice(batches, steps):
            loss = torch.nn.functional.l1_loss(self._unet(sample.image[:, None])[:, 0], sample.target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        torch.save(self._unet.state_dict(), file)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Reconstruct images (batch, height, width) float32, normalised and clipped as fastMRI does."""
        corrupted = torch.from_numpy(images)
        mean, std = (f(corrupted, dim=(1, 2), keepdim=True) for f in (torch.mean, torch.std))
        with torch.inference_mode():
            output = self._unet(((corrupted - mean) / (std + 1e-11)).clamp(-6, 6)[:, None])[:, 0] * std + mean
        return output.numpy()
