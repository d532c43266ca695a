"""Streams of noise are inflated to what zlib makes of them; all others, and damaged ones, are left to libdeflate."""

import zlib

import deflate
import numpy as np
import pytest

from mrjax.io import inflate

RNG = np.random.default_rng(0)
NOISE = RNG.normal(size=2**16).astype(np.float32).tobytes()  # 262 kB
ROWS = RNG.normal(size=(64, 1024)).astype(np.float32)
ROWS[:, :128] = ROWS[:, 900:] = 0
STRATEGIES = (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_FIXED)
needs_compiler = pytest.mark.skipif(inflate._library() is None, reason="no C++ compiler")


def compress(data: bytes, level: int = 4, strategy: int = zlib.Z_DEFAULT_STRATEGY, memory: int = 8) -> bytes:
    compressor = zlib.compressobj(level, memLevel=memory, strategy=strategy)
    return compressor.compress(data) + compressor.flush()


def inflated(stream: bytes, size: int) -> bytes | None:
    """What the stream is inflated to, if it is; the memory is as long as it must be."""
    packed = np.frombuffer(stream + bytes(inflate.PADDING), np.uint8)[: len(stream)]
    out = np.full(size + 1, 99, np.uint8)
    done = inflate.inflate_noise(packed, out[:size])
    assert out[size] == 99
    return out[:size].tobytes() if done else None


@needs_compiler
@pytest.mark.parametrize("memory", [1, 8, 9])  # blocks of 128 to 32,768 symbols
@pytest.mark.parametrize("data", [NOISE, NOISE[:70_001], ROWS.tobytes()], ids=["noise", "odd", "rows with zeros"])
def test_noise_is_inflated(data: bytes, memory: int) -> None:
    for level in (2, 4, 9):
        assert inflated(compress(data, level, memory=memory), len(data)) == data
    assert inflated(deflate.zlib_compress(data, 6), len(data)) == data


@needs_compiler
def test_any_stream_is_inflated_or_left() -> None:
    text = b"".join(b"%d bottles of beer, " % i for i in range(4_000))
    shuffled = np.frombuffer(NOISE, np.uint8).reshape(-1, 4).T.tobytes()
    for data in (b"", b"a", NOISE[:2], NOISE[:1001], NOISE, shuffled, text, bytes(70_000), NOISE[:99_999] + text):
        for level in (0, 1, 4, 9):
            for strategy in STRATEGIES:
                stream = compress(data, level, strategy)
                assert inflated(stream, len(data)) in (data, None)
                assert inflated(stream, len(data) + 1) is None
                assert not data or inflated(stream, len(data) - 1) is None


@needs_compiler
def test_a_damaged_stream_is_left_or_holds_what_zlib_reads() -> None:
    stream = np.frombuffer(compress(NOISE[:60_000]), np.uint8)
    for i in range(4000):
        damaged = stream.copy()
        places = RNG.integers(0, len(stream) if i % 2 else 200, RNG.integers(1, 4))
        damaged[places] ^= (1 << RNG.integers(0, 8, len(places))).astype(np.uint8)
        damaged = damaged[: RNG.integers(0, len(stream))] if i % 3 == 0 else damaged
        result = inflated(damaged.tobytes(), 60_000)
        assert result is None or result == zlib.decompress(damaged.tobytes())


def test_without_a_compiler_nothing_is_inflated(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(inflate, "_library", inflate._library.__wrapped__)
    assert inflated(compress(NOISE), len(NOISE)) is None


@pytest.mark.parametrize("compiler", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("itemsize", [1, 2, 3, 4, 8, 16])
def test_shuffled_bytes_become_items(itemsize: int, compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiler:
        monkeypatch.setattr(inflate, "_library", lambda: None)
    items = np.frombuffer(NOISE, np.uint8)[: itemsize * 1001].reshape(-1, itemsize)
    out = np.full(items.size + 1, 99, np.uint8)
    inflate.unshuffle(np.frombuffer(items.T.tobytes(), np.uint8), out[:-1], itemsize)
    np.testing.assert_array_equal(out[:-1], items.ravel())
    assert out[-1] == 99
