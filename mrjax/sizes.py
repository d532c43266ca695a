"""Slices of several sizes in one batch, each in the upper left corner of its arrays, as if each were alone.

What touches k-space or whole images is computed at each slice's own size: for every size there is, a branch of the
compiled step. The network sees a canvas, the size rounded up to what its levels need, and nothing beyond
(`models.UNet`); losses and metrics count a slice's own pixels. So it does not matter which bucket a slice is in.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Batch = dict[str, jax.Array]
Size = tuple[int, int]
# For each bucket, by the shape of the largest array of an example, the sizes of the slices in it.
Sizes = Mapping[tuple[int, ...], Sequence[Size]]


class OwnSize:
    """How the slices of one batch lie in its arrays.

    Args:
      batch: k-space or images, (batch, ..., height, width), and with several sizes `size` (batch, 2) int32, which of
        them an example has.
      sizes: of the buckets there are; a batch of no bucket holds slices of one size. None: all slices there are have
        one size, at which the network works as well: then nothing here changes anything.
      model: whose `multiple` the height and width of its canvases are multiples of.

    Attributes:
      size: (batch, 2) int32, each slice's own; None if it is one for all.
      canvas: (batch, 2) int32, of each slice; None if it is all of the network's image.
    """

    def __init__(self, batch: Batch, sizes: Sizes | None, model: Any):
        self.size: jax.Array | None = None
        self.canvas: jax.Array | None = None
        self._sizes: Sequence[Size] = ()
        if sizes is None:
            return
        shape = max((x.ndim, x.shape[1:]) for x in batch.values())[1]
        self._sizes = sizes.get(shape, [(shape[-2], shape[-1])])
        self._whole = tuple(max(lengths) for lengths in zip(*self._sizes, strict=True))
        if len(self._sizes) > 1:
            self.size = batch["size"]
            self.canvas = self.size

    def of(self, function: Callable[[Batch], Any]) -> Callable[[Batch], Any]:
        """A `function` of batches of one size made one of such batches as this.

        Where it gives images, (batch, height, width, ...), they are padded with zeros to what all canvases fit into.
        """
        if not self._sizes:
            return function

        def at(size: Size, batch: Batch) -> Any:
            def pad(x: jax.Array) -> jax.Array:
                if x.shape[1:3] != size:
                    return x
                widths = [(0, whole - own) for whole, own in zip(self._whole, size, strict=True)]
                return jnp.pad(x, [(0, 0), *widths, *[(0, 0)] * (x.ndim - 3)])

            height, width = size
            own = {name: x[..., :height, :width] if x.ndim > 2 else x for name, x in batch.items()}
            return jax.tree.map(pad, function(own))

        def one(example: Batch) -> Any:
            alone = {name: x[None] for name, x in example.items()}
            which = jnp.argmax(jnp.all(example["size"] == np.array(self._sizes), axis=-1))
            made = jax.lax.switch(which, [functools.partial(at, size) for size in self._sizes], alone)
            return jax.tree.map(lambda x: x[0], made)

        if len(self._sizes) == 1:
            return functools.partial(at, self._sizes[0])
        return functools.partial(jax.lax.map, one)

    def cut(self, images: jax.Array) -> jax.Array:
        """Images (batch, height, width) of the network's size: without padding, or with zeros for it."""
        if self.size is not None:
            return jnp.where(inside(self.size, images), images, 0)
        return images[:, : self._sizes[0][0], : self._sizes[0][1]] if self._sizes else images


def inside(size: jax.Array, images: jax.Array) -> jax.Array:
    """The pixels within `size` (batch, 2) of images (batch, height, width), bool of their shape."""
    rows, columns = (jnp.arange(n) < size[:, axis, None] for axis, n in enumerate(images.shape[1:]))
    return rows[:, :, None] & columns[:, None]
