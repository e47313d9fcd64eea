// The terms of a cell: nodes[target] += gate * op(sources[source]) in place, where op is a row of units of a separable
// convolution (none of them: the identity) or a pool. The backward pass computes the units again: what they make is
// still in the cache then, while reading what was kept since the forward pass takes as long.
#pragma once

#include <cmath>

#include "kernels.h"
#include "pools.h"
#include "separable.h"

namespace prdarts {

// The units of each operation in turn: how many (-1: the operation is not of this form), and their geometry.
struct Operations {
  Span units, strides, dilations;
  Span pools;  // of each operation: a Pool
  int64_t pool_stride, pool_norm;

  bool inside(int64_t op) const { return op < static_cast<int64_t>(units.size()); }
  bool has(int64_t op) const { return inside(op) && units[op] >= 0; }
  Pool pool(int64_t op) const { return inside(op) ? static_cast<Pool>(pools[op]) : Pool::kNone; }
  Shape pool_shape(Span image) const { return Shape(image, 3, pool_stride, 1); }
  int64_t first(int64_t op) const {
    int64_t before = 0;
    for (int64_t o = 0; o < op; ++o) before += std::max<int64_t>(units[o], 0);
    return before;
  }
};

// Which term: source and target are rows of the nodes, `row` is that of the stacked weights.
struct Slot {
  int64_t source, target, op, row;

  explicit Slot(const int32_t* v) : source(v[0]), target(v[1]), op(v[2]), row(v[3]) {}
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
  // Whether its input is a row of `from`, and what it makes one of `to`, whose rows are of the size of those of `work`.
  bool fits(const Array& from, const Array& work, const Array& to) const {
    bool good = size_of_row(work) == size_of_row(to) && slot_.source < from.dimensions()[0] &&
                slot_.target < to.dimensions()[0] && count_ <= work.dimensions()[0];
    if (count_ == 0) return good && size_of_row(from) == size_of_row(to);
    const Shape g = shape(count_ - 1);
    good = good && g.batch * g.out_pixels() * g.channels == size_of_row(to);
    for (int64_t u = 0; u < count_; ++u) good = good && slot_.row < depthwise(u).dimensions()[0];
    return good;
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

// What a term is multiplied by: one number, or one for each image.
struct Factor {
  const float* of;
  bool by_image;

  explicit Factor(const Array& value) : of(value.typed_data()), by_image(value.element_count() > 1) {}
  float operator()(int64_t b) const { return of[by_image ? b : 0]; }
};

inline bool fits(const Array& value, int64_t batch) {
  return value.element_count() == 1 || static_cast<int64_t>(value.element_count()) == batch;
}

// What the units of a chain compute: z of each in a row of `work`, and its mean and 1/sigma.
class Units {
 public:
  Units(const Chain& chain, const Array& work)
      : chain_(chain), work_(work), channels_(chain.shape(0).channels), moments_(2 * channels_ * (chain.count() + 1)) {
    std::fill_n(scale(-1), channels_, 1.0f);  // what the first unit reads is not normalised
  }
  float* z(int64_t u) const { return row_of(work_, u); }
  float* mean(int64_t u) { return moments_.data() + 2 * channels_ * (u + 1); }
  float* scale(int64_t u) { return mean(u) + channels_; }

  ffi::Error run(ffi::ThreadPool& pool, const float* x, float eps) {
    for (int64_t u = 0; u < chain_.count(); ++u) {
      ffi::Error error = unit_forward(pool, chain_.shape(u), channels_, u ? z(u - 1) : x, {mean(u - 1), scale(u - 1)},
                                      chain_.weights(u), z(u), mean(u), scale(u));
      if (error.failure()) return error;
      for (int64_t c = 0; c < channels_; ++c) scale(u)[c] = 1.0f / std::sqrt(scale(u)[c] + eps);
    }
    return ffi::Error::Success();
  }

 private:
  const Chain& chain_;
  const Array& work_;
  int64_t channels_;
  Buffer moments_;
};

// to += factor * (z - mean) * scale, of images [pixels, channels].
inline void add_normalised(ffi::ThreadPool& pool, const float* z, const float* mean, const float* scale,
                           const Factor& factor, int64_t batch, int64_t pixels, int64_t channels, float* to) {
  const int64_t parts = parts_of(batch);
  for_parts(pool, parts, [&](int64_t part) {
    const Range range = images_of(part, parts, batch);
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t n = channels - c;
      const Vec m = load(mean + c, n), inverse = load(scale + c, n);
      for (int64_t b = range.first; b < range.last; ++b) {
        const Vec s = factor(b) * inverse;
        for (int64_t i = b * pixels; i < (b + 1) * pixels; ++i) {
          const int64_t at = i * channels + c;
          store(to + at, load(to + at, n) + (load(z + at, n) - m) * s, n);
        }
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

// to += factor * from, of images of equal size; all of them at once where they have one factor.
inline void add_images(ffi::ThreadPool& pool, const float* from, const Factor& factor, int64_t size, int64_t batch,
                       float* to) {
  const int64_t pieces = factor.by_image ? batch : 1, piece = size / pieces;
  for (int64_t b = 0; b < pieces; ++b) {
    add_multiple(pool, from + b * piece, factor(b), piece, to + b * piece, nullptr);
  }
}

// mean and 1/sigma of what a pool makes, or what leaves it as it is.
inline void pool_moments(ffi::ThreadPool& pool, const Shape& g, Pool kind, bool norm, float eps, const float* x,
                         float* z, float* mean, float* scale) {
  pool_forward(pool, g, kind, x, z, mean, scale);
  for (int64_t c = 0; c < g.channels; ++c) {
    mean[c] = norm ? mean[c] : 0.0f;
    scale[c] = norm ? 1.0f / std::sqrt(scale[c] + eps) : 1.0f;
  }
}

inline void pool_term_forward(ffi::ThreadPool& pool, const Shape& g, Pool kind, bool norm, const Factor& factor,
                              float eps, const float* x, const Array& work, float* to) {
  Buffer moments(2 * g.channels);
  float *mean = moments.data(), *scale = mean + g.channels, *z = row_of(work, 0);
  pool_moments(pool, g, kind, norm, eps, x, z, mean, scale);
  add_normalised(pool, z, mean, scale, factor, g.batch, g.out_pixels(), g.channels, to);
}

// Adds factor * dx to `to`; returns the gradient of the gate.
inline float pool_term_backward(ffi::ThreadPool& pool, const Shape& g, Pool kind, bool norm, float factor, float eps,
                                const float* x, const Array& work, const float* dy, float* to) {
  Buffer moments(4 * g.channels);
  float *mean = moments.data(), *scale = mean + g.channels, *z = row_of(work, 0);
  float *mean_dy = scale + g.channels, *mean_cross = mean_dy + g.channels;
  pool_moments(pool, g, kind, norm, eps, x, z, mean, scale);
  norm_sums(pool, dy, z, mean, scale, g.batch, g.out_pixels(), g.channels, mean_dy, mean_cross);
  double total = 0;
  for (int64_t c = 0; c < g.channels; ++c) total += mean_cross[c];
  if (!norm) std::fill_n(mean_dy, 2 * g.channels, 0.0f);  // both: nothing is subtracted
  pool_backward(pool, g, kind, x, dy, {z, mean, scale, mean_dy, mean_cross}, {to, true, factor});
  return static_cast<float>(total * g.batch * g.out_pixels());
}

inline ffi::Error term_forward(ffi::ThreadPool& pool, const Chain& chain, const Factor& factor, float eps,
                               const float* x, const Array& work, int64_t size, int64_t batch, float* to) {
  if (chain.count() == 0) {
    add_images(pool, x, factor, size, batch, to);
    return ffi::Error::Success();
  }
  Units units(chain, work);
  ffi::Error error = units.run(pool, x, eps);
  if (error.failure()) return error;
  const int64_t last = chain.count() - 1;
  const Shape g = chain.shape(last);
  add_normalised(pool, units.z(last), units.mean(last), units.scale(last), factor, g.batch, g.out_pixels(), g.channels,
                 to);
  return ffi::Error::Success();
}

// Adds factor * dx to `to`, factor times the gradients of the weights to rows of their stacks; writes the gate's.
template <bool kWeights>
ffi::Error term_backward(ffi::ThreadPool& pool, const Chain& chain, float factor, float eps, const float* x,
                         const Array& work, const float* dy, int64_t size, float* to,
                         const ffi::RemainingRets& gradients, float* dvalue) {
  if (chain.count() == 0) {
    *dvalue = static_cast<float>(add_multiple(pool, dy, factor, size, to, x));
    return ffi::Error::Success();
  }
  Units units(chain, work);
  ffi::Error error = units.run(pool, x, eps);
  if (error.failure()) return error;
  const int64_t channels = chain.shape(0).channels;
  Buffer means(2 * channels);
  float *mean_dy = means.data(), *mean_cross = means.data() + channels;
  std::vector<float> of_depthwise, of_pointwise(kWeights ? channels * channels : 0);
  for (int64_t u = chain.count() - 1; u >= 0; --u) {
    const Shape g = chain.shape(u);
    float* z = units.z(u);
    const Norm norm{z, units.mean(u), units.scale(u), mean_dy, mean_cross};
    norm_sums(pool, dy, z, norm.mean, norm.scale, g.batch, g.out_pixels(), channels, mean_dy, mean_cross);
    if (u == chain.count() - 1) {  // y of the last unit is that of the operation
      double total = 0;
      for (int64_t c = 0; c < channels; ++c) total += mean_cross[c];
      *dvalue = static_cast<float>(total * g.batch * g.out_pixels());
    }
    // The cotangent of an image of z(u - 1) takes the place of that of z(u), which has been read by then.
    const Sink dx = u ? Sink{z} : Sink{to, true, factor};
    of_depthwise.resize(kWeights ? g.taps() * channels : 0);
    error = unit_backward<kWeights>(pool, g, channels, u ? units.z(u - 1) : x, {units.mean(u - 1), units.scale(u - 1)},
                                    chain.weights(u), dy, norm, dx, of_depthwise.data(), of_pointwise.data());
    if (error.failure()) return error;
    if (kWeights) {
      float *ddepthwise = chain.gradient(gradients, u, 0), *dpointwise = chain.gradient(gradients, u, 1);
      for (int64_t i = 0; i < g.taps() * channels; ++i) ddepthwise[i] += factor * of_depthwise[i];
      for (int64_t i = 0; i < channels * channels; ++i) dpointwise[i] += factor * of_pointwise[i];
    }
    dy = z;
  }
  return ffi::Error::Success();
}

}  // namespace prdarts
