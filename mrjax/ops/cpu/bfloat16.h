// The zero-padded convolution of bfloat16 images, [height][width][channels], and its gradients, with float32 sums. The
// kernel, [side][side][cin][cout], has 3 taps a side or 1.
//
// Both are matrix products of blocks of 32. Rows of an image lie one after the other in scratch memory, a zero pixel
// before each (none for a single tap), so that a tap of the kernel is an offset of pixels there, over the borders too,
// and 32 pixels may span rows; channels are padded with zeros to a multiple of 32. A convolution contracts channels and
// taps, a filter gradient contracts pixels. The second factor always holds pairs of the contracted index, as the
// instructions for bfloat16 take it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mrjax::bfloat16_ {

using T = uint16_t;     // bfloat16
using Pair = uint32_t;  // two of them, the first in the low half

constexpr int kBlock = 32;

inline int blocks(int n) { return (n + kBlock - 1) / kBlock; }

// Of each thread, aligned to cache lines, kept from call to call.
template <int which>
T* scratch(size_t count) {
  thread_local std::vector<T> memory;
  if (memory.size() < count + 32) memory.resize(count + 32);
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

// What a row takes in scratch, in pixels, and how many zero pixels follow the last: blocks may end beyond it.
template <int side>
int pitch(int width) {
  return width + side / 2;
}
constexpr int kSlack = 4 * kBlock;

// Rows [begin, end) of an image, those outside it zero.
template <int which, int side>
const T* pad(const T* image, int height, int width, int channels, int begin, int end) {
  const size_t padded = blocks(channels) * kBlock;
  T* const start = scratch<which>(((end - begin) * size_t(pitch<side>(width)) + kSlack) * padded);
  T* to = start;
  for (int row = begin; row < end; ++row) {
    to = std::fill_n(to, side / 2 * padded, 0);
    const T* from = image + ptrdiff_t(row) * width * channels;
    if (row < 0 || row >= height) {
      to = std::fill_n(to, width * padded, 0);
    } else if (size_t(channels) == padded) {
      to = std::copy_n(from, width * padded, to);
    } else {
      for (int pixel = 0; pixel < width; ++pixel, from += channels) {
        to = std::fill_n(std::copy_n(from, channels, to), padded - channels, 0);
      }
    }
  }
  std::fill_n(to, kSlack * padded, 0);
  return start;
}

// [2 * pairs][channels] to [channels / 32][pairs][32] pairs; the blocks lie `distance` apart.
inline void interleave(const T* from, Pair* to, size_t pairs, size_t channels, size_t distance) {
  for (size_t block = 0; block < channels; block += kBlock, to += distance) {
    for (size_t pair = 0; pair < pairs; ++pair) {
      const T* first = from + 2 * pair * channels + block;
      const T* second = first + channels;
      for (int i = 0; i < kBlock; ++i) to[pair * kBlock + i] = first[i] | Pair(second[i]) << 16;
    }
  }
}

#if defined(__clang__)
#define MRJAX_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC has that from 12 on.
#define MRJAX_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Row{__VA_ARGS__})
#endif

// 16 x 16 pairs, by four perfect shuffles of the rows.
inline void transpose(const Pair* from, size_t from_stride, Pair* to, size_t to_stride) {
  typedef Pair Row __attribute__((vector_size(64)));
  Row rows[16], next[16];
  for (int i = 0; i < 16; ++i) std::memcpy(&rows[i], from + i * from_stride, sizeof(Row));
  for (int stage = 0; stage < 4; ++stage) {
    for (int i = 0; i < 8; ++i) {
      const Row a = rows[i], b = rows[i + 8];
      next[2 * i] = MRJAX_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = MRJAX_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    std::copy_n(next, 16, rows);
  }
  for (int i = 0; i < 16; ++i) std::memcpy(to + i * to_stride, &rows[i], sizeof(Row));
}

// c[32][32] = the sum, over `outer` * `inner` steps, of a[32][32] * b[32][32]. Rows of `a` lie `stride` apart, its
// inner steps 32 and its outer ones `distance`; b is [outer][inner][16][32] pairs.
struct Factors {
  const T* a;
  ptrdiff_t stride, distance;
  int outer, inner;
  const Pair* b;
};

#if defined(__AVX512F__)
constexpr int kWidth = 64, kRows = 8;
#elif defined(__AVX__)
constexpr int kWidth = 32, kRows = 2;
#else
constexpr int kWidth = 16, kRows = 2;
#endif
constexpr int kVectors = kBlock * sizeof(float) / kWidth;
typedef float Sums __attribute__((vector_size(kWidth)));
typedef Pair Pairs __attribute__((vector_size(kWidth)));

template <class Value>
Value load(const void* from) {
  Value value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

#if defined(__AVX512BF16__)
inline Sums add_products(Sums sums, Pairs x, Pairs y) { return _mm512_dpbf16_ps(sums, (__m512bh)x, (__m512bh)y); }

// Rounds up to 32 sums.
inline void store(const float* sums, T* y, int count) {
  const auto rounded = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(sums + 16), _mm512_loadu_ps(sums));
  _mm512_mask_storeu_epi16(y, uint32_t(-1) >> (kBlock - count), rounded);
}
#else
inline Sums add_products(Sums sums, Pairs x, Pairs y) {
  sums += (Sums)(x << 16) * (Sums)(y << 16);
  return sums + (Sums)(x & 0xffff0000u) * (Sums)(y & 0xffff0000u);
}

inline void store(const float* sums, T* y, int count) {
  for (int i = 0; i < count; ++i) {
    const Pair bits = load<Pair>(sums + i);
    y[i] = sums[i] == sums[i] ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
  }
}
#endif

// kRows rows from `row` on; sum number n is of row n / kVectors. The pack keeps the sums in registers, which GCC does not
// do for an array that loops index.
template <size_t... n>
void multiply_rows(const Factors& f, int row, float* c, std::index_sequence<n...>) {
  Sums sums[sizeof...(n)] = {};
  const Pair* b = f.b;
  for (int outer = 0; outer < f.outer; ++outer) {
    const T* a = f.a + outer * f.distance + row * f.stride;
    for (int pair = 0; pair < f.inner * kBlock / 2; ++pair, a += 2, b += kBlock) {
      ((sums[n] = add_products(sums[n], load<Pair>(a + n / kVectors * f.stride) + Pairs{},
                               load<Pairs>(b + n % kVectors * (kBlock / kVectors)))),
       ...);
    }
  }
  std::memcpy(c + row * kBlock, sums, sizeof sums);
}

inline void multiply_by_vectors(const Factors& f, float* c) {
  for (int row = 0; row < kBlock; row += kRows) {
    multiply_rows(f, row, c, std::make_index_sequence<kRows * kVectors>());
  }
}

#if defined(__AMX_BF16__)
// Whether Linux lets this process use the tiles, for which it must be asked.
inline bool has_tiles() {
  constexpr int request_permission = 0x1023, tile_data = 18;
  static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return granted;
}

// Tiles of 16 rows of 64 bytes, for as long as this lives.
struct Tiles {
  Tiles() {
    static const struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    if (has_tiles()) _tile_loadconfig(&shapes);
  }
  ~Tiles() {
    if (has_tiles()) _tile_release();
  }
};

inline void multiply(const Factors& f, float* c) {
  if (!has_tiles()) return multiply_by_vectors(f, c);
  asm volatile("" ::: "memory");  // GCC does not know that tiles read memory.
  const ptrdiff_t bytes = f.stride * sizeof(T);
  constexpr int row = kBlock * sizeof(Pair);
  const Pair* b = f.b;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int outer = 0; outer < f.outer; ++outer) {
    const T* a = f.a + outer * f.distance;
    for (int inner = 0; inner < f.inner; ++inner, a += kBlock, b += kBlock * kBlock / 2) {
      _tile_loadd(4, a, bytes);
      _tile_loadd(6, b, row);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + 16, row);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + 16 * f.stride, bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, row);
  _tile_stored(1, c + 16, row);
  _tile_stored(2, c + 16 * kBlock, row);
  _tile_stored(3, c + 16 * kBlock + 16, row);
}
#else
struct Tiles {
  ~Tiles() {}
};

inline void multiply(const Factors& f, float* c) { multiply_by_vectors(f, c); }
#endif

template <int side>
size_t packed_bytes(int cin, int cout) {
  return side * side * sizeof(T) * blocks(cin) * blocks(cout) * kBlock * kBlock;
}

// Writes one tap of the kernel to `packed`, which has packed_bytes(cin, cout), for `forward`. Flipped, it is of the
// gradient of the input: `forward` then takes cout channels to cin.
template <int side>
void pack(const T* kernel, void* packed, int cin, int cout, bool flipped, int tap) {
  constexpr int taps = side * side;
  const size_t in = blocks(cin) * kBlock, out = blocks(cout) * kBlock;
  const T* from = pad<0, 1>(kernel + size_t(tap) * cin * cout, 1, cin, cout, 0, 1);
  Pair* const to = static_cast<Pair*>(packed);
  if (!flipped) return interleave(from, to + tap * in / 2 * kBlock, in / 2, out, taps * in / 2 * kBlock);
  for (size_t i = 0; i < in; i += 16) {
    for (size_t pair = 0; pair < out / 2; pair += 16) {
      Pair* block = to + ((i / kBlock * taps + taps - 1 - tap) * out / 2 + pair) * kBlock + i % kBlock;
      transpose(reinterpret_cast<const Pair*>(from) + i * out / 2 + pair, out / 2, block, kBlock);
    }
  }
}

// Rows [row_begin, row_end) of y, [height][width][cout], from x, [height][width][cin].
template <int side>
void forward(const T* x, const void* packed, T* y, int height, int width, int cin, int cout, int row_begin,
             int row_end) {
  const Tiles tiles;
  const int inner = side * blocks(cin), row_pixels = pitch<side>(width);
  const ptrdiff_t channels = blocks(cin) * kBlock;
  // Rows that stay in the second-level cache, 512 KB.
  const int step = std::max<int>(1, (512 << 10) / (row_pixels * channels * sizeof(T)));
  alignas(64) float c[kBlock][kBlock];
  for (int begin = row_begin; begin < row_end; begin += step) {
    const int end = std::min(begin + step, row_end), pixels = (end - begin) * row_pixels;
    const T* padded = pad<0, side>(x, height, width, cin, begin - side / 2, end + side / 2);
    for (int channel = 0; channel < cout; channel += kBlock) {
      const Pair* kernel = static_cast<const Pair*>(packed) + channel * inner * side * kBlock / 2;
      T* to = y + ptrdiff_t(begin) * width * cout + channel;
      for (int pixel = 0, column = 0; pixel < pixels; pixel += kBlock) {
        multiply({padded + pixel * channels, channels, row_pixels * channels, side, inner, kernel}, c[0]);
        for (int i = 0; i < std::min(kBlock, pixels - pixel); ++i) {
          if (column < width) {
            store(c[i], to, std::min(kBlock, cout - channel));
            to += cout;
          }
          if (++column == row_pixels) column = 0;
        }
      }
    }
  }
}

// Adds to dw, [side][side][cin][cout], what rows [row_begin, row_end) of the gradient g, [height][width][cout], give
// with x.
template <int side>
void filter_gradient(const T* x, const T* g, float* dw, int height, int width, int cin, int cout, int row_begin,
                     int row_end) {
  const Tiles tiles;
  const int row_pixels = pitch<side>(width);
  // Of pixels enough that adding a block to dw costs little, few enough that a block's lie in the cache.
  const int step = std::max(1, 2048 / row_pixels);
  const size_t in = blocks(cin) * kBlock, out = blocks(cout) * kBlock;
  alignas(64) float c[kBlock][kBlock];
  for (int begin = row_begin; begin < row_end; begin += step) {
    const int end = std::min(begin + step, row_end);
    const size_t pixels = blocks((end - begin) * row_pixels) * kBlock;
    const T* padded = pad<0, side>(g, height, width, cout, begin, end) + side / 2 * out;
    auto* gradient = reinterpret_cast<Pair*>(scratch<1>(pixels * out));
    interleave(padded, gradient, pixels / 2, out, pixels / 2 * kBlock);
    // Rows of an odd number of cache lines, lest all fall into the same sets of the cache.
    const size_t stride = (blocks((end - begin + side - 1) * row_pixels + kBlock + 2) | 1) * kBlock;
    padded = pad<0, side>(x, height, width, cin, begin - side / 2, end + side / 2);
    auto* block = reinterpret_cast<Pair*>(scratch<2>(stride * in));
    interleave(padded, block, stride / 2, in, stride / 2 * kBlock);
    T* const image = scratch<3>(stride * in);
    for (size_t channel = 0; channel < in; channel += kBlock, block += stride / 2 * kBlock) {
      for (size_t pair = 0; pair < stride / 2; pair += 16) {
        Pair* to = reinterpret_cast<Pair*>(image + channel * stride) + pair;
        transpose(block + pair * kBlock, kBlock, to, stride / 2);
        transpose(block + pair * kBlock + 16, kBlock, to + 16 * stride / 2, stride / 2);
      }
    }
    for (int o = 0; o < cout; o += kBlock) {
      for (int i = 0; i < cin; i += kBlock) {
        for (int tap = 0; tap < side * side; ++tap) {
          const T* shifted = image + i * stride + tap / side * row_pixels + tap % side;
          multiply({shifted, ptrdiff_t(stride), 0, 1, int(pixels / kBlock), gradient + o * pixels / 2}, c[0]);
          float* to = dw + (ptrdiff_t(tap) * cin + i) * cout + o;
          for (int row = 0; row < std::min(kBlock, cin - i); ++row, to += cout) {
            for (int j = 0; j < std::min(kBlock, cout - o); ++j) to[j] += c[row][j];
          }
        }
      }
    }
  }
}

}  // namespace mrjax::bfloat16_
