// The 3x3 convolution, zero-padded, of images (batch, height, width, channels) for XLA on CPUs, as FFI calls.
//
// Each dtype is computed by a header of its own; this file shares the work among XLA's threads. Each header has
//   packed_bytes(cin, cout): the size of a packed kernel
//   pack(kernel, packed, cin, cout, flipped, tap): writes one tap of the kernel (3, 3, cin, cout) as `forward` takes it;
//     flipped, it is the kernel of the input's gradient, from cout channels to cin
//   forward(x, packed, y, height, width, cin, cout, begin, end): computes rows [begin, end) of one image
//   filter_gradient(x, g, dw, height, width, cin, cout, begin, end): adds the contribution of these rows to dw, float32
// Sums are float32. A result is the same, bit for bit, whatever the number of threads.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>

#include "bfloat16.h"
#include "float32.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr size_t CACHED = 512 << 10;     // bytes of an image that a thread works on at a time
constexpr size_t PARTIAL = 16 << 20;     // bytes of filter gradients waiting to be added up

// Runs tasks 0 to count - 1, each once, on this thread and those of the pool. This thread runs all that no other has
// begun, so it does not matter whether the pool has idle threads.
void share(ffi::ThreadPool& pool, int count, const std::function<void(int)>& task) {
  struct Work {
    std::atomic<int> next{0};
    int done = 0;
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto work = std::make_shared<Work>();
  // `task` lives until all are done: a thread that comes later finds none to begin.
  std::function<void()> help = [work, count, &task] {
    int finished = 0;
    for (int n; (n = work->next++) < count; finished++) task(n);
    if (finished) {
      std::lock_guard<std::mutex> lock(work->mutex);
      work->done += finished;
      if (work->done == count) work->all_done.notify_one();
    }
  };
  int helpers = std::min<int>(pool.num_threads(), count) - 1;
  for (int n = 0; n < helpers; n++) pool.Schedule(std::function<void()>(help));
  help();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->all_done.wait(lock, [&] { return work->done == count; });
}

struct Float32 {
  using Item = float;
  static constexpr int side = 3;
  static constexpr auto packed_bytes = mrjax::float32::packed_bytes;
  static constexpr auto pack = mrjax::float32::pack;
  static constexpr auto forward = mrjax::float32::forward;
  static constexpr auto filter_gradient = mrjax::float32::filter_gradient;
};

template <int kernel_side>
struct Bfloat16 {
  using Item = uint16_t;
  static constexpr int side = kernel_side;
  static constexpr auto packed_bytes = mrjax::bfloat16_::packed_bytes<side>;
  static constexpr auto pack = mrjax::bfloat16_::pack<side>;
  static constexpr auto forward = mrjax::bfloat16_::forward<side>;
  static constexpr auto filter_gradient = mrjax::bfloat16_::filter_gradient<side>;
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

Memory allocate(size_t bytes) { return Memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64)); }

ffi::Error no_memory() { return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a convolution"); }

// Rows of an image with all its channels that stay in the cache.
int rows_cached(size_t item, int height, int width, int channels) {
  return std::clamp<size_t>(CACHED / (item * width * channels), 1, height);
}

template <typename Kernels>
ffi::Error convolve(ffi::ThreadPool& pool, bool flipped, ffi::AnyBuffer x, ffi::AnyBuffer kernel,
                    ffi::Result<ffi::AnyBuffer> y) {
  using Item = typename Kernels::Item;
  const auto in = x.dimensions(), taps = kernel.dimensions();
  int batch = in[0], height = in[1], width = in[2], cin = in[3], cout = y->dimensions()[3];
  Memory packed = allocate(Kernels::packed_bytes(cin, cout));
  if (!packed) return no_memory();
  share(pool, Kernels::side * Kernels::side, [&](int tap) {
    Kernels::pack(static_cast<const Item*>(kernel.untyped_data()), packed.get(), taps[2], taps[3], flipped, tap);
  });
  // At least two tasks a thread if there are rows enough.
  int fair = std::max<int>(batch * height / (2 * std::max<int>(pool.num_threads(), 1)), 1);
  int rows = std::min(rows_cached(sizeof(Item), height, width, cin), fair);
  int tiles = (height + rows - 1) / rows;
  share(pool, batch * tiles, [&](int task) {
    size_t image = size_t(task / tiles) * height * width;
    int begin = task % tiles * rows;
    Kernels::forward(static_cast<const Item*>(x.untyped_data()) + image * cin, packed.get(),
                     static_cast<Item*>(y->untyped_data()) + image * cout, height, width, cin, cout, begin,
                     std::min(begin + rows, height));
  });
  return ffi::Error::Success();
}

template <typename Kernels>
ffi::Error filter_gradient(ffi::ThreadPool& pool, ffi::AnyBuffer x, ffi::AnyBuffer g, ffi::Result<ffi::AnyBuffer> dw) {
  using Item = typename Kernels::Item;
  const auto in = x.dimensions();
  int batch = in[0], height = in[1], width = in[2], cin = in[3], cout = g.dimensions()[3];
  size_t size = size_t(Kernels::side * Kernels::side) * cin * cout;
  // Each part of an image has a sum of its own; how many there are depends on the shapes alone.
  int rows = rows_cached(sizeof(Item), height, width, cin + cout);
  int parts = std::clamp<size_t>(PARTIAL / (sizeof(float) * size * batch), 1, (height + rows - 1) / rows);
  Memory partial = allocate(sizeof(float) * size * batch * parts);
  if (!partial) return no_memory();
  float* sums = static_cast<float*>(partial.get());
  share(pool, batch * parts, [&](int task) {
    size_t image = size_t(task / parts) * height * width;
    int begin = int64_t(height) * (task % parts) / parts, end = int64_t(height) * (task % parts + 1) / parts;
    float* sum = sums + size * task;
    std::fill(sum, sum + size, 0.0f);
    for (; begin < end; begin += rows)
      Kernels::filter_gradient(static_cast<const Item*>(x.untyped_data()) + image * cin,
                               static_cast<const Item*>(g.untyped_data()) + image * cout, sum, height, width, cin,
                               cout, begin, std::min(begin + rows, end));
  });
  constexpr size_t SPAN = 4096;
  share(pool, (size + SPAN - 1) / SPAN, [&](int task) {
    size_t first = task * SPAN, last = std::min(first + SPAN, size);
    for (int part = 1; part < batch * parts; part++)
      for (size_t i = first; i < last; i++) sums[i] += sums[part * size + i];
    std::copy(sums + first, sums + last, static_cast<float*>(dw->untyped_data()) + first);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Convolution,
    [](ffi::ThreadPool pool, bool flipped, ffi::AnyBuffer x, ffi::AnyBuffer kernel,
       ffi::Result<ffi::AnyBuffer> y) {
      auto run = x.element_type() == ffi::F32   ? convolve<Float32>
                 : kernel.dimensions()[0] == 3 ? convolve<Bfloat16<3>>
                                               : convolve<Bfloat16<1>>;
      return run(pool, flipped, x, kernel, y);
    },
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Attr<bool>("flipped")
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    FilterGradient,
    [](ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer g,
       ffi::Result<ffi::AnyBuffer> dw) {
      auto run = x.element_type() == ffi::F32 ? filter_gradient<Float32>
                 : dw->dimensions()[0] == 3   ? filter_gradient<Bfloat16<3>>
                                              : filter_gradient<Bfloat16<1>>;
      return run(pool, x, g, dw);
    },
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Ret<ffi::AnyBuffer>());
