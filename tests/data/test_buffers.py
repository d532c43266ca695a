"""Memory of batches is reused, and never while someone still looks at it."""

import numpy as np
import pytest

from mrjax.data import buffers
from mrjax.data.buffers import Batch
from mrjax.errors import UserError


def test_memory_is_reused_only_when_no_view_of_the_batch_is_left() -> None:
    pool = buffers.Buffers({"a": ((4, 3), np.dtype(np.float32)), "b": ((4,), np.dtype(np.int32))})

    def number(value: int) -> Batch:
        return pool.fill(lambda batch: [array.fill(value) for array in batch.values()])

    first = number(1)
    view = first["b"][1:3].reshape(2, 1)
    where = first["a"].ctypes.data
    del first
    second = number(2)
    assert second["a"].ctypes.data != where
    assert view.tolist() == [[1], [1]]
    del view
    third = number(3)
    assert third["a"].ctypes.data == where
    assert (second["a"] == 2).all()
    assert len(pool._pool) == 2


def test_the_memory_of_a_batch_that_could_not_be_read_is_reused() -> None:
    pool = buffers.Buffers({"a": ((4, 3), np.dtype(np.float32))})

    def fail(batch: Batch) -> None:
        raise UserError("damaged")

    for _ in range(3):
        with pytest.raises(UserError, match="damaged"):
            pool.fill(fail)
    assert len(pool._pool) == 1
