// A depthwise convolution of a batch of images: its geometry, and what is done image by image.
#pragma once

#include <algorithm>

#include "depthwise.h"
#include "threads.h"

namespace prdarts {

// The geometry of a depthwise convolution of images [batch, height, width, channels].
struct Shape {
  int64_t batch, height, width, channels;
  int64_t k, s, d;

  Shape(ffi::Span<const int64_t> image, int64_t kernel, int64_t stride, int64_t dilation)
      : batch(image[0]), height(image[1]), width(image[2]), channels(image[3]), k(kernel), s(stride), d(dilation) {}
  int64_t border() const { return d * (k - 1) / 2; }
  int64_t out_height() const { return (height + s - 1) / s; }
  int64_t out_width() const { return (width + s - 1) / s; }
  int64_t wide() const { return padded(channels); }
  int64_t pixels() const { return height * width; }
  int64_t out_pixels() const { return out_height() * out_width(); }
  int64_t taps() const { return k * k; }
  Planes frame(float* data) const { return {data, height + 2 * border(), width + 2 * border(), wide()}; }
  int64_t frame_size() const { return (height + 2 * border()) * (width + 2 * border()) * wide(); }
  // Rows of the output that are computed together: enough pixels for the products, few enough for the first cache.
  int64_t block() const { return std::max<int64_t>(1, 64 / out_width()); }
};

enum Use { kImage, kGradient, kRows, kSlopes };

inline ffi::Error no_kernel() {
  return ffi::Error::InvalidArgument("no kernel for this size, stride and dilation");
}

// f(loops) for a geometry that is compiled.
template <typename F>
ffi::Error with_loops(const Shape& g, F f) {
  const Loops loops = loops_of(g.k, g.s, g.d);
  if (loops.convolve == nullptr) return no_kernel();
  f(loops);
  return ffi::Error::Success();
}

// out[i] = sum over the parts of what each has at i.
inline void sum_parts(const Buffer& parts, int64_t count, int64_t size, float* total) {
  std::memcpy(total, parts.data(), 4 * size);
  for (int64_t part = 1; part < count; ++part) {
    const float* from = parts.data() + part * size;
    for (int64_t i = 0; i < size; ++i) total[i] += from[i];
  }
}

inline void drop_lanes(const Buffer& wide, const Shape& g, float* kernel) {
  for (int64_t t = 0; t < g.taps(); ++t) {
    std::memcpy(kernel + t * g.channels, wide.data() + t * g.wide(), 4 * g.channels);
  }
}

// Where images go: they are written, or their multiples are added to what is there.
struct Sink {
  float* data;
  bool adds = false;
  float factor = 1.0f;

  Sink at(int64_t offset) const { return {data + offset, adds, factor}; }
  void put(int64_t i, Vec v, int64_t n) const { store(data + i, adds ? load(data + i, n) + factor * v : v, n); }
};

// Writes dx [height, width, channels] of one image from the framed gradient; a ReLU lets nothing through where
// x <= bound.
inline void input_gradient(const Shape& g, const Loops& loops, const Planes& dy, const float* flipped, const float* x,
                           const float* bound, const Sink& dx) {
  float* row = scratch<kRows>(g.width * g.wide());
  for (int64_t i = 0; i < g.height; ++i) {
    loops.transpose(dy, flipped, i, g.width, row);
    for (int64_t j = 0; j < g.width; ++j) {
      const int64_t at = (i * g.width + j) * g.channels;
      for (int64_t c = 0; c < g.channels; c += kLanes) {
        const int64_t n = g.channels - c;
        Vec v = load(row + j * g.wide() + c);
        if (x != nullptr) v = where_above(load(x + at + c, n), load(bound + c, n), v);
        dx.put(at + c, v, n);
      }
    }
  }
}

}  // namespace prdarts
