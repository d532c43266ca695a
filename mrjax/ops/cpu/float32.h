// 3x3 convolutions of float32 images, zero-padded, for one image (height, width, channels) and a range of its rows.
//
// Both operations are products of small blocks that stay in registers: PIXELS x COLUMNS vectors of sums. Rows of the
// image are first copied with a border of zeros to memory that stays in the cache; there the three pixels under a
// row of the kernel lie side by side, as one vector of 3 cin numbers. The caller gives as many rows as fit there.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>

namespace mrjax::float32 {

#if defined(__AVX512F__)
constexpr int LANES = 16, PIXELS = 14;
#elif defined(__AVX__)
constexpr int LANES = 8, PIXELS = 6;
#else
constexpr int LANES = 4, PIXELS = 6;
#endif
constexpr int COLUMNS = 2, BLOCK = COLUMNS * LANES;

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
inline Vector everywhere(float value) { return value - Vector{}; }

inline int blocks(int count, int size) { return (count + size - 1) / size; }

// Memory of this thread, kept for the next call.
inline float* scratch(int which, size_t count) {
  struct Buffer {
    float* data = nullptr;
    size_t count = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffers[2];
  Buffer& buffer = buffers[which];
  if (buffer.count < count) {
    std::free(buffer.data);
    size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (!buffer.data) throw std::bad_alloc();
    buffer.count = count;
  }
  return buffer.data;
}

// Rows [begin - 1, end + 1) with a border of zeros: (end - begin + 2, width + 2, cin).
inline const float* bordered(const float* x, int height, int width, int cin, int begin, int end) {
  size_t row = size_t(width + 2) * cin;
  float* copy = scratch(0, row * (end - begin + 2) + LANES);
  for (int r = begin - 1; r <= end; r++) {
    float* to = copy + row * (r - begin + 1);
    if (r < 0 || r >= height) {
      std::memset(to, 0, row * sizeof(float));
    } else {
      std::memset(to, 0, cin * sizeof(float));
      std::memcpy(to + cin, x + size_t(r) * width * cin, size_t(width) * cin * sizeof(float));
      std::memset(to + row - cin, 0, cin * sizeof(float));
    }
  }
  return copy;
}

// Bytes of what `forward` from cin to cout channels takes.
inline size_t packed_bytes(int cin, int cout) { return sizeof(float) * 9 * cin * blocks(cout, BLOCK) * BLOCK; }

// One tap of a kernel (3, 3, cin, cout) for `forward`: (blocks of output channels, 9 taps, cin, BLOCK), with zeros for
// the channels that are not there. `flipped`: for the gradient by the input, which takes cout channels to cin.
inline void pack(const float* kernel, void* packed, int cin, int cout, bool flipped, int tap) {
  int in = flipped ? cout : cin, out = flipped ? cin : cout;
  const float* from = kernel + size_t(flipped ? 8 - tap : tap) * cin * cout;
  for (int b = 0; b < blocks(out, BLOCK); b++) {
    float* to = static_cast<float*>(packed) + (size_t(b) * 9 + tap) * in * BLOCK;
    int first = b * BLOCK, count = std::min(out - first, BLOCK);
    for (int i = 0; i < in; i++, to += BLOCK) {
      if (flipped)
        for (int o = 0; o < count; o++) to[o] = from[size_t(first + o) * cout + i];
      else
        std::memcpy(to, from + size_t(i) * cout + first, count * sizeof(float));
      std::fill(to + count, to + BLOCK, 0.0f);
    }
  }
}

// P pixels side by side, V vectors of output channels, `count` of which are there.
template <int P, int V>
inline void pixels(const float* x, size_t row, int cin, const float* weights, float* y, int cout, int count) {
  Vector sum[P][V] = {};
  for (int dy = 0; dy < 3; dy++, x += row)
    for (int i = 0; i < 3 * cin; i++, weights += BLOCK) {
      Vector weight[V];
      #pragma GCC unroll 16
      for (int v = 0; v < V; v++) weight[v] = load(weights + v * LANES);
      #pragma GCC unroll 16
      for (int p = 0; p < P; p++) {
        Vector value = everywhere(x[size_t(p) * cin + i]);
        #pragma GCC unroll 16
        for (int v = 0; v < V; v++) sum[p][v] += value * weight[v];
      }
    }
  #pragma GCC unroll 16
  for (int p = 0; p < P; p++, y += cout) {
    Vector result[V];
    #pragma GCC unroll 16
    for (int v = 0; v < V; v++) result[v] = sum[p][v];
    if (count == V * LANES)
      std::memcpy(y, result, sizeof(result));
    else
      std::memcpy(y, result, count * sizeof(float));
  }
}

template <int P = PIXELS>
inline void some_pixels(int n, const float* x, size_t row, int cin, const float* weights, float* y, int cout, int count) {
  if constexpr (P > 0) {
    if (n < P) return some_pixels<P - 1>(n, x, row, cin, weights, y, cout, count);
    if (count > LANES) return pixels<P, 2>(x, row, cin, weights, y, cout, count);
    return pixels<P, 1>(x, row, cin, weights, y, cout, count);
  }
}

// y[begin:end], (height, width, cout).
inline void forward(const float* x, const void* packed, float* y, int height, int width, int cin, int cout, int begin,
                    int end) {
  size_t row = size_t(width + 2) * cin;
  const float* in = bordered(x, height, width, cin, begin, end);
  int chunks = blocks(width, PIXELS);
  for (int b = 0; b < blocks(cout, BLOCK); b++) {
    const float* weights = static_cast<const float*>(packed) + size_t(9) * cin * BLOCK * b;
    for (int r = begin; r < end; r++)
      for (int c = 0; c < chunks; c++) {
        // Chunks as equal as can be.
        int first = size_t(width) * c / chunks, last = size_t(width) * (c + 1) / chunks;
        some_pixels(last - first, in + row * (r - begin) + size_t(first) * cin, row, cin, weights,
                    y + (size_t(r) * width + first) * cout + b * BLOCK, cout, std::min(cout - b * BLOCK, BLOCK));
      }
  }
}

// Adds, for N of the 3 cin numbers under a row of the kernel, to (N, cout) all products with V vectors of g.
template <int N, int V>
inline void products(const float* x, size_t row, int cin, const float* g, int rows, int width, float* dw, int cout,
                     int count) {
  Vector sum[N][V] = {};
  for (int r = 0; r < rows; r++, x += row) {
    const float* in = x;
    for (int c = 0; c < width; c++, in += cin, g += V * LANES) {
      Vector gradient[V];
      #pragma GCC unroll 16
      for (int v = 0; v < V; v++) gradient[v] = load(g + v * LANES);
      #pragma GCC unroll 16
      for (int n = 0; n < N; n++) {
        Vector value = everywhere(in[n]);
        #pragma GCC unroll 16
        for (int v = 0; v < V; v++) sum[n][v] += value * gradient[v];
      }
    }
  }
  #pragma GCC unroll 16
  for (int n = 0; n < N; n++, dw += cout) {
    float result[V * LANES];
    #pragma GCC unroll 16
    for (int v = 0; v < V; v++) store(result + v * LANES, sum[n][v]);
    for (int o = 0; o < count; o++) dw[o] += result[o];
  }
}

template <int N = PIXELS>
inline void some_products(int n, const float* x, size_t row, int cin, const float* g, int rows, int width, float* dw,
                          int cout, int count) {
  if constexpr (N > 0) {
    if (n < N) return some_products<N - 1>(n, x, row, cin, g, rows, width, dw, cout, count);
    if (count > LANES) return products<N, 2>(x, row, cin, g, rows, width, dw, cout, count);
    return products<N, 1>(x, row, cin, g, rows, width, dw, cout, count);
  }
}

// Adds to dw (3, 3, cin, cout) what the rows of x (height, width, cin) and g (height, width, cout) give.
inline void filter_gradient(const float* x, const float* g, float* dw, int height, int width, int cin, int cout,
                            int begin, int end) {
  size_t row = size_t(width + 2) * cin;
  const float* in = bordered(x, height, width, cin, begin, end);
  int rows = end - begin, count = rows * width, chunks = blocks(3 * cin, PIXELS);
  for (int b = 0; b < blocks(cout, BLOCK); b++) {
    int there = std::min(cout - b * BLOCK, BLOCK), wide = blocks(there, LANES) * LANES;
    // This block's channels alone, side by side.
    float* block = scratch(1, size_t(count) * wide);
    const float* from = g + size_t(begin) * width * cout + b * BLOCK;
    for (int p = 0; p < count; p++) {
      std::memcpy(block + size_t(p) * wide, from + size_t(p) * cout, there * sizeof(float));
      if (there < wide) std::memset(block + size_t(p) * wide + there, 0, (wide - there) * sizeof(float));
    }
    for (int dy = 0; dy < 3; dy++)
      for (int c = 0; c < chunks; c++) {
        int first = size_t(3) * cin * c / chunks, last = size_t(3) * cin * (c + 1) / chunks;
        some_products(last - first, in + row * dy + first, row, cin, block, rows, width,
                      dw + (size_t(dy) * 3 * cin + first) * cout + b * BLOCK, cout, there);
      }
  }
}

}  // namespace mrjax::float32
