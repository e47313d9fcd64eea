// The terms of a cell: nodes[target] += gate * op(sources[source]) in place, where op is a row of units of a separable
// convolution (none of them: the identity). What a unit computes is kept for the backward pass in rows of two buffers.
#pragma once

#include <cmath>

#include "separable.h"

namespace prdarts {

using Array = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using Span = ffi::Span<const int64_t>;

// The units of each operation in turn: how many (-1: the operation is not of this form), and their geometry.
struct Operations {
  Span units, strides, dilations;

  bool has(int64_t op) const { return op < static_cast<int64_t>(units.size()) && units[op] >= 0; }
  int64_t first(int64_t op) const {
    int64_t before = 0;
    for (int64_t o = 0; o < op; ++o) before += std::max<int64_t>(units[o], 0);
    return before;
  }
};

// Which term: source and target are rows of the nodes, `row` is that of the stacked weights, `kept` the first kept one.
struct Slot {
  int64_t source, target, op, row, kept;

  explicit Slot(const int32_t* v) : source(v[0]), target(v[1]), op(v[2]), row(v[3]), kept(v[4]) {}
};

inline int64_t size_of_row(const Array& stack) { return stack.element_count() / stack.dimensions()[0]; }
inline Span dimensions_of_row(const Array& stack) {
  return {stack.dimensions().begin() + 1, stack.dimensions().size() - 1};
}
inline float* row_of(const Array& stack, int64_t row) { return stack.typed_data() + row * size_of_row(stack); }

// The units of one operation, with the weights of one edge.
class Chain {
 public:
  // input: dimensions of one source [batch, height, width, channels].
  Chain(const Operations& all, const Slot& slot, Span input, const ffi::RemainingArgs& weights)
      : count_(all.units[slot.op]),
        input_(input),
        weights_(weights),
        all_(all),
        slot_(slot),
        first_(all.first(slot.op)) {}

  int64_t count() const { return count_; }
  Array depthwise(int64_t u) const { return *weights_.get<Array>(2 * (first_ + u)); }
  UnitWeights weights(int64_t u) const {
    return {row_of(depthwise(u), slot_.row), row_of(*weights_.get<Array>(2 * (first_ + u) + 1), slot_.row)};
  }
  // All strides but the first are 1.
  Shape shape(int64_t u) const {
    Shape g(input_, depthwise(u).dimensions()[1], all_.strides[first_ + u], all_.dilations[first_ + u]);
    for (int64_t before = 0; before < u; ++before) {
      const int64_t s = all_.strides[first_ + before];
      g.height = (g.height + s - 1) / s;
      g.width = (g.width + s - 1) / s;
    }
    return g;
  }
  // Gradients lie behind the weights among the arguments, and are the results `of`.
  float* gradient(const ffi::RemainingRets& of, int64_t u, int64_t which) const {
    return row_of(**of.get<Array>(2 * (first_ + u) + which), slot_.row);
  }

 private:
  int64_t count_;
  Span input_;
  const ffi::RemainingArgs& weights_;
  const Operations& all_;
  const Slot& slot_;
  int64_t first_;
};

// What units keep: z of each, and its mean and 1/sigma.
struct Kept {
  const Array &z, &moments;

  float* z_of(int64_t row) const { return row_of(z, row); }
  float* mean_of(int64_t row) const { return row_of(moments, row); }
  float* scale_of(int64_t row) const { return row_of(moments, row) + moments.dimensions()[2]; }
};

// What the first unit reads is not normalised.
class Plain {
 public:
  explicit Plain(int64_t channels) : zeros_(channels), ones_(channels) { std::fill_n(ones_.data(), channels, 1.0f); }
  Prologue prologue() const { return {zeros_.data(), ones_.data()}; }

 private:
  Buffer zeros_, ones_;
};

// to += factor * (z - mean) * scale, of images [pixels, channels].
inline void add_normalised(ffi::ThreadPool& pool, const float* z, const float* mean, const float* scale, float factor,
                           int64_t batch, int64_t pixels, int64_t channels, float* to) {
  const int64_t parts = parts_of(batch);
  for_parts(pool, parts, [&](int64_t part) {
    const Range range = images_of(part, parts, batch);
    const int64_t first = range.first * pixels, last = range.last * pixels;
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t n = channels - c;
      const Vec m = load(mean + c, n), s = factor * load(scale + c, n);
      for (int64_t i = first; i < last; ++i) {
        const int64_t at = i * channels + c;
        store(to + at, load(to + at, n) + (load(z + at, n) - m) * s, n);
      }
    }
  });
}

// to += factor * from; the sum of from * with, if there is `with`.
inline double add_multiple(ffi::ThreadPool& pool, const float* from, float factor, int64_t size, float* to,
                           const float* with) {
  const int64_t parts = std::clamp<int64_t>(size / 4096, 1, kMaxParts);
  double sums[kMaxParts] = {};
  for_parts(pool, parts, [&](int64_t part) {
    const Range range = images_of(part, parts, size);
    Vec products[2] = {};
    for (int64_t i = range.first; i < range.last; i += kLanes) {
      const int64_t n = range.last - i;
      const Vec v = load(from + i, n);
      store(to + i, load(to + i, n) + factor * v, n);
      if (with != nullptr) products[i / kLanes % 2] += v * load(with + i, n);
    }
    for (int lane = 0; lane < kLanes; ++lane) sums[part] += products[0][lane] + products[1][lane];
  });
  double total = 0;
  for (int64_t part = 0; part < parts; ++part) total += sums[part];
  return total;
}

inline ffi::Error term_forward(ffi::ThreadPool& pool, const Chain& chain, const Slot& slot, float factor, float eps,
                               const float* x, const Kept& kept, int64_t size, float* to) {
  const Plain plain(chain.count() ? chain.shape(0).channels : 1);
  Prologue prologue = plain.prologue();
  for (int64_t u = 0; u < chain.count(); ++u) {
    const Shape g = chain.shape(u);
    const int64_t row = slot.kept + u;
    float *z = kept.z_of(row), *mean = kept.mean_of(row), *scale = kept.scale_of(row);
    ffi::Error error = unit_forward(pool, g, g.channels, x, prologue, chain.weights(u), z, mean, scale);
    if (error.failure()) return error;
    for (int64_t c = 0; c < g.channels; ++c) scale[c] = 1.0f / std::sqrt(scale[c] + eps);
    x = z;
    prologue = {mean, scale};
  }
  if (chain.count() == 0) {
    add_multiple(pool, x, factor, size, to, nullptr);
  } else {
    const Shape g = chain.shape(chain.count() - 1);
    add_normalised(pool, x, prologue.mean, prologue.scale, factor, g.batch, g.out_pixels(), g.channels, to);
  }
  return ffi::Error::Success();
}

// Adds factor * dx to `to`; the gradients of the weights, times factor, to rows of their stacks. Returns the gate's.
template <bool kWeights>
ffi::Error term_backward(ffi::ThreadPool& pool, const Chain& chain, const Slot& slot, float factor, const float* x,
                         const Kept& kept, const float* dy, int64_t size, float* to,
                         const ffi::RemainingRets& gradients, float* dvalue) {
  if (chain.count() == 0) {
    *dvalue = static_cast<float>(add_multiple(pool, dy, factor, size, to, x));
    return ffi::Error::Success();
  }
  const int64_t channels = chain.shape(0).channels;
  const Plain plain(channels);
  Buffer means(2 * channels);
  for (int64_t u = chain.count() - 1; u >= 0; --u) {
    const Shape g = chain.shape(u);
    const int64_t row = slot.kept + u;
    float *mean_dy = means.data(), *mean_cross = means.data() + channels;
    norm_sums(pool, dy, kept.z_of(row), kept.mean_of(row), kept.scale_of(row), g.batch, g.out_pixels(), channels,
              mean_dy, mean_cross);
    if (u == chain.count() - 1) {  // y of the last unit is that of the operation
      double total = 0;
      for (int64_t c = 0; c < channels; ++c) total += mean_cross[c];
      *dvalue = static_cast<float>(total * g.batch * g.out_pixels());
    }
    const Norm norm{kept.z_of(row), kept.mean_of(row), kept.scale_of(row), mean_dy, mean_cross};
    const Prologue prologue = u ? Prologue{kept.mean_of(row - 1), kept.scale_of(row - 1)} : plain.prologue();
    // Two buffers in turn: a unit reads the cotangent that the one after it wrote.
    float* between = u % 2 ? scratch<kCotangent>(g.batch * g.pixels() * channels)
                           : scratch<kCotangent + 1>(u ? g.batch * g.pixels() * channels : 0);
    const Sink dx = u ? Sink{between} : Sink{to, true, factor};
    float *ddepthwise = nullptr, *dpointwise = nullptr;
    if (kWeights) ddepthwise = chain.gradient(gradients, u, 0), dpointwise = chain.gradient(gradients, u, 1);
    ffi::Error error = unit_backward<kWeights>(pool, g, channels, u ? kept.z_of(row - 1) : x, prologue,
                                               chain.weights(u), dy, norm, dx, ddepthwise, dpointwise);
    if (error.failure()) return error;
    if (kWeights) {
      for (int64_t i = 0; i < g.k * g.k * channels; ++i) ddepthwise[i] *= factor;
      for (int64_t i = 0; i < channels * channels; ++i) dpointwise[i] *= factor;
    }
    dy = between;
  }
  return ffi::Error::Success();
}

}  // namespace prdarts
