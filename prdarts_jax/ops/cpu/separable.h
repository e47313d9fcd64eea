// The unit of a separable convolution: ReLU, depthwise, pointwise, and the statistics of what comes out.
//
// Its input is relu((x - mean) scale): what came out of another one is normalised on the way in, and never stored.
#pragma once

#include "images.h"
#include "products.h"
#include "statistics.h"

namespace prdarts {

// The weights of a unit: [k, k, channels] and [channels, out].
struct UnitWeights {
  const float *depthwise, *pointwise;
};

// --- without a window: a 1x1 depthwise kernel is a factor ---------------------------------------------------------------

inline bool has_window(const Shape& g) { return g.k != 1 || g.s != 1; }

// Pixels that are computed together: few enough for the first cache.
inline int64_t pixel_block(const Shape& g, int64_t wide_out) {
  return std::max<int64_t>(kTile, 6144 / (g.wide() + wide_out) / kTile * kTile);
}

// rows = relu((x - mean) scale) factor, in whole vectors.
inline void rectify(const float* x, const Prologue& prologue, const float* factors, int64_t pixels, int64_t channels,
                    float* rows) {
  const int64_t wide = padded(channels);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t n = channels - c;
    const Vec mean = load(prologue.mean + c, n), scale = load(prologue.scale + c, n), factor = load(factors + c, n);
    for (int64_t i = 0; i < pixels; ++i) {
      store(rows + i * wide + c, relu((load(x + i * channels + c, n) - mean) * scale) * factor);
    }
  }
}

inline void pointwise_forward(ffi::ThreadPool& pool, const Shape& g, int64_t out, const float* x,
                              const Prologue& prologue, const UnitWeights& weights, float* z, float* means,
                              float* squares) {
  const int64_t parts = parts_of(g.batch), wide_out = padded(out), block = pixel_block(g, wide_out);
  Buffer matrix(g.channels * wide_out);
  lay_out_matrix(weights.pointwise, g.channels, out, false, matrix.data());
  for_parts(pool, parts, [&](int64_t part) {
    float* rows = scratch<kRows>(block * g.wide());
    const Range range = images_of(part, parts, g.batch);
    for (int64_t b = range.first; b < range.last; ++b) {
      const float* from = x + b * g.pixels() * g.channels;
      float* to = z + b * g.pixels() * out;
      for (int64_t i = 0; i < g.pixels(); i += block) {
        const int64_t count = std::min(block, g.pixels() - i);
        rectify(from + i * g.channels, prologue, weights.depthwise, count, g.channels, rows);
        product(rows, g.wide(), matrix.data(), wide_out, count, g.channels, {to + i * out, out, kLanes, out});
      }
      image_moments(to, g.pixels(), out, means + b * out, squares + b * out);
    }
  });
}

// z [batch, out_height, out_width, out], and its mean and biased variance over the batch.
inline ffi::Error unit_forward(ffi::ThreadPool& pool, const Shape& g, int64_t out, const float* x,
                               const Prologue& prologue, const UnitWeights& weights, float* z, float* mean,
                               float* variance) {
  const int64_t parts = parts_of(g.batch);
  Buffer moments(2 * g.batch * out);
  float *means = moments.data(), *squares = means + g.batch * out;
  if (!has_window(g)) {
    pointwise_forward(pool, g, out, x, prologue, weights, z, means, squares);
    batch_moments(means, squares, g.batch, g.pixels(), out, mean, variance);
    return ffi::Error::Success();
  }
  Buffer taps(g.taps() * g.wide()), matrix(g.channels * padded(out));
  lay_out(weights.depthwise, g.taps(), g.channels, false, taps.data());
  lay_out_matrix(weights.pointwise, g.channels, out, false, matrix.data());
  ffi::Error error = with_loops(g, [&](const Loops& loops) {
    for_parts(pool, parts, [&](int64_t part) {
      const Planes image = g.frame(scratch<kImage>(g.frame_size()));
      float* rows = scratch<kRows>(g.block() * g.out_width() * g.wide());
      image.clear();
      const Range range = images_of(part, parts, g.batch);
      for (int64_t b = range.first; b < range.last; ++b) {
        fill(image, x + b * g.pixels() * g.channels, g.height, g.width, g.channels, g.border(), 1, prologue);
        float* to = z + b * g.out_pixels() * out;
        for (int64_t i = 0; i < g.out_height(); i += g.block()) {
          const int64_t count = std::min(g.block(), g.out_height() - i);
          for (int64_t r = 0; r < count; ++r) {
            loops.convolve(image, taps.data(), (i + r) * g.s, g.out_width(), rows + r * g.out_width() * g.wide());
          }
          product(rows, g.wide(), matrix.data(), padded(out), count * g.out_width(), g.channels,
                  {to + i * g.out_width() * out, out, kLanes, out});
        }
        image_moments(to, g.out_pixels(), out, means + b * out, squares + b * out);
      }
    });
  });
  batch_moments(means, squares, g.batch, g.out_pixels(), out, mean, variance);
  return error;
}

// What the backward pass of a batch normalisation needs beside dy: z, and by channel mean, 1/sigma, mean(dy),
// mean(dy y).
struct Norm {
  const float *z, *mean, *scale, *mean_dy, *mean_cross;
};

// dz = scale (dy - mean(dy) - y mean(dy y)) of `pixels` pixels, in whole vectors.
inline void norm_gradient(const Norm& norm, const float* z, const float* dy, int64_t pixels, int64_t channels,
                          float* dz) {
  const int64_t wide = padded(channels);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t n = channels - c;
    const Vec scale = load(norm.scale + c, n), mean = load(norm.mean + c, n);
    const Vec slope = scale * load(norm.mean_cross + c, n), offset = load(norm.mean_dy + c, n);
    for (int64_t i = 0; i < pixels; ++i) {
      const Vec centred = load(z + i * channels + c, n) - mean;
      store(dz + i * wide + c, scale * (load(dy + i * channels + c, n) - offset - centred * slope));
    }
  }
}

// The rest of a pointwise unit's block: gradients d of its rows become those of its input and of the factors.
template <bool kWeights>
void rectify_backward(const float* x, const Prologue& prologue, const float* factors, int64_t pixels, int64_t channels,
                      const float* d, const Sink& dx, float* dfactors) {
  const int64_t wide = padded(channels);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t n = channels - c;
    const Vec mean = load(prologue.mean + c, n), scale = load(prologue.scale + c, n), factor = load(factors + c, n);
    Vec sum = {};
    for (int64_t i = 0; i < pixels; ++i) {
      const Vec v = load(x + i * channels + c, n), slope = load(d + i * wide + c);
      if (kWeights) sum += relu((v - mean) * scale) * slope;
      dx.put(i * channels + c, where_above(v, mean, slope * factor), n);
    }
    if (kWeights) store(dfactors + c, load(dfactors + c) + sum);
  }
}

// partial: of each part [wide factors] and [wide][wide_out] of the matrix, if kWeights.
template <bool kWeights>
void pointwise_backward(ffi::ThreadPool& pool, const Shape& g, int64_t out, const float* x, const Prologue& prologue,
                        const UnitWeights& weights, const float* dy, const Norm& norm, const Sink& dx,
                        Buffer& partial) {
  const int64_t parts = parts_of(g.batch), wide_out = padded(out), block = pixel_block(g, wide_out);
  const int64_t size_all = g.wide() * (1 + wide_out);
  Buffer transposed(out * g.wide());
  lay_out_matrix(weights.pointwise, g.channels, out, true, transposed.data());
  for_parts(pool, parts, [&](int64_t part) {
    float* rows = scratch<kRows>(block * g.wide());
    float* slopes = scratch<kSlopes>(block * wide_out);
    float* sums = partial.data() + part * size_all;
    const Range range = images_of(part, parts, g.batch);
    for (int64_t b = range.first; b < range.last; ++b) {
      for (int64_t i = 0; i < g.pixels(); i += block) {
        const int64_t count = std::min(block, g.pixels() - i), at = b * g.pixels() + i;
        const float* input = x + at * g.channels;
        norm_gradient(norm, norm.z + at * out, dy + at * out, count, out, slopes);
        if (kWeights) {
          rectify(input, prologue, weights.depthwise, count, g.channels, rows);
          outer(rows, g.wide(), slopes, wide_out, count, g.wide(), sums + g.wide(), wide_out);
        }
        product(slopes, wide_out, transposed.data(), g.wide(), count, out, {rows, g.wide(), kLanes, g.wide()});
        rectify_backward<kWeights>(input, prologue, weights.depthwise, count, g.channels, rows,
                                   dx.at(at * g.channels), sums);
      }
    }
  });
}

// The cotangent of what the input stands for, and, if kWeights, [k, k, channels] and [channels, out] of the weights.
template <bool kWeights>
ffi::Error unit_backward(ffi::ThreadPool& pool, const Shape& g, int64_t out, const float* x, const Prologue& prologue,
                         const UnitWeights& weights, const float* dy, const Norm& norm, const Sink& dx,
                         float* ddepthwise, float* dpointwise) {
  const int64_t wide_out = padded(out), parts = parts_of(g.batch);
  const int64_t size_dw = g.taps() * g.wide(), size_pw = g.wide() * wide_out, size_all = size_dw + size_pw;
  Buffer partial(kWeights ? parts * size_all : 0);
  const auto finish = [&] {
    if (!kWeights) return;
    Buffer total(size_all);
    sum_parts(partial, parts, size_all, total.data());
    drop_lanes(total, g, ddepthwise);
    for (int64_t c = 0; c < g.channels; ++c) {
      std::memcpy(dpointwise + c * out, total.data() + size_dw + c * wide_out, 4 * out);
    }
  };
  if (!has_window(g)) {
    pointwise_backward<kWeights>(pool, g, out, x, prologue, weights, dy, norm, dx, partial);
    finish();
    return ffi::Error::Success();
  }
  Buffer taps(g.taps() * g.wide()), flipped(g.taps() * g.wide()), transposed(out * g.wide());
  lay_out(weights.depthwise, g.taps(), g.channels, false, taps.data());
  lay_out(weights.depthwise, g.taps(), g.channels, true, flipped.data());
  lay_out_matrix(weights.pointwise, g.channels, out, true, transposed.data());
  ffi::Error error = with_loops(g, [&](const Loops& loops) {
    for_parts(pool, parts, [&](int64_t part) {
      const Planes image = g.frame(scratch<kImage>(kWeights ? g.frame_size() : 0));
      const Planes gradient = g.frame(scratch<kGradient>(g.frame_size()));
      const int64_t pixels = g.block() * g.out_width();
      float* slopes = scratch<kSlopes>(pixels * wide_out);
      float* sums_dw = partial.data() + part * size_all;
      if (kWeights) image.clear();
      gradient.clear();
      const Range range = images_of(part, parts, g.batch);
      for (int64_t b = range.first; b < range.last; ++b) {
        const float* input = x + b * g.pixels() * g.channels;
        if (kWeights) fill(image, input, g.height, g.width, g.channels, g.border(), 1, prologue);
        for (int64_t i = 0; i < g.out_height(); i += g.block()) {
          const int64_t count = std::min(g.block(), g.out_height() - i);
          const int64_t at = (b * g.out_pixels() + i * g.out_width()) * out;
          norm_gradient(norm, norm.z + at, dy + at, count * g.out_width(), out, slopes);
          if (kWeights) {
            float* rows = scratch<kRows>(std::max(pixels, g.width) * g.wide());
            for (int64_t r = 0; r < count; ++r) {
              loops.convolve(image, taps.data(), (i + r) * g.s, g.out_width(), rows + r * g.out_width() * g.wide());
            }
            outer(rows, g.wide(), slopes, wide_out, count * g.out_width(), g.wide(), sums_dw + size_dw, wide_out);
          }
          for (int64_t r = 0; r < count; ++r) {
            product(slopes + r * g.out_width() * wide_out, wide_out, transposed.data(), g.wide(), g.out_width(), out,
                    {gradient.at(0, g.border() + (i + r) * g.s, g.border()), g.s * kLanes, gradient.plane(), g.wide()});
          }
        }
        if (kWeights) {
          loops.correlate(image, gradient, g.border(), g.s, g.out_height(), g.out_width(), sums_dw);
        }
        input_gradient(g, loops, gradient, flipped.data(), input, prologue.mean,
                       dx.at(b * g.pixels() * g.channels));
      }
    });
  });
  finish();
  return error;
}

}  // namespace prdarts
